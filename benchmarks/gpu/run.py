"""Everything that is measured on a GPU, in one go of less than eight minutes, with nothing downloaded and no Ray: kernels,
steps of models in the shape of Llama-3.1-8B and OPT-13B with random weights, and conversations, beside transformers' own
continuous batching. One JSON and one plot per section; a section that fails is reported and loses none of the others.

    python benchmarks/gpu/run.py                            all of it, to benchmarks/results/gpu_*.json
    python benchmarks/gpu/run.py --sections roofs attention
    python benchmarks/gpu/run.py --smoke                    does the code run? on a CPU, tiny, Triton interpreted
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import transformers
from setting import Setting, for_gpu, for_smoke

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import RESULTS, write_result

BUDGET_S = 465.0


class Report:
    """What was measured so far, kept in a file per section as soon as it is there."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self._folder = folder
        self._setting = setting
        self.failures: dict[str, str] = {}
        self._start = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start

    def section(self, name: str, measure: Any) -> Any:
        """What `measure` returns; None where it failed, or no time is left."""
        if self.elapsed_s > BUDGET_S and not self._setting.is_smoke:
            self.failures[name] = "no time was left"
            return None
        print(f"== {name} ({self.elapsed_s:.0f} s)", flush=True)
        begin = time.perf_counter()
        try:
            # Weights and activations of a section that failed must not stay with its traceback.
            figures = measure()
        except Exception:
            self.failures[name] = traceback.format_exc()
            print(self.failures[name], flush=True)
            return None
        seconds = time.perf_counter() - begin
        self.write(name, {"section_s": seconds, "figures": figures})
        return figures

    def write(self, name: str, figures: dict[str, Any]) -> None:
        write_result(f"gpu_{name}", figures, self._folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--sections", nargs="+", help="only these; roofs are always measured")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --smoke looks whether the code runs")
    setting = for_smoke() if arguments.smoke else for_gpu()
    if setting.is_smoke:
        torch.set_num_threads(1)
    logging.basicConfig(format="  %(message)s")
    logging.getLogger("engine").setLevel(logging.INFO)  # what was measured at the start, and chosen
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    report = Report(arguments.out, setting)
    with tempfile.TemporaryDirectory() as folder:
        run(setting, report, Path(folder), arguments.sections)
    report.write("failures", {"seconds": report.elapsed_s, "failures": report.failures})
    from plots import plot_all

    report.section("plots", lambda: plot_all(arguments.out))
    print(f"{report.elapsed_s:.0f} s; failed: {', '.join(report.failures) or 'nothing'}")
    sys.exit(bool(report.failures))


def run(setting: Setting, report: Report, folder: Path, only: list[str] | None) -> None:
    """The sections, the most telling first."""
    from conversations import compare, configurations, measure_engine, measure_peer
    from kernels import measure_attention, measure_figure_12, measure_roofs
    from steps import measure_accuracy, measure_model

    def wanted(name: str) -> bool:
        return only is None or name in only

    folders = {}
    for name, shape in setting.models.items():
        folders[name] = shape.save(folder / name.replace(" ", "-"))
    roofs = report.section("roofs", lambda: measure_roofs(setting))
    if roofs is None:
        return
    if wanted("attention"):
        report.section("attention", lambda: measure_attention(setting))
    if wanted("figure_12"):
        report.section("figure_12", lambda: measure_figure_12(setting))
    for number, name in enumerate(setting.models):
        section = ("llama", "opt")[number]
        if wanted(section):
            report.section(section, lambda name=name: measure_model(setting, name, folders[name], roofs))  # type: ignore[misc]
            free()
    first = next(iter(setting.models))
    rows: list[dict[str, Any]] = []
    for name in configurations(setting) if wanted("conversations") else ():
        part = report.section(
            f"conversations_{name.replace(' ', '_')}",
            lambda name=name: measure_engine(setting, folders[first], name),  # type: ignore[misc]
        )
        rows += part or []
        free()
    if wanted("peer"):
        rows += report.section("conversations_transformers", lambda: measure_peer(setting, folders[first])) or []
        free()
    if rows:
        report.section("conversations", lambda: {"rows": rows, "two_tiers_over": compare(rows)})
    if wanted("accuracy"):
        shallow = type(setting.models[first])(
            setting.models[first].family,
            {**setting.models[first].values, "num_hidden_layers": setting.accuracy_layers},
        )
        path = shallow.save(folder / "shallow")
        report.section("accuracy", lambda: measure_accuracy(setting, path))


def free() -> None:
    """A model that a section leaves is gone before the next one comes."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

"""Groups of sections of the benchmark, in this process.

Models in the shape of Llama-3.1-8B and OPT-13B with random weights, nothing downloaded, no Ray. Started by run.py,
which gives each group a process and a time limit; by hand:

    python benchmarks/gpu/sections.py llama --out FOLDER

A section has a file in FOLDER, which is written anew whenever there are more figures: what was measured is kept, whatever
ends the process. Exit codes: 0; 1 = a section failed; 3 = the device is broken.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import environment
import torch
import transformers
from conversations import measure_conversations, measure_peer
from kernels import measure_attention, measure_figure_12, measure_roofs
from machine import write_result
from setting import Setting, Shape, for_gpu, for_smoke
from step_times import measure_step_times
from steps import measure_accuracy, measure_model
from tiles import measure_tiles

from engine.attention.device_health import check_device
from engine.errors import DeviceFailedError

DEVICE_FAILED = 3


class Report:
    """What was measured so far, kept in a file per section."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder = folder
        self._setting = setting
        self.failed: list[str] = []

    def section(self, name: str, results: Iterator[Any]) -> None:
        """Write what `results` gives, all figures so far, whenever it gives more. Raises DeviceFailedError."""
        print(f"== {name}", flush=True)
        begin = time.perf_counter()
        content: dict[str, Any] = {"is_complete": False, "figures": None}
        try:
            for content["figures"] in results:
                self._write(name, content, begin)
            content["is_complete"] = True
        except Exception:
            # As text: the weights of a section that failed must not stay with its traceback.
            content["failure"] = traceback.format_exc()
            print(content["failure"], flush=True)
            self.failed.append(name)
        self._write(name, content, begin)
        check_device(self._setting.device)
        free()

    def read(self, name: str) -> Any:
        """The figures of a section that an earlier process wrote; None if there are none."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text())["figures"] if path.exists() else None

    def _write(self, name: str, content: dict[str, Any], begin: float) -> None:
        write_result(name, {"section_s": time.perf_counter() - begin, **content}, self.folder)


class Group:
    """The groups of sections, by name; see `main`."""

    def __init__(self, setting: Setting, report: Report, folder: Path) -> None:
        self._setting = setting
        self._report = report
        self._folder = folder
        self._llama, self._opt = setting.models.items()

    def llama(self) -> None:
        self._model("llama", self._llama)

    def opt(self) -> None:
        self._model("opt", self._opt)

    def attention(self) -> None:
        self._report.section("attention", measure_attention(self._setting))

    def tiles(self) -> None:
        self._report.section("tiles", measure_tiles(self._setting))

    def figure_12(self) -> None:
        self._report.section("figure_12", measure_figure_12(self._setting))

    def conversations(self) -> None:
        self._report.section("conversations", measure_conversations(self._setting, self._save(self._llama)))

    def peer(self) -> None:
        rows = (self._report.read("conversations") or {"rows": []})["rows"]
        self._report.section("peer", measure_peer(self._setting, self._save(self._llama), rows))

    def accuracy(self) -> None:
        name, shape = self._llama
        shallow = Shape(shape.family, {**shape.values, "num_hidden_layers": self._setting.accuracy_layers})
        self._report.section("accuracy", measure_accuracy(self._setting, self._save((name, shallow))))

    def steps(self) -> None:
        for section, model in (("steps_opt", self._opt), ("steps_llama", self._llama)):
            table = self._report.folder / f"{section}_table.json"
            results = measure_step_times(self._setting, model[0], self._save(model), table)
            self._report.section(section, results)

    def plots(self) -> None:
        from plots import plot_all  # not above: matplotlib takes a second

        self._report.section("plots", iter([plot_all(self._report.folder)]))

    def _model(self, section: str, model: tuple[str, Shape]) -> None:
        self._report.section(section, measure_model(self._setting, model[0], self._save(model), self._roofs()))

    def _roofs(self) -> dict[str, float]:
        if self._report.read("roofs") is None:
            self._report.section("roofs", iter([measure_roofs(self._setting)]))
        roofs: dict[str, float] = self._report.read("roofs")
        return roofs

    def _save(self, model: tuple[str, Shape]) -> str:
        name, shape = model
        return shape.save(self._folder / name.replace(" ", "-"))


def free() -> None:
    """A model that a section leaves is gone before the next one comes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    names = [name for name in vars(Group) if not name.startswith("_")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", choices=names)
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --smoke looks whether the code runs")
    setting = for_smoke() if environment.IS_SMOKE else for_gpu()
    if setting.is_smoke:
        torch.set_num_threads(1)
    logging.basicConfig(format="  %(message)s")
    logging.getLogger("engine").setLevel(logging.INFO)  # what was measured at the start, and chosen
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    report = Report(arguments.out, setting)
    with tempfile.TemporaryDirectory() as folder:
        group = Group(setting, report, Path(folder))
        try:
            for name in arguments.groups:
                run: Callable[[], None] = getattr(group, name)
                run()
        except DeviceFailedError as error:
            print(error.message, flush=True)
            sys.exit(DEVICE_FAILED)
    sys.exit(bool(report.failed))


if __name__ == "__main__":
    main()

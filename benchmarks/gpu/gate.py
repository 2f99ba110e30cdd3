"""Checks in a minute or two whether the GPU path computes what it should.

    python benchmarks/gpu/gate.py             on a GPU
    python benchmarks/gpu/gate.py --smoke     does the code run? on a CPU, with stand-ins for streams and graphs
    python benchmarks/gpu/gate.py --only 'sampling|disk'    the checks in whose names that is found; a regular expression

A line for each check as it ends, and all of them as JSON at the end (and in --out FILE after each). A check that fails shows
its traceback and the others go on, unless the device is broken. Exit codes: 0; 1 = a check failed; 3 = the device is broken.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import environment
import torch
import transformers
from checks import Check, all_checks, selected
from machine import describe_run
from setting import for_gpu, for_smoke

from engine.attention.device_health import check_device
from engine.errors import DeviceFailedError

DEVICE_FAILED = 3


@dataclass(frozen=True, slots=True)
class Result:
    """detail: what the check saw, or its traceback."""

    name: str
    is_ok: bool
    seconds: float
    detail: str


def run_check(name: str, check: Check) -> Result:
    begin = time.perf_counter()
    try:
        detail, is_ok = check(), True
    except Exception:  # as text: what the check holds must not stay with its traceback
        detail, is_ok = traceback.format_exc(), False
    return Result(name, is_ok, time.perf_counter() - begin, detail)


def run_checks(checks: Iterable[tuple[str, Check]], device: torch.device, out: Path | None) -> tuple[list[Result], str]:
    """Return the results, and what broke the device, if anything.

    Prints a line for each check as it ends, and writes all so far to the file `out`.
    """
    results: list[Result] = []
    broken = ""
    for name, check in checks:
        result = run_check(name, check)
        results.append(result)
        print(f"{'ok  ' if result.is_ok else 'FAIL'} {name} ({result.seconds:.1f} s): {result.detail}", flush=True)
        try:
            check_device(device)
        except DeviceFailedError as error:
            broken = error.message
            print(f"FAIL the device: {broken}", flush=True)
        if out is not None:
            report = {"run": describe_run(), "device_failure": broken, "checks": [asdict(result) for result in results]}
            out.write_text(json.dumps(report, indent=2) + "\n")
        if broken:
            break
    return results, broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--only", default="", help="a regular expression: checks in whose names it is found")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds; then all threads are shown, and it ends")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --smoke looks whether the code runs")
    setting = for_smoke() if environment.IS_SMOKE else for_gpu()
    if setting.is_smoke:
        torch.set_num_threads(1)
    faulthandler.dump_traceback_later(arguments.limit, exit=True)
    logging.basicConfig(format="    %(message)s")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        checks = selected(all_checks(setting, Path(folder)), arguments.only)
        results, broken = run_checks(checks, setting.device, arguments.out)
    if not results:
        parser.error(f"no check has a name in which {arguments.only!r} is found")
    failed = [result.name for result in results if not result.is_ok]
    print(json.dumps({result.name: {"ok": result.is_ok, "s": round(result.seconds, 1)} for result in results}))
    seconds = sum(result.seconds for result in results)
    print(f"{len(results)} checks in {seconds:.0f} s; failed: {', '.join(failed) or 'none'}", flush=True)
    faulthandler.cancel_dump_traceback_later()
    sys.exit(DEVICE_FAILED if broken else bool(failed))


if __name__ == "__main__":
    main()

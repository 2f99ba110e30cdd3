"""The benchmark for GPUs is run once, where there is one: so all of its code is run here, tiny, with Triton interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTIONS = {
    "roofs",
    "attention",
    "figure_12",
    "llama",
    "opt",
    "conversations_stateless",
    "conversations_GPU_only",
    "conversations_two_tiers",
    "conversations_transformers",
    "conversations",
    "accuracy",
    "plots",
}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton's interpreter")
def test_every_section_of_the_benchmark_runs(tmp_path):
    process = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu/run.py"), "--smoke", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    failures = json.loads((tmp_path / "gpu_failures.json").read_text())["failures"]
    assert failures == {}
    assert process.returncode == 0, process.stderr[-3000:]
    written = {path.stem.removeprefix("gpu_") for path in tmp_path.glob("*.json")}
    assert written == SECTIONS | {"failures"}
    pictures = {path.stem.removeprefix("gpu_") for path in tmp_path.glob("*.png")}
    assert pictures == {"attention", "figure_12", "llama", "opt", "conversations"}
    conversations = json.loads((tmp_path / "gpu_conversations.json").read_text())["figures"]
    assert set(conversations["two_tiers_over"]) == {"stateless", "GPU only", "transformers"}
    llama = json.loads((tmp_path / "gpu_llama.json").read_text())["figures"]
    assert {(row["by"], row["way"]) for row in llama["swaps"]} == {
        (by, way) for by in ("dma", "kernel") for way in ("in", "out", "both")
    }


def test_the_kernels_tests_are_found_without_pytest_asyncio():
    """A machine with a GPU may have no more than pytest itself."""
    command = [sys.executable, "-m", "pytest", "-p", "no:asyncio", "--collect-only", "-q", "-m", "gpu"]
    process = subprocess.run(
        [*command, "tests/engine/attention/test_triton.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]

"""What the scripts run_*.py have in common: their options, and how they report. Standard library only.

A runner prints JSON lines: {"turn": n} after each turn, {"result": {...}} at the end. Other lines are libraries' chatter.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import signal
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workload import Generate, Workload, run_workload

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Options:
    """What each system gets.

    first_tier_tokens: KV cache in tokens, before rounding to blocks.
    second_tier_tokens: of the second tier, if a system has one.
    bytes_per_token: of KV in `dtype`, for systems that count in bytes.
    """

    workload: Workload
    model: Path
    dtype: str
    num_threads: int
    max_num_batched_tokens: int
    first_tier_tokens: int
    second_tier_tokens: int

    @property
    def bytes_per_token(self) -> int:
        config = json.loads((self.model / "config.json").read_text())
        size = 4 if self.dtype == "float32" else 2
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * (hidden // heads) * size

    def num_blocks(self, block_size: int) -> int:
        """First tier in blocks of that many tokens, rounded up."""
        return -(-self.first_tier_tokens // block_size)


def build_parser(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("workload", help="JSON with the fields of Workload, or a file with it")
    parser.add_argument("model", type=Path, help="folder of the model, in this system's format")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--first-tier-tokens", type=int, help="default: everything fits")
    parser.add_argument("--second-tier-tokens", type=int, default=0)
    return parser


def read_options(arguments: argparse.Namespace) -> Options:
    text = arguments.workload if arguments.workload.startswith("{") else Path(arguments.workload).read_text()
    workload = Workload(**json.loads(text))
    # Half as much again: watermarks and reserves of no system are to be felt where everything fits.
    roomy = (workload.working_set + workload.num_active * workload.max_context_len) * 3 // 2
    return Options(
        workload,
        arguments.model,
        arguments.dtype,
        arguments.num_threads,
        arguments.max_num_batched_tokens,
        arguments.first_tier_tokens or roomy,
        arguments.second_tier_tokens,
    )


def run(
    options: Options,
    serving: AbstractAsyncContextManager[Generate],
    *,
    packages: tuple[str, ...],
    details: dict[str, Any],
) -> None:
    """Start the system, measure the workload, stop it, print the result.

    `details`: what `serving` puts there meanwhile.
    """

    async def measure() -> dict[str, Any]:
        num_turns = 0

        def report_turn() -> None:
            nonlocal num_turns
            num_turns += 1
            print(json.dumps({"turn": num_turns}), flush=True)

        # The server that a runner started ends with it.
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        async with serving as generate:
            return await run_workload(options.workload, generate, report_turn)

    result = asyncio.run(measure())
    result["details"] = details
    result["versions"] = {package: importlib.metadata.version(package) for package in packages}
    print(json.dumps({"result": result}), flush=True)

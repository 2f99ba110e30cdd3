"""This engine and other ones on the same conversations, side by side in one run.

Output tokens/s, time to first token and time per token by turn, and whether the answers are the same.

    benchmarks/peers/setup.sh                       once; needs a compiler and about 4 GB
    python benchmarks/peer_comparison.py
    python benchmarks/peer_comparison.py --systems pensieve openvino --dtype bfloat16 --workloads plain --repeats 5
    python benchmarks/peer_comparison.py --dtype bfloat16 --weights int4 --model smollm2 --stop-after 150

Each system runs in a process of its own, never two at once, in turns over the repeats; the figures are medians of those.
What is not set up is left out. A run that was interrupted, or stopped by --stop-after, goes on when the same command is
given again. Writes benchmarks/results/engine_DTYPE.json and .png, or engine_DTYPE_WEIGHTS, with _smollm2. (The script
cannot be called engine.py: beside the other benchmarks it would hide the package of that name from them.)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from machine import RESULTS, describe_run, write_result
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent / "peers"))  # the runners import each other as scripts
import conversion
import model as peer_model
import systems as peer_systems
from journal import Journal
from systems import System
from workload import Workload

PEERS = Path(__file__).parent / "peers"

WORKLOADS = {
    # Every session active, everything fits.
    "plain": Workload("plain", num_sessions=8, num_active=8),
    # Sessions take turns, so that others run between two turns of one; everything fits.
    "relaxed": Workload("relaxed", num_sessions=16, num_active=4),
    # The same with a first tier for half of it; the rest fits the second tier, where a system has one.
    "pressure": Workload("pressure", num_sessions=16, num_active=4),
    # To see that all runs.
    "tiny": Workload("tiny", num_sessions=2, num_active=2, num_turns=2),
    "tiny_pressure": Workload("tiny_pressure", num_sessions=6, num_active=2, num_turns=3, prompt_len=96, output_len=16),
}


def run_system(system: System, workload: Workload, arguments: argparse.Namespace, progress: tqdm) -> dict[str, Any]:
    """One run in a process of its own. Raises RuntimeError with the end of its log where it fails."""
    command = [str(system.python), str(PEERS / system.script), json.dumps(asdict(workload)), str(system.model)]
    command += [*system.arguments, "--dtype", arguments.dtype, "--num-threads", str(arguments.num_threads)]
    command += ["--max-num-batched-tokens", str(arguments.max_num_batched_tokens)]
    if workload.name.endswith("pressure"):
        half = workload.working_set // 2
        command += ["--first-tier-tokens", str(half), "--second-tier-tokens", str(workload.working_set - half)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.num_threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert process.stdout is not None
        result = None
        for line in process.stdout:
            if line.startswith('{"turn"'):
                progress.update()
            elif line.startswith('{"result"'):
                result = json.loads(line)["result"]
        # A library that fails at its exit has measured all the same.
        if process.wait() != 0 and result is None:
            log.seek(0)
            raise RuntimeError(f"{system.name} ended with code {process.returncode}:\n{log.read()[-3000:]}")
    if result is None:
        raise RuntimeError(f"{system.name} printed no result")
    return result


def summarise(runs: list[dict[str, Any]], num_turns: int) -> dict[str, Any]:
    """Medians over the runs; by turn, of the mean over the sessions."""

    def by_turn(key: str) -> list[float]:
        means = [
            [statistics.mean(t[key] for t in run["turns"] if t["turn"] == turn) for turn in range(num_turns)]
            for run in runs
        ]
        return [1e3 * statistics.median(values) for values in zip(*means, strict=True)]

    rates = [run["output_tokens_per_s"] for run in runs]
    return {
        "output_tokens_per_s": statistics.median(rates),
        "output_tokens_per_s_of_runs": rates,
        "seconds": statistics.median(run["seconds"] for run in runs),
        "num_prompt_tokens": runs[0]["num_prompt_tokens"],
        "ttft_ms": by_turn("ttft_s"),
        "ms_per_token": by_turn("s_per_token"),
        "versions": runs[0]["versions"],
        "details": runs[0]["details"],
    }


def compare_answers(runs: list[dict[str, Any]], reference: dict[str, Any]) -> dict[str, float]:
    """Return the shares of equal answers, and of tokens before the first difference of their session.

    After a difference the histories differ, and so do all later answers.
    """
    expected = {(turn["session"], turn["turn"]): turn["token_ids"] for turn in reference["turns"]}
    num_answers = num_tokens = num_equal_answers = num_equal_tokens = 0
    for run in runs:
        diverged = set()
        for turn in run["turns"]:  # in the order of sessions, then turns
            token_ids, session = turn["token_ids"], turn["session"]
            same = expected[session, turn["turn"]]
            num_answers += 1
            num_tokens += len(token_ids)
            num_equal_answers += token_ids == same
            if session not in diverged:
                num_equal_tokens += next(
                    (i for i, (a, b) in enumerate(zip(token_ids, same, strict=True)) if a != b), len(token_ids)
                )
                if token_ids != same:
                    diverged.add(session)
    return {"equal_answers": num_equal_answers / num_answers, "equal_tokens": num_equal_tokens / num_tokens}


class OutOfTime(Exception):
    """No further run may start; the next call goes on."""


def measure(
    workload: Workload, systems: list[System], arguments: argparse.Namespace, journal: Journal, deadline: float
) -> list[dict[str, Any]]:
    """A row per system, in their order; a system that fails is reported and left out from then on.

    journal: has the runs that are over.
    deadline: by time.monotonic; raises OutOfTime if a run is left then.
    """
    runs: dict[str, list[dict[str, Any]]] = {system.name: [] for system in systems}
    failed: set[str] = set()
    num_turns = workload.num_sessions * workload.num_turns
    with tqdm(total=len(systems) * arguments.repeats * num_turns, unit="turn") as progress:
        for number in range(arguments.repeats):
            for system in systems:
                if system.name in failed:
                    continue
                result = journal.find(workload.name, number, system.name)
                if result is not None:
                    progress.update(num_turns)
                else:
                    if time.monotonic() > deadline:
                        raise OutOfTime
                    progress.set_description(f"{workload.name}: {system.name}")
                    try:
                        result = run_system(system, workload, arguments, progress)
                    except RuntimeError as error:
                        failed.add(system.name)
                        progress.write(f"left out: {error}")
                        continue
                    journal.add(workload.name, number, system.name, result)
                runs[system.name].append(result)
    measured = [system.name for system in systems if system.name not in failed]
    rows = []
    for name in measured:
        first = runs[measured[0]][0]
        rows.append({"system": name, **summarise(runs[name], workload.num_turns), **compare_answers(runs[name], first)})
    return rows


def format_rows(workload: Workload, rows: list[dict[str, Any]]) -> str:
    """Figures of each system and, in brackets, their ratio to the first one's."""
    base = rows[0]

    def line(title: str, row: dict[str, Any], key: str) -> str:
        cells = [f"{a:7.1f} ({a / b:4.2f}x)" for a, b in zip(row[key], base[key], strict=True)]
        return f"{row['system']:<14}{title:<8}" + " ".join(cells)

    lines = [
        f"{workload.name}: {workload.num_sessions} sessions, {workload.num_active} active, {workload.num_turns} turns of "
        f"{workload.prompt_len} new and {workload.output_len} generated tokens; ratios to {base['system']}"
    ]
    lines.append(f"{'':<14}{'output tok/s':>20} {'equal answers':>14} {'equal tokens':>13}")
    for row in rows:
        rate = row["output_tokens_per_s"]
        lines.append(
            f"{row['system']:<14}{rate:>12.1f} ({rate / base['output_tokens_per_s']:4.2f}x) {row['equal_answers']:>14.1%} "
            f"{row['equal_tokens']:>13.1%}"
        )
    lines.append(f"{'':<14}{'ms':<8}" + " ".join(f"{f'turn {turn + 1}':^15}" for turn in range(workload.num_turns)))
    lines += [line("TTFT", row, "ttft_ms") for row in rows]
    lines += [line("a token", row, "ms_per_token") for row in rows]
    return "\n".join(lines)


def plot(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 3.6 * len(tables)), layout="constrained")
    for (name, rows), (left, right) in zip(tables.items(), figure.subplots(len(tables), 2, squeeze=False), strict=True):
        for i, row in enumerate(rows):
            turns = range(1, len(row["ttft_ms"]) + 1)
            left.plot(turns, row["ttft_ms"], "o-", color=f"C{i}", label=row["system"])
            right.barh(row["system"], row["output_tokens_per_s"], color=f"C{i}")
        left.set(xlabel="turn", ylabel="ms", title=f"{name}: time to first token", ylim=(0, None), xticks=turns)
        left.grid(alpha=0.3)
        left.legend()
        right.set(xlabel="output tokens/s", title=f"{name}: throughput")
        right.invert_yaxis()
    figure.savefig(path, dpi=120)


def format_summary(tables: dict[str, list[dict[str, Any]]]) -> str:
    """The rows of a Markdown table: for each workload, output tokens/s and time to first token of the last turn."""
    by_system: dict[str, list[str]] = {}
    for rows in tables.values():
        for row in rows:
            cells = [f"{row['output_tokens_per_s']:.0f}", f"{row['ttft_ms'][-1] / 1e3:.2f} s"]
            by_system.setdefault(row["system"], []).extend(cells)
    return "\n".join(f"| {' | '.join([system, *cells])} |" for system, cells in by_system.items())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = peer_systems.NAMES
    parser.add_argument("--systems", nargs="+", choices=names, default=names, help="the first is what others relate to")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["plain", "pressure"])
    parser.add_argument("--model", choices=peer_model.VOCAB_SIZES, default="random")
    parser.add_argument("--dtype", choices=peer_model.DTYPES, default="float32")
    parser.add_argument("--weights", choices=conversion.WEIGHTS, default="same", help="same: in DTYPE, as all the rest")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--venvs", type=Path, default=PEERS / ".venvs", help="the folder given to setup.sh")
    parser.add_argument("--models", type=Path, default=PEERS / ".models", help="where the models are kept")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds after which no run starts")
    parser.add_argument("--prepare", action="store_true", help="make the models, and measure nothing")
    parser.add_argument("--name", help="of the result files; default: engine_DTYPE, and what differs from the defaults")
    return parser.parse_args()


def choose_systems(arguments: argparse.Namespace) -> tuple[list[System], list[str]]:
    """Those that can run, with their models, and the names of the others."""
    known = peer_systems.build_systems(
        arguments.model, arguments.dtype, arguments.weights, arguments.venvs.absolute(), arguments.models.absolute()
    )
    chosen, left_out = [], []
    for name in arguments.systems:
        if name not in known:
            print(f"left out: {name} has no {arguments.weights} weights")
            left_out.append(name)
        elif missing := [str(path) for path in known[name].needs if not path.exists()]:
            print(f"left out: {name} is not set up, {', '.join(missing)} missing; run benchmarks/peers/setup.sh")
            left_out.append(name)
        else:
            chosen.append(known[name])
    peer_systems.make_models([known["pensieve"], *chosen])  # all are made from that one's
    return chosen, left_out


def main() -> None:
    arguments = parse_arguments()
    deadline = time.monotonic() + arguments.stop_after
    systems, left_out = choose_systems(arguments)
    if arguments.prepare:
        return
    named = ("engine", arguments.dtype, arguments.weights, arguments.model)
    result_name = arguments.name or "_".join(part for part in named if part not in ("same", "random"))
    settings = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "weights": arguments.weights,
        "repeats": arguments.repeats,
        "num_threads": arguments.num_threads,
        "max_num_batched_tokens": arguments.max_num_batched_tokens,
        "left_out": left_out,
    }
    journal = Journal(PEERS / ".runs" / f"{result_name}.jsonl", {"commit": describe_run()["commit"], **settings})
    workloads = {
        name: replace(WORKLOADS[name], vocab_size=peer_model.VOCAB_SIZES[arguments.model])
        for name in arguments.workloads
    }
    tables = {}
    try:
        for name, workload in workloads.items():
            if rows := measure(workload, systems, arguments, journal, deadline):
                tables[name] = rows
                print(f"\n{format_rows(workload, rows)}\n")
    except OutOfTime:
        sys.exit("runs are left: give the same command again")
    print(format_summary(tables))
    measured = {name: {**asdict(workloads[name]), "rows": rows} for name, rows in tables.items()}
    write_result(result_name, {**settings, "workloads": measured})
    if tables:
        plot(tables, RESULTS / f"{result_name}.png")


if __name__ == "__main__":
    main()

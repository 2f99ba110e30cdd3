"""`pensieve bench`: its options, and what they make of them.

Imported by every command for its options: what is slow to import is imported when it is run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.bench.client import Endpoint
    from engine.bench.figures import Limits
    from engine.bench.plan import Cell
    from engine.bench.runner import BenchPlan
    from engine.bench.turns import TurnRecord
    from engine.workloads.session import Session

DESCRIPTION = "Put a load of conversations on servers with OpenAI's API, and report their latencies and throughput"
API_KEY_VARIABLE = "PENSIEVE_API_KEY"
APIS = ("chat", "completions", "responses", "responses-stored")
LIMITS = ("ttft", "s_per_token", "normalised", "latency")
# Options that go to the workload as they are.
_WORKLOAD_OPTIONS = (
    *("num_sessions", "max_context_len", "max_turns", "max_output_tokens", "turns", "new_tokens", "output_tokens"),
    *("think_s", "tool_s", "prefix_tokens", "num_tenants", "tenant_skew", "seed", "block_tokens"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pensieve bench [NAME=]URL [[NAME=]URL ...] [option ...]"
    parser.add_argument(
        "urls",
        nargs="*",
        metavar="[NAME=]URL",
        help="Servers, such as http://127.0.0.1:8000; they take turns at each load",
    )
    group = parser.add_argument_group("server options")
    group.add_argument(
        "--api", choices=APIS, default="chat", help="What is sent (default: chat); completions sends token ids"
    )
    group.add_argument(
        "--model", metavar="NAME", help="Model of the requests (default: the first one that the server lists)"
    )
    group.add_argument(
        "--api-key", metavar="KEY", help=f"Key for the servers; better set {API_KEY_VARIABLE} in the environment"
    )
    group.add_argument("--body", metavar="JSON", help="Further fields of each request, such as '{\"top_k\": 1}'")
    group.add_argument("--timeout-s", type=float, default=600.0, metavar="S", help="Of one answer (default: 600)")
    group.add_argument(
        "--token-ids",
        default="100:1000",
        metavar="FIRST:END",
        help="Ids that completions draws from (default: 100:1000)",
    )
    _add_workload_options(parser.add_argument_group("workload options"))
    _add_load_options(parser.add_argument_group("load options"))
    group = parser.add_argument_group("report options")
    group.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=S",
        help=f"What a good turn keeps, in seconds: {', '.join(LIMITS)}; may be given several times",
    )
    group.add_argument("--output", type=Path, metavar="FOLDER", help="Where the files go (default: bench-DATE-TIME)")
    group.add_argument(
        "--max-lag", type=float, metavar="S", help="How late the client may be (default: 25 ms, or ttft / 10)"
    )
    group.add_argument(
        "--write-workload",
        metavar="FORMAT:FILE",
        help="Write the sessions as jsonl, vllm, aiperf or mooncake, and without a URL do no more",
    )


def _add_workload_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--workload",
        default="synthetic",
        metavar="NAME",
        help="synthetic, sharegpt-like, ultrachat-like, or FORMAT:FILE with a format of mooncake, tau-bench, oasst, sharegpt,"
        " vllm, aiperf, jsonl (default: synthetic)",
    )
    group.add_argument("--num-sessions", type=int, metavar="N", help="At most so many (default: 100)")
    group.add_argument("--max-context-len", type=int, metavar="N", help="Sessions end before they pass so many tokens")
    group.add_argument("--max-turns", type=int, metavar="N", help="Of a session")
    group.add_argument("--max-output-tokens", type=int, metavar="N", help="Of an answer")
    distribution = "a number, or NAME:PARAMETER=X,... of constant, uniform, exponential, lognormal, geometric, pareto"
    for name, text in (
        ("turns", f"Turns of a drawn session: {distribution}"),
        ("new-tokens", "Tokens that a user's turn adds"),
        ("output-tokens", "Tokens of an answer"),
        ("think-s", "Pause before a user's turn"),
        ("tool-s", "Pause before a tool's result"),
        ("prefix-tokens", "Of the system prompt that sessions share"),
    ):
        group.add_argument(f"--{name}", metavar="DISTRIBUTION", help=text)
    group.add_argument(
        "--tool-share", type=float, metavar="X", help="Of the drawn turns after the first, that are results of tools"
    )
    group.add_argument("--tool-tokens", metavar="DISTRIBUTION", help="Of a tool's result (default: 200)")
    group.add_argument(
        "--num-tenants", type=int, metavar="N", help="Groups of sessions with a system prompt of their own"
    )
    group.add_argument("--tenant-skew", type=float, metavar="X", help="0: groups of equal size; 1: as 1, 1/2, 1/3, ...")
    group.add_argument("--block-tokens", type=int, metavar="N", help="Of a Mooncake trace's blocks (default: 512)")
    group.add_argument("--each-request-alone", action="store_true", help="Guess no sessions in a Mooncake trace")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="Of lengths, pauses and arrivals (default: 0)")
    group.add_argument(
        "--same-words",
        action="store_true",
        help="The same words in all runs, which then find each other's in the server's cache",
    )


def _add_load_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--rate", metavar="X,...", help="Turns per second offered, sessions starting at random")
    group.add_argument("--concurrency", metavar="N,...", help="Sessions at once (default: 4)")
    group.add_argument(
        "--arrivals",
        metavar="NAME",
        help="closed:N, poisson:RATE, ramp:FROM:TO:S[:TO:S...] (of sessions per second), trace or trace:FACTOR",
    )
    group.add_argument("--repeats", type=int, default=1, metavar="N", help="Of the whole sweep (default: 1)")
    group.add_argument(
        "--max-s", type=float, default=600.0, metavar="S", help="No turn is sent after so long in a run (default: 600)"
    )
    group.add_argument(
        "--warm-up-s", type=float, default=0.0, metavar="S", help="Turns due before are not measured (default: 0)"
    )
    group.add_argument(
        "--processes", type=int, metavar="N", help="Of the client (default: by the load, at most one a core)"
    )


def run(arguments: argparse.Namespace) -> int:
    """0 = measured, 1 = a run has no figures, 130 = interrupted. Raises PensieveError."""
    sessions = _load_sessions(arguments)
    if arguments.write_workload is not None:
        _write_sessions(arguments.write_workload, sessions)
        if not arguments.urls:
            return 0
    if not arguments.urls:
        raise ConfigError("name at least one server, such as http://127.0.0.1:8000", param="urls")
    folder = arguments.output or Path(time.strftime("bench-%Y%m%d-%H%M%S"))
    can_plot = importlib.util.find_spec("matplotlib") is not None
    plan = _make_plan(arguments, sessions)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output {folder}: {error.strerror}; name a folder that can be made", param="output"
        ) from error
    plan, notes = _probe(plan)
    return _run(plan, notes, arguments, folder, can_plot=can_plot)


def _run(
    plan: BenchPlan, notes: dict[str, Sequence[str]], arguments: argparse.Namespace, folder: Path, *, can_plot: bool
) -> int:
    from engine.bench.files import format_table, write_files
    from engine.bench.runner import run_plan
    from engine.bench.summary import summarise, turn_rows

    about = {
        "command": shlex.join(["pensieve", "bench", *_without_key(sys.argv[2:])]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "source": arguments.workload,
    }
    with _progress(plan) as (begin, advance), _stopped_like_ctrl_c():
        results = run_plan(plan, begin, advance)
    summary = summarise(plan, results, notes, about)
    turns = turn_rows(plan, results)
    written = write_files(folder, summary, turns, plots=can_plot)
    print(format_table(summary))
    for row in summary["rows"]:
        for text in row["refusals"]:
            print(f"no figures of {row['endpoint']}, {row['level']}: {text}")
        for error, count in row["errors"].items():
            print(f"{row['endpoint']}, {row['level']}: {count} times: {error}")
    if not can_plot:
        print("no plots: pip install 'pensieve-ray[plot]'")
    print(f"written: {', '.join(map(str, written))}")
    if summary["is_interrupted"]:
        return 130
    return 1 if any(not cell["figures"].get("turns") for cell in summary["cells"]) else 0


def _load_sessions(arguments: argparse.Namespace) -> list[Session]:
    from engine.workloads.sources import load_workload, parse_options

    options = {name: getattr(arguments, name) for name in _WORKLOAD_OPTIONS}
    if arguments.each_request_alone:
        options["guess_sessions"] = False
    if arguments.tool_share:
        options["tools"] = [
            {
                "name": "tool",
                "share": arguments.tool_share,
                "pause_s": arguments.tool_s or 1.0,
                "result_tokens": arguments.tool_tokens or 200,
            }
        ]
    return load_workload(arguments.workload, parse_options(options))


def _write_sessions(target: str, sessions: Sequence[Session]) -> None:
    from engine.workloads.sources import write_workload

    form, _, path = target.partition(":")
    if not path:
        raise ConfigError(
            f"--write-workload {target}: write FORMAT:FILE, such as vllm:sessions.json", param="write_workload"
        )
    write_workload(sessions, form, Path(path))
    print(f"written: {path} ({len(sessions)} sessions)")


def _make_plan(arguments: argparse.Namespace, sessions: Sequence[Session]) -> BenchPlan:
    from engine.bench.plan import MAX_REPEATS, levels_of
    from engine.bench.runner import BenchPlan

    if not 1 <= arguments.repeats <= MAX_REPEATS:
        raise ConfigError(f"--repeats must be from 1 to {MAX_REPEATS}", param="repeats")
    for name in ("max_s", "timeout_s"):
        if not getattr(arguments, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0", param=name)
    if arguments.processes is not None and not 1 <= arguments.processes <= 256:
        raise ConfigError("--processes must be from 1 to 256", param="processes")
    rates = _numbers(arguments.rate, float, "rate")
    concurrencies = _numbers(arguments.concurrency, int, "concurrency")
    return BenchPlan(
        _endpoints(arguments),
        tuple(levels_of(rates, concurrencies, arguments.arrivals, sessions)),
        sessions,
        arguments.repeats,
        _limits(arguments.limit),
        arguments.processes,
        arguments.max_lag,
        arguments.max_s,
        arguments.warm_up_s,
        arguments.seed,
        not arguments.same_words,
        _token_ids(arguments.token_ids),
    )


def _endpoints(arguments: argparse.Namespace) -> tuple[Endpoint, ...]:
    from engine.bench.client import Endpoint

    try:
        fields = json.loads(arguments.body) if arguments.body else {}
        if not isinstance(fields, dict):
            raise ValueError("it must be an object")
    except ValueError as error:
        raise ConfigError(f"--body is not JSON: {error}; write it as '{{\"top_k\": 1}}'", param="body") from error
    endpoints: dict[str, Endpoint] = {}
    for text in arguments.urls:
        name, is_named, url = text.partition("=")
        if not is_named or "/" in name:
            name, url = text.partition("//")[2].rstrip("/"), text
        base = url.rstrip("/").removesuffix("/v1")
        if not base.startswith(("http://", "https://")):
            raise ConfigError(f"{text} is not a URL; give one such as http://127.0.0.1:8000", param="urls")
        if name in endpoints:
            raise ConfigError(f"two servers are called {name}; name them, as in old={url}", param="urls")
        key = arguments.api_key or os.environ.get(API_KEY_VARIABLE, "")
        endpoints[name] = Endpoint(
            name, f"{base}/v1", arguments.api, arguments.model or "", key, fields, arguments.timeout_s
        )
    return tuple(endpoints.values())


def _probe(plan: BenchPlan) -> tuple[BenchPlan, dict[str, Sequence[str]]]:
    """The plan with what its servers take, and notes on each of them. Raises ConfigError."""
    import asyncio
    from dataclasses import replace

    from engine.bench.apis import Content
    from engine.bench.probe import probe

    async def all_of_them() -> list[Any]:
        return [await probe(endpoint, Content(0, "", *plan.token_ids)) for endpoint in plan.endpoints]

    probed = asyncio.run(all_of_them())
    for each in probed:
        for note in each.notes:
            print(f"{each.endpoint.name} {note}", file=sys.stderr)
    return replace(plan, endpoints=tuple(each.endpoint for each in probed)), {
        each.endpoint.name: each.notes for each in probed
    }


def _limits(texts: Sequence[str]) -> Limits:
    from engine.bench.figures import Limits

    limits: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            limits[LIMITS[LIMITS.index(name)]] = float(value)
        except ValueError:
            raise ConfigError(
                f"--limit {text}: write NAME=SECONDS with a name of {', '.join(LIMITS)}", param="limit"
            ) from None
    return Limits(**limits)


def _token_ids(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end) < 2**31):
        raise ConfigError(f"--token-ids {text}: write FIRST:END, such as 100:1000", param="token_ids")
    return int(first), int(end)


def _numbers(text: str | None, kind: Callable[[str], Any], name: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(
            f"--{name} {text}: write numbers with commas between them, such as 1,2,4", param=name
        ) from None


def _without_key(words: Sequence[str]) -> list[str]:
    """The command line, without a key that others would read in the report."""
    shown = list(words)
    for number, word in enumerate(words):
        if word.startswith("--api-key="):
            shown[number] = "--api-key=..."
        elif number and words[number - 1] == "--api-key":
            shown[number] = "..."
    return shown


@contextlib.contextmanager
def _stopped_like_ctrl_c() -> Iterator[None]:
    """SIGTERM, which `timeout` and container runtimes send, ends a run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _progress(
    plan: BenchPlan,
) -> Iterator[tuple[Callable[[Cell, int], None], Callable[[Sequence[TurnRecord]], None]]]:
    """Bars at a terminal: one for each run. Elsewhere a line for each."""
    from tqdm import tqdm

    bars: list[tqdm[Any]] = []
    num_cells = len(plan.endpoints) * len(plan.levels) * plan.num_repeats

    def begin(cell: Cell, num_turns: int) -> None:
        close()
        number = len(bars) + 1
        name = f"[{number}/{num_cells}] {plan.endpoints[cell.endpoint].name}, {plan.levels[cell.level].label}"
        if not sys.stderr.isatty():
            print(f"{name}: {num_turns} turns", file=sys.stderr)
        bars.append(tqdm(total=num_turns, desc=name, unit="turn", disable=not sys.stderr.isatty()))

    def advance(records: Sequence[TurnRecord]) -> None:
        bars[-1].update(len(records))

    def close() -> None:
        if bars:
            bars[-1].close()

    try:
        yield begin, advance
    finally:
        close()

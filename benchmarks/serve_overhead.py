"""What Ray Serve costs: `pensieve bench` over HTTP beside the same load on the same engine in this process.

Time to first token, time per later token and tokens/s, by the number of streams at once.

    python benchmarks/serve_overhead.py
    python benchmarks/serve_overhead.py --fast-path    # also with HAProxy and Serve's throughput switches (needs haproxy)
    python benchmarks/serve_overhead.py --model 102m --streams 64 --repeats 1

Both sides run the same model, float32, one thread, in turns, the order changed each time. Load, client and figures are those
of `pensieve bench`, which cannot drive an engine without a server. All processes share the machine: with few cores, client,
proxy and ingress take from the engine what they need. The embedded model makes a token of each of 64 streams in a few
milliseconds, as fast as no model that is of use: its time to first token shows what the path adds, its tokens/s only what the
cores have left. `--model 102m` is the random Llama of benchmarks/peers, whose steps take as long as those of a real one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from machine import RESULTS, write_result
from peers.model import save_model
from serve_app import KEY, serve_app
from tqdm import tqdm

from deployments.run import DEFAULTS, FAST_PATH
from engine.async_engine import AsyncEngine
from engine.bench.apis import Content, Conversation, Heard, Json
from engine.bench.client import Answered, Client, Endpoint
from engine.bench.driver import Driver, Load
from engine.bench.figures import Limits, figures_of, intervals_of
from engine.bench.probe import probe
from engine.bench.turns import TurnRecord
from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.generation import Generation
from engine.text.prompt import TokenPrompt
from engine.workloads.session import Session, Span, Turn

ENGINE = {"served_model_name": "it", "dtype": "float32", "num_threads": 1, "num_gpu_blocks": 512, "max_num_seqs": 64}
NUM_PROMPT_TOKENS = 4
MIN_STREAMS = 100  # in each run
FIGURES = ("ttft_p50", "ttft_p90", "s_per_token_p50", "output_tokens_per_s")


class EngineClient:
    """The engine of this process in the place of a server, for a Driver."""

    api = "completions"

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def request(self, asked: Json, output_tokens: int, session_id: str) -> Generation:
        sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        return Generation(session_id, session_id, TokenPrompt(tuple(asked["prompt"])), sampling)

    async def ask(self, generation: Generation, conversation: Conversation) -> Answered:
        answered = Answered(time.perf_counter(), 0.0, Heard())
        async for delta in self._engine.generate(generation):
            answered.end_s = time.perf_counter()
            answered.first_s = answered.first_s or answered.end_s
            answered.num_pieces += 1
            answered.heard.usage = {"completion_tokens": delta.num_output_tokens}
        return answered


async def run_streams(
    client: Client | EngineClient, num_streams: int, num_tokens: int, run_id: int
) -> dict[str, float]:
    """The figures of a closed loop of so many streams at once. run_id: names sessions and words that no other run has."""
    num_sessions = num_streams * -(-MIN_STREAMS // num_streams)
    turns = [Turn((Span(number, NUM_PROMPT_TOKENS),), num_tokens) for number in range(num_sessions)]
    sessions = [Session(str(number), (turn,)) for number, turn in enumerate(turns)]
    records: list[TurnRecord] = []
    load = Load(f"run-{run_id}", Content(run_id), num_streams)
    await Driver(client, load, time.perf_counter(), records.append).run(sessions, itertools.count().__next__)
    figures = figures_of(records, Limits())
    wrong = {record.error or f"{record.num_output_tokens} tokens" for record in records} - {f"{num_tokens} tokens"}
    if wrong or figures["turns"] != num_sessions:
        raise SystemExit(f"not all streams had {num_tokens} tokens: {', '.join(wrong)}")
    return figures


async def measure(engine_options: dict[str, Any], url: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of streams: the engine alone, and over HTTP."""
    engine = AsyncEngine(EngineConfig.from_options(engine_options))
    server = await probe(Endpoint("http", f"{url}/v1", "completions", api_key=KEY))
    sides = {"alone": EngineClient(engine), "http": Client(server.endpoint)}
    run_ids = itertools.count()
    rows = []
    for num_streams in options.streams:
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for repeat in tqdm(range(-1, options.repeats), desc=f"{num_streams} streams"):  # the first one warms up
            for side in list(sides)[:: 1 if repeat % 2 else -1]:
                figures = await run_streams(sides[side], num_streams, options.num_tokens, next(run_ids))
                if repeat >= 0:
                    runs[side].append(figures)
        row: dict[str, Any] = {"num_streams": num_streams}
        for side, repeats in runs.items():
            intervals = intervals_of(repeats)
            row[side] = {name: asdict(intervals[name]) for name in FIGURES}
        rows.append(row)
    await sides["http"].close()
    await engine.shutdown()
    return rows


def print_row(path: str, row: dict[str, Any]) -> None:
    http, alone = ({name: figure["mean"] for name, figure in row[side].items()} for side in ("http", "alone"))
    first, added = 1e3 * http["ttft_p50"], 1e3 * (http["ttft_p50"] - alone["ttft_p50"])
    gap, added_gap = 1e3 * http["s_per_token_p50"], 1e3 * (http["s_per_token_p50"] - alone["s_per_token_p50"])
    rate, own_rate = http["output_tokens_per_s"], alone["output_tokens_per_s"]
    print(
        f"{path:10} {row['num_streams']:3} streams: first token {first:.1f} ms (+{added:.1f}; p90 "
        f"{1e3 * http['ttft_p90']:.1f}), {gap:.2f} ms a token (+{added_gap:.2f}), {rate:.0f} of {own_rate:.0f} tokens/s "
        f"({rate / own_rate:.0%})"
    )


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    streams = [row["num_streams"] for row in next(iter(results.values()))]
    lines = {"engine alone": [row["alone"] for row in next(iter(results.values()))]}
    lines |= {f"over HTTP, {name}": [row["http"] for row in rows] for name, rows in results.items()}
    for name, points in lines.items():
        left.plot(streams, [1e3 * point["ttft_p50"]["mean"] for point in points], marker="o", label=name)
        right.plot(streams, [point["output_tokens_per_s"]["mean"] for point in points], marker="o", label=name)
    for axes, label in ((left, "time to first token, p50 (ms)"), (right, "tokens/s, all streams")):
        axes.set(xscale="log", xlabel="streams at once", ylabel=label)
        axes.set_xticks(streams, [str(number) for number in streams])
        axes.legend()
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", choices=("embedded", "102m"), default="embedded")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fast-path", action="store_true")
    options = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        model = options.model
        if model != "embedded":
            model = stack.enter_context(tempfile.TemporaryDirectory())
            save_model(Path(model), ENGINE["dtype"])
        engine = ENGINE | {"model": model}
        for path in ("default", "fast path") if options.fast_path else ("default",):
            with serve_app(engine, fast_path=path != "default") as url:
                results[path] = asyncio.run(measure(engine, url, options))
    for path, rows in results.items():
        for row in rows:
            print_row(path, row)
    settings = {"num_tokens": options.num_tokens, "repeats": options.repeats, "model": options.model, "engine": ENGINE}
    name = "serve_overhead" + ("" if options.model == "embedded" else f"_{options.model}")
    write_result(name, {"settings": settings, "default": DEFAULTS, "fast_path": FAST_PATH, "results": results})
    if len(options.streams) > 1:
        plot(results, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()

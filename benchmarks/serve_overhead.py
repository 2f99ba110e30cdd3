"""What Ray Serve costs: streams over HTTP beside the same engine called directly in this process.

Time to first token, time per later token and tokens/s, by number of concurrent streams.

    python benchmarks/serve_overhead.py
    python benchmarks/serve_overhead.py --fast-path    # also with HAProxy and Serve's throughput switches (needs haproxy)
    python benchmarks/serve_overhead.py --model 102m --streams 64 --repeats 3

Both sides run the same model, float32, one thread, in turns, the order changed each time. All processes share the machine:
with few cores, client, proxy and ingress take from the engine what they need. The embedded model makes a token of each of
64 streams in a few milliseconds, as fast as no model that is of use: its time to first token shows what the path adds, its
tokens/s only what the cores have left. `--model 102m` is the random Llama of benchmarks/peers, whose steps take as long as
those of a real one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml
from machine import RESULTS, write_result
from peers.model import save_model
from tqdm import tqdm

from deployments.run import DEFAULTS, FAST_PATH
from deployments.tenants import API_KEY_VARIABLE
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.generation import Generation
from engine.text.prompt import TextPrompt

ENGINE = {"served_model_name": "it", "dtype": "float32", "num_threads": 1, "num_gpu_blocks": 512, "max_num_seqs": 64}
KEY = "sk-benchmark"  # which the fast path asks for
START_TIMEOUT_S = 180
MIN_STREAMS = 100  # measured of each kind, for their first tokens

# A stream: first token, then the end. Yields twice.
Stream = Callable[[str], AsyncIterator[None]]


@contextmanager
def serve_app(engine: dict[str, Any], fast_path: bool, **args: Any) -> Iterator[str]:
    """A Serve application of one ingress and one engine replica in processes of its own; its URL.

    args: further AppArgs.
    """
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        config = {
            "http_options": {"host": "127.0.0.1", "port": port},
            "logging_config": {"enable_access_log": False},
            "applications": [
                {
                    "name": "overhead",
                    "route_prefix": "/",
                    "import_path": "deployments.app:build",
                    "args": {
                        "engine": engine,
                        "num_cpus": 0.5,
                        "max_ongoing_requests": 128,
                        "store_url": f"sqlite:///{folder}/conversations.db",
                        **args,
                    },
                }
            ],
        }
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "deployments.run", str(path), *(["--fast-path"] if fast_path else [])]
        with open(Path(folder) / "output.txt", "wb") as output:
            environment = os.environ | {API_KEY_VARIABLE: KEY}
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        url = f"http://127.0.0.1:{port}"
        try:
            asyncio.run(wait_until_ready(url, process, Path(folder) / "output.txt"))
            yield url
        finally:
            process.terminate()
            process.wait(60)


async def wait_until_ready(url: str, process: subprocess.Popen[bytes], output: Path) -> None:
    async with asyncio.timeout(START_TIMEOUT_S), aiohttp.ClientSession() as http:
        while True:
            try:
                async with http.get(f"{url}/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            if process.poll() is not None:
                sys.exit(f"the application did not start:\n{output.read_text()[-3000:]}")
            await asyncio.sleep(0.5)


def over_http(http: aiohttp.ClientSession, url: str, num_tokens: int) -> Stream:
    async def stream(name: str) -> AsyncIterator[None]:
        body = {
            "model": ENGINE["served_model_name"],
            "prompt": f"hello {name}",
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        headers = {"x-session-id": name, "authorization": f"Bearer {KEY}"}
        async with http.post(f"{url}/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
            is_first = True
            async for chunk in response.content.iter_any():
                if is_first:
                    is_first = False
                    yield
                last = chunk
            assert last.endswith(b"data: [DONE]\n\n"), last
            yield

    return stream


def direct(engine: AsyncEngine, num_tokens: int) -> Stream:
    async def stream(name: str) -> AsyncIterator[None]:
        prompt = TextPrompt(f"hello {name}")
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        is_first = True
        async for _ in engine.generate(Generation(name, name, prompt, sampling)):
            if is_first:
                is_first = False
                yield
        yield

    return stream


async def run_streams(stream: Stream, num_streams: int, label: str) -> tuple[list[tuple[float, float]], float]:
    """Seconds to the first token and to the end of each stream, and seconds until all are done."""

    async def follow(name: str) -> tuple[float, float]:
        start = time.perf_counter()
        times = [time.perf_counter() - start async for _ in stream(name)]
        return times[0], times[-1]

    start = time.perf_counter()
    times = await asyncio.gather(*(follow(f"{label}-{number}") for number in range(num_streams)))
    return list(times), time.perf_counter() - start


async def measure(engine_options: dict[str, Any], url: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of streams: the engine alone, and over HTTP."""
    engine = AsyncEngine(EngineConfig.from_options(engine_options))
    rows = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        sides = {"alone": direct(engine, options.num_tokens), "http": over_http(http, url, options.num_tokens)}
        for num_streams in options.streams:
            firsts: dict[str, list[float]] = {side: [] for side in sides}
            gaps: dict[str, list[float]] = {side: [] for side in sides}
            totals: dict[str, list[float]] = {side: [] for side in sides}
            num_repeats = max(options.repeats, MIN_STREAMS // num_streams)
            for repeat in tqdm(range(-1, num_repeats), desc=f"{num_streams} streams"):  # the first one warms up
                for side in list(sides)[:: 1 if repeat % 2 else -1]:
                    times, total = await run_streams(sides[side], num_streams, f"{side}-{num_streams}-{repeat}")
                    if repeat >= 0:
                        firsts[side] += [first for first, _ in times]
                        gaps[side] += [(end - first) / (options.num_tokens - 1) for first, end in times]
                        totals[side].append(total)
            row: dict[str, Any] = {"num_streams": num_streams}
            for side in sides:
                per_run = [num_streams * options.num_tokens / total for total in totals[side]]
                row[side] = {
                    "ttft_p50_ms": 1e3 * statistics.median(firsts[side]),
                    "ttft_p95_ms": 1e3 * statistics.quantiles(firsts[side], n=20)[-1],
                    "ms_per_token_p50": 1e3 * statistics.median(gaps[side]),
                    "tokens_per_s": statistics.median(per_run),
                }
            row["added_ttft_p50_ms"] = row["http"]["ttft_p50_ms"] - row["alone"]["ttft_p50_ms"]
            row["share_of_tokens_per_s"] = row["http"]["tokens_per_s"] / row["alone"]["tokens_per_s"]
            rows.append(row)
    await engine.shutdown()
    return rows


def print_row(path: str, row: dict[str, Any]) -> None:
    http, alone = row["http"], row["alone"]
    ttft = f"{http['ttft_p50_ms']:.1f} ms (+{row['added_ttft_p50_ms']:.1f}; p95 {http['ttft_p95_ms']:.1f})"
    rate = f"{http['tokens_per_s']:.0f} of {alone['tokens_per_s']:.0f} tokens/s ({row['share_of_tokens_per_s']:.0%})"
    gap = f"{http['ms_per_token_p50']:.2f} ms a token (+{http['ms_per_token_p50'] - alone['ms_per_token_p50']:.2f})"
    print(f"{path:10} {row['num_streams']:3} streams: first token {ttft}, {gap}, {rate}")


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    streams = [row["num_streams"] for row in next(iter(results.values()))]
    lines = {"engine alone": [row["alone"] for row in next(iter(results.values()))]}
    lines |= {f"over HTTP, {name}": [row["http"] for row in rows] for name, rows in results.items()}
    for name, points in lines.items():
        left.plot(streams, [point["ttft_p50_ms"] for point in points], marker="o", label=name)
        right.plot(streams, [point["tokens_per_s"] for point in points], marker="o", label=name)
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
    parser.add_argument("--repeats", type=int, default=20)
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

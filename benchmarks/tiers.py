"""Turns per second and time to first token with a disk tier and without, and with hand-over and without, by working set.

Conversations take turns, one after the other, and all of them come back in each round. The working set is told in multiples
of what the GPU and the CPU tier hold together. The disk is the real one, and the real one slowed down to so many MB/s, reads
and writes together. For hand-over, two engines have half of the tiers each, and in each round that is measured some
conversations move from the first one to the second one, each of them once; it is limited to so many MB/s, or not. All engines
live in one process and make a round in turns, in an order that changes; each round of one is compared with the same round of
two without, and what these two differ by is the noise.

Wanted: at no point more than 3 % slower than without. A point holds, or it does not, if that is so within two standard
errors; else it is told as unclear, and more rounds are needed.

    python benchmarks/tiers.py --plot                                   SmolLM2-135M in bfloat16
    python benchmarks/tiers.py --model random --multiples 1 8           a small random model; a minute
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from machine import RESULTS, write_result
from peers.model import build_tokenizer
from random_llama import save_random_llama
from tqdm import tqdm

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.plan import ChunkRecord
from engine.core.request import SamplingParams
from engine.executor.tiers.disk_store import NUM_PROBED_SLOTS, DiskSpeed, DiskStore
from engine.generation import Generation
from engine.peer_network import PeerNetwork
from engine.text.prompt import TokenPrompt

CHUNK_SIZE = 32
CONVERSATIONS_IN_TIERS = 4
NUM_NEW_TOKENS = 16
# Until the second use has admitted what there is to the disk; told apart from the others.
NUM_FIRST_ROUNDS = 2
ANSWER = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
WITHOUT = ("without", "without again")
DISK, HANDOVER = "disk", "hand-over"
MAX_SLOWER = 0.03
# The system prompts of no two conversations are alike, so nothing is shared.
TOKEN_IDS = range(500, 1000)


class ThrottledStore(DiskStore):
    """A disk that moves at most so many MB a second, in both directions together."""

    def __init__(self, *arguments: Any, mb_per_s: float) -> None:
        super().__init__(*arguments)
        self._mutex_of_time = threading.Lock()
        self._bytes_per_s = mb_per_s * 1e6
        self._free_at_s = 0.0

    def _wait(self, num_slots: int) -> None:
        with self._mutex_of_time:
            begin_s = max(time.perf_counter(), self._free_at_s)
            self._free_at_s = begin_s + num_slots * self.layout.slot_bytes / self._bytes_per_s
            wait_s = self._free_at_s - time.perf_counter()
        time.sleep(max(0.0, wait_s))

    def read(self, block: int, keys: Sequence[bytes], buffers: Sequence[memoryview]) -> list[bool]:
        results = super().read(block, keys, buffers)
        self._wait(len(keys))
        return results

    def write(self, block: int, records: Sequence[ChunkRecord], buffers: Sequence[memoryview]) -> None:
        super().write(block, records, buffers)
        self._wait(len(records))

    def measure(self, num_slots: int = NUM_PROBED_SLOTS) -> DiskSpeed:
        least_s = self.layout.slot_bytes / self._bytes_per_s
        return DiskSpeed(*(max(seconds, least_s) for seconds in super().measure(num_slots)))


@dataclass(slots=True)
class Side:
    """One engine, or two between which conversations move, and their conversations.

    moves_in: the round in which each conversation moves to the second engine.
    Of each round: round_s, its time; cpu_s, that of the process on all cores, which other processes disturb less;
    first_token_s, of each turn; computed, how many tokens were.
    """

    name: str
    engines: list[AsyncEngine]
    contexts: list[list[int]]
    rng: random.Random
    moves_in: list[int]
    round_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    first_token_s: list[list[float]] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)

    def count(self, *names: str) -> int:
        """A statistic of all its engines together: the value under these keys, one in the other."""
        total = 0
        for engine in self.engines:
            value: Any = engine.get_statistics()
            for name in names:
                value = value.get(name, 0) if isinstance(value, dict) else 0
            total += value
        return total

    async def make_round(self, number: int) -> None:
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        before = self.count("num_computed_tokens")
        self.first_token_s.append([])
        for index, context in enumerate(self.contexts):
            engine = self.engines[-1] if number >= self.moves_in[index] else self.engines[0]
            asked_s = time.perf_counter()
            is_first = True
            generation = Generation(f"{index}.{number}", str(index), TokenPrompt(tuple(context)), ANSWER)
            async for delta in engine.generate(generation):
                if is_first:
                    self.first_token_s[-1].append(time.perf_counter() - asked_s)
                is_first = False
                context.extend(delta.token_ids)
            context.extend(self.rng.choices(TOKEN_IDS, k=NUM_NEW_TOKENS))
        self.round_s.append(time.perf_counter() - begin_s)
        self.cpu_s.append(time.process_time() - begin_cpu_s)
        self.computed.append(self.count("num_computed_tokens") - before)


def open_engine(mb_per_s: float | None, options: dict[str, Any]) -> AsyncEngine:
    """mb_per_s: of its disk, if that is slowed down."""
    with ExitStack() as stack:
        if mb_per_s is not None:
            store = partial(ThrottledStore, mb_per_s=mb_per_s)
            stack.enter_context(mock.patch("engine.executor.tiers.disk_tier.DiskStore", store))
        return AsyncEngine(EngineConfig.from_options(options))


def open_pair(name: str, options: dict[str, Any], rate: float | None) -> list[AsyncEngine]:
    """Two engines, each with half of the tiers. rate: of their hand-over in MB/s, 0 = no limit; None = there is none."""
    halves = {tier: options[tier] // 2 for tier in ("num_gpu_blocks", "num_cpu_blocks")}
    config = EngineConfig.from_options({**options, **halves, "kv_transfer_rate": rate})
    secret = name.encode() * 8
    pair = [
        AsyncEngine(
            config,
            network=None if rate is None else PeerNetwork(secret=secret, host="127.0.0.1", peer_id=f"{name} {n}"),
        )
        for n in range(2)
    ]
    if rate is not None:
        for own, other in (pair, pair[::-1]):
            assert other.peer_address is not None
            own.set_peers({f"{name} {pair.index(other)}": other.peer_address})
    return pair


async def measure(
    what: str, multiple: float, arguments: argparse.Namespace, options: dict[str, Any], folder: Path
) -> list[dict[str, Any]]:
    """A row for each mode of DISK or HANDOVER, of one working set."""
    rng = random.Random(0)
    num_conversations = round(CONVERSATIONS_IN_TIERS * multiple)
    contexts = [rng.choices(TOKEN_IDS, k=arguments.context_len) for _ in range(num_conversations)]
    num_rounds = NUM_FIRST_ROUNDS + arguments.num_rounds
    modes: dict[str, float | None] = {
        **dict.fromkeys(WITHOUT),
        **{f"{s:g} MB/s": s for s in arguments.speeds},
        "as it is": None if what == DISK else 0.0,
    }
    sides = []
    for number, (name, mb_per_s) in enumerate(modes.items()):
        if what == HANDOVER:
            engines = open_pair(f"{multiple} {number}", options, mb_per_s)
            moves_in = [NUM_FIRST_ROUNDS + index % arguments.num_rounds for index in range(num_conversations)]
        else:
            path = folder / f"{multiple} {number}"
            disk = {} if name in WITHOUT else {"kv_disk_path": str(path), "kv_disk_size": arguments.disk_gib}
            engines = [open_engine(mb_per_s, {**options, **disk})]
            moves_in = [num_rounds] * num_conversations
        sides.append(Side(name, engines, [context[:] for context in contexts], random.Random(0), moves_in))
    for number in tqdm(range(num_rounds), desc=f"{what}, {multiple:g}x"):
        for side in rng.sample(sides, len(sides)):
            await side.make_round(number)
    rows = [figures_of(what, side, sides[: len(WITHOUT)]) for side in sides]
    for side in sides:
        for engine in side.engines:
            await engine.shutdown()
    return [{"working_set": multiple, "what": what, **row} for row in rows]


def figures_of(what: str, side: Side, without: Sequence[Side]) -> dict[str, Any]:
    """Of the rounds behind the first ones, and how much faster than without these and the first ones were."""
    first, rest = slice(NUM_FIRST_ROUNDS), slice(NUM_FIRST_ROUNDS, None)
    num_turns = len(side.contexts)

    def logs(times: str) -> list[float]:
        """How much faster each round was than the mean of the same round of both without."""
        rounds = zip(getattr(side, times), *(getattr(other, times) for other in without), strict=True)
        return [math.log(statistics.mean(others) / own) for own, *others in rounds]

    noise = [math.log(a / b) for a, b in zip(*(other.round_s[rest] for other in without), strict=True)]
    tier, sent = ("disk", "disk_stored") if what == DISK else ("peer", "peer_sent")
    num_tokens = sum(map(len, side.contexts))
    return {
        "mode": side.name,
        "turns_per_s": num_turns / statistics.median(side.round_s[rest]),
        "first_token_s": statistics.median(s for round_s in side.first_token_s[rest] for s in round_s),
        "faster": math.exp(statistics.median(logs("round_s")[rest])) - 1,
        "faster_in_first_rounds": math.exp(statistics.median(logs("round_s")[first])) - 1,
        "less_cpu": math.exp(statistics.median(logs("cpu_s")[rest])) - 1,
        # Of the mean of the rounds, from what both without differ by; each of these is one of a mean of two.
        "error": math.sqrt(statistics.mean(d * d for d in noise) * 3 / 4 / len(noise)),
        "computed_share": statistics.mean(side.computed[rest]) / num_tokens,
        "loaded_bytes": side.count("num_slow_transfer_bytes", f"{tier}_loaded"),
        "stored_bytes": side.count("num_slow_transfer_bytes", sent),
        "num_refused_loads": side.count("slow_refusals", f"{tier}_load"),
        "round_s": side.round_s,
    }


def verdict(row: dict[str, Any]) -> str:
    """Whether it is at most MAX_SLOWER slower than without."""
    if row["mode"] in WITHOUT:
        return ""
    if row["faster"] - 2 * row["error"] >= -MAX_SLOWER:
        return "holds"
    return "slower" if row["faster"] + 2 * row["error"] < -MAX_SLOWER else "unclear"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="smollm2", help="random: a small one with random weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--context-len", type=int, default=192)
    parser.add_argument("--num-rounds", type=int, default=4, help="that are measured")
    parser.add_argument("--multiples", type=float, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--speeds",
        type=float,
        nargs="+",
        default=[20, 100, 500],
        help="MB/s; the real disk, and hand-over without a limit, are added",
    )
    parser.add_argument("--what", nargs="+", choices=[DISK, HANDOVER], default=[DISK, HANDOVER])
    parser.add_argument("--disk-gib", type=float, default=1.0)
    parser.add_argument("--path", type=Path, default=None, help="a folder on the disk to measure")
    parser.add_argument("--name", default="tiers", help="of the result files")
    parser.add_argument("--plot", action="store_true")
    arguments = parser.parse_args()
    final_len = arguments.context_len + (NUM_FIRST_ROUNDS + arguments.num_rounds) * (NUM_NEW_TOKENS + ANSWER.max_tokens)
    num_chunks = -(-final_len // CHUNK_SIZE)
    half = CONVERSATIONS_IN_TIERS // 2 * num_chunks + num_chunks // 2
    rows: list[dict[str, Any]] = []
    columns = f"{'turns/s':>8} {'first token':>12} {'faster':>8} {'+-':>6} {'less CPU':>9} {'computed':>9}"
    print(f"{'':>9} {'set':>4} {'mode':>14} {columns} loaded, stored")
    with tempfile.TemporaryDirectory(dir=arguments.path, prefix="tiers-") as folder:
        model = arguments.model
        if model == "random":
            model = f"{folder}/model"
            save_random_llama(Path(model), hidden=256, layers=4)
            build_tokenizer().save_pretrained(model)
        options = {
            "model": model,
            "dtype": arguments.dtype,
            "num_threads": arguments.num_threads,
            "chunk_size": CHUNK_SIZE,
            "num_gpu_blocks": half,
            "num_cpu_blocks": half,
            "max_model_len": final_len + CHUNK_SIZE,
            "decode_reserve": 0.02,
        }
        for what in arguments.what:
            for multiple in arguments.multiples:
                more = asyncio.run(measure(what, multiple, arguments, options, Path(folder)))
                for row in more:
                    print(describe(row), flush=True)
                rows += more
    given = {name: value for name, value in vars(arguments).items() if name not in ("path", "name", "plot")}
    verdicts = {name: sum(verdict(row) == name for row in rows) for name in ("holds", "unclear", "slower")}
    print(verdicts)
    write_result(
        arguments.name, {**given, "options": {**options, "model": arguments.model}, "verdicts": verdicts, "rows": rows}
    )
    if arguments.plot:
        plot(rows, RESULTS / f"{arguments.name}.png")


def describe(row: dict[str, Any]) -> str:
    return (
        f"{row['what']:>9} {row['working_set']:>3g}x {row['mode']:>14} "
        f"{row['turns_per_s']:>8.2f} {row['first_token_s'] * 1e3:>9.1f} ms "
        f"{row['faster']:>+8.1%} {2 * row['error']:>6.1%} {row['less_cpu']:>+9.1%} {row['computed_share']:>9.1%} "
        f"{row['loaded_bytes'] / 1e6:.0f}, {row['stored_bytes'] / 1e6:.0f} MB; "
        f"first rounds {row['faster_in_first_rounds']:+.1%} {verdict(row)}"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.figure

    kinds = list(dict.fromkeys(row["what"] for row in rows))
    figure = matplotlib.figure.Figure(figsize=(10, 4 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), 2, squeeze=False)
    for what, (speed_axes, latency_axes) in zip(kinds, grid, strict=True):
        for name in dict.fromkeys(row["mode"] for row in rows):
            own = [row for row in rows if (row["what"], row["mode"]) == (what, name)]
            sizes = [row["working_set"] for row in own]
            style = {WITHOUT[0]: "k--", WITHOUT[1]: "k:"}.get(name, "o-")
            speed_axes.plot(sizes, [row["turns_per_s"] for row in own], style, label=name)
            latency_axes.plot(sizes, [row["first_token_s"] * 1e3 for row in own], style, label=name)
        label = "working set / (GPU tier + CPU tier)"
        speed_axes.set(title=f"{what}: turns per second", xlabel=label, xscale="log")
        latency_axes.set(title=f"{what}: median time to first token (ms)", xlabel=label, xscale="log")
        for axes in (speed_axes, latency_axes):
            axes.set_xticks(sizes, [f"{size:g}x" for size in sizes])
            axes.legend(title=what)
            axes.grid(alpha=0.3)
            axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

"""What hints and learned pauses buy when the conversations' contexts take three times the GPU and CPU tiers.

tau-bench sessions, each turn after a pause: short behind a tool's call, long behind an answer to a person. The three modes of
`kv_hints` side by side, each with an engine of its own, so that whatever else the machine does meets all of them alike:
time to first token, and where prompt tokens came from.

    python benchmarks/retention.py

The model is a random Llama, which calls no tools: what the engine's parser would have found is told to it here. A client
that gives hints knows which tool it runs and how long that takes as a rule, how long people take, and when a session is over.
A server that learns knows only the first, and that from its own parser.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import tempfile
import time
import zlib
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from machine import write_result
from random_llama import save_random_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.core.retention import RetentionHint
from engine.generation import Generation
from engine.text.prompt import TokenPrompt
from engine.workloads.conversations import read_tau_bench, text_of

DATA = Path(__file__).parent / "data" / "airline_sessions.json"
CHUNK_SIZE = 32
MODES = ("off", "client", "learned")
COUNTS = ("gpu_cached_tokens", "cpu_cached_tokens", "recomputed_tokens", "computed_tokens", "new_tokens", "refills")


class Turn(NamedTuple):
    """tool: whose result it brings; "" = a person's words. usual_pause_s: the median for that tool, or for people."""

    new_tokens: tuple[int, ...]
    num_output_tokens: int
    tool: str
    pause_s: float
    usual_pause_s: float


Session = list[Turn]


def build_model(folder: Path, texts: list[str], arguments: argparse.Namespace) -> transformers.PreTrainedTokenizerFast:
    """A random Llama and a byte-level BPE of `texts`, in `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<eos>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(folder)
    save_random_llama(Path(folder), hidden=arguments.hidden, layers=arguments.layers, vocab_size=len(fast))
    return fast


def usual_pause_s(tool: str, arguments: argparse.Namespace) -> float:
    """Of a tool from half to twice the usual one, the same for each run."""
    if not tool:
        return arguments.think_s
    return arguments.tool_s * 2.0 ** (zlib.crc32(tool.encode()) % 1000 / 500 - 1)


def build_sessions(tokenizer: Any, arguments: argparse.Namespace) -> list[Session]:
    """Roles are written out, because the random model has no chat template."""
    sessions = []
    for number, recorded in enumerate(islice(read_tau_bench(DATA), arguments.num_sessions)):
        rng = random.Random(number)
        session = []
        for turn in recorded.turns[: arguments.num_turns]:
            said = "".join(f"{message.role}: {message.content}\n" for message in turn.messages)
            tool = (turn.tool or "a tool") if turn.kind == "tool" else ""
            usual_s = usual_pause_s(tool, arguments)
            num_tokens = len(tokenizer(text_of(turn.answer)).input_ids)
            session.append(
                Turn(
                    tuple(tokenizer(said + "assistant: ").input_ids),
                    max(4, min(num_tokens, arguments.max_output_tokens)),
                    tool,
                    usual_s * math.exp(rng.gauss(0.0, arguments.spread))
                    if session
                    else rng.random() * arguments.start_s,
                    usual_s,
                )
            )
        sessions.append(session)
    return sessions


def hint_for(following: Turn | None) -> RetentionHint:
    """What a client says with a turn, knowing what it does next."""
    if following is None:
        return RetentionHint.of(release=True)
    return RetentionHint.of(expected_return_s=following.usual_pause_s)


async def run_session(
    engine: AsyncEngine, number: int, session: Session, mode: str, rows: list[dict[str, Any]], progress: tqdm
) -> None:
    context: list[int] = []
    for place, turn in enumerate(session):
        await asyncio.sleep(turn.pause_s)
        context += turn.new_tokens
        following = session[place + 1] if place + 1 < len(session) else None
        sampling = SamplingParams(temperature=0.0, max_tokens=turn.num_output_tokens, ignore_eos=True)
        generation = Generation(
            f"{number}.{place}",
            f"session-{number}",
            TokenPrompt(tuple(context)),
            sampling,
            retention=hint_for(following) if mode == "client" else None,
        )
        start, first = time.perf_counter(), None
        async for delta in engine.generate(generation):
            if first is None:
                first = time.perf_counter() - start
            context += delta.token_ids
        assert delta.stats is not None
        recomputed = delta.stats.num_dropped_tokens + delta.stats.num_not_loaded_tokens
        rows.append({"ttft_s": first, "is_first": not place, "is_tool": bool(turn.tool), "recomputed": recomputed})
        progress.update()


def tell_tools(engine: AsyncEngine, sessions: list[Session]) -> None:
    """In place of the parser of a model that calls tools."""
    retention = engine._retention

    def note_end(request: Any, _: str) -> None:
        number, _, place = request.request_id.partition(".")
        session = sessions[int(number)]
        following = session[int(place) + 1] if int(place) + 1 < len(session) else None
        retention.note_end(request, "" if following is None else following.tool)

    engine._outputs.note_end = note_end


async def run_all(model: str, sessions: list[Session], sizes: Mapping[str, int], threads: int) -> list[dict[str, Any]]:
    engines = []
    for mode in MODES:
        config = EngineConfig(
            model=model, chunk_size=CHUNK_SIZE, num_threads=threads, max_num_seqs=8, kv_hints=mode, **sizes
        )
        engines.append(AsyncEngine(config))
    return await asyncio.gather(*(run(engine, sessions, mode) for engine, mode in zip(engines, MODES, strict=True)))


async def run(engine: AsyncEngine, sessions: list[Session], mode: str) -> dict[str, Any]:
    if mode != "off":
        tell_tools(engine, sessions)
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    with tqdm(total=sum(map(len, sessions)), desc=mode, unit="turn") as progress:
        await asyncio.gather(
            *(run_session(engine, number, session, mode, rows, progress) for number, session in enumerate(sessions))
        )
    seconds = time.perf_counter() - start
    stats = engine.get_statistics()
    await engine.check_integrity()
    await engine.shutdown()
    return {
        "mode": mode,
        "seconds": seconds,
        "turns": rows,
        "gpu_cached_tokens": stats["num_gpu_cached_tokens"],
        "cpu_cached_tokens": stats["num_cpu_cached_tokens"],
        "recomputed_tokens": sum(turn["recomputed"] for turn in rows),
        "computed_tokens": stats["num_computed_tokens"],
        "new_tokens": stats["num_new_tokens"],
        "refills": engine._retention.num_refills,
    }


def summarise(mode: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the turns that follow another one: a session's first turn finds nothing of its own in any mode."""
    runs = [each for each in runs if each["mode"] == mode]
    later = [turn for each in runs for turn in each["turns"] if not turn["is_first"]]

    def percentile(turns: list[dict[str, Any]], number: int) -> float:
        return statistics.quantiles([turn["ttft_s"] for turn in turns], n=100)[number - 1]

    return {
        "mode": mode,
        "num_turns": len(later),
        "ttft_p50_s": percentile(later, 50),
        "ttft_p90_s": percentile(later, 90),
        "ttft_p99_s": percentile(later, 99),
        "ttft_p90_after_tools_s": percentile([turn for turn in later if turn["is_tool"]], 90),
        "ttft_p90_after_people_s": percentile([turn for turn in later if not turn["is_tool"]], 90),
        "ttft_p90_by_run_s": [percentile([t for t in each["turns"] if not t["is_first"]], 90) for each in runs],
        **{
            key: statistics.fmean(each[key] for each in runs)
            for key in (
                "seconds",
                "recomputed_tokens",
                "computed_tokens",
                "gpu_cached_tokens",
                "cpu_cached_tokens",
                "refills",
            )
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-sessions", type=int, default=24)
    parser.add_argument("--num-turns", type=int, default=8)
    parser.add_argument("--max-output-tokens", type=int, default=16)
    parser.add_argument("--start-s", type=float, default=40.0, help="sessions begin within so many seconds")
    parser.add_argument("--tool-s", type=float, default=0.5, help="usual pause behind a tool's call")
    parser.add_argument("--think-s", type=float, default=12.0, help="usual pause behind an answer to a person")
    parser.add_argument("--spread", type=float, default=0.5, help="sigma of the pauses' logarithm")
    parser.add_argument("--over-subscription", type=float, default=3.0, help="all contexts over both tiers")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--name", default="retention", help="name of the result file")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    texts = [message["content"] for messages in json.loads(DATA.read_text()) for message in messages]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_model(Path(folder), texts, arguments)
        sessions = build_sessions(tokenizer, arguments)
        lens = [sum(len(turn.new_tokens) + turn.num_output_tokens for turn in session) for session in sessions]
        shared_len = min(len(session[0].new_tokens) for session in sessions)  # about the system prompt
        working_set = sum(lens) - shared_len * (len(sessions) - 1)
        num_blocks = int(working_set / arguments.over_subscription) // CHUNK_SIZE
        num_gpu_blocks = max(num_blocks // 2, max(lens) // CHUNK_SIZE + 2)
        sizes = {
            "num_gpu_blocks": num_gpu_blocks,
            "num_cpu_blocks": num_blocks - num_gpu_blocks,
            "max_model_len": max(lens) + 1,
        }
        print(f"{len(sessions)} sessions, working set {working_set} tokens, {sizes}", flush=True)
        for _ in range(arguments.num_rounds):
            runs += asyncio.run(run_all(folder, sessions, sizes, arguments.num_threads))
            done = [summarise(mode, runs) for mode in MODES]
            write_result(arguments.name, {**vars(arguments), "working_set": working_set, **sizes, "rows": done})
    for row in done:
        print(
            f"{row['mode']:<8} TTFT p50 {row['ttft_p50_s']:.3f} s, p90 {row['ttft_p90_s']:.3f} s (after tools "
            f"{row['ttft_p90_after_tools_s']:.3f}, after people {row['ttft_p90_after_people_s']:.3f}), recomputed "
            f"{row['recomputed_tokens']:.0f} tokens, {row['refills']:.0f} refills"
        )


if __name__ == "__main__":
    main()

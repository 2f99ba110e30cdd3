"""Real agent sessions with think time over a working set three times the GPU tier.

Stateless, GPU tier only, and both tiers under each eviction policy, in one run: throughput, time to first token, and
where prompt tokens came from.

    python benchmarks/multi_turn.py

The model is a random Llama (only shapes matter); the prompts are real text, tokenised by a BPE that is trained on it. Each
turn sends the whole history as token ids, the answers being those that were generated. Sessions arrive as a Poisson
process; a turn is sent an exponential think time after the last answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import transformers
from machine import RESULTS, write_result
from random_llama import save_random_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.cache.eviction import EVICTION_POLICIES
from engine.core.request import SamplingParams
from engine.generation import Generation
from engine.text.prompt import TokenPrompt
from engine.workloads.conversations import read_tau_bench, text_of

DATA = Path(__file__).parent / "data" / "airline_sessions.json"
CHUNK_SIZE = 32


@dataclass(frozen=True)
class Session:
    """One agent session.

    new_tokens: what each turn adds to the context before the model answers.
    num_output_tokens: of each answer.
    """

    name: str
    new_tokens: tuple[tuple[int, ...], ...]
    num_output_tokens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.new_tokens)) + sum(self.num_output_tokens)


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


def build_sessions(tokenizer: Any, arguments: argparse.Namespace) -> list[Session]:
    """Roles are written out, because the random model has no chat template."""
    sessions = []
    for number, session in enumerate(islice(read_tau_bench(DATA), arguments.num_sessions)):
        turns, outputs, before = [], [], ""
        for turn in session.turns[: arguments.num_turns]:
            said = "".join(f"{message.role}: {message.content}\n" for message in turn.messages)
            turns.append(tuple(tokenizer(before + said + "assistant: ").input_ids))
            num_tokens = len(tokenizer(text_of(turn.answer)).input_ids)
            outputs.append(max(4, min(num_tokens, arguments.max_output_tokens)))
            before = "\n"
        sessions.append(Session(f"session-{number}", tuple(turns), tuple(outputs)))
    return sessions


async def run_session(
    engine: AsyncEngine, session: Session, arguments: argparse.Namespace, ttfts: list[float], progress: tqdm
) -> int:
    """All turns of one session; returns the number of output tokens."""
    rng = random.Random(session.name)
    await asyncio.sleep(rng.expovariate(1 / arguments.arrival_s))
    context: list[int] = []
    num_output = 0
    for turn, (new, max_tokens) in enumerate(zip(session.new_tokens, session.num_output_tokens, strict=True)):
        context += new
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        start, first = time.perf_counter(), None
        generation = Generation(f"{session.name}.{turn}", session.name, TokenPrompt(tuple(context)), sampling)
        async for delta in engine.generate(generation):
            if first is None:
                first = time.perf_counter() - start
            context += delta.token_ids
            num_output += len(delta.token_ids)
        assert first is not None
        ttfts.append(first)
        progress.update()
        await asyncio.sleep(rng.expovariate(1 / arguments.think_s))
    return num_output


async def run(
    model: str, sessions: list[Session], options: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    engine = AsyncEngine(
        EngineConfig(
            model=model,
            chunk_size=CHUNK_SIZE,
            num_threads=arguments.num_threads,
            max_num_seqs=arguments.max_num_seqs,
            max_num_batched_tokens=512,
            **options,
        )
    )
    num_turns = sum(len(session.new_tokens) for session in sessions)
    ttfts: list[float] = []
    start = time.perf_counter()
    with tqdm(total=num_turns, desc=" ".join(map(str, options.values())), unit="turn") as progress:
        outputs = await asyncio.gather(*(run_session(engine, s, arguments, ttfts, progress) for s in sessions))
    seconds = time.perf_counter() - start
    stats = engine.get_statistics()
    await engine.check_integrity()
    await engine.shutdown()
    percentiles = statistics.quantiles(ttfts, n=100)
    return {
        "seconds": seconds,
        "turns_per_s": num_turns / seconds,
        "output_tokens_per_s": sum(outputs) / seconds,
        "ttft_p50_s": percentiles[49],
        "ttft_p90_s": percentiles[89],
        "ttft_p99_s": percentiles[98],
        "gpu_cached_tokens": stats["num_gpu_cached_tokens"],
        "cpu_cached_tokens": stats["num_cpu_cached_tokens"],
        "recomputed_tokens": stats["num_dropped_tokens"] + stats["num_not_loaded_tokens"] + stats["num_resumed_tokens"],
        "new_tokens": stats["num_new_tokens"],
        "suspensions": stats["num_suspensions"],
        "swap_ins": stats["num_swap_ins"],
        "swap_outs": stats["num_swap_outs"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-sessions", type=int, default=24)
    parser.add_argument("--num-turns", type=int, default=8)
    parser.add_argument("--max-output-tokens", type=int, default=32)
    parser.add_argument("--arrival-s", type=float, default=2.0, help="mean time until a session begins")
    parser.add_argument("--think-s", type=float, default=1.0, help="mean think time")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--name", default="multi_turn", help="name of the result files")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    texts = [message["content"] for messages in json.loads(DATA.read_text()) for message in messages]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_model(Path(folder), texts, arguments)
        sessions = build_sessions(tokenizer, arguments)
        shared_len = min(len(session.new_tokens[0]) for session in sessions)  # about the system prompt
        working_set = sum(session.num_tokens - shared_len for session in sessions) + shared_len
        longest = max(session.num_tokens for session in sessions) + 1
        num_gpu_blocks = max(working_set // 3, longest + CHUNK_SIZE) // CHUNK_SIZE
        num_cpu_blocks = working_set // 2 // CHUNK_SIZE  # five sixths of the working set fit: policies have to choose
        sizes = {"num_gpu_blocks": num_gpu_blocks, "max_model_len": longest}
        configurations = {
            "stateless": {"mode": "stateless", **sizes},
            "GPU only, retention_value": {"eviction_policy": "retention_value", "num_cpu_blocks": 0, **sizes},
            **{
                f"both tiers, {policy}": {"eviction_policy": policy, "num_cpu_blocks": num_cpu_blocks, **sizes}
                for policy in EVICTION_POLICIES
            },
        }
        rows = [
            {"configuration": name, **asyncio.run(run(folder, sessions, options, arguments))}
            for name, options in configurations.items()
        ]
    print(
        f"{len(sessions)} sessions, working set {working_set} tokens, GPU tier {num_gpu_blocks * CHUNK_SIZE}, CPU tier "
        f"{num_cpu_blocks * CHUNK_SIZE}, longest context {longest}"
    )
    print(
        f"{'':<32} {'turns/s':>8} {'TTFT p50':>9} {'p90':>7} {'p99':>7} {'GPU hits':>9} {'CPU hits':>9} {'recomputed':>11}"
    )
    for row in rows:
        print(
            f"{row['configuration']:<32} {row['turns_per_s']:>8.2f} {row['ttft_p50_s']:>7.2f} s {row['ttft_p90_s']:>5.2f} s "
            f"{row['ttft_p99_s']:>5.2f} s {row['gpu_cached_tokens']:>9} {row['cpu_cached_tokens']:>9} "
            f"{row['recomputed_tokens']:>11}"
        )
    write_result(arguments.name, {**vars(arguments), "working_set": working_set, **sizes, "rows": rows})
    plot(rows, RESULTS / f"{arguments.name}.png")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True)
    names = [row["configuration"] for row in rows]
    left.barh(names, [row["turns_per_s"] for row in rows])
    left.set(xlabel="turns/s", title="throughput")
    left.invert_yaxis()
    for key, label in (("ttft_p90_s", "p90"), ("ttft_p50_s", "p50")):
        middle.barh(names, [row[key] for row in rows], label=label)
    middle.set(xlabel="s", title="time to first token")
    middle.legend()
    start = [0] * len(rows)
    for key in ("gpu_cached_tokens", "cpu_cached_tokens", "recomputed_tokens", "new_tokens"):
        values = [row[key] for row in rows]
        right.barh(names, values, left=start, label=key.removesuffix("_tokens").replace("_", " "))
        start = [a + b for a, b in zip(start, values, strict=True)]
    right.set(xlabel="prompt tokens", title="where prompt tokens came from")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=4)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

"""Cold tiers in fewer bits (`kv_cold_dtype`): hit rate, turns/s and time to first token in the same memory, and copy speed.

Engines with one dtype each take turns at the same requests: conversations of OpenAssistant, whose turns come in random order,
and whose KV is `--times` as large as both tiers. The history is the data's, so that all compute the same prompts. Before it,
the error: the log-probability of the data's own text behind KV that went through the CPU tier; and the speed of the copies.

    python benchmarks/cold_tiers.py --conversations trees.jsonl
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from machine import write_result
from transformers import AutoTokenizer

from engine.cold_error import measure_cold_error
from engine.config import COLD_DTYPES, EngineConfig
from engine.core.plan import BlockCopy, StepPlan
from engine.core.request import SamplingParams
from engine.core.tier_table import CPU, GPU
from engine.dialogue.messages import Dialogue
from engine.executor.group import make_executor
from engine.model_files import model_location
from engine.server import Server, create_server
from engine.sizing import measure_model
from engine.text.prompt import ChatPrompt
from engine.workloads.conversations import read_oasst

CHUNK_SIZE = 32
WINDOW = 1024
NUM_GPU_BLOCKS = 34
NUM_COPIED = 40
Messages = list[tuple[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=Path, required=True, help="a file of OpenAssistant's trees")
    parser.add_argument("--num-conversations", type=int, default=20)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--times", type=float, default=3.0, help="KV of all conversations over the memory of both tiers"
    )
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--passes", type=int, default=2, help="over all turns")
    parser.add_argument("--kinds", nargs="+", choices=COLD_DTYPES, default=list(COLD_DTYPES))
    parser.add_argument("--only", choices=["errors", "serving"], help="a part of it; default: both")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(model_location(arguments.model))
    talks = list(islice(read_talks(arguments.conversations), arguments.num_conversations))

    def count(messages: Messages) -> int:
        chat = [{"role": role, "content": content} for role, content in messages]
        return len(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])

    turns = {number: turns_of(talk, count, arguments.max_tokens) for number, talk in enumerate(talks)}
    turns = {number: prompts for number, prompts in turns.items() if prompts}
    num_tokens = sum(count(prompts[-1]) for prompts in turns.values())
    num_cpu_tokens = num_tokens / arguments.times - NUM_GPU_BLOCKS * CHUNK_SIZE
    options = {**vars(arguments), "conversations": arguments.conversations.name}
    if arguments.only != "serving":
        errors, speeds = {}, {}
        for kind in arguments.kinds:
            errors[kind], speeds[kind] = measure(arguments, kind, tokenizer, talks)
            print(kind, errors[kind], speeds[kind])
            write_result("cold_tiers_errors", {"options": options, "errors": errors, "copies": speeds})
    if arguments.only == "errors":
        return
    size, _ = measure_model(arguments.model, dtype=arguments.dtype)
    servers = {
        kind: create_server(
            model=arguments.model,
            dtype=arguments.dtype,
            num_threads=arguments.num_threads,
            num_gpu_blocks=NUM_GPU_BLOCKS,
            kv_offloading_size=num_cpu_tokens * size.kv_bytes / 2**30,
            max_model_len=WINDOW,
            kv_cold_dtype=kind,
        )
        for kind in arguments.kinds
    }
    rows = serve(servers, turns, arguments)
    for server in servers.values():
        server.close()
    figures = {kind: summary(rows[kind]) for kind in servers}
    for kind, row in figures.items():
        print(kind, row)
    sizes = {"num_tokens": num_tokens, "num_gpu_tokens": NUM_GPU_BLOCKS * CHUNK_SIZE, "num_cpu_tokens": num_cpu_tokens}
    write_result("cold_tiers", {"options": options, **sizes, "serving": figures})


def read_talks(path: Path) -> Iterator[Messages]:
    """The first path of each tree that has more than one turn."""
    for session in read_oasst(path):
        if session.session_id.endswith(".0") and len(session.turns) > 1:
            messages: Messages = []
            for turn in session.turns:
                messages += [(message.role, message.content) for message in turn.messages]
                if turn.answer is not None:
                    messages.append((turn.answer.role, turn.answer.content))
            yield messages


def turns_of(talk: Messages, count: Any, max_tokens: int) -> list[Messages]:
    """The prompt of each turn that fits the window."""
    prompts = [talk[: index + 1] for index, (role, _) in enumerate(talk) if role == "user"]
    return [prompt for prompt in prompts if count(prompt) + max_tokens < WINDOW]


def serve(
    servers: dict[str, Server], turns: dict[int, list[Messages]], arguments: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """All turns by all engines, in the same order; the engines one after the other at each turn, the first one in turn."""
    rng = random.Random(arguments.seed)
    sampling = SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens, ignore_eos=True)
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in servers}
    kinds = list(servers)
    order = [
        (once, number, k) for once in range(arguments.passes) for number in turns for k in range(len(turns[number]))
    ]
    # A conversation's turns stay in order; between conversations, any order.
    names = [(once, number) for once, number, _ in order]
    rng.shuffle(names)
    names.sort(key=lambda name: name[0])
    at: dict[tuple[int, int], int] = {}
    for step, (once, number) in enumerate(names):
        turn = at[once, number] = at.get((once, number), -1) + 1
        prompt = ChatPrompt(Dialogue.of(turns[number][turn]).messages)
        for kind in kinds[step % len(kinds) :] + kinds[: step % len(kinds)]:
            answer = servers[kind].complete(prompt, sampling, f"talk-{number}")
            rows[kind].append(
                {
                    "prompt": answer.num_prompt_tokens,
                    "cached": answer.num_cached_tokens,
                    "ttft_s": answer.ttft_s,
                    "total_s": answer.total_s,
                }
            )
    return rows


def summary(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    first = sorted(row["ttft_s"] for row in rows)
    return {
        "turns": len(rows),
        "hit_rate": round(sum(row["cached"] for row in rows) / sum(row["prompt"] for row in rows), 3),
        "turns_per_s": round(len(rows) / sum(row["total_s"] for row in rows), 3),
        "ttft_p50_s": round(statistics.median(first), 4),
        "ttft_p90_s": round(first[int(len(first) * 0.9)], 4),
    }


def measure(
    arguments: argparse.Namespace, kind: str, tokenizer: Any, talks: Sequence[Messages]
) -> tuple[dict[str, float], dict[str, float]]:
    """The error over all conversations; the speed of the copies (GB/s of exact KV), and how much smaller blocks are."""
    executor = make_executor(
        EngineConfig(
            model=arguments.model,
            dtype=arguments.dtype,
            num_threads=arguments.num_threads,
            num_gpu_blocks=NUM_COPIED,
            num_cpu_blocks=NUM_COPIED,
            kv_cold_dtype=kind,
        )
    )
    try:
        facts = executor.facts
        found = []
        for talk in talks:
            chat = [{"role": role, "content": content} for role, content in talk]
            ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"][:WINDOW]
            error = measure_cold_error(executor, ids, CHUNK_SIZE, 512)
            if error is not None:
                found.append(asdict(error))
        weights = [row["num_scored"] for row in found]
        mean = {
            name: round(statistics.fmean([row[name] for row in found], weights), 4)
            for name in ("perplexity", "cold_perplexity", "mean_difference")
        }
        mean["max_difference"] = round(max(row["max_difference"] for row in found), 4)
        mean["share_of_other_choices"] = round(sum(row["num_other_choices"] for row in found) / sum(weights), 4)
        mean["num_scored"] = sum(weights)
        pairs = range(NUM_COPIED)
        out = StepPlan(0, (), swap_outs=tuple(BlockCopy(GPU, i, CPU, i) for i in pairs))
        back = StepPlan(0, (), swap_ins=tuple(BlockCopy(CPU, i, GPU, i) for i in pairs))
        num_bytes = NUM_COPIED * facts.bytes_per_block
        speeds = {
            "out_gb_s": num_bytes / timed(executor, out) / 1e9,
            "in_gb_s": num_bytes / timed(executor, back) / 1e9,
        }
        speeds["times_as_many_blocks"] = facts.bytes_per_block / facts.bytes_per_cold_block
        return mean, {name: round(value, 2) for name, value in speeds.items()}
    finally:
        executor.shutdown()


def timed(executor: Any, plan: StepPlan) -> float:
    """Median seconds of ten."""
    seconds = []
    for _ in range(11):
        begin = time.perf_counter()
        executor.execute(plan)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()

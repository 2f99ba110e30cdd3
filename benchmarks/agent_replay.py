"""What an agent's sessions cost with the cache and without: time to first token and computed tokens of each turn.

    python benchmarks/agent_replay.py
    python benchmarks/agent_replay.py --model smollm2 --num-sessions 4

The sessions are an airline agent's, with calls and results (see agent_sessions.py). Requests are bodies of the chat API,
parsed as the server parses them. They go to two engines in this process, pensieve and stateless, each turn to both before the
next, in alternating order. Both have to give the same tokens, and pensieve may compute no more than what is new. The model is
a random Llama with SmolLM2's tokenizer, unless one is given.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import transformers
from agent_sessions import MAX_TOKENS, AgentSession, Json, as_text, assistant_message, load_sessions, next_messages
from machine import write_result
from random_llama import save_random_llama
from tqdm import tqdm

from deployments.completions.requests import ChatCompletionBody
from deployments.http.parsing import parse_request
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.model_files import model_location
from engine.tenant import LOCAL_TENANT

MODES = ("pensieve", "stateless")


@dataclass(frozen=True, slots=True)
class Served:
    """One turn in one mode."""

    token_ids: tuple[int, ...]
    ttft_s: float
    num_prompt_tokens: int
    num_cached_tokens: int


async def serve(engine: AsyncEngine, body: Json, request_id: str, session_id: str) -> Served:
    parsed, _ = parse_request(ChatCompletionBody, json.dumps(body).encode())
    request = parsed.generation_request(
        parsed.prompt_value(), request_id=request_id, session_id=session_id, tenant=LOCAL_TENANT
    )
    token_ids: list[int] = []
    start, ttft_s, delta = time.perf_counter(), 0.0, None
    async for delta in engine.generate(request):
        ttft_s = ttft_s or time.perf_counter() - start
        token_ids += delta.token_ids
    assert delta is not None
    return Served(tuple(token_ids), ttft_s, delta.num_prompt_tokens, delta.num_cached_tokens)


async def replay(
    engines: dict[str, AsyncEngine], session: AgentSession, name: str, num_turns: int, progress: tqdm
) -> list[dict[str, Served]]:
    """The turns of a session, by mode."""
    messages: list[Json] = []
    turns: list[dict[str, Served]] = []
    call_id = ""
    for number, turn in enumerate(session.turns[:num_turns]):
        messages += next_messages(turn, call_id)
        body = {"model": "it", "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True}
        body |= as_text(session, turn)
        served = {}
        for mode in MODES if number % 2 else MODES[::-1]:
            served[mode] = await serve(engines[mode], body, f"{name}.{number}", name)
        assert served["pensieve"].token_ids == served["stateless"].token_ids
        turns.append(served)
        call_id = f"call_{number}"
        messages.append(assistant_message(turn, call_id))
        progress.update()
    return turns


def summarise(number: int, turn: list[dict[str, Served]]) -> dict[str, Any]:
    """Medians and sums over the sessions that have this turn."""
    row: dict[str, Any] = {"turn": number + 1, "num_sessions": len(turn)}
    for mode in MODES:
        row[f"{mode}_ttft_s"] = statistics.median(served[mode].ttft_s for served in turn)
        row[f"{mode}_computed_tokens"] = sum(
            served[mode].num_prompt_tokens - served[mode].num_cached_tokens for served in turn
        )
    row["speed_up"] = statistics.median(s["stateless"].ttft_s / s["pensieve"].ttft_s for s in turn)
    return row


def build_model(folder: Path, arguments: argparse.Namespace) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_location("smollm2"))
    tokenizer.save_pretrained(folder)
    save_random_llama(folder, hidden=arguments.hidden, layers=arguments.layers, vocab_size=len(tokenizer))
    return str(folder)


async def run(model: str, arguments: argparse.Namespace) -> list[list[dict[str, Served]]]:
    options = {"model": model, "dtype": arguments.dtype, "num_threads": arguments.num_threads}
    engines = {mode: AsyncEngine(EngineConfig.from_options({**options, "mode": mode})) for mode in MODES}
    sessions = [s for s in load_sessions() if sum(bool(turn.name) for turn in s.turns) >= arguments.num_calls]
    sessions = sessions[: arguments.num_sessions]
    num_turns = sum(min(arguments.num_turns, len(session.turns)) for session in sessions)
    with tqdm(total=num_turns, unit="turn") as progress:
        replayed = [
            await replay(engines, session, f"session-{number}", arguments.num_turns, progress)
            for number, session in enumerate(sessions)
        ]
    for engine in engines.values():
        await engine.check_integrity()
        await engine.shutdown()
    return replayed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="instead of a random one")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--num-sessions", type=int, default=2)
    parser.add_argument("--num-calls", type=int, default=4, help="least number of calls in a session")
    parser.add_argument("--num-turns", type=int, default=10, help="of each session, at most")
    parser.add_argument("--dtype", default="float32", help="the answers of both modes are the same in float32 only")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--name", default="agent_replay", help="name of the result file")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        replayed = asyncio.run(run(arguments.model or build_model(Path(folder), arguments), arguments))
    for session in replayed:
        for before, served in pairwise(session):
            said = before["pensieve"].num_prompt_tokens + len(before["pensieve"].token_ids)
            assert served["pensieve"].num_cached_tokens >= said - 1
    most = max(len(session) for session in replayed)
    rows = [summarise(n, [session[n] for session in replayed if n < len(session)]) for n in range(most)]
    print(
        f"{'turn':>4} {'sessions':>8} {'stateless':>10} {'pensieve':>10} {'faster':>7} {'computed':>9} {'stateless':>10}"
    )
    for row in rows:
        print(
            f"{row['turn']:>4} {row['num_sessions']:>8} {row['stateless_ttft_s']:>8.2f} s {row['pensieve_ttft_s']:>8.2f} s "
            f"{row['speed_up']:>6.1f}x {row['pensieve_computed_tokens']:>9} {row['stateless_computed_tokens']:>10}"
        )
    later = [served for session in replayed for served in session[1:]]
    overall = summarise(0, later)
    print(f"all turns but the first: {overall['speed_up']:.1f}x faster (median)")
    write_result(arguments.name, {**vars(arguments), "rows": rows, "later_turns": overall})


if __name__ == "__main__":
    main()

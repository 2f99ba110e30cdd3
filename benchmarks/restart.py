"""What conversations have left of their KV after everything was stopped and started again, and how fast they go on.

Over HTTP, with the openai client, with pensieve-serve: chats of named sessions and responses that name the one before. Each
conversation has two turns. Then the server gets SIGTERM, ends, and is started again, and each conversation has two more:

    restored    the turn after the start: its KV comes from the disk
    warm        the one behind that, at once: its KV is in the GPU tier
    recomputed  the same context with a line in front that no cache knows, for every few conversations

After a second restart all conversations go on concurrently. Wanted: at least 95 % of the tokens that were cached before are
cached in the next turn, its first token comes at most 2 times as late as a warm one, and at least 3 times as early as a
recomputed one.

    python benchmarks/restart.py                                           some minutes, 4 GB of memory and of disk
    python benchmarks/restart.py --cpu-gib 1                               most of it is on the disk before the restart
    python benchmarks/restart.py --model embedded --dtype float32 --num-conversations 4 --lengths 200 500 --quick
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import openai
from machine import write_result
from serve_app import KEY, serve_app
from tqdm import tqdm

from engine.model_files import choose_model, model_location
from engine.text.tokenizer import Tokenizer
from engine.text.transcript import NO_MATCH

DATA = Path(__file__).parent / "data"
TALKS = Path(__file__).parents[1] / "tests" / "data" / "oasst_conversations.json"
MODEL = "it"
NUM_ANSWER_TOKENS = 16
MAX_SHARE_LOST, MAX_TIMES_WARM, MIN_TIMES_FASTER = 0.05, 2.0, 3.0

Messages = list[dict[str, str]]


@dataclass(slots=True)
class Turn:
    """What the server said of a turn, and after how long the first token came."""

    first_token_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_answer_tokens: int

    @property
    def num_known_tokens(self) -> int:
        """How many tokens have KV after it: all but the last one, which was not computed."""
        return self.num_prompt_tokens + self.num_answer_tokens - 1


@dataclass(slots=True)
class Conversation:
    """is_chat: a named session whose client sends all messages again; else responses, of which each names the one before."""

    name: str
    messages: Messages
    questions: list[str]
    is_chat: bool
    response_id: str | None = None
    turns: list[Turn] = field(default_factory=list)

    async def ask(self, client: openai.AsyncOpenAI) -> Turn:
        """The next turn."""
        if self.turns:
            # Turns that are compared with each other ask the same.
            question = self.questions[len(self.turns) // 2 % len(self.questions)]
            self.messages.append({"role": "user", "content": question})
        turn = await (self._chat(client) if self.is_chat else self._respond(client))
        self.turns.append(turn)
        return turn

    async def recompute(self, client: openai.AsyncOpenAI) -> Turn:
        """The last turn again, in a context that no cache has."""
        first, *rest = self.messages[:-1]  # without the last answer
        unknown = {"role": first["role"], "content": f"Case {self.name}, turn {len(self.turns)}. {first['content']}"}
        return (await chat(client, f"{self.name} recomputed", [unknown, *rest]))[1]

    async def _chat(self, client: openai.AsyncOpenAI) -> Turn:
        text, turn = await chat(client, self.name, self.messages)
        self.messages.append({"role": "assistant", "content": text})
        return turn

    async def _respond(self, client: openai.AsyncOpenAI) -> Turn:
        context = {} if self.response_id is None else {"previous_response_id": self.response_id}
        begin_s, first_s = time.perf_counter(), None
        events = await client.responses.create(
            model=MODEL,
            input=self.messages if self.response_id is None else self.messages[-1:],  # type: ignore[arg-type]
            max_output_tokens=NUM_ANSWER_TOKENS,
            temperature=0,
            stream=True,
            extra_body={"min_tokens": NUM_ANSWER_TOKENS},
            **context,  # type: ignore[arg-type]
        )
        async for event in events:
            if first_s is None and event.type == "response.output_text.delta":
                first_s = time.perf_counter() - begin_s
            last = event
        response = last.response  # type: ignore[union-attr]
        assert first_s is not None, response
        assert response.usage is not None
        self.response_id = response.id
        self.messages.append({"role": "assistant", "content": response.output_text})
        usage = response.usage
        return Turn(first_s, usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.output_tokens)


async def chat(client: openai.AsyncOpenAI, name: str, messages: Messages) -> tuple[str, Turn]:
    """The answer of a named session."""
    begin_s, first_s, text, usage = time.perf_counter(), None, "", None
    async for chunk in await client.chat.completions.create(
        model=MODEL,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=NUM_ANSWER_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"session_id": name, "min_tokens": NUM_ANSWER_TOKENS},
    ):
        if chunk.choices and chunk.choices[0].delta.content:
            first_s = first_s or time.perf_counter() - begin_s
            text += chunk.choices[0].delta.content
        usage = chunk.usage or usage
    assert first_s is not None, "no token"
    assert usage is not None
    cached = usage.prompt_tokens_details
    num_cached = 0 if cached is None else cached.cached_tokens or 0
    return text, Turn(first_s, usage.prompt_tokens, num_cached, usage.completion_tokens)


def make_conversations(arguments: argparse.Namespace) -> list[Conversation]:
    """Agent sessions and human conversations, each cut or joined to a length in tokens, spread over the range."""
    tokenizer = Tokenizer(model_location(choose_model(arguments.model)))

    def num_tokens(messages: Messages) -> int:
        text = tokenizer.render_chat([(message["role"], message["content"]) for message in messages])
        return len(tokenizer.encode_prompt(text, NO_MATCH, is_chat=True, max_tokens=1 << 20).token_ids)

    sessions = json.loads((DATA / "airline_sessions.json").read_text())
    sessions.sort(key=lambda messages: sum(len(message["content"]) for message in messages))
    talks = json.loads(TALKS.read_text())
    questions = json.loads((DATA / "oasst_questions.json").read_text())
    shortest, longest = arguments.lengths
    conversations = []
    for number in range(arguments.num_conversations):
        wanted = shortest * (longest / shortest) ** (number / max(1, arguments.num_conversations - 1))
        if number % 5 == 4:
            source = chain.from_iterable(talks[number // 5 % len(talks) :] + talks)
        else:
            first = len(sessions) * number // arguments.num_conversations
            rest = (
                message for session in sessions[first + 1 :] + sessions for message in session[1:]
            )  # without the system prompt
            source = chain(sessions[first], rest)
        messages: Messages = []
        num_before = 0
        for message in source:
            role = message["role"] if message["role"] in ("system", "assistant") else "user"
            messages.append({"role": role, "content": message["content"]})
            num_now = num_tokens(messages)
            if num_now >= wanted:
                share = (wanted - num_before) / (num_now - num_before)
                messages[-1]["content"] = message["content"][: int(share * len(message["content"])) + 1]
                break
            num_before = num_now
        if messages[-1]["role"] != "user":
            messages.append({"role": "user", "content": questions[0]})
        turned = questions[number % len(questions) :] + questions[: number % len(questions)]
        conversations.append(Conversation(f"conversation {number}", messages, turned, is_chat=number % 2 == 0))
    return conversations


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--num-conversations", type=int, default=50)
    parser.add_argument("--lengths", type=int, nargs=2, default=[2000, 7400], help="shortest and longest, in tokens")
    parser.add_argument("--gpu-gib", type=float, default=0.5)
    parser.add_argument("--cpu-gib", type=float, default=5.0)
    parser.add_argument("--disk-gib", type=float, default=8.0)
    parser.add_argument("--grace-s", type=float, default=20.0, help="how long the server may take to end")
    parser.add_argument("--recompute-every", type=int, default=7)
    parser.add_argument("--path", type=Path, default=None, help="a folder on the disk to measure")
    parser.add_argument("--name", default="restart", help="of the result file")
    parser.add_argument("--quick", action="store_true", help="write no result")
    arguments = parser.parse_args()
    conversations = make_conversations(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.path, prefix="restart-") as folder:
        figures = measure(conversations, Path(folder), arguments)
    options = {name: value for name, value in vars(arguments).items() if name not in ("path", "name", "quick")}
    if not arguments.quick:
        write_result(arguments.name, {**options, **figures})
    for name, value in figures.items():
        print(f"{name:<32} {value:.3f}" if isinstance(value, float) else f"{name:<32} {value}")


def measure(conversations: list[Conversation], folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    engine = {
        "model": arguments.model,
        "served_model_name": MODEL,
        "dtype": arguments.dtype,
        "num_threads": arguments.num_threads,
        "gpu_memory_gib": arguments.gpu_gib,
        "kv_offloading_size": arguments.cpu_gib,
        "kv_disk_path": str(folder / "kv"),
        "kv_disk_size": arguments.disk_gib,
    }
    others = {
        "store_url": f"sqlite:///{folder}/conversations.db",
        "graceful_shutdown_timeout_s": arguments.grace_s,
    }
    restored, warm, recomputed, together = [], [], [], []

    async def begin(url: str) -> None:
        async with client_of(url) as client:
            for _ in range(2):
                for conversation in tqdm(conversations, desc="before"):
                    await conversation.ask(client)

    async def go_on(url: str) -> None:
        async with client_of(url) as client:
            for number, conversation in enumerate(tqdm(conversations, desc="restarted")):
                restored.append(await conversation.ask(client))
                warm.append(await conversation.ask(client))
                if number % arguments.recompute_every == 0:
                    recomputed.append((number, await conversation.recompute(client)))

    async def go_on_together(url: str) -> None:
        async with client_of(url) as client:
            together.extend(await asyncio.gather(*(conversation.ask(client) for conversation in conversations)))

    seconds: dict[str, float] = {}
    known: list[list[int]] = []
    for name, work in (("begin", begin), ("go_on", go_on), ("go_on_together", go_on_together)):
        start_s = time.perf_counter()
        with serve_app(engine, fast_path=False, **others) as url:
            seconds[f"{name}_start_s"] = time.perf_counter() - start_s
            asyncio.run(work(url))
            known.append([conversation.turns[-1].num_known_tokens for conversation in conversations])
            start_s = time.perf_counter()
        seconds[f"{name}_stop_s"] = time.perf_counter() - start_s
        print(f"{name}: {disk_bytes(folder / 'kv') / 1e9:.2f} GB of files")

    def share(turns: list[Turn], before: list[int]) -> float:
        pairs = zip(turns, before, strict=True)
        return sum(min(turn.num_cached_tokens, num) for turn, num in pairs) / sum(before)

    def ratio(turns: list[Turn], others: list[Turn]) -> float:
        pairs = zip(turns, others, strict=True)
        return statistics.median(turn.first_token_s / other.first_token_s for turn, other in pairs)

    def times(turns: list[Turn]) -> dict[str, float]:
        values = sorted(turn.first_token_s for turn in turns)
        return {"p50_s": statistics.median(values), "p90_s": values[int(0.9 * (len(values) - 1))], "max_s": values[-1]}

    is_chat = [conversation.is_chat for conversation in conversations]
    pick = {
        "chats": [n for n, chat in enumerate(is_chat) if chat],
        "responses": [n for n, c in enumerate(is_chat) if not c],
    }
    figures: dict[str, Any] = {
        "num_context_tokens": sum(known[0]),
        "shortest": min(known[0]),
        "longest": max(known[0]),
        "cached_share": share(restored, known[0]),
        **{
            f"cached_share_of_{name}": share([restored[n] for n in numbers], [known[0][n] for n in numbers])
            for name, numbers in pick.items()
            if numbers
        },
        "least_cached_share": min(share([turn], [num]) for turn, num in zip(restored, known[0], strict=True)),
        "cached_share_together": share(together, known[1]),
        "restored_to_warm": ratio(restored, warm),
        "recomputed_to_restored": ratio([turn for _, turn in recomputed], [restored[n] for n, _ in recomputed]),
        "restored": times(restored),
        "warm": times(warm),
        "recomputed": times([turn for _, turn in recomputed]),
        "together": times(together),
        "most_cached_of_recomputed": max(turn.num_cached_tokens for _, turn in recomputed),
        **seconds,
    }
    holds = {
        "cached": figures["cached_share"] >= 1 - MAX_SHARE_LOST,
        "cached_together": figures["cached_share_together"] >= 1 - MAX_SHARE_LOST,
        "times_warm": figures["restored_to_warm"] <= MAX_TIMES_WARM,
        "times_faster": figures["recomputed_to_restored"] >= MIN_TIMES_FASTER,
    }
    turns = zip(restored, warm, together, strict=True)
    rows = [[[t.first_token_s, t.num_prompt_tokens, t.num_cached_tokens] for t in row] for row in turns]
    return {**figures, "holds": holds, "restored_warm_together": rows}


def disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def client_of(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=600)


if __name__ == "__main__":
    main()

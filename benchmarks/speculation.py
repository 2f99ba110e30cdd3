"""Tokens a second with speculation and without, side by side: agents' sessions, edits of code, text that quotes nothing.

The answers are given, so that a small model says what a capable one would: every token is computed, and then the recorded one
is chosen. Only steps that decode are timed. The two settings take turns, request by request.

    python -m benchmarks.speculation --tau tau_bench/airline_sessions.json

Rows take the place of those of the same cases in the file, so cases can be measured alone (`--models`, `--workloads`).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

from benchmarks.machine import RESULTS, write_result
from engine.config import EngineConfig
from engine.core.engine_core import RequestOutput
from engine.core.plan import StepPlan, StepResult
from engine.core.request import Request, SamplingParams
from engine.errors import EngineError
from engine.executor.local import LocalExecutor
from engine.make_core import make_core
from engine.model_files import model_location
from engine.step_loop import LookAhead, StepLoop

MODELS = (("smollm2", "bfloat16"), ("smollm2", "float32"), ("embedded", "float32"))
SETTINGS = {"off": None, "on": {"method": "ngram", "num_tokens": 8}}
BATCHES = (1, 4, 16)
MAX_CONTEXT = 1900
# Answers of agents' sessions, in tokens: with so many, a measurement has enough of them.
MIN_SESSION_TOKENS = 1500
WORKLOADS = ("first answers", "agent sessions", "edits", "random")


class Turn(NamedTuple):
    """A prompt and its answer, as token ids; is_call: the answer calls a tool."""

    prompt: list[int]
    answer: list[int]
    is_call: bool = False


# Turns that are asked for at once.
Group = list[Turn]
# Of the results.
Row = dict[str, object]


class Side:
    """One setting: an engine of its own, whose answers are given."""

    def __init__(self, model: str, dtype: str, speculative: dict[str, object] | None) -> None:
        config = EngineConfig.from_options(
            {"model": model, "dtype": dtype, "speculative": speculative, "chunk_size": 32, "num_gpu_blocks": 512}
        )
        self.executor = LocalExecutor(config)
        self.core = make_core(config, self.executor)
        self.max_steps_in_flight = 1
        self._loop = StepLoop(self.core, self, self, time.perf_counter, LookAhead.NOTHING)  # type: ignore[arg-type]
        self._turns: dict[str, Turn] = {}
        self._wanted: list[int] = []
        self._num_requests = self._num_new = 0
        self.executor.runner.see_logits = self._choose

    def execute(self, plan: StepPlan) -> StepResult:
        self._wanted = []
        for segment in plan.segments:
            prompt, answer, _ = self._turns[segment.request_id]
            first = segment.context_len - segment.num_guesses - len(prompt)
            self._wanted += [answer[min(first + i, len(answer) - 1)] for i in range(segment.num_chosen)]
        return self.executor.execute(plan)

    def _choose(self, logits: torch.Tensor) -> None:
        logits[range(len(self._wanted)), self._wanted] = 1e4

    def add(self, outputs: Iterable[RequestOutput]) -> None:
        self._num_new += len(list(outputs))

    def deliver(self) -> None:
        """There is no text to make."""

    def fail(self, request_ids: Iterable[str], error: EngineError) -> None:
        raise error

    def run(self, group: Group) -> tuple[int, float]:
        """(Tokens, seconds) of the steps that only decode."""
        for turn in group:
            self._num_requests += 1
            name = f"r{self._num_requests}"
            self._turns[name] = turn
            sampling = SamplingParams(temperature=0.0, max_tokens=len(turn.answer), ignore_eos=True)
            self.core.add_request(Request(name, turn.prompt, sampling), time.perf_counter())
        num_tokens, seconds = 0, 0.0
        while self.core.has_requests:
            self._num_new, begin_s = 0, time.perf_counter()
            plan = self._loop.step()
            if plan is not None and all(s.query_len == 1 + s.num_guesses for s in plan.segments):
                num_tokens += self._num_new
                seconds += time.perf_counter() - begin_s
        return num_tokens, seconds


def spoken(message: dict[str, Any]) -> str:
    """The text of a recorded message, with its calls as a model writes them."""
    said: str = message.get("content") or ""
    for call in message.get("tool_calls") or ():
        arguments = json.loads(call["function"]["arguments"])
        said += json.dumps({"name": call["function"]["name"], "arguments": arguments})
    return said


def first_answers(session: dict[str, Any], tokenizer: Any, window: int, num_turns: int) -> list[Turn]:
    """How a recorded agent begins its first session: nothing that it says has been said before."""
    turns: list[Turn] = []
    text = ""
    for message in session["traj"]:
        said = spoken(message)
        answer = tokenizer.encode(said)
        if message["role"] == "assistant" and len(answer) > 8 and len(turns) < num_turns:
            turns.append(Turn(tokenizer.encode(text)[-(window - 300) :], answer[:256]))
        text += f"<|im_start|>{message['role']}\n{said}<|im_end|>\n"
    return turns


def whole_session(session: dict[str, Any], tokenizer: Any) -> list[Turn]:
    """All answers of a recorded agent, each behind all that was said before."""
    turns = []
    text = ""
    for message in session["traj"]:
        said = spoken(message)
        text += f"<|im_start|>{message['role']}\n"
        if message["role"] == "assistant":
            is_call = bool(message.get("tool_calls"))
            turns.append(Turn(tokenizer.encode(text), tokenizer.encode(said + "<|im_end|>"), is_call))
        text += f"{said}<|im_end|>\n"
    return turns


def sessions(
    recorded: Iterable[dict[str, Any]], tokenizer: Any, window: int, batch: int, num_tokens: int
) -> Iterator[Group]:
    """Sessions in their order, so many side by side, until their answers have so many tokens."""
    waiting: list[list[Turn]] = []
    for session in recorded:
        turns = whole_session(session, tokenizer)
        if max(len(turn.prompt) + len(turn.answer) for turn in turns) <= window:
            waiting.append(turns)
        if len(waiting) == batch:
            for group in zip_longest(*waiting):
                yield [turn for turn in group if turn is not None]
            num_tokens -= sum(len(turn.answer) for turns in waiting for turn in turns)
            waiting = []
        if num_tokens <= 0:
            return


def edits(tokenizer: Any, rng: random.Random, window: int, num_turns: int) -> list[Turn]:
    """A file, and the same with a name changed in it and a line added."""
    words = ["load", "save", "parse", "render", "update", "check", "count", "merge", "order", "price", "user", "item"]
    turns = []
    for _ in range(num_turns):
        lines = []
        for _ in range(6):
            a, b, c = rng.sample(words, 3)
            lines += [f"def {a}_{b}({c}, limit={rng.randint(2, 99)}):", f"    {b} = {a}({c})[:limit]"]
            lines += [f"    if not {b}:", f'        raise ValueError("no {b} in {c}")', f"    return {b}", ""]
        old, new = rng.sample(words, 2)
        changed = [line.replace(old, new) for line in lines]
        changed.insert(rng.randrange(len(changed)), "    # checked by hand")
        answer = tokenizer.encode("\n".join(changed))[: (window - 64) // 2]
        prompt = tokenizer.encode("\n".join(lines) + f"\nRename {old} to {new}.\n")[-(window - len(answer) - 8) :]
        turns.append(Turn(prompt, answer))
    return turns


def random_text(vocab_size: int, rng: random.Random, num_turns: int) -> list[Turn]:
    """Nothing that can be guessed."""
    return [Turn(rng.choices(range(vocab_size), k=100), rng.choices(range(vocab_size), k=60)) for _ in range(num_turns)]


def groups_of(turns: list[Turn], batch: int) -> list[Group]:
    """So many at once."""
    return [turns[start : start + batch] for start in range(0, len(turns), batch)]


def measure(
    model: str, dtype: str, recorded: list[dict[str, Any]], workloads: Sequence[str], num_rounds: int
) -> Iterator[Row]:
    """A row for each workload and batch size, and for the calls of sessions alone."""
    sides = {name: Side(model, dtype, speculative) for name, speculative in SETTINGS.items()}
    tokenizer = AutoTokenizer.from_pretrained(model_location(model))
    facts = sides["on"].executor.facts.model
    window = min(facts.max_model_len, MAX_CONTEXT)
    rng = random.Random(0)
    for side in sides.values():
        side.run(random_text(facts.vocab_size, random.Random(1), 2))
    first, *others = recorded  # what was answered in one measurement is not asked for in the next
    cases: list[tuple[str, int, Iterable[Group]]] = [
        ("first answers", 1, groups_of(first_answers(first, tokenizer, window, 2 * num_rounds), 1)),
    ]
    for start, batch in ((0, 1), (len(others) // 2, 4)):
        told = sessions(others[start:], tokenizer, facts.max_model_len, batch, MIN_SESSION_TOKENS)
        cases.append(("agent sessions", batch, told))
    for batch in BATCHES:
        cases.append(("edits", batch, groups_of(edits(tokenizer, rng, window, batch * num_rounds), batch)))
    for batch in BATCHES:
        texts = random_text(facts.vocab_size, rng, 2 * batch * num_rounds)
        cases.append(("random", batch, groups_of(texts, batch)))
    for workload, batch, groups in cases:
        if workload in workloads:
            head: Row = {"model": model, "dtype": dtype, "workload": workload, "batch": batch}
            yield from measure_case(sides, groups, head)


def measure_case(sides: dict[str, Side], groups: Iterable[Group], head: Row) -> Iterator[Row]:
    """What came of these groups; of those that are one call, once more alone."""
    tallies = {name: Tally() for name in ("", ", calls")}
    for number, group in enumerate(groups):
        names = ["", ", calls"] if len(group) == 1 and group[0].is_call else [""]
        before = sides["on"].core.get_statistics()
        for side in list(sides) if number % 2 else list(reversed(sides)):
            num_tokens, seconds = sides[side].run(group)
            for name in names:
                tallies[name].note_time(side, num_tokens, seconds)
        after = sides["on"].core.get_statistics()
        for name in names:
            tallies[name].num_guessed += after["num_guessed_tokens"] - before["num_guessed_tokens"]
            tallies[name].num_accepted += after["num_accepted_tokens"] - before["num_accepted_tokens"]
    for name, tally in tallies.items():
        if tally.num_tokens["on"]:
            yield head | {"workload": f"{head['workload']}{name}"} | tally.row()


class Tally:
    """Tokens and seconds of both sides."""

    def __init__(self) -> None:
        self.num_tokens = dict.fromkeys(SETTINGS, 0)
        self._seconds = dict.fromkeys(SETTINGS, 0.0)
        self.num_guessed = self.num_accepted = 0.0

    def note_time(self, side: str, num_tokens: int, seconds: float) -> None:
        """One side has answered so much."""
        self.num_tokens[side] += num_tokens
        self._seconds[side] += seconds

    def row(self) -> Row:
        """Of the results."""
        rates = {side: self.num_tokens[side] / seconds for side, seconds in self._seconds.items()}
        return {
            "num_tokens": self.num_tokens["on"],
            "num_guessed_tokens": int(self.num_guessed),
            "num_accepted_tokens": int(self.num_accepted),
            **{f"tokens_per_s_{side}": round(rate, 1) for side, rate in rates.items()},
            "ratio": round(rates["on"] / rates["off"], 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tau", type=Path, required=True, help="airline_sessions.json of tau-bench")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of speculation.json")
    parser.add_argument("--models", nargs="+", choices=[":".join(model) for model in MODELS])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    recorded = json.loads(arguments.tau.read_text())
    path = arguments.output / "speculation.json"
    rows: dict[tuple[object, ...], Row] = {}
    for row in json.loads(path.read_text())["rows"] if path.exists() else ():
        rows[case_of(row)] = row
    for model, dtype in MODELS:
        if arguments.models is None or f"{model}:{dtype}" in arguments.models:
            for row in measure(model, dtype, recorded, arguments.workloads, arguments.rounds):
                print(row, flush=True)
                rows[case_of(row)] = row
                write_result("speculation", {"rows": list(rows.values())}, arguments.output)


def case_of(row: Row) -> tuple[object, ...]:
    """What a row is about."""
    return tuple(row[name] for name in ("model", "dtype", "workload", "batch"))


if __name__ == "__main__":
    main()

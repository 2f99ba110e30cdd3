"""Tokens a second with speculation and without, side by side: tool calls, edits of code, and text that quotes nothing.

The answers are given, so that a small model says what a capable one would: every token is computed, and then the recorded one
is chosen. Only steps that decode are timed. The two settings take turns, request by request.

    python -m benchmarks.speculation --output benchmarks/results/speculation.json --tau tau_bench/airline_sessions.json
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

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
# A prompt and its answer, as token ids.
Turn = tuple[list[int], list[int]]


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
            prompt, answer = self._turns[segment.request_id]
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

    def run(self, turns: list[Turn]) -> tuple[int, float]:
        """All at once. (Tokens, seconds) of the steps that only decode."""
        for prompt, answer in turns:
            self._num_requests += 1
            name = f"r{self._num_requests}"
            self._turns[name] = prompt, answer
            sampling = SamplingParams(temperature=0.0, max_tokens=len(answer))
            self.core.add_request(Request(name, prompt, sampling), time.perf_counter())
        num_tokens, seconds = 0, 0.0
        while self.core.has_requests:
            self._num_new, begin_s = 0, time.perf_counter()
            plan = self._loop.step()
            if plan is not None and all(s.query_len == 1 + s.num_guesses for s in plan.segments):
                num_tokens += self._num_new
                seconds += time.perf_counter() - begin_s
        return num_tokens, seconds


def tool_calls(path: Path, tokenizer: Any, window: int, num_turns: int) -> list[Turn]:
    """Answers of recorded agents, calls of tools included, with the end of the session in front of them."""
    turns: list[Turn] = []
    for session in json.loads(path.read_text()):
        text = ""
        for message in session["traj"]:
            said = message.get("content") or ""
            for call in message.get("tool_calls") or ():
                arguments = json.loads(call["function"]["arguments"])
                said += json.dumps({"name": call["function"]["name"], "arguments": arguments})
            answer = tokenizer.encode(said)
            if message["role"] == "assistant" and len(answer) > 8 and message is not session["traj"][1]:
                turns.append((tokenizer.encode(text)[-(window - 300) :], answer[:256]))
            text += f"<|im_start|>{message['role']}\n{said}<|im_end|>\n"
            if len(turns) == num_turns:
                return turns
    return turns


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
        turns.append((prompt, answer))
    return turns


def random_text(vocab_size: int, rng: random.Random, num_turns: int) -> list[Turn]:
    """Nothing that can be guessed."""
    return [(rng.choices(range(vocab_size), k=100), rng.choices(range(vocab_size), k=60)) for _ in range(num_turns)]


def measure(model: str, dtype: str, tau: Path, num_rounds: int) -> list[dict[str, object]]:
    """A row for each workload and batch size."""
    sides = {name: Side(model, dtype, speculative) for name, speculative in SETTINGS.items()}
    tokenizer = AutoTokenizer.from_pretrained(model_location(model))
    facts = sides["on"].executor.facts.model
    window = min(facts.max_model_len, MAX_CONTEXT)
    rng = random.Random(0)
    rows: list[dict[str, object]] = []
    for side in sides.values():
        side.run(random_text(facts.vocab_size, random.Random(1), 2))
    for workload, batches in (("tool calls", (1,)), ("edits", (1, 4)), ("random", BATCHES)):
        for batch in batches:
            if workload == "tool calls":
                turns = tool_calls(tau, tokenizer, window, 2 * num_rounds)
            elif workload == "edits":
                turns = edits(tokenizer, rng, window, batch * num_rounds)
            else:
                turns = random_text(facts.vocab_size, rng, batch * max(2, num_rounds))
            took = {name: [0, 0.0] for name in sides}
            before = sides["on"].core.get_statistics()
            for number, start in enumerate(range(0, len(turns), batch)):
                order = list(sides) if number % 2 else list(reversed(sides))
                for name in order:
                    num_tokens, seconds = sides[name].run(turns[start : start + batch])
                    took[name][0] += num_tokens
                    took[name][1] += seconds
            after = sides["on"].core.get_statistics()
            rates = {name: num_tokens / seconds for name, (num_tokens, seconds) in took.items()}
            counts = {key: after[key] - before[key] for key in ("num_guessed_tokens", "num_accepted_tokens")}
            rows.append(
                {
                    "model": model,
                    "dtype": dtype,
                    "workload": workload,
                    "batch": batch,
                    "num_tokens": took["on"][0],
                    **counts,
                    **{f"tokens_per_s_{name}": round(rate, 1) for name, rate in rates.items()},
                    "ratio": round(rates["on"] / rates["off"], 3),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tau", type=Path, required=True, help="airline_sessions.json of tau-bench")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for model, dtype in MODELS:
        rows += measure(model, dtype, arguments.tau, arguments.rounds)
        if arguments.output is not None:
            arguments.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

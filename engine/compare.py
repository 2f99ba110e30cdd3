"""The same conversation with and without the cache, in one process, turn by turn, several times over.

The two modes take turns, so that a busy machine slows both alike, and both are given the same messages: if their answers
differ (in bfloat16 they may, by rounding), both go on from the answer of the mode with the cache.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.core.request import SamplingParams
from engine.dialogue.messages import Message
from engine.errors import ContextLengthError
from engine.server import Answer, Server, create_server
from engine.tenant import Tenant
from engine.text.prompt import ChatPrompt

# Things to remember, each in a message of some length, so that there is something to compute again without a cache.
DEMO_CONVERSATION = (
    "My name is Ada. I work in a library by the sea, where the windows rattle in winter and the heating is always"
    " either off or much too warm. Most of the people who come in want to read the newspaper, and a few of them "
    "want to talk.",
    "My cat is called Mia. She came to us one evening in the rain, sat down on the best chair in the kitchen, and"
    " has never been seen to leave it since, unless somebody opens a tin or the neighbour's dog goes by under the"
    " window.",
    "The code of my locker is 4711. I keep my coat in there, an umbrella that does not open, a pair of shoes for "
    "the garden behind the library, and two books that I should have brought back to the shelves a long time ago.",
    "My favourite colour is green. The front door is green, the bicycle is green, and so are most of the plates; "
    "my brother says that one day I am going to lose myself in the garden and nobody will be able to find me "
    "again.",
    "My brother is named Tom. He lives on the other side of the harbour and builds boats that are too small for "
    "the sea and too large for the bath, and every summer one of them sinks with everything that was on it.",
    "What is my cat called?",
    "What is the code of my locker?",
    "What is my favourite colour?",
    "Who is my brother?",
    "What is my name?",
)


# Answers of the round before the first one that counts are cut to so many tokens.
NUM_WARM_UP_TOKENS = 8
# Least time between two lines about the progress when they go to a file, in seconds.
PROGRESS_INTERVAL_S = 15.0


@dataclass(frozen=True, slots=True)
class TurnComparison:
    """One turn in both modes; times and rates are medians over the rounds.

    num_prompt_tokens: of the whole conversation so far, the new message included.
    num_computed_tokens, num_cached_tokens: of these, how many pensieve computed, and how many it had kept.
    num_output_tokens: of pensieve's answer.
    pensieve_ttft_s, stateless_ttft_s: from the message to the first token of the answer.
    pensieve_tokens_per_s, stateless_tokens_per_s: tokens of the answer over the time from the message to its end.
    speed_up: stateless over pensieve, time to first token.
    is_identical: the answers are the same in each round, token for token.
    """

    turn: int
    num_prompt_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    pensieve_ttft_s: float
    stateless_ttft_s: float
    pensieve_tokens_per_s: float
    stateless_tokens_per_s: float
    speed_up: float
    is_identical: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """All turns of one conversation.

    is_identical: every answer was the same, token for token.
    is_complete: no turn was left out for want of window.
    """

    model: str
    num_rounds: int
    turns: tuple[TurnComparison, ...]
    is_identical: bool
    is_complete: bool


def compare_modes(
    options: dict[str, Any], turns: Sequence[str], sampling: SamplingParams, num_rounds: int = 3
) -> Comparison:
    """Hold one conversation with a pensieve and a stateless engine of the same options, several times.

    options: of the engines, as create_server takes them.
    turns: the user's messages. If the window is full, the rest of them is left out.
    num_rounds: times that the whole conversation is held. Once before that it is held with short answers, uncounted,
        because some things are slow only the first time.

    Shows its progress on standard error. Raises as create_server.
    """
    num_turns = len(turns)
    warm_up = replace(sampling, max_tokens=min(NUM_WARM_UP_TOKENS, sampling.max_tokens or NUM_WARM_UP_TOKENS))
    with (
        create_server(**{**options, "mode": "pensieve"}) as kept,
        create_server(**{**options, "mode": "stateless"}) as fresh,
        tqdm(
            total=(num_rounds + 1) * 2 * num_turns,
            unit="answer",
            mininterval=0.1 if sys.stderr.isatty() else PROGRESS_INTERVAL_S,
        ) as progress,
    ):
        rounds: list[list[tuple[Answer, Answer]]] = []
        for number in range(num_rounds + 1):
            progress.set_description(f"round {number} of {num_rounds}" if number else "warming up")
            rounds.append(_run_round(kept, fresh, turns, sampling if number else warm_up, number, progress))
        model = kept.engine.model_name
    results = tuple(_compare_turn(number, answers) for number, answers in enumerate(zip(*rounds[1:], strict=False), 1))
    is_identical = all(turn.is_identical for turn in results)
    return Comparison(model, num_rounds, results, is_identical, len(results) == num_turns)


def _run_round(
    kept: Server, fresh: Server, turns: Sequence[str], sampling: SamplingParams, number: int, progress: tqdm[Any]
) -> list[tuple[Answer, Answer]]:
    """The answers of both modes, turn by turn, as far as the window holds them.

    number: of the round. A tenant of its own finds nothing of the rounds before in the cache.
    """
    tenant = Tenant(f"round {number}")
    messages: list[Message] = []
    answers: list[tuple[Answer, Answer]] = []
    for turn, text in enumerate(turns):
        messages.append(Message("user", text))
        given: dict[Server, Answer] = {}
        for server in (kept, fresh) if (turn + number) % 2 else (fresh, kept):
            try:
                given[server] = server.complete(ChatPrompt(tuple(messages)), sampling, "compare", tenant=tenant)
            except ContextLengthError:
                return answers
            progress.update()
        messages.append(Message("assistant", given[kept].text))
        answers.append((given[kept], given[fresh]))
    return answers


def _compare_turn(number: int, answers: Sequence[tuple[Answer, Answer]]) -> TurnComparison:
    """One turn of all rounds."""
    ours, theirs = zip(*answers, strict=True)
    pensieve_ttft_s, stateless_ttft_s = (statistics.median(answer.ttft_s for answer in side) for side in (ours, theirs))
    pensieve_tokens_per_s, stateless_tokens_per_s = (
        statistics.median(len(answer.token_ids) / answer.total_s for answer in side) for side in (ours, theirs)
    )
    return TurnComparison(
        turn=number,
        num_prompt_tokens=ours[0].num_prompt_tokens,
        num_computed_tokens=ours[0].num_computed_tokens,
        num_cached_tokens=ours[0].num_cached_tokens,
        num_output_tokens=len(ours[0].token_ids),
        pensieve_ttft_s=pensieve_ttft_s,
        stateless_ttft_s=stateless_ttft_s,
        pensieve_tokens_per_s=pensieve_tokens_per_s,
        stateless_tokens_per_s=stateless_tokens_per_s,
        speed_up=stateless_ttft_s / pensieve_ttft_s,
        is_identical=all(kept.token_ids == fresh.token_ids for kept, fresh in answers),
    )


def format_table(comparison: Comparison) -> str:
    """What is compared, a line for each turn, and a verdict, for a terminal of 80 columns."""
    times = "once" if comparison.num_rounds == 1 else f"{comparison.num_rounds} times (medians)"
    lines = [
        f"{comparison.model}: one conversation, held {times}",
        "With the cache, what earlier turns computed is kept; without it, each turn",
        "computes the whole conversation again. tokens/s: tokens of the answer over the",
        "time from the question to the last of them.",
        "",
        "         prompt tokens    time to first token               tokens/s",
        "turn   in all computed    cache   no cache faster      cache no cache  answers",
    ]
    for turn in comparison.turns:
        lines.append(
            f"{turn.turn:>4} {turn.num_prompt_tokens:>8} {turn.num_computed_tokens:>8} "
            f"{turn.pensieve_ttft_s * 1e3:>6.0f} ms {turn.stateless_ttft_s * 1e3:>7.0f} ms {turn.speed_up:>5.1f}x "
            f"{turn.pensieve_tokens_per_s:>10.1f} {turn.stateless_tokens_per_s:>8.1f}  "
            f"{'same' if turn.is_identical else 'differ'}"
        )
    lines.append("")
    if not comparison.is_complete:
        lines.append("The context window is full: the remaining turns were left out.")
    if comparison.is_identical:
        lines.append("All answers are the same with the cache and without, token for token.")
    else:
        num_different = sum(not turn.is_identical for turn in comparison.turns)
        lines += [
            f"{num_different} of {len(comparison.turns)} answers differ. In bfloat16 and float16 that is rounding: it",
            "depends on how many tokens are computed at once, and decides between two tokens",
            "that are about equally good. With --dtype float32 the answers are the same; if",
            "they differ there, too, please report it.",
        ]
    return "\n".join(lines)


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Time to first token and computed tokens by turn, as a PNG."""
    import matplotlib.figure  # slow to import, and only a plot needs it

    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = [turn.turn for turn in comparison.turns]
    left.plot(numbers, [turn.stateless_ttft_s * 1e3 for turn in comparison.turns], "o-", label="without the cache")
    left.plot(numbers, [turn.pensieve_ttft_s * 1e3 for turn in comparison.turns], "o-", label="with the cache")
    left.set(xlabel="turn", ylabel="ms", title="time to first token", ylim=(0, None))
    right.plot(numbers, [turn.num_prompt_tokens for turn in comparison.turns], "o-", label="without the cache")
    right.plot(numbers, [turn.num_computed_tokens for turn in comparison.turns], "o-", label="with the cache")
    right.set(xlabel="turn", ylabel="tokens", title="prompt tokens computed", ylim=(0, None))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(comparison.model)
    figure.savefig(path, dpi=120)

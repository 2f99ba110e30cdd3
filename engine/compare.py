"""The same conversation in both modes, in one process, turn by turn, several times over. The turns of the two modes
alternate, so that a busy machine slows both alike.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.core.request import SamplingParams
from engine.errors import ContextLengthError
from engine.server import Answer, Server, create_server
from engine.tenant import Tenant

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


@dataclass(frozen=True, slots=True)
class TurnComparison:
    """One turn in both modes. Times in seconds, medians. `speed_up`: stateless over pensieve, time to first token."""

    turn: int
    num_prompt_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    pensieve_ttft_s: float
    stateless_ttft_s: float
    speed_up: float
    is_identical: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """is_identical: every answer was the same, token for token. is_complete: no turn was left out for want of window."""

    model: str
    turns: tuple[TurnComparison, ...]
    is_identical: bool
    is_complete: bool


def compare_modes(
    options: dict[str, Any], turns: Sequence[str], sampling: SamplingParams, num_rounds: int = 3
) -> Comparison:
    """Hold the conversation of `turns` (user messages) with a pensieve and a stateless engine of the same options,
    `num_rounds` times and once before that, uncounted: whatever is slow only the first time is slow then. If the window is
    full, the rest of the turns is left out. Raises as create_server."""
    num_turns = len(turns)
    with (
        create_server(**{**options, "mode": "pensieve"}) as kept,
        create_server(**{**options, "mode": "stateless"}) as fresh,
        tqdm(
            total=(num_rounds + 1) * num_turns, desc="turns", unit="turn", disable=not sys.stderr.isatty()
        ) as progress,
    ):
        rounds = []
        for number in range(num_rounds + 1):
            rounds.append(_run_round(kept, fresh, turns, sampling, number, progress))
            turns = turns[: len(rounds[0])]
        model = kept.engine.model_name
    results = tuple(_compare_turn(number, answers) for number, answers in enumerate(zip(*rounds[1:], strict=True), 1))
    return Comparison(model, results, all(turn.is_identical for turn in results), len(turns) == num_turns)


def _run_round(
    kept: Server, fresh: Server, turns: Sequence[str], sampling: SamplingParams, number: int, progress: tqdm[Any]
) -> list[tuple[Answer, Answer]]:
    """The answers of both modes, turn by turn, as far as the window holds them. A tenant of its own finds nothing of the
    rounds before in the cache."""
    tenant = Tenant(f"round {number}")
    answers: list[tuple[Answer, Answer]] = []
    for turn, text in enumerate(turns):
        order = (kept, fresh) if (turn + number) % 2 else (fresh, kept)
        try:
            given = {server: server.chat(f"compare {number}", text, sampling, tenant=tenant) for server in order}
        except ContextLengthError:
            break
        answers.append((given[kept], given[fresh]))
        progress.update()
    return answers


def _compare_turn(number: int, answers: Sequence[tuple[Answer, Answer]]) -> TurnComparison:
    """One turn of all rounds."""
    ours, theirs = (statistics.median(answer.ttft_s for answer in column) for column in zip(*answers, strict=True))
    first = answers[0][0]
    return TurnComparison(
        turn=number,
        num_prompt_tokens=first.num_prompt_tokens,
        num_computed_tokens=first.num_computed_tokens,
        num_cached_tokens=first.num_cached_tokens,
        pensieve_ttft_s=ours,
        stateless_ttft_s=theirs,
        speed_up=theirs / ours,
        is_identical=all(kept.token_ids == fresh.token_ids for kept, fresh in answers),
    )


def format_table(comparison: Comparison) -> str:
    """For people: a line per turn and a verdict."""
    lines = [f"{comparison.model}: one conversation, both modes (TTFT = time to first token)"]
    lines.append(
        f"{'turn':>4} {'prompt':>7} {'computed':>9} {'cached':>7} {'pensieve TTFT':>14} {'stateless TTFT':>15} "
        f"{'speed-up':>9}  identical"
    )
    for turn in comparison.turns:
        lines.append(
            f"{turn.turn:>4} {turn.num_prompt_tokens:>7} {turn.num_computed_tokens:>9} {turn.num_cached_tokens:>7} "
            f"{turn.pensieve_ttft_s * 1e3:>11.1f} ms {turn.stateless_ttft_s * 1e3:>12.1f} ms {turn.speed_up:>8.1f}x  "
            f"{'yes' if turn.is_identical else 'NO'}"
        )
    if not comparison.is_complete:
        lines.append("the context window is full: the remaining turns were left out")
    lines.append("outputs are identical" if comparison.is_identical else "OUTPUTS DIFFER")
    return "\n".join(lines)


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Time to first token and computed tokens by turn, as a PNG."""
    import matplotlib.figure  # slow to import, and only a plot needs it

    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = [turn.turn for turn in comparison.turns]
    left.plot(numbers, [turn.stateless_ttft_s * 1e3 for turn in comparison.turns], "o-", label="stateless")
    left.plot(numbers, [turn.pensieve_ttft_s * 1e3 for turn in comparison.turns], "o-", label="pensieve")
    left.set(xlabel="turn", ylabel="ms", title="time to first token", ylim=(0, None))
    right.plot(numbers, [turn.num_prompt_tokens for turn in comparison.turns], "o-", label="stateless")
    right.plot(numbers, [turn.num_computed_tokens for turn in comparison.turns], "o-", label="pensieve")
    right.set(xlabel="turn", ylabel="tokens", title="prompt tokens computed", ylim=(0, None))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(comparison.model)
    figure.savefig(path, dpi=120)

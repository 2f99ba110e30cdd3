"""The same conversation in both modes, in one process, turn by turn. The turns of the two modes alternate, so that a busy
machine slows both alike.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.core.request import SamplingParams
from engine.errors import ContextLengthError
from engine.server import Answer, create_server


@dataclass(frozen=True, slots=True)
class TurnComparison:
    """One turn in both modes. Times in seconds. `speed_up`: stateless over pensieve, time to first token."""

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


def compare_modes(options: dict[str, Any], turns: Sequence[str], sampling: SamplingParams) -> Comparison:
    """Run `turns` (user messages) through a pensieve and a stateless engine of the same options. Where the window is full
    the rest of the turns is left out. Raises as create_server."""
    results: list[TurnComparison] = []
    is_complete = True
    with (
        create_server(**{**options, "mode": "pensieve"}) as kept,
        create_server(**{**options, "mode": "stateless"}) as fresh,
    ):
        for server in (kept, fresh):  # the first forward of a process pays for everybody's allocations
            # Backwards: as long as the first turn, and not found in the cache when that comes.
            server.chat("warm-up", turns[0][::-1], SamplingParams(temperature=0.0, max_tokens=2))
        progress = tqdm(turns, desc="turns", unit="turn", disable=not sys.stderr.isatty())
        for number, text in enumerate(progress, 1):
            servers = (kept, fresh) if number % 2 else (fresh, kept)
            try:
                answers: dict[str, Answer] = {s.engine.config.mode: s.chat("compare", text, sampling) for s in servers}
            except ContextLengthError:
                is_complete = False
                break
            ours, theirs = answers["pensieve"], answers["stateless"]
            results.append(
                TurnComparison(
                    turn=number,
                    num_prompt_tokens=ours.num_prompt_tokens,
                    num_computed_tokens=ours.num_computed_tokens,
                    num_cached_tokens=ours.num_cached_tokens,
                    pensieve_ttft_s=ours.ttft_s,
                    stateless_ttft_s=theirs.ttft_s,
                    speed_up=theirs.ttft_s / ours.ttft_s,
                    is_identical=ours.token_ids == theirs.token_ids,
                )
            )
        model = kept.engine.model_name
    return Comparison(model, tuple(results), all(turn.is_identical for turn in results), is_complete)


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

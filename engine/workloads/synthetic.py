"""Sessions drawn from distributions; ShareGPT and UltraChat by the statistics that the paper gives of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.workloads.distributions import Constant, Distribution, Exponential, Lognormal, sample_count
from engine.workloads.session import Session, Span, Turn


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What some turns are: the result of a call of this tool.

    share: of the turns after a session's first; the shares of all tools are at most 1 together.
    pause_s: how long the tool runs. result_tokens: of what comes back.
    """

    name: str
    share: float
    pause_s: Distribution
    result_tokens: Distribution


@dataclass(frozen=True, slots=True)
class Synthetic:
    """What sessions are drawn from.

    turns, new_tokens, output_tokens: counts; of the user's turns.
    think_s: from an answer until the user asks on.
    num_tenants: sessions are of one of these, tenant k with a weight of 1 / (k + 1) ** tenant_skew.
    prefix_tokens: that all sessions of a tenant begin with, such as a system prompt.
    max_context_len: a session ends before the turn that would pass it.
    """

    num_sessions: int
    turns: Distribution
    new_tokens: Distribution
    output_tokens: Distribution
    think_s: Distribution = field(default_factory=lambda: Exponential(60.0))
    tools: tuple[ToolUse, ...] = ()
    num_tenants: int = 1
    tenant_skew: float = 0.0
    prefix_tokens: Distribution = field(default_factory=lambda: Constant(0.0))
    max_context_len: int = 16_384


# The paper gives means only. The spreads are named here, once: of turns as in the fit of its Figure 10a.
TURN_SIGMA, LENGTH_SIGMA = 0.6, 1.0


def sharegpt(num_sessions: int) -> Synthetic:
    """As many turns and tokens as the paper counts in ShareGPT: 5.56 turns, 37.77 tokens in, 204.58 out."""
    return _by_means(num_sessions, 5.56, 37.77, 204.58)


def ultrachat(num_sessions: int) -> Synthetic:
    """As many turns and tokens as the paper counts in UltraChat: 3.86 turns, 51.78 tokens in, 257.81 out."""
    return _by_means(num_sessions, 3.86, 51.78, 257.81)


def _by_means(num_sessions: int, turns: float, new_tokens: float, output_tokens: float) -> Synthetic:
    return Synthetic(
        num_sessions,
        Lognormal(turns, TURN_SIGMA),
        Lognormal(new_tokens, LENGTH_SIGMA),
        Lognormal(output_tokens, LENGTH_SIGMA),
    )


def draw_sessions(spec: Synthetic, seed: int = 0) -> Iterator[Session]:
    """The sessions, one at a time; each depends on the seed and its number alone, not on how many there are."""
    prefixes = [
        round(spec.prefix_tokens.sample(random.Random(f"{seed}.prefix.{tenant}"))) for tenant in range(spec.num_tenants)
    ]
    weights = list(itertools.accumulate((tenant + 1.0) ** -spec.tenant_skew for tenant in range(spec.num_tenants)))
    for number in range(spec.num_sessions):
        rng = random.Random(f"{seed}.{number}")
        tenant = rng.choices(range(spec.num_tenants), cum_weights=weights)[0]
        prefix = (Span(tenant, prefixes[tenant]),) if prefixes[tenant] else ()
        turns = tuple(_draw_turns(spec, rng, prefix, stream=spec.num_tenants + number))
        yield Session(f"session-{number}", turns, tenant=f"tenant-{tenant}")


def _draw_turns(spec: Synthetic, rng: random.Random, prefix: tuple[Span, ...], stream: int) -> Iterator[Turn]:
    """The first turn is cut to the window; the others are left out if they do not fit."""
    context_len = sum(span.num_tokens for span in prefix)
    num_used = 0
    for number in range(sample_count(spec.turns, rng)):
        tool = None if number == 0 else _choose_tool(spec.tools, rng)
        pause_s = 0.0 if number == 0 else (spec.think_s if tool is None else tool.pause_s).sample(rng)
        num_new = sample_count(spec.new_tokens if tool is None else tool.result_tokens, rng)
        num_output = sample_count(spec.output_tokens, rng)
        if context_len + num_new + num_output > spec.max_context_len:
            if number:
                return
            num_output = max(1, min(num_output, spec.max_context_len // 2))
            num_new = max(1, spec.max_context_len - context_len - num_output)
        spans = (*(prefix if number == 0 else ()), Span(stream, num_new, num_used))
        yield Turn(spans, num_output, pause_s, "user" if tool is None else "tool", "" if tool is None else tool.name)
        context_len += num_new + num_output
        num_used += num_new


def _choose_tool(tools: tuple[ToolUse, ...], rng: random.Random) -> ToolUse | None:
    if not tools:
        return None
    point = rng.random()
    for tool in tools:
        point -= tool.share
        if point < 0:
            return tool
    return None

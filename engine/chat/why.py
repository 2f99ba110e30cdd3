"""How an answer came about, for people: what `/why` prints of an explanation, see docs/http_api.md.

The explanation may be of a server that is not this one: what is not as expected is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.core.tier_table import tier_title

# What the time went to, by phase.
PHASES = {
    "lost": "on replicas that were full or lost",
    "route": "on the way to the replica and back",
    "prepare": "the prompt was read",
    "queue": "it waited for its turn",
    "load": "KV came from a slow tier",
    "prefill": "until the first token",
    "decode": "until the last token",
    "suspended": "it gave way to others",
}
# Why tokens of the prompt were computed, besides that a tier dropped them.
REASONS = {
    "new": "never cached before",
    "not_loaded": "cached, but computed faster than loaded",
    "released": "released by a hint",
    "failed": "a transfer failed",
    "peer_gone": "another replica had them, and no longer has",
    "stateless": "nothing is kept in this mode",
}
# Why the conversation's own tokens did not count as cached: its prompt had others.
RECOMPUTED = {
    "edited": "the history was changed",
    "retokenised": "the template writes an answer in other words",
    "template_dropped": "the template leaves out what was thought",
    "tools_changed": "the tools were changed",
    "truncated": "the oldest messages were left out",
}
_DROPPED = "_dropped"
# More is no number of tokens or seconds.
MOST = 1e15


def describe_why(explanation: Mapping[str, Any]) -> str:
    """Times by phase, then tokens of the prompt by where they came from; a line each."""
    seconds = _numbers(explanation, "seconds")
    cached = _numbers(explanation, "cached_tokens_by_tier")
    computed = _numbers(explanation, "computed_tokens_by_reason")
    recomputed = _numbers(explanation, "recomputed")
    lines = _table(
        f"{sum(seconds.values()) * 1e3:.1f} ms",
        {name: (f"{value * 1e3:.1f} ms", PHASES.get(name, "")) for name, value in seconds.items() if value},
    )
    lines += _table(
        f"{sum(cached.values()) + sum(computed.values()):.0f} tokens of the prompt",
        {f"cached {tier}": (f"{count:.0f}", f"found in the {tier_title(tier)} tier") for tier, count in cached.items()}
        | {f"computed {name}": (f"{count:.0f}", _reason(name)) for name, count in computed.items()},
    )
    lines += [
        f"{count:.0f} of the computed ones were said before: {RECOMPUTED.get(reason, reason)}"
        for reason, count in recomputed.items()
    ]
    if isinstance(replica := explanation.get("replica"), int):
        home = {True: ", where this session belongs", False: ", where this session does not belong"}
        is_home = explanation.get("home")
        lines.append(f"replica {replica}{home[is_home] if isinstance(is_home, bool) else ''}")
    for name, text in (("lost_replicas", "lost before it was complete"), ("suspensions", "suspended")):
        if isinstance(count := explanation.get(name), int) and count:
            lines.append(f"{text}: {count}")
    return "\n".join(lines)


def _reason(name: str) -> str:
    if name.endswith(_DROPPED):
        return f"evicted from the {tier_title(name.removesuffix(_DROPPED))} tier"
    return REASONS.get(name, "")


def _table(title: str, rows: Mapping[str, tuple[str, str]]) -> list[str]:
    """The title, then each row as name, value and what it means, in columns."""
    names = max(map(len, rows), default=0)
    values = max((len(value) for value, _ in rows.values()), default=0)
    return [
        title,
        *(f"  {name:<{names}}  {value:>{values}}  {meaning}".rstrip() for name, (value, meaning) in rows.items()),
    ]


def _numbers(explanation: Mapping[str, Any], name: str) -> dict[str, float]:
    told = explanation.get(name)
    if not isinstance(told, Mapping):
        return {}
    return {
        name: value
        for name, value in told.items()
        if type(value) in (int, float) and 0 <= value < MOST and str(name).isidentifier()
    }

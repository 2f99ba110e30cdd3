"""What answers say of the cache beyond the number of cached tokens, for every endpoint.

In the places that OpenAI's and Anthropic's clients have for it, as far as they have any; the rest are extensions of ours,
which these clients keep or ignore.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.core.retention import NEUTRAL_PRIORITY, KeptSpan, RetentionHint, RetentionOutcome
from engine.text.comparisons import SYSTEM, TOOLS, CacheComparison, Loss
from engine.text.output import OutputDelta

OUTCOMES = ("accepted", "clipped", "refused")  # from the best to the worst
LOST_MARKS = "the place of a mark is not in the prompt: the model's chat template leaves the marked text out"
# What OpenAI's API has no word for: tokens that are the same and were computed all the same.
OTHER_LOSSES = {"new": "not_kept", "stateless": "not_kept", "failed": "failed", "not_loaded": "not_loaded"}


def cache_details(deltas: Sequence[OutputDelta]) -> dict[str, dict[str, int]]:
    """Of these prompts together, the tokens by tier that had them, and by reason why they were computed again.

    deltas: the latest of an answer to each prompt.
    """
    by_tier: Counter[str] = Counter()
    recomputed: Counter[str] = Counter()
    for delta in deltas:
        by_tier.update(delta.cached_by_tier)
        recomputed.update(dict([delta.recomputed] if delta.recomputed is not None else []))
    details = {"cached_tokens_by_tier": dict(by_tier), "recomputed": dict(recomputed)}
    return {name: counts for name, counts in details.items() if counts}


def written_spans(delta: OutputDelta) -> list[tuple[KeptSpan, int]]:
    """How many of the prompt's tokens were computed in each of the spans that its hint keeps."""
    spans = () if delta.hint is None else delta.hint.spans
    first, last = delta.num_cached_tokens, delta.num_prompt_tokens
    sizes = [(span, min(last, span.end or last) - max(first, span.start)) for span in spans]
    return [(span, size) for span, size in sizes if size > 0 and span.priority > NEUTRAL_PRIORITY]


def write_details(deltas: Sequence[OutputDelta]) -> dict[str, Any]:
    """OpenAI's counts of the tokens of these prompts that were computed and are cached now, without what may go first.

    Those by time are there only if something was said of time.
    """
    num_written, times = 0, Counter[str]()
    for delta in deltas:
        hint = delta.hint or RetentionHint()
        num_computed = delta.num_prompt_tokens - delta.num_cached_tokens
        num_kept = 0
        for span, size in written_spans(delta):
            num_kept += size
            if span.ttl_s is not None and span.ttl_s >= 1800:
                times["ttl_12h_tokens" if span.ttl_s >= 43_200 else "ttl_30m_tokens"] += size
        num_written += num_kept if hint.rest_priority == 0 else num_computed - _num_in_gone_spans(delta, hint)
    details: dict[str, Any] = {"cache_write_tokens": num_written}
    if times:
        details["cache_write_tokens_details"] = {"ttl_12h_tokens": 0, "ttl_30m_tokens": 0} | times
    return details


def _num_in_gone_spans(delta: OutputDelta, hint: RetentionHint) -> int:
    first, last = delta.num_cached_tokens, delta.num_prompt_tokens
    return sum(
        max(0, min(last, span.end or last) - max(first, span.start)) for span in hint.spans if span.priority == 0
    )


def hint_report(deltas: Sequence[OutputDelta]) -> dict[str, Any]:
    """What came of the hints of these prompts together, {} without any: the worst outcome, and all that is kept.

    expires_at: Unix time in seconds.
    """
    outcomes = [_with_lost_marks(delta) for delta in deltas if delta.retention is not None]
    if not outcomes:
        return {}
    worst = max(outcomes, key=lambda each: OUTCOMES.index(each.outcome))
    ends = [each.until_s for each in outcomes if each.until_s is not None]
    whole = replace(worst, num_tokens=sum(each.num_tokens for each in outcomes), until_s=min(ends) if ends else None)
    return {"prompt_cache_hint": outcome_report(whole)}


def _with_lost_marks(delta: OutputDelta) -> RetentionOutcome:
    assert delta.retention is not None
    if not delta.num_lost_marks or delta.retention.outcome == "refused":
        return delta.retention
    return replace(delta.retention, outcome="clipped", reason=delta.retention.reason or LOST_MARKS)


def outcome_report(outcome: RetentionOutcome) -> dict[str, Any]:
    """What came of one hint, as hint_report tells it."""
    return {
        "outcome": outcome.outcome,
        "reason": outcome.reason or None,
        "kept_tokens": outcome.num_tokens,
        "expires_at": None if outcome.until_s is None else int(outcome.until_s),
    }


def diagnostics(comparison: CacheComparison) -> dict[str, Any]:
    """OpenAI's `prompt_cache_diagnostics`.

    first_difference and lost are ours, and so are reasons that are about what happened to the cache.
    """
    if not comparison.is_found:
        return {"type": "comparison_response_not_found"}
    num_missed = comparison.num_different + comparison.num_lost
    if not num_missed:
        return {"type": "cache_hit"}
    if comparison.difference is not None:
        reason = "tools_changed" if comparison.difference.part == TOOLS else "input_changed"
    else:
        reason = OTHER_LOSSES.get(comparison.losses[0].reason, "evicted")
        reason = "unknown" if comparison.losses[0].reason == "unknown" else reason
    return {
        "type": "cache_miss",
        "reason": reason,
        "cache_missed_tokens": num_missed,
        "comparison_reusable_tokens": comparison.num_same,
        **_what_happened(comparison),
    }


def message_diagnostics(comparison: CacheComparison) -> dict[str, Any] | None:
    """Anthropic's `diagnostics`, with first_difference and lost as in OpenAI's; None = nothing was missed."""
    if not comparison.is_found:
        return {"cache_miss_reason": {"type": "previous_message_not_found"}}
    num_missed = comparison.num_different + comparison.num_lost
    if not num_missed:
        return None
    if comparison.difference is None:
        return {"cache_miss_reason": {"type": "unavailable", **_what_happened(comparison)}}
    part = comparison.difference.part
    kind = f"{part}_changed" if part in (TOOLS, SYSTEM) else "messages_changed"
    reason = {"type": kind, "cache_missed_input_tokens": num_missed, **_what_happened(comparison)}
    return {"cache_miss_reason": reason}


def _what_happened(comparison: CacheComparison) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if (found := comparison.difference) is not None:
        told["first_difference"] = {
            "token": found.token,
            "message": found.message,
            "role": found.role or None,
            "before": found.before,
            "now": found.now,
        }
    if comparison.losses:
        told["lost"] = [_loss(loss) for loss in comparison.losses]
    return told


def _loss(loss: Loss) -> dict[str, Any]:
    return {
        "reason": loss.reason,
        "tokens": loss.num_tokens,
        "ago_s": None if loss.ago_s is None else round(loss.ago_s, 3),
    }

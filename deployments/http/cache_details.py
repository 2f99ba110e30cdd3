"""What `usage` says of a prompt's cached tokens beyond their number, in the same words for every endpoint.

Extensions of ours: clients of OpenAI's and Anthropic's APIs keep or ignore what they do not know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from engine.text.output import OutputDelta


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

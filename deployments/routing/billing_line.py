"""The line about billing that Claude Code puts in front of its system prompt.

It changes with every request, and says nothing to a model: left in, it would change the prompt from its beginning on, so that
nothing of it would be cached. Knows no HTTP library and no model of the body.
"""

from __future__ import annotations

BILLING = "x-anthropic-billing-header:"


def without_billing_line(system: str) -> str:
    """The text of a system prompt, or of its first block, without that line if it is the first one."""
    return system.partition("\n")[2] if system.startswith(BILLING) else system

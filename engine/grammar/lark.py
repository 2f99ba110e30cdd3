"""Texts within grammars in Lark. Knows no library."""

from __future__ import annotations

import json


def quoted(text: str) -> str:
    """Exactly this text."""
    return json.dumps(text, ensure_ascii=False)


def escaped(text: str) -> str:
    """The same within a regular expression."""
    return "".join(f"\\{char}" if char in r"\.[]{}()*+?|^$/" else char for char in text)

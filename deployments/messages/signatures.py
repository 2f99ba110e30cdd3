"""The signature of a thinking block: whether the text that a client sends back is what the model here thought.

A hash keyed by the model's name, so that every ingress recognises it, also after a restart, and keeps nothing for it. It
guards no secret: a client may write into the prompt what it likes anyway.
"""

from __future__ import annotations

import base64
import hashlib


def signature(thinking: str, model: str) -> str:
    """Of what that model thought."""
    key = hashlib.blake2b(model.encode(errors="replace"), digest_size=32).digest()
    digest = hashlib.blake2b(thinking.encode(errors="replace"), key=key, digest_size=24, person=b"thinking").digest()
    return base64.b64encode(digest).decode()

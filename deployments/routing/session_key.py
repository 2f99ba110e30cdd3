"""Which conversation a request belongs to, from what its client sends.

Requests with one key go to one replica. Looks at plain data only: knows no HTTP library and no model of the body.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from deployments.routing.billing_line import without_billing_line

# Of the proxy's or the client's own choice; then those that agents send unasked: Claude Code, Codex, OpenCode.
SESSION_HEADERS = ("x-session-id", "x-correlation-id", "x-claude-code-session-id", "session-id", "x-opencode-session")
# With the session's header, the name of one of the agents in it: each has a conversation of its own.
AGENT_HEADERS = {"x-claude-code-session-id": "x-claude-code-agent-id"}
# How much of a prompt tells conversations apart that name no session: characters of a text, or token ids.
PROMPT_BEGINNING = 256
# The same for each of the messages that do: characters, or parts.
MESSAGE_BEGINNING = 4096
# A longer name is known by its hash: each conversation keeps its key for as long as it is remembered.
MAX_KEY_CHARS = 64
# Of a user_id in which a session is looked for.
MAX_USER_ID_CHARS = 1024


def session_key(headers: Iterable[tuple[str, str]], body: Mapping[str, Any]) -> str:
    """The name of the request's session, or a hash of its beginning.

    The hash is of the first system message (or the instructions, or the system prompt) and the first user message, or of
    the beginning of the prompt.
    """
    return session_name(headers, body) or "content-" + _content_hash(body)


def session_name(headers: Iterable[tuple[str, str]], body: Mapping[str, Any]) -> str | None:
    """What the client calls the request's session; None if it gives it no name.

    The first that is there and not empty: the headers of SESSION_HEADERS in their order, then session_id, conversation (an
    id, or an object with one), conversation_id, prompt_cache_key and the session in metadata.user_id of the body.

    Header names are matched without regard to case, and `_` counts as `-`; a name is the same whichever way it comes,
    and one of more than MAX_KEY_CHARS is hashed. A completions client that continues a prompt shorter than
    PROMPT_BEGINNING should name its session: there the hash changes with the prompt.
    """
    by_name: dict[str, str] = {}
    for name, value in headers:
        by_name.setdefault(name.lower().replace("_", "-"), value)
    conversation = body.get("conversation")
    named = (
        *(_header_name(by_name, name) for name in SESSION_HEADERS),
        body.get("session_id"),
        conversation.get("id") if isinstance(conversation, Mapping) else conversation,
        body.get("conversation_id"),
        body.get("prompt_cache_key"),
        _session_of_user(body.get("metadata")),
    )
    for key in named:
        if key:
            return short_name(str(key))
    return None


def _header_name(by_name: Mapping[str, str], header: str) -> str:
    """The session that a header names, with the agent if there is one."""
    session = _header_text(by_name.get(header, ""))
    agent = _header_text(by_name.get(AGENT_HEADERS.get(header, ""), ""))
    return f"{session} {agent}" if session and agent else session


def _session_of_user(metadata: Any) -> Any:
    """The session that Claude Code writes into metadata.user_id: a JSON text with session_id, formerly `..._session_ID`."""
    user_id = metadata.get("user_id") if isinstance(metadata, Mapping) else None
    if not isinstance(user_id, str) or len(user_id) > MAX_USER_ID_CHARS:
        return None
    try:
        named = json.loads(user_id)
    except (ValueError, RecursionError):
        return user_id.partition("_session_")[2]
    session = named.get("session_id") if isinstance(named, dict) else None
    return session if isinstance(session, str) else None


def _header_text(value: str) -> str:
    """Headers are read as Latin-1; what was sent as UTF-8 is made that again."""
    with contextlib.suppress(UnicodeError):
        value = value.encode("latin-1").decode()
    return value.strip()


def short_name(key: str) -> str:
    """The key of a session that its client calls so. It has no line end: behind one the engine puts an adapter's name."""
    if len(key) <= MAX_KEY_CHARS and "\n" not in key:
        return key
    return "name-" + hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def _content_hash(body: Mapping[str, Any]) -> str:
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if messages is not None:
        system = (
            body.get("instructions") or _system_prompt(body.get("system")) or _first(messages, ("system", "developer"))
        )
        user = _first(messages, ("user",))
        beginning: Any = [_beginning_of(system), _beginning_of(user)]
    else:
        prompt = body.get("prompt") or ""
        if isinstance(prompt, list) and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]  # a batch of one is the same prompt as the one
        beginning = prompt[:PROMPT_BEGINNING]
    return hashlib.blake2b(json.dumps(beginning).encode(), digest_size=16).hexdigest()


def _first(messages: Iterable[Mapping[str, Any]], roles: tuple[str, ...]) -> Any:
    return next((message.get("content") for message in messages if message.get("role") in roles), None)


def _beginning_of(content: Any) -> Any:
    """Of a text, or of the texts among parts."""
    if isinstance(content, list):
        texts = (part.get("text") for part in content[:MESSAGE_BEGINNING])
        return "".join(text[:MESSAGE_BEGINNING] for text in texts if isinstance(text, str))[:MESSAGE_BEGINNING]
    return content if content is None else content[:MESSAGE_BEGINNING]


def _system_prompt(system: Any) -> Any:
    """Of the Messages API: a text or blocks, without what changes with every request."""
    if isinstance(system, list) and system:
        return [{"text": without_billing_line(system[0].get("text", ""))}, *system[1:]]
    return without_billing_line(system) if isinstance(system, str) else system

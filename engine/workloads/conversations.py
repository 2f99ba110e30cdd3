"""Files of conversations with their text: tau-bench, OASST, ShareGPT, vLLM's multi-turn benchmark, aiperf.

Equal messages are equal spans, so that sessions with the same system prompt, and forks of a conversation, share a prefix.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from engine.dialogue.messages import Message, ToolCall
from engine.errors import WorkloadError
from engine.workloads.distributions import Distribution, Exponential
from engine.workloads.records import MAX_TURNS, Record, read_json_list, read_json_values, read_jsonl
from engine.workloads.session import Session, Span, Turn

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bing", "chatgpt", "bard"), "assistant"),
    "system": "system",
}
ROLES = ("system", "developer", "user", "assistant", "tool")
# Of aiperf's turns that do not say.
OUTPUT_TOKENS = 128
CHARS_PER_TOKEN = 4


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has, without a tokenizer."""
    return -(-len(text) // CHARS_PER_TOKEN)


@dataclass(frozen=True, slots=True)
class Reading:
    """How text becomes sessions.

    count_tokens: of a text.
    think_s, tool_s: pauses before turns of a user and of a tool, in files that have no times.
    seed: of these.
    """

    count_tokens: Callable[[str], int] = estimate_tokens
    think_s: Distribution = field(default_factory=lambda: Exponential(60.0))
    tool_s: Distribution = field(default_factory=lambda: Exponential(1.0))
    seed: int = 0


def read_tau_bench(path: Path, reading: Reading | None = None) -> Iterator[Session]:
    """Trajectories of agents: a list of {"traj": messages}, or of lists of messages with calls as JSON in the text."""
    builder = _Builder(reading or Reading())
    for index, value in enumerate(read_json_values(path)):
        place = f"{path}, entry {index}"
        messages = value.get("traj") if isinstance(value, dict) else value
        record = Record({"traj": messages}, place)
        yield from builder.session(f"session-{index}", [_message(each) for each in record.records("traj")], place)


def read_messages(path: Path, reading: Reading | None = None) -> Iterator[Session]:
    """Conversations of vLLM's multi-turn benchmark: a list of {"id", "messages"}."""
    builder = _Builder(reading or Reading())
    for record in read_json_list(path):
        messages = [_message(each) for each in record.records("messages")]
        yield from builder.session(_identity(record), messages, record.place)


def read_sharegpt(path: Path, reading: Reading | None = None) -> Iterator[Session]:
    """ShareGPT: a list of {"id", "conversations": [{"from", "value"}]}. Parts `ID_0`, `ID_1` in a row are one session."""
    builder = _Builder(reading or Reading())
    for name, parts in groupby(read_json_list(path), key=lambda record: _identity(record).split("_")[0]):
        messages: list[Message] = []
        place = ""
        for record in parts:
            place = place or record.place
            part = [_sharegpt_message(each) for each in record.records("conversations")]
            # Parts overlap by one message.
            messages += part[1:] if messages and part and messages[-1] == part[0] else part
        yield from builder.session(name, messages, place)


def read_oasst(path: Path, reading: Reading | None = None) -> Iterator[Session]:
    """Trees of Open-Assistant, one a line: a session for each path from the root to a last answer."""
    builder = _Builder(reading or Reading())
    for record in read_jsonl(path):
        tree = record.text("message_tree_id", record.place)
        for number, messages in enumerate(_paths(record.record("prompt"))):
            yield from builder.session(f"{tree}.{number}", messages, record.place)


def read_aiperf(path: Path, reading: Reading | None = None) -> Iterator[Session]:
    """aiperf's `multi_turn`, a session a line: {"session_id", "turns": [{"text", "role", "delay", "output_length"}]}.

    `delay`, and the first turn's `timestamp`, are in milliseconds.
    """
    builder = _Builder(reading or Reading())
    for number, record in enumerate(read_jsonl(path)):
        turns: list[Turn] = []
        waiting: list[Message] = []
        start_s = 0.0
        for each in record.records("turns"):
            role = each.text("role", "user")
            waiting.append(Message(role, each.text("text")))
            if role == "system":  # goes with the turn behind it
                continue
            if not turns:
                start_s = each.seconds("timestamp", scale=1e-3)
            pause_s = each.seconds("delay", scale=1e-3) if turns else 0.0
            output_tokens = each.integer("output_length", 1) if each.has("output_length") else OUTPUT_TOKENS
            turns.append(builder.turn(waiting, output_tokens, pause_s))
            waiting = []
        if not turns:
            record.fail("'turns' must hold at least one turn of a user")
        yield Session(record.text("session_id", f"session-{number}"), tuple(turns), start_s)


class _Builder:
    """Numbers equal texts alike, over all sessions of a file."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._streams: dict[str, int] = {}

    def session(self, session_id: str, messages: Sequence[Message], place: str) -> Iterator[Session]:
        """One session, or none if there is nothing that was asked and answered."""
        if len(messages) > MAX_TURNS:
            raise WorkloadError(f"{place}: {len(messages)} messages, more than {MAX_TURNS}; cut the conversation")
        rng = random.Random(f"{self._reading.seed}.{session_id}")
        turns: list[Turn] = []
        waiting: list[Message] = []
        called = ""
        for message in messages:
            if message.role != "assistant":
                waiting.append(message)
            elif any(each.role not in ("system", "developer") for each in waiting):
                turns.append(self._answered(waiting, message, called, is_first=not turns, rng=rng))
                waiting = []
                called = message.tool_calls[0].name if message.tool_calls else ""
        if turns:
            yield Session(session_id, tuple(turns))

    def turn(self, new: Sequence[Message], output_tokens: int, pause_s: float) -> Turn:
        return Turn(tuple(self._span(message) for message in new), output_tokens, pause_s, messages=tuple(new))

    def _answered(
        self, new: Sequence[Message], answer: Message, called: str, *, is_first: bool, rng: random.Random
    ) -> Turn:
        is_tool = new[-1].role == "tool"
        pause_s = 0.0 if is_first else (self._reading.tool_s if is_tool else self._reading.think_s).sample(rng)
        asked = self.turn(new, 0, pause_s)
        span = self._span(answer)
        turn = replace(asked, output_tokens=span.num_tokens, answer=answer, answer_stream=span.stream)
        return replace(turn, kind="tool", tool=new[-1].name or called) if is_tool else turn

    def _span(self, message: Message) -> Span:
        text = text_of(message)
        return Span(self._streams.setdefault(text, len(self._streams)), max(1, self._reading.count_tokens(text)))


def text_of(message: Message) -> str:
    """A message as one text, its calls written out."""
    calls = (json.dumps({"name": call.name, "arguments": call.arguments}) for call in message.tool_calls)
    return "\n".join([*([message.content] if message.content or not message.tool_calls else []), *calls])


def _paths(root: Record) -> Iterator[list[Message]]:
    """Depth first, without recursion: a file may hold trees as deep as it likes."""
    stack: list[tuple[Record, list[Message]]] = [(root, [])]
    while stack:
        node, before = stack.pop()
        if len(before) > MAX_TURNS:
            node.fail(f"the tree is deeper than {MAX_TURNS} messages")
        role = "assistant" if node.text("role") == "assistant" else "user"
        path = [*before, Message(role, node.text("text"))]
        replies = node.records("replies") if node.has("replies") else []
        answered = [each for each in replies if role == "user" or _is_answered(each)]
        if role == "assistant" and not answered:
            yield path
        stack += [(each, path) for each in reversed(answered)]


def _is_answered(prompt: Record) -> bool:
    return prompt.has("replies") and bool(prompt.items("replies"))


def _identity(record: Record) -> str:
    value = record.fields.get("id", record.place)
    return value if isinstance(value, str) else str(value)


def _sharegpt_message(record: Record) -> Message:
    role = SHAREGPT_ROLES.get(record.text("from"))
    if role is None:
        record.fail(f"'from' must be one of {', '.join(SHAREGPT_ROLES)}, got {record.fields['from']!r}")
    return Message(role, record.text("value"))


def _message(record: Record) -> Message:
    role = record.text("role")
    if role not in ROLES:
        record.fail(f"'role' must be one of {', '.join(ROLES)}, got {role!r}")
    content = record.text("content", "")
    calls = [_call(each) for each in record.records("tool_calls")] if record.has("tool_calls") else []
    if role == "assistant" and not calls and (written := _written_call(content)) is not None:
        content, calls = "", [written]
    return Message(
        role,
        content,
        tool_calls=tuple(calls),
        tool_call_id=record.text("tool_call_id", ""),
        name=record.text("name", ""),
    )


def _call(record: Record) -> ToolCall:
    function = record.record("function")
    return ToolCall(function.text("name"), function.text("arguments", "{}"), record.text("id", ""))


def _written_call(content: str) -> ToolCall | None:
    """The call that a text is: a JSON list of {"name", "arguments"}, as in benchmarks/data. Only the first is made."""
    if not content.startswith('[{"'):
        return None
    try:
        first: dict[str, Any] = json.loads(content)[0]
        return ToolCall(first["name"], first["arguments"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def write_messages(sessions: Iterable[Session], path: Path) -> None:
    """As vLLM's multi-turn benchmark reads them. Raises WorkloadError if a session has no text."""
    entries = []
    for session in sessions:
        messages = []
        for turn in session.turns:
            if not turn.messages or turn.answer is None:
                raise _without_text(session)
            messages += [{"role": each.role, "content": text_of(each)} for each in (*turn.messages, turn.answer)]
        entries.append({"id": session.session_id, "messages": messages})
    path.write_text(json.dumps(entries, ensure_ascii=False, indent=1) + "\n")


def write_aiperf(sessions: Iterable[Session], path: Path) -> None:
    """As aiperf's `multi_turn` reads them. Raises WorkloadError if a session has no text."""
    with path.open("w") as file:
        for session in sessions:
            turns: list[dict[str, Any]] = []
            for number, turn in enumerate(session.turns):
                if not turn.messages:
                    raise _without_text(session)
                *before, last = turn.messages
                turns += [{"role": each.role, "text": text_of(each)} for each in before]
                time = {"delay": turn.pause_s * 1e3} if number else {"timestamp": session.start_s * 1e3}
                turns.append({"text": text_of(last), "output_length": turn.output_tokens, **time})
            file.write(json.dumps({"session_id": session.session_id, "turns": turns}, ensure_ascii=False) + "\n")


def _without_text(session: Session) -> WorkloadError:
    return WorkloadError(
        f"{session.session_id} has turns without their text, which this format needs; write mooncake or jsonl instead"
    )

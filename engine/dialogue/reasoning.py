"""Thinking before the answer: where it begins and ends in what the model writes."""

from __future__ import annotations

from dataclasses import dataclass

from engine.dialogue.events import Reasoning, Text
from engine.dialogue.program import BLANK, Program, ProgramParser


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model marks its thinking.

    opening, closing: around it; white space on their inner and outer sides is no part of it nor of the answer.
    is_assumed: the model thinks without an opening even if the prompt has none, so that only a closing ends it.
    repeats: it may think anywhere in the answer, and more than once.
    """

    opening: str
    closing: str
    is_assumed: bool = False
    repeats: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.opening.strip(), self.closing)

    def state_at(self, tail: str) -> str:
        """Whether an answer that begins behind `tail` begins within the model's thinking.

        tail: what the prompt says of the answer, from the assistant's header on.
        Returns "open" (within it), "closed" (behind it), or "" (the model may begin to think).
        """
        opened, closed = tail.rfind(self.opening.strip()), tail.rfind(self.closing)
        if opened < 0 and closed < 0:
            return "open" if self.is_assumed else ""
        return "open" if opened > closed else "closed"

    def parser(self, state: str) -> ReasoningParser:
        """A parser of an answer that begins in this state."""
        return ReasoningParser(self, state)


class ReasoningParser(ProgramParser):
    """Tells an answer's thinking as reasoning, and all that follows as text."""

    def __init__(self, form: ReasoningFormat, state: str) -> None:
        super().__init__(form.markers)
        self._form = form
        self._state = state

    def _run(self) -> Program[None]:
        form = self._form
        if self._state != "closed":
            yield from self._skip_blank()
            if (yield from self._try_take(form.opening)) or self._state == "open":
                yield from self._skip_blank()
                self._tell_markup()
                yield from self._read_until((form.closing,), self._tell_thought)
                yield from self._skip_blank()
                self._tell_markup()
        while True:
            self._take(self._unread)
            if source := self._flush():
                self._events.append(Text(source))
            if self._is_final:
                return
            yield

    def _tell_thought(self, piece: str) -> None:
        """Tell what is pending as reasoning, but for the white space at its end."""
        end = len(piece.rstrip(BLANK))
        if end:
            self._pending[-1] = piece[:end]
            self._events.append(Reasoning(self._flush()))
            if end < len(piece):
                self._pending.append(piece[end:])


# Reasoning parsers by vLLM's names.
THINK = ReasoningFormat("<think>", "</think>")
REASONING_FORMATS: dict[str, ReasoningFormat] = {
    "qwen3": THINK,
    "glm45": THINK,
    "kimi_k2": THINK,
    "deepseek_v3": THINK,
    "deepseek_r1": ReasoningFormat("<think>", "</think>", is_assumed=True),
    "magistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "gemma4": ReasoningFormat("<|channel>thought\n", "<channel|>"),
}
# The values of the option `reasoning_parser`.
REASONING_PARSERS = ("auto", "none", *REASONING_FORMATS)

"""`pensieve chat`: conversations and commands.

Knows a `Partner`, which answers, and a `Screen`, where people are: no engine, network or terminal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from engine.chat.why import describe_why
from engine.core.request import SamplingParams
from engine.errors import ConfigError, ContextLengthError, PensieveError
from engine.paths import write_private_file

HELP = """\
/new         begin another conversation
/fork        begin another one with what was said in this one
/go [N]      go on with conversation N; without a number, list them
/save FILE   write this conversation as JSON
/load FILE   begin another conversation with what /save wrote
/model [M]   show the model, or take another one
/stats       the turns of this conversation, and what the engine has done so far
/why         where the time of the last answer went, and why tokens of its prompt were computed
/help        this list
/quit        end; so do Ctrl-D, and Ctrl-C twice
Alt-Enter, or a backslash at the end of a line, begins another line. Ctrl-C during an answer stops the answer only. A message
that begins with / is written with two: //"""

Message = tuple[str, str]  # role, content
# Most tokens of an answer unless --max-tokens says otherwise, at most a quarter of the window.
MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer and its account. ttft_s: from the question to the first token; total_s: to the last.

    explanation: how it came about, as docs/http_api.md says; None if what answers does not tell that.
    """

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    ttft_s: float
    total_s: float
    explanation: Mapping[str, Any] | None = None

    @property
    def num_computed_tokens(self) -> int:
        return self.num_prompt_tokens - self.num_cached_tokens

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens after the first one; None if there are none."""
        seconds = self.total_s - self.ttft_s
        return (self.num_output_tokens - 1) / seconds if self.num_output_tokens > 1 and seconds > 0 else None


class Partner(Protocol):
    """What answers: an engine in this process or a server."""

    @property
    def model_name(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...

    def answer(
        self, session_id: str, messages: list[Message], sampling: SamplingParams, on_text: Callable[[str], None]
    ) -> Turn:
        """Answer a message; blocking.

        on_text: gets each new piece.

        Raises PensieveError, and KeyboardInterrupt, which stops the answer.
        """

    def take_model(self, model: str) -> None:
        """Answer by another model from now on. Raises PensieveError, and then the old one answers."""

    def statistics(self) -> str:
        """What it has done so far, for people."""


class Screen(Protocol):
    """Where messages are read and answers are shown."""

    is_terminal: bool

    def read(self) -> str:
        """The next message. Raises EOFError at the end, and KeyboardInterrupt."""

    def answering(self) -> AbstractContextManager[Callable[[str], None]]:
        """Take the pieces of one answer."""

    def show(self, text: str) -> None:
        """What was asked for by a command."""

    def note(self, text: str) -> None:
        """A remark, or what is wrong."""

    def show_turns(self, turns: list[Turn]) -> None:
        """The account of a conversation."""

    def show_status(self, text: str) -> None:
        """The line about the last turn."""


@dataclass(slots=True)
class Conversation:
    """What was said, and the account of its turns in this program."""

    session_id: str
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)


class Chat:
    """Several conversations with one partner, of which one is current."""

    def __init__(self, partner: Partner, screen: Screen, sampling: SamplingParams, session_prefix: str) -> None:
        """session_prefix: what makes the sessions' ids those of this program."""
        self._partner, self._screen, self._sampling = partner, screen, sampling
        self._prefix = session_prefix
        self._conversations: list[Conversation] = []
        self._current = self._begin([])
        self._commands: dict[str, Callable[[str], None]] = {
            "/new": self._new,
            "/fork": self._fork,
            "/go": self._go,
            "/save": self._save,
            "/load": self._load,
            "/model": self._model,
            "/stats": self._stats,
            "/why": self._why,
            "/help": lambda argument: screen.show(HELP),
        }

    def run(self) -> int:
        """Read and answer until the end; returns the exit status."""
        is_ending = False
        while True:
            try:
                text = self._screen.read().strip()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                if not self._screen.is_terminal:
                    raise
                if is_ending:
                    return 0
                is_ending = True
                self._screen.note("[Ctrl-C again ends the chat]")
                continue
            is_ending = False
            if text == "/quit":
                return 0
            if text.startswith("/") and not text.startswith("//"):
                name, _, argument = text.partition(" ")
                command = self._commands.get(name)
                if command is None:
                    self._screen.note(f"unknown command {name}; /help lists the commands")
                    continue
                try:
                    command(argument.strip())
                except PensieveError as error:
                    self._screen.note(f"pensieve: {error.message}")
            elif text:
                self._answer(text[1:] if text.startswith("//") else text)

    def _answer(self, text: str) -> None:
        """One turn. Ctrl-C in a terminal ends it, and the conversation goes on without it."""
        conversation, screen = self._current, self._screen
        messages = [*conversation.messages, ("user", text)]
        sampling = self._sampling
        if sampling.max_tokens is None:
            sampling = replace(sampling, max_tokens=min(MAX_TOKENS, max(1, self._partner.max_model_len // 4)))
        try:
            with screen.answering() as on_text:
                turn = self._partner.answer(conversation.session_id, messages, sampling, on_text)
        except KeyboardInterrupt:
            if not screen.is_terminal:
                raise
            screen.note("[stopped; the conversation goes on without this turn]")
            return
        except PensieveError as error:
            hint = "; /new begins another conversation" if isinstance(error, ContextLengthError) else ""
            screen.note(f"pensieve: {error.message}{hint}")
            return
        conversation.messages = [*messages, ("assistant", turn.text)]
        conversation.turns.append(turn)
        if turn.finish_reason == "length":
            screen.note(f"[{describe_cut(turn.num_output_tokens, sampling)}]")
        screen.show_status(describe_turn(turn))

    # -- commands ------------------------------------------------------------------------------------------------------

    def _begin(self, messages: list[Message]) -> Conversation:
        self._current = Conversation(f"{self._prefix}-{len(self._conversations)}", messages)
        self._conversations.append(self._current)
        return self._current

    def _new(self, argument: str) -> None:
        self._begin([])
        self._tell_current()

    def _fork(self, argument: str) -> None:
        self._begin(self._current.messages[:])
        self._tell_current()

    def _go(self, argument: str) -> None:
        if not argument:
            for number, conversation in enumerate(self._conversations, 1):
                first = conversation.messages[0][1].splitlines()[0][:60] if conversation.messages else ""
                mark = "*" if conversation is self._current else " "
                self._screen.show(f"{mark} {number}: {len(conversation.messages)} messages  {first}")
            return
        if not (argument.isdecimal() and 1 <= int(argument) <= len(self._conversations)):
            raise ConfigError(f"/go {argument}: the conversations are 1 to {len(self._conversations)}")
        self._current = self._conversations[int(argument) - 1]
        self._tell_current()

    def _tell_current(self) -> None:
        if self._screen.is_terminal:
            number = self._conversations.index(self._current) + 1
            self._screen.note(f"[conversation {number}, {len(self._current.messages)} messages]")

    def _save(self, argument: str) -> None:
        path = _named_file("/save", argument)
        messages = [{"role": role, "content": content} for role, content in self._current.messages]
        try:
            write_private_file(path, json.dumps(messages, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ConfigError(f"/save {argument}: {error.strerror}; name a file in a folder that exists") from error
        self._screen.note(f"[{len(messages)} messages written to {path}]")

    def _load(self, argument: str) -> None:
        path = _named_file("/load", argument)
        try:
            messages = read_messages(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"/load {argument}: {error.strerror}; name a file that /save wrote") from error
        except ValueError as error:
            raise ConfigError(f"/load {argument}: {error}; name a file that /save wrote") from error
        self._begin(messages)
        self._tell_current()

    def _model(self, argument: str) -> None:
        if argument:
            self._partner.take_model(argument)
        self._screen.show(f"{self._partner.model_name}, window of {self._partner.max_model_len} tokens")

    def _stats(self, argument: str) -> None:
        self._screen.show_turns(self._current.turns)
        self._screen.show(self._partner.statistics())

    def _why(self, argument: str) -> None:
        if not self._current.turns:
            raise ConfigError("/why: there is no answer in this conversation yet; ask something first")
        explanation = self._current.turns[-1].explanation
        if explanation is None:
            raise ConfigError(f"/why: the server of {self._partner.model_name} does not say how an answer came about")
        self._screen.show(describe_why(explanation))


def read_messages(text: str) -> list[Message]:
    """The messages of a JSON file; raises ValueError if it holds none."""
    data = json.loads(text)
    if not isinstance(data, list) or not all(
        isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
        for item in data
    ):
        raise ValueError('it must hold a list of {"role", "content"}')
    return [(item["role"], item["content"]) for item in data]


def _named_file(command: str, argument: str) -> Path:
    if not argument:
        raise ConfigError(f"{command} needs the name of a file")
    return Path(argument).expanduser()


def describe_turn(turn: Turn) -> str:
    speed = "" if turn.tokens_per_s is None else f", {turn.tokens_per_s:.0f} tokens/s"
    return (
        f"{turn.num_prompt_tokens} prompt tokens: {turn.num_cached_tokens} cached, {turn.num_computed_tokens} computed; "
        f"first token {turn.ttft_s * 1e3:.0f} ms{speed}"
    )


def describe_cut(num_tokens: int, sampling: SamplingParams) -> str:
    """Why an answer that was not complete has ended."""
    if num_tokens == sampling.max_tokens:
        return f"cut off after {sampling.max_tokens} tokens: --max-tokens allows more"
    return "cut off: the context window is full"

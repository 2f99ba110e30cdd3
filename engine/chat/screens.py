"""Where a chat is held: a terminal, or a pipe.

prompt_toolkit reads from the terminal and rich writes to it. A pipe's standard output has answers only.
"""

from __future__ import annotations

import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.table import Table

from engine.chat.chat import Turn
from engine.paths import data_folder, private_folder

REFRESHES_PER_S = 10
# Control characters of a model could steer the terminal; these two cannot.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_FENCE = re.compile(r" {0,3}(```|~~~)")


class PipeScreen:
    """Standard input, line by line.

    Answers and what commands ask for go to standard output, everything else to standard error.
    """

    is_terminal = False

    def read(self) -> str:
        return input("")

    @contextmanager
    def answering(self) -> Iterator[Callable[[str], None]]:
        has_text = False

        def show(piece: str) -> None:
            nonlocal has_text
            has_text = True
            print(piece, end="", flush=True)

        try:
            yield show
        finally:
            if has_text:
                print(flush=True)

    def show(self, text: str) -> None:
        print(text, flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def show_turns(self, turns: list[Turn]) -> None: ...

    def show_status(self, text: str) -> None: ...


class TerminalScreen:
    """A terminal: editing, history, several lines; answers as markdown while they come.

    The account of the last turn is below.
    """

    is_terminal = True

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._status = "/help lists the commands"
        self._session: PromptSession[str] = PromptSession(
            history=_history(),
            multiline=True,
            key_bindings=_key_bindings(),
            prompt_continuation="...> ",
            bottom_toolbar=self._toolbar,
        )

    def read(self) -> str:
        return self._session.prompt("you> ")

    def _toolbar(self) -> StyleAndTextTuples:
        return [("", self._status)]

    @contextmanager
    def answering(self) -> Iterator[Callable[[str], None]]:
        answer = MarkdownAnswer(self._console)
        with answer.live:
            try:
                yield answer.add
            finally:
                answer.close()

    def show(self, text: str) -> None:
        self._console.print(text, markup=False)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, style="dim")

    def show_turns(self, turns: list[Turn]) -> None:
        table = Table("turn", "prompt", "cached", "computed", "output", "first token", "tokens/s")
        for column in table.columns:
            column.justify = "right"
        for number, turn in enumerate(turns, 1):
            counts = (turn.num_prompt_tokens, turn.num_cached_tokens, turn.num_computed_tokens, turn.num_output_tokens)
            speed = "" if turn.tokens_per_s is None else f"{turn.tokens_per_s:.1f}"
            table.add_row(*map(str, (number, *counts)), f"{turn.ttft_s * 1e3:.0f} ms", speed)
        self._console.print(table)

    def show_status(self, text: str) -> None:
        self._status = text


class MarkdownAnswer:
    """An answer that grows. Pieces may come in any one thread.

    Its finished blocks are printed once; the last one is drawn again and again while it grows.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rest = ""
        self._is_closed = False
        self.live = Live(
            console=console,
            refresh_per_second=REFRESHES_PER_S,
            transient=True,
            get_renderable=lambda: _Tail(self._rest),
        )

    def add(self, piece: str) -> None:
        if self._is_closed:  # stopped; a last piece is on its way
            return
        self._rest += _CONTROL.sub("\N{REPLACEMENT CHARACTER}", piece)
        if "\n" in piece:
            end = end_of_blocks(self._rest)
            if end:
                done, self._rest = self._rest[:end], self._rest[end:]
                self._console.print(Markdown(done))

    def close(self) -> None:
        """Print what is left."""
        self._is_closed = True
        done, self._rest = self._rest, ""
        if done.strip():
            self._console.print(Markdown(done))


def end_of_blocks(text: str) -> int:
    """How many characters of a growing markdown text are blocks that can no longer change; 0 if none are.

    A block ends at an empty line outside fences, if the next line is there and not indented (it could belong to a list).
    """
    end, position, fence, is_after_blank = 0, 0, None, False
    for line in text.splitlines(keepends=True):
        mark = _FENCE.match(line)
        if fence is None and is_after_blank and line.strip() and not line[0].isspace():
            end = position
        if mark is not None:
            fence = mark[1] if fence is None else None if mark[1] == fence else fence
        is_after_blank = fence is None and not line.strip()
        position += len(line)
    return end


class _Tail:
    """A text as markdown, or its last lines if there are more than the terminal has."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(Markdown(self._text), options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - 1) :]:
            yield from line
            yield Segment.line()


def _history() -> History:
    """What was typed in earlier chats; only its user may read that."""
    try:
        path = private_folder(data_folder()) / "chat_history"
        path.touch(mode=stat.S_IRUSR | stat.S_IWUSR)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def accept(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings

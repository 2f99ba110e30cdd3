"""`pensieve chat`: a conversation in the terminal, or over a pipe. Knows the blocking server and nothing below it."""

from __future__ import annotations

import contextlib
import sys

from engine.core.request import SamplingParams
from engine.errors import ContextLengthError, PensieveError
from engine.server import Answer, Server

HELP = """\
/new    begin another conversation
/stats  what the engine has done so far
/help   this list
/quit   end; so do Ctrl-D, and Ctrl-C twice
Ctrl-C during an answer stops the answer only. A message that begins with / is written with two: //"""


def run_chat(server: Server, sampling: SamplingParams) -> int:
    """Read messages from standard input and answer them until it ends; returns the exit status. What is not the assistant's
    goes to standard output in a terminal only, and else to standard error."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() edits lines and recalls them once this is imported
        print(f"{server.engine.model_name} ({server.engine.config.mode}); /help lists the commands", file=sys.stderr)
    number, is_ending = 0, False
    while True:
        try:
            text = input("you> " if is_terminal else "").strip()
        except EOFError:
            if is_terminal:
                print()
            return 0
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()
            if is_ending:
                return 0
            is_ending = True
            print("[Ctrl-C again ends the chat]")
            continue
        is_ending = False
        if text == "/quit":
            return 0
        if text == "/new":
            number += 1
        elif text == "/stats":
            print(server.get_statistics_str())
        elif text == "/help":
            print(HELP)
        elif text.startswith("/") and not text.startswith("//"):
            print(f"unknown command {text.split()[0]}; /help lists the commands", file=sys.stderr)
        elif text:
            _answer(
                server, f"chat-{number}", text.replace("//", "/", 1) if text[0] == "/" else text, sampling, is_terminal
            )


def _answer(server: Server, session_id: str, text: str, sampling: SamplingParams, is_terminal: bool) -> None:
    """Print the answer as it comes. Ctrl-C in a terminal ends it, and the conversation goes on without this turn."""
    is_stopped = False

    def show(piece: str) -> None:
        if not is_stopped:
            print(piece, end="", flush=True)

    try:
        answer = server.chat(session_id, text, sampling, show)
    except KeyboardInterrupt:
        is_stopped = True
        if not is_terminal:
            raise
        print("\n[stopped; the conversation goes on without this turn]")
    except PensieveError as error:
        hint = "; /new begins another conversation" if isinstance(error, ContextLengthError) else ""
        print(f"pensieve: {error.message}{hint}", file=sys.stderr)
    else:
        print()
        notes = [] if answer.finish_reason != "length" else [describe_cut(answer, sampling)]
        if is_terminal:
            counts = f"{answer.num_prompt_tokens} prompt tokens, {answer.num_cached_tokens} cached"
            notes.insert(0, f"{counts}, first token {answer.ttft_s * 1e3:.0f} ms")
        if notes:
            print(f"[{'; '.join(notes)}]", file=sys.stdout if is_terminal else sys.stderr, flush=True)


def describe_cut(answer: Answer, sampling: SamplingParams) -> str:
    """Why an answer that was not complete has ended."""
    if len(answer.token_ids) == sampling.max_tokens:
        return f"cut off after {sampling.max_tokens} tokens: --max-tokens allows more"
    return "cut off: the context window is full"

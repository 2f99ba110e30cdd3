"""The command line: what it imports, what it refuses and how, and a chat in a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from engine import chat, cli, compare
from engine.compare import compare_modes
from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.errors import ConfigError, ContextLengthError
from engine.server import Answer, Server

SMALL = ["--num-threads", "1", "--num-gpu-blocks", "200", "--chunk-size", "16"]
WAIT_S = 120


@pytest.fixture
def no_model(monkeypatch):
    """A command that gets as far as loading a model fails the test."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("engine.server.AsyncEngine", load)
    monkeypatch.setattr("engine.profile.measure_profile", load)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in cli.MAX_TOKENS)])
def test_help_imports_nothing_that_is_slow(arguments):
    script = (
        "import sys\n"
        "from engine import cli\n"
        "try:\n"
        f"    cli.main({arguments!r})\n"
        "finally:\n"
        "    slow = {'torch', 'transformers', 'tokenizers', 'numpy', 'matplotlib', 'tqdm', 'asyncio'} & set(sys.modules)\n"
        "    print('slow:', sorted(slow))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "slow: []"


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "--chunk-size", "0"], "chunk_size must be at least 1"),
        (["generate", "x", "--max-tokens", "0"], "max_tokens must be at least 1"),
        (["chat", "--num-cpu-blocks", "-4"], "num_cpu_blocks must be at least 0"),
        (["chat", "--stop", ""], "stop must be non-empty strings"),
        (["chat", *["--stop", "x"] * 17], "stop must be at most 16 strings"),
        (["generate", "x", "--top-p", "2"], "top_p must be above 0 and at most 1"),
        (["generate", ""], "the prompt is empty"),
        (["compare", "--conversation", "/no/such/file"], "cannot read"),
        (["compare", "--rounds", "0"], "--rounds must be at least 1"),
        (["compare", "--plot", "/nonexistent/x.png"], "--plot /nonexistent/x.png cannot be written: No such file"),
        (["compare", "--plot", "/tmp/x.gif"], "the name has to end with one of .png, .pdf, .svg"),
        (["compare", "--json", "/tmp"], "--json /tmp cannot be written: Is a directory"),
        (["profile", "--output", "/proc/x.json"], "--output /proc/x.json cannot be written"),
        (["profile", "--plot", "/nonexistent/x.png"], "--plot /nonexistent/x.png cannot be written: No such file"),
    ],
)
def test_a_mistake_is_told_by_name_before_a_model_is_loaded(no_model, arguments, message, capsys):
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("pensieve: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_trying_an_output_file_leaves_no_trace(no_model, tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.png"
    old.write_text("{}")
    arguments = ["compare", "--json", str(old), "--plot", str(new), "--conversation", "/no/such/file"]
    assert cli.main(arguments) == 1
    assert "cannot read" in capsys.readouterr().err
    assert old.read_text() == "{}"
    assert not new.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--temprature", "0.5", "hi"], "unknown option --temprature; did you mean --temperature?"),
        (["generate", "--temprature=0.5", "hi"], "unknown option --temprature; did you mean --temperature?"),
        (["generate", "--max-token", "5", "hi"], "unknown option --max-token; did you mean --max-tokens?"),
        (["chat", "--no-pack-weight"], "unknown option --no-pack-weight; did you mean --no-pack-weights?"),
        (["chat", "--qqqq"], "unknown option --qqqq\n"),
        (["chat", "hello"], "unexpected arguments: hello"),
        (["chat", "--chunk-size", "x"], "argument --chunk-size: invalid int value: 'x'"),
        (["chatt"], "invalid choice: 'chatt'"),
    ],
)
def test_usage_errors_suggest_what_may_have_been_meant(no_model, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_options_of_yaml_and_python_are_suggested_too():
    with pytest.raises(ConfigError, match="unknown option 'max_num_seq'; did you mean 'max_num_seqs'") as error:
        EngineConfig.from_options({"max_num_seq": 4})
    assert error.value.param == "max_num_seq"
    with pytest.raises(ConfigError, match="unknown option 'colour'; known are async_scheduling"):
        EngineConfig.from_options({"colour": 4})


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_speaks_to_a_chat_model_by_its_template_unless_told_not_to(monkeypatch, capsys):
    assert cli.main(["generate", "my cat is called Mia", *SMALL]) == 0
    answer = capsys.readouterr().out
    assert "your cat is called Mia." in answer
    assert cli.main(["generate", "--raw", "<|user|>my cat is called Mia<|assistant|>", *SMALL]) == 0
    assert capsys.readouterr().out == answer
    assert cli.main(["generate", "my cat is called Mia", "--stop", "called", *SMALL]) == 0
    assert capsys.readouterr().out == answer[: answer.index("called")] + "\n"


def test_generate_continues_the_text_if_the_model_has_no_chat_template(tiny_model, capsys):
    options = ["--model", str(tiny_model("llama")), "--max-tokens", "6", "--dtype", "float32", *SMALL]
    assert cli.main(["generate", "some text", *options]) == 0
    plain = capsys.readouterr().out
    assert cli.main(["generate", "--raw", "some text", *options]) == 0
    assert capsys.readouterr().out == plain


# -- chat --------------------------------------------------------------------------------------------------------------


class Terminal:
    """`pensieve` in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.output, self._position = b"", 0
        self._pid, self._terminal = pty.fork()
        if not self._pid:
            os.execv(sys.executable, [sys.executable, "-m", "engine.cli", *arguments])

    def wait_for(self, text: bytes) -> None:
        end_s = time.monotonic() + WAIT_S
        while text not in self.output[self._position :]:
            assert time.monotonic() < end_s, (text, self.output)
            assert self._read(), (text, self.output)
        self._position = self.output.index(text, self._position) + len(text)

    def type(self, keys: bytes) -> None:
        os.write(self._terminal, keys)

    def wait_for_end(self) -> int:
        while self._read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def _read(self) -> bool:
        assert select.select([self._terminal], [], [], WAIT_S)[0], self.output
        try:
            data = os.read(self._terminal, 4096)
        except OSError:  # the other side is closed
            return False
        self.output += data
        return bool(data)

    def close(self) -> None:
        """Hang up, which ends what still runs."""
        os.close(self._terminal)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


@pytest.fixture
def open_terminal() -> Iterator[Callable[..., Terminal]]:
    """Arguments -> Terminal, closed at the end."""
    with contextlib.ExitStack() as stack:

        def open_(*arguments: str) -> Terminal:
            terminal = Terminal(*arguments)
            stack.callback(terminal.close)
            return terminal

        yield open_


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # that a process with threads forks
def test_chat_in_a_terminal(open_terminal):
    """Commands, editing of a line, recall, an answer that is stopped and the turn after it, and both ways out by Ctrl-C."""
    terminal = open_terminal("chat", "--ignore-eos", "--max-tokens", "2000", *SMALL)
    prompt = b"you> "
    terminal.wait_for(prompt)
    terminal.type(b"/help\n")
    terminal.wait_for(b"/quit   end")
    terminal.wait_for(prompt)
    terminal.type(b"/foo bar\n")
    terminal.wait_for(b"unknown command /foo; /help lists the commands")
    terminal.wait_for(prompt)
    terminal.type(b"my cat is called Miaow\x7f\x7f\n")
    terminal.wait_for(b"your cat is called Mia.")
    terminal.type(b"\x03")
    terminal.wait_for(b"[stopped; the conversation goes on without this turn]")
    terminal.wait_for(prompt)
    terminal.type(b"\x1b[A\n")
    terminal.wait_for(b"your cat is called Mia.")
    terminal.type(b"\x03")
    terminal.wait_for(b"[stopped;")
    terminal.wait_for(prompt)
    for _ in range(500):  # the engine ends them between two steps
        terminal.type(b"/stats\n")
        terminal.wait_for(b"evictions:")
        terminal.wait_for(prompt)
        if b"0 requests finished, 2 aborted" in terminal.output:
            break
    assert b"0 requests finished, 2 aborted" in terminal.output
    terminal.type(b"\x03")
    terminal.wait_for(b"[Ctrl-C again ends the chat]")
    terminal.wait_for(prompt)
    terminal.type(b"\x03")
    assert terminal.wait_for_end() == 0
    assert b"Traceback" not in terminal.output
    assert b"Warning" not in terminal.output


class ScriptedServer:
    """Answers, or fails, as told; notes what it was asked."""

    class engine:
        model_name = "scripted"
        config = EngineConfig()

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str]] = []

    def chat(self, session_id: str, text: str, sampling: SamplingParams, on_text) -> Answer:
        self.asked.append((session_id, text))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        on_text(answer)
        reason = "length" if answer.endswith("...") else "stop"
        return Answer(answer, (1,) * (8 if answer == "limit..." else 5), reason, 7, 3, 0.01, 0.1)

    def get_statistics_str(self) -> str:
        return "statistics"


def converse(monkeypatch, server: ScriptedServer, *lines: str) -> int:
    """As over a pipe."""
    rest = iter(lines)

    def read(prompt: str) -> str:
        assert prompt == ""
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    return chat.run_chat(server, SamplingParams(max_tokens=8))  # type: ignore[arg-type]


def test_chat_over_a_pipe_prints_answers_only(monkeypatch, capsys):
    server = ScriptedServer("one", "limit...", "window...", ContextLengthError("too long"), "two")
    lines = [
        "hello",
        "/new",
        "  what?  ",
        "",
        "//etc is a folder",
        "and?",
        "/nope",
        "again",
        "/stats",
        "/quit",
        "not read",
    ]
    assert converse(monkeypatch, server, *lines) == 0
    assert server.asked == [
        ("chat-0", "hello"),
        ("chat-1", "what?"),
        ("chat-1", "/etc is a folder"),
        ("chat-1", "and?"),
        ("chat-1", "again"),
    ]
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["one", "limit...", "window...", "two", "statistics"]
    assert captured.err.splitlines() == [
        "[cut off after 8 tokens: --max-tokens allows more]",
        "[cut off: the context window is full]",
        "pensieve: too long; /new begins another conversation",
        "unknown command /nope; /help lists the commands",
    ]


@pytest.mark.parametrize(
    ("window", "asked", "limit"), [(64, [], 16), (512, [], 128), (4096, [], 512), (64, ["40"], 40)]
)
def test_answers_have_a_default_length_that_leaves_room_for_turns(monkeypatch, window, asked, limit):
    given = []
    monkeypatch.setattr(chat, "run_chat", lambda server, sampling: given.append(sampling.max_tokens) or 0)
    options = ["--max-model-len", str(window), *SMALL[:2], "--num-gpu-blocks", "300"]
    assert cli.main(["chat", *(["--max-tokens", *asked] if asked else []), *options]) == 0
    assert given == [limit]


# -- compare -----------------------------------------------------------------------------------------------------------


def test_compare_stops_at_the_window_and_says_so():
    turns = ["my cat is called Mia"] * 12
    options = {"max_model_len": 128, "dtype": "float32", "num_threads": 1}
    comparison = compare_modes(options, turns, SamplingParams(temperature=0.0, max_tokens=24), num_rounds=1)
    assert not comparison.is_complete
    assert comparison.is_identical
    assert 1 < len(comparison.turns) < len(turns)
    for before, turn in zip(comparison.turns, comparison.turns[1:], strict=False):
        assert turn.num_computed_tokens < turn.num_prompt_tokens
        assert turn.num_cached_tokens >= before.num_prompt_tokens


def test_compare_takes_medians_of_rounds_of_which_none_helps_the_next_and_the_first_does_not_count(monkeypatch):
    """The clock is the number of the answer: what the first round takes is not in the medians."""
    given: list[tuple[str, Answer]] = []
    chat_of_server = Server.chat

    def timed_chat(server: Server, *arguments: object, **options: object) -> Answer:
        answer = chat_of_server(server, *arguments, **options)  # type: ignore[arg-type]
        given.append((server.engine.config.mode, answer))
        number = len(given) - 1
        ttft_s = 100.0 if number < 4 else float(number)
        return Answer(*(getattr(answer, name) for name in Answer.__slots__[:5]), ttft_s, answer.total_s)

    monkeypatch.setattr(compare.Server, "chat", timed_chat)
    turns = ["my cat is called Mia", "what is my cat called?"]
    options = {"dtype": "float32", "num_threads": 1, "num_gpu_blocks": 200}
    comparison = compare_modes(options, turns, SamplingParams(temperature=0.0, max_tokens=8), num_rounds=3)
    assert comparison.is_identical
    assert comparison.is_complete
    assert len(given) == 2 * 2 * (1 + 3)
    first_turns = [answer for number, (mode, answer) in enumerate(given) if number // 2 % 2 == 0]
    assert all(answer.num_cached_tokens == 0 for answer in first_turns), "a round found what the one before had left"
    # Which mode goes first alternates from turn to turn and from round to round.
    rounds = [["stateless", "pensieve", "pensieve", "stateless"], ["pensieve", "stateless", "stateless", "pensieve"]]
    assert [mode for mode, _ in given] == 2 * [*rounds[0], *rounds[1]]
    # Answers 4 to 15; turn 1: pensieve 4, 9, 12, stateless 5, 8, 13; turn 2: pensieve 7, 10, 15, stateless 6, 11, 14.
    times = [(turn.pensieve_ttft_s, turn.stateless_ttft_s) for turn in comparison.turns]
    assert times == [(9.0, 8.0), (10.0, 11.0)]
    assert [turn.speed_up for turn in comparison.turns] == pytest.approx([8 / 9, 11 / 10])


def test_the_built_in_conversation_has_something_to_compute():
    assert len(compare.DEMO_CONVERSATION) == 10
    assert sum(map(len, compare.DEMO_CONVERSATION)) > 1000


def test_command_compare_prints_writes_and_plots(tmp_path, capsys):
    figures, plot = tmp_path / "figures.json", tmp_path / "figures.png"
    conversation = tmp_path / "conversation.json"
    conversation.write_text(
        json.dumps(
            [{"role": "user", "content": "my cat is called Mia"}, {"role": "assistant", "content": "-"}, "hello"]
        )
    )
    arguments = ["compare", "--conversation", str(conversation), "--json", str(figures), "--plot", str(plot)]
    assert cli.main([*arguments, "--rounds", "1", *SMALL]) == 0

    assert "outputs are identical" in capsys.readouterr().out
    assert [turn["turn"] for turn in json.loads(figures.read_text())["turns"]] == [1, 2]
    assert plot.read_bytes().startswith(b"\x89PNG")

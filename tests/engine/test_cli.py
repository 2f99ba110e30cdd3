"""The command line: what it imports, what it refuses and how, and a chat in a terminal."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar

import pytest
from rich.console import Console

from engine import cli, compare
from engine.chat import chat
from engine.chat.partners import EnginePartner
from engine.chat.screens import MarkdownAnswer, PipeScreen, end_of_blocks
from engine.compare import compare_modes
from engine.config import GROUPS, EngineConfig
from engine.core.request import SamplingParams
from engine.errors import ConfigError, ContextLengthError, ModelLoadError
from engine.options import options_of
from engine.server import Answer, Server
from engine.text.prompt import ChatPrompt

SMALL = ["--model", "embedded", "--num-threads", "1", "--num-gpu-blocks", "200", "--chunk-size", "16"]
WAIT_S = 120
FLAGS = """
    --model m --served-model-name s --mode vllm --dtype bfloat16 --device cuda:1 --max-model-len 64 --load-format auto
    --chunk-size 16 --num-gpu-blocks 8 --num-cpu-blocks 0 --gpu-memory-gib 2 --gpu-memory-utilization 0.5
    --kv-offloading-size 3 --eviction-policy lru --max-num-seqs 4 --max-num-batched-tokens 128 --prefill-batch-tokens 32
    --max-num-queued-reqs 5 --max-num-queued-tokens 99 --decode-reserve 0.2 --swap-out-watermark 0.3 --write-through
    --verify-swaps --profile p.json --num-threads 2 --attention-backend cpu --enforce-eager
    --no-pack-weights --no-compile-layers --no-async-scheduling --tensor-parallel-size 2
"""
SLOW_TO_IMPORT = {"torch", "transformers", "tokenizers", "numpy", "matplotlib", "tqdm", "asyncio"} | {
    *("rich", "prompt_toolkit", "httpx")
}


@pytest.fixture
def no_model(monkeypatch):
    """A command that gets as far as loading a model fails the test."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("engine.server.AsyncEngine", load)
    monkeypatch.setattr("engine.profile.measure_profile", load)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in (*cli.MAX_TOKENS, *cli.COMMANDS))]
)
def test_help_imports_nothing_that_is_slow(arguments):
    script = (
        "import sys\n"
        "from engine import cli\n"
        "try:\n"
        f"    cli.main({arguments!r})\n"
        "finally:\n"
        f"    slow = {SLOW_TO_IMPORT} & set(sys.modules)\n"
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
        (["generate", "x", "--json-schema", "/no/such/file"], "cannot read a JSON schema from /no/such/file"),
        (["generate", "x", "--regex", "a", "--ignore-eos"], "ignore_eos must be false with a grammar"),
        (["generate", "x", "--regex", ""], "a grammar of kind 'regex' needs a text"),
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


def test_a_plot_without_matplotlib_names_the_extra_that_brings_it(no_model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in ("compare", "profile"):
        assert cli.main([command, "--plot", str(tmp_path / "x.png")]) == 1
        assert "--plot needs matplotlib: pip install 'pensieve-ray[plot]'" in capsys.readouterr().err


def test_the_flags_are_what_they_were_and_mean_the_same_as_in_yaml():
    """A literal list, so that existing scripts and configuration files do not break."""
    flags = FLAGS.split()
    values = vars(cli.build_parser()[0].parse_args(["chat", *flags]))
    given = {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags if flag.startswith("--")}
    config = EngineConfig.from_options({name: values[name] for name in given})
    assert config == EngineConfig(
        model="m",
        served_model_name="s",
        mode="stateless",
        dtype="bfloat16",
        device="cuda:1",
        max_model_len=64,
        load_format="auto",
        chunk_size=16,
        num_gpu_blocks=8,
        num_cpu_blocks=0,
        gpu_memory_gib=2.0,
        gpu_memory_utilization=0.5,
        kv_offloading_size=3.0,
        eviction_policy="lru",
        max_num_seqs=4,
        max_num_batched_tokens=128,
        prefill_batch_tokens=32,
        max_num_queued_reqs=5,
        max_num_queued_tokens=99,
        decode_reserve=0.2,
        swap_out_watermark=0.3,
        write_through=True,
        verify_swaps=True,
        profile="p.json",
        num_threads=2,
        attention_backend="cpu",
        enforce_eager=True,
        pack_weights=False,
        compile_layers=False,
        async_scheduling=False,
        tensor_parallel_size=2,
    )


@pytest.mark.parametrize("command", ["chat", "generate", "compare", "profile"])
def test_help_has_every_option_of_the_engine_in_its_group(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    titles = [*(f"{title} options" for title, _ in GROUPS), "tuning options"]
    sections = re.split("|".join(rf"^({title}):$" for title in titles), capsys.readouterr().out, flags=re.MULTILINE)
    text_of = {part: sections[sections.index(part) + len(titles) - titles.index(part)] for part in titles}
    for title, group in GROUPS:
        for entry in options_of(group):
            section = text_of["tuning options" if entry.option.is_tuning else f"{title} options"]
            assert f"\n  --{entry.name.replace('_', '-')}" in section
            assert " ".join(entry.option.help.replace("`", "").split()[:3]) in " ".join(section.split())


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
        (["chat", "--qqqq"], "unknown option --qqqq; --help lists them all\n"),
        (["chat", "--block-size", "16"], "unknown option --block-size; it is called --chunk-size here\n"),
        (
            ["chat", "--n-gpu-layers=99"],
            "unknown option --n-gpu-layers; a model is on one device as a whole; set device\n",
        ),
        (
            ["chat", "--no-enable-prefix-caching"],
            "prefixes are always cached in mode pensieve, never in mode stateless",
        ),
        (["chat", "hello"], "unexpected arguments: hello"),
        (["chat", "--chunk-size", "x"], "argument --chunk-size: invalid int value: 'x'"),
        (["chatt"], "invalid choice: 'chatt'"),
        (["generate", "x", "--regex", "a", "--json-schema", "b"], "not allowed with argument"),
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
    options = [*SMALL, "--model", str(tiny_model("llama")), "--max-tokens", "6", "--dtype", "float32"]
    assert cli.main(["generate", "some text", *options]) == 0
    plain = capsys.readouterr().out
    assert cli.main(["generate", "--raw", "some text", *options]) == 0
    assert capsys.readouterr().out == plain


def test_generate_answers_in_the_form_that_is_asked_for(tmp_path, capsys):
    schema = tmp_path / "schema.json"
    schema.write_text(
        '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]}'
    )
    assert cli.main(["generate", "my cat is called Mia", "--json-schema", str(schema), *SMALL]) == 0
    assert "name" in json.loads(capsys.readouterr().out)
    assert cli.main(["generate", "my cat is called Mia", "--regex", "[0-9]{3}", *SMALL]) == 0
    assert len(capsys.readouterr().out.strip()) == 3
    assert cli.main(["generate", "my cat is called Mia", "--regex", "(", *SMALL]) == 1
    assert "the grammar cannot be used: unclosed group" in capsys.readouterr().err


# -- chat --------------------------------------------------------------------------------------------------------------


class Terminal:
    """`pensieve` in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.output, self._position = b"", 0
        self._pid, self._terminal = pty.fork()
        if not self._pid:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that runs the tests in the background has it ignored
            os.execv(sys.executable, [sys.executable, "-m", "engine.cli", *arguments])
        termios.tcsetwinsize(self._terminal, (100, 80))  # room for a whole answer: its beginning is in every redraw

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
        for _ in range(data.count(b"\x1b[6n")):
            self.type(b"\x1b[1;1R")  # where the cursor is
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
def test_chat_in_a_terminal(open_terminal, monkeypatch, tmp_path):
    """Commands, editing, recall, several lines, an answer that is stopped and the turns after it, forks, and the ways out."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    file = tmp_path / "said.json"
    terminal = open_terminal("chat", "--ignore-eos", "--max-tokens", "2000", *SMALL)
    prompt = b"\x1b[?2004h"  # what a prompt begins with

    def enter(line: str, *expected: bytes) -> None:
        terminal.wait_for(prompt)
        terminal.type(line.encode() + b"\r")
        for text in expected:
            terminal.wait_for(text)

    enter("/help", b"/quit        end")
    enter("/foo bar", b"unknown command /foo; /help lists the commands")
    # What follows may be one long word with "Mia.", which then begins a line of its own.
    enter("my cat is called Miaow\x7f\x7f", b"your cat is called", b"Mia.")
    terminal.type(b"\x03")
    terminal.wait_for(b"[stopped; the conversation goes on without this turn]")
    enter("\x1b[A", b"your cat is called", b"Mia.")
    terminal.type(b"\x03")
    terminal.wait_for(b"[stopped;")
    for _ in range(500):  # the engine ends them between two steps
        enter("/stats", b"evictions:")
        if b"0 requests finished, 2 aborted" in terminal.output:
            break
    assert b"0 requests finished, 2 aborted" in terminal.output
    terminal.wait_for(prompt)
    terminal.type(b"\x03")
    terminal.wait_for(b"[Ctrl-C again ends the chat]")
    terminal.wait_for(prompt)
    terminal.type(b"\x03")
    assert terminal.wait_for_end() == 0

    terminal = open_terminal("chat", "--max-tokens", "60", *SMALL)
    enter("my cat\\\ris called\x1b\rMia", b"Mia", b" cached, ", b" computed; first token ")  # at the bottom
    terminal.type(f"/save {file}\r".encode())
    terminal.wait_for(b"[2 messages written to ")
    enter("/fork", b"[conversation 2, 2 messages]")
    enter("what is my cat called?")
    enter("/stats", b"first token", b"evictions:")
    enter(f"/load {file}", b"[conversation 3, 2 messages]")
    enter("/model", b"pensieve-recall-0.6m, window of ")
    enter("/quit")
    assert terminal.wait_for_end() == 0
    assert [message["role"] for message in json.loads(file.read_text())] == ["user", "assistant"]
    assert json.loads(file.read_text())[0]["content"] == "my cat\nis called\nMia"
    assert (tmp_path / "pensieve" / "chat_history").stat().st_mode & 0o077 == 0
    for frightening in (b"Traceback", b"Warning", b"your terminal"):
        assert frightening not in terminal.output


class ScriptedPartner:
    """Answers, or fails, as told; notes what it was asked."""

    model_name, max_model_len = "scripted", 64

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, list[str], int | None]] = []

    def answer(self, session_id: str, messages: list[chat.Message], sampling: SamplingParams, on_text) -> chat.Turn:
        self.asked.append((session_id, [text for _, text in messages], sampling.max_tokens))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        on_text(answer)
        reason = "length" if answer.endswith("...") else "stop"
        return chat.Turn(answer, reason, 7, 3, 8 if answer == "limit..." else 5, 0.01, 0.1)

    def take_model(self, model: str) -> None:
        if model != "other":
            raise ModelLoadError(f"no {model}")
        self.model_name = model

    def statistics(self) -> str:
        return "statistics"


def converse(monkeypatch, partner: ScriptedPartner, *lines: str, max_tokens: int | None = 8) -> int:
    """As over a pipe."""
    rest = iter(lines)

    def read(prompt: str) -> str:
        assert prompt == ""
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    return chat.Chat(partner, PipeScreen(), SamplingParams(max_tokens=max_tokens), "s").run()


def test_chat_over_a_pipe_prints_answers_only(monkeypatch, capsys):
    partner = ScriptedPartner("one", "limit...", "window...", ContextLengthError("too long"), "two")
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
    assert converse(monkeypatch, partner, *lines) == 0
    kept = ["what?", "limit...", "/etc is a folder", "window..."]  # a turn that fails leaves no trace
    assert partner.asked == [
        ("s-0", ["hello"], 8),
        ("s-1", kept[:1], 8),
        ("s-1", kept[:3], 8),
        ("s-1", [*kept, "and?"], 8),
        ("s-1", [*kept, "again"], 8),
    ]
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["one", "limit...", "window...", "two", "statistics"]
    assert captured.err.splitlines() == [
        "[cut off after 8 tokens: --max-tokens allows more]",
        "[cut off: the context window is full]",
        "pensieve: too long; /new begins another conversation",
        "unknown command /nope; /help lists the commands",
    ]


def test_conversations_are_forked_saved_loaded_and_returned_to(monkeypatch, capsys, tmp_path):
    file = tmp_path / "said.json"
    partner = ScriptedPartner("one", "two", "three", "four")
    lines = ["a", f"/save {file}", "/fork", "b", "/go 1", "c", f"/load {file}", "d", "/go"]
    assert converse(monkeypatch, partner, *lines, max_tokens=None) == 0
    assert partner.asked == [
        ("s-0", ["a"], 16),  # a quarter of the window
        ("s-1", ["a", "one", "b"], 16),
        ("s-0", ["a", "one", "c"], 16),
        ("s-2", ["a", "one", "d"], 16),
    ]
    assert json.loads(file.read_text()) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
    ]
    assert file.stat().st_mode & 0o077 == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "  1: 4 messages  a",
        "  2: 4 messages  a",
        "* 3: 4 messages  a",
    ]


def test_what_a_command_cannot_do_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "text.json").write_text("[1]")
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    lines = ["/save", "/save /no/such/folder/x", "/load /no/such", f"/load {tmp_path}/text.json"]
    lines += [f"/load {tmp_path}/bytes.json", "/go 2", "/go x", "/model nothing", "/model other"]
    lines += ["/why", "hello", "/why"]
    assert converse(monkeypatch, ScriptedPartner("one"), *lines) == 0
    captured = capsys.readouterr()
    assert captured.out == "other, window of 64 tokens\none\n"
    expected = (
        "/save needs the name of a file",
        "/save /no/such/folder/x: No such file or directory; name a file in a folder that exists",
        "/load /no/such: No such file or directory; name a file that /save wrote",
        "it must hold a list of",
        "name a file that /save wrote",
        "/go 2: the conversations are 1 to 1",
        "/go x: the conversations are 1 to 1",
        "no nothing",
        "/why: there is no answer in this conversation yet",
        "/why: the server of other does not say how an answer came about",
    )
    errors = captured.err.splitlines()
    assert len(errors) == len(expected)
    for line, part in zip(errors, expected, strict=True):
        assert line.startswith("pensieve: ")
        assert part in line


def test_another_model_is_loaded_and_the_old_one_stays_if_it_cannot_be(tiny_model):
    config = EngineConfig(num_threads=1, num_gpu_blocks=200, dtype="float32")
    with contextlib.closing(EnginePartner(config, Server)) as partner:
        with pytest.raises(ModelLoadError):
            partner.take_model("/no/such.gguf")
        sampling = SamplingParams(max_tokens=16, temperature=0.0)
        pieces: list[str] = []
        turn = partner.answer("s", [("user", "my cat is called Mia")], sampling, pieces.append)
        assert turn.text == "".join(pieces)
        assert "Mia" in turn.text
        assert turn.num_output_tokens > 0
        partner.take_model(str(tiny_model("llama")))
        assert (partner.model_name, partner.max_model_len) == (tiny_model("llama").name, 512)


# -- chat with a server ------------------------------------------------------------------------------------------------


EXPLANATION = {
    "replica": 1,
    "home": True,
    "lost_replicas": 0,
    "seconds": {"route": 0.0021, "queue": 0.0, "prefill": 0.0312, "decode": 0.4127},
    "cached_tokens_by_tier": {"gpu": 640, "disk": 150},
    "computed_tokens_by_reason": {"new": 22, "cpu_dropped": 32},
    "suspensions": 2,
    "recomputed": {"edited": 20},
}
WHY = """\
446.0 ms
  route      2.1 ms  on the way to the replica and back
  prefill   31.2 ms  until the first token
  decode   412.7 ms  until the last token
844 tokens of the prompt
  cached gpu            640  found in the GPU tier
  cached disk           150  found in the disk tier
  computed new           22  never cached before
  computed cpu_dropped   32  evicted from the CPU tier
20 of the computed ones were said before: the history was changed
replica 1, where this session belongs
suspended: 2"""


class OpenAIServer(http.server.BaseHTTPRequestHandler):
    """Speaks OpenAI's API; wants the key "sk-a"."""

    asked: ClassVar[list[tuple[str, dict]]] = []

    def log_message(self, *arguments: object) -> None: ...

    def do_GET(self) -> None:
        is_allowed = self.headers["authorization"] == "Bearer sk-a"
        error = {"error": {"message": "a key is needed", "code": "invalid_api_key"}}
        self.send_json(200 if is_allowed else 401, {"data": [{"id": "tiny"}]} if is_allowed else error)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append((self.headers["x-session-id"], body))
        question = body["messages"][-1]["content"]
        if question == "too much":
            self.send_json(400, {"error": {"message": "too long", "code": "context_length_exceeded"}})
            return
        usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
        failure = {"error": {"message": "the engine is gone"}}
        explanation = {"explanation": EXPLANATION} if self.headers["x-pensieve-explain"] == "true" else {}
        chunks = [
            {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
            {"choices": [{"delta": {"content": "Hel"}}]},
            *([failure] if question == "fail" else []),
            {"choices": [{"delta": {"content": "lo"}, "finish_reason": "stop", **explanation}]},
            {"choices": [], "usage": usage},
        ]
        data = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        self.send(200, data.encode())

    def send_json(self, status: int, body: dict) -> None:
        self.send(status, json.dumps(body).encode())

    def send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server_url() -> Iterator[str]:
    OpenAIServer.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OpenAIServer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_chat_with_a_server(server_url, no_model, monkeypatch, capsys):
    monkeypatch.setenv("PENSIEVE_API_KEY", "sk-a")
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\ntoo much\nfail\nagain\n/stats\n/model x\n/why\n"))
    assert cli.main(["chat", "--url", f"{server_url}/v1/", "--temperature", "0.5", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[:3] == ["Hello", "Hel", "Hello"]
    assert captured.out.splitlines()[3].startswith(f"tiny at {server_url}: 2 turns")
    assert "18 prompt tokens, 8 of them cached" in captured.out
    assert captured.out.endswith(f"\n{WHY}\n")
    assert captured.err.splitlines() == [
        "pensieve: too long; /new begins another conversation",
        "pensieve: the engine is gone",
        f"pensieve: {server_url} has no model 'x'; it has: tiny",
    ]
    (session, first), *_, (_, last) = OpenAIServer.asked
    assert {name for name, _ in OpenAIServer.asked} == {session}
    assert (first["temperature"], first["seed"], first["max_tokens"], first["model"]) == (0.5, 3, 512, "tiny")
    assert [message["content"] for message in last["messages"]] == ["hi", "Hello", "again"]


def test_a_server_that_cannot_be_used_is_one_line(server_url, no_model, monkeypatch, capsys):
    monkeypatch.delenv("PENSIEVE_API_KEY", raising=False)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{sock.getsockname()[1]}"
        for arguments, message in (
            (["--url", nobody], "is the server running?"),
            (["--url", server_url], "a key is needed (--api-key, or PENSIEVE_API_KEY"),
            (["--url", server_url, "--api-key", "sk-a", "--model", "big"], "has no model 'big'; it has: tiny"),
            (["--url", server_url, "--chunk-size", "8"], "--chunk-size is for an engine of this program"),
            (["--url", "http://127.0.0.1:x"], "cannot be used"),
            (["--url", "127.0.0.1:8000"], "--url 127.0.0.1:8000 is not a URL; give one such as http://127.0.0.1:8000"),
            (["--url", server_url, "--api-key", "schlüssel"], "cannot be used"),
        ):
            assert cli.main(["chat", *arguments]) == 1
            captured = capsys.readouterr()
            assert captured.err.startswith("pensieve: ")
            assert message in captured.err
            assert len(captured.err.splitlines()) == 1


# -- how answers are shown ---------------------------------------------------------------------------------------------

MARKDOWN = """# Title

A *word* and
a line.

1. one

   more of one

2. two

```python
a = 1

b = 2
```

The end"""


def test_only_finished_blocks_are_printed_for_good():
    blocks, rest = [], ""
    for character in MARKDOWN:
        rest += character
        end = end_of_blocks(rest)
        if end:
            blocks.append(rest[:end])
            rest = rest[end:]
    assert "".join(blocks) + rest == MARKDOWN
    assert [block.strip() for block in blocks] == [
        "# Title",
        "A *word* and\na line.",
        "1. one\n\n   more of one",
        "2. two",
        "```python\na = 1\n\nb = 2\n```",
    ]
    assert rest == "The end"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_answer_is_shown_once_however_it_comes(size):
    """And what would steer the terminal does not."""
    output = io.StringIO()
    answer = MarkdownAnswer(Console(file=output, width=60, height=5, force_terminal=False))
    text = MARKDOWN.replace("two", "tw\x1b]0;o")
    with answer.live:
        for start in range(0, len(text), size):
            answer.add(text[start : start + size])
        answer.close()
    shown = output.getvalue()
    assert "\x1b" not in shown
    for word in ("Title", "word", "more of one", "tw\N{REPLACEMENT CHARACTER}]0;o", "b = 2", "The end"):
        assert shown.count(word) == 1


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
    complete = Server.complete

    def timed_complete(server: Server, *arguments: object, **options: object) -> Answer:
        answer = complete(server, *arguments, **options)  # type: ignore[arg-type]
        given.append((server.engine.config.mode, answer))
        number = len(given) - 1
        ttft_s = 100.0 if number < 4 else float(number)
        return replace(answer, ttft_s=ttft_s, total_s=2 * ttft_s)

    monkeypatch.setattr(Server, "complete", timed_complete)
    turns = ["my cat is called Mia", "what is my cat called?"]
    options = {"dtype": "float32", "num_threads": 1, "num_gpu_blocks": 200}
    comparison = compare_modes(
        options, turns, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True), num_rounds=3
    )
    assert comparison.is_identical
    assert comparison.is_complete
    assert [len(answer.token_ids) for _, answer in given] == 4 * [compare.NUM_WARM_UP_TOKENS] + 12 * [12]
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
    rates = [(turn.pensieve_tokens_per_s, turn.stateless_tokens_per_s) for turn in comparison.turns]
    assert rates == [pytest.approx((12 / 18, 12 / 16)), pytest.approx((12 / 20, 12 / 22))]


def test_both_modes_of_compare_go_on_from_the_same_answer_if_theirs_differ(monkeypatch, tmp_path, capsys):
    prompts: dict[str, list[ChatPrompt]] = {"pensieve": [], "stateless": []}
    complete = Server.complete

    def complete_otherwise(server: Server, prompt: ChatPrompt, *arguments: object, **options: object) -> Answer:
        answer = complete(server, prompt, *arguments, **options)  # type: ignore[arg-type]
        prompts[server.engine.config.mode].append(prompt)
        if server.engine.config.mode == "stateless":
            return replace(answer, text="otherwise", token_ids=(*answer.token_ids[:2], 0))
        return answer

    monkeypatch.setattr(Server, "complete", complete_otherwise)
    conversation, figures = tmp_path / "conversation.json", tmp_path / "figures.json"
    conversation.write_text(json.dumps(["my cat is called Mia", "what is my cat called?"]))
    arguments = ["compare", "--conversation", str(conversation), "--json", str(figures), "--rounds", "1", *SMALL]
    assert cli.main(arguments) == 1
    assert prompts["pensieve"] == prompts["stateless"]
    assert [len(prompt.messages) for prompt in prompts["pensieve"]] == [1, 3, 1, 3]
    shown = capsys.readouterr().out
    assert shown.count("  differ\n") == 2
    assert max(map(len, shown.splitlines())) < 80
    assert "2 of 2 answers differ." in shown
    assert [turn["is_identical"] for turn in json.loads(figures.read_text())["turns"]] == [False, False]


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

    shown = capsys.readouterr()
    assert "All answers are the same" in shown.out
    assert "round 1 of 1" in shown.err, "it says how far it is, to a file, too"
    assert [turn["turn"] for turn in json.loads(figures.read_text())["turns"]] == [1, 2]
    assert plot.read_bytes().startswith(b"\x89PNG")

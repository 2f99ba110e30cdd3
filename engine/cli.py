"""The command line: `pensieve chat`, `generate`, `compare`. Options of the engine are those of EngineConfig, by name."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Union

import transformers

from engine import __version__
from engine.compare import compare_modes, format_table, plot_comparison
from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.errors import PensieveError
from engine.profile import describe_profile, measure_profile, plot_profile, profile_path
from engine.prompt import TextPrompt
from engine.server import Server, create_server

DEMO_CONVERSATION = (
    "My name is Ada.",
    "My cat is called Mia.",
    "The code of my locker is 4711.",
    "My favourite colour is green.",
    "My brother is named Tom.",
    "What is my cat called?",
    "What is the code of my locker?",
    "What is my favourite colour?",
    "Who is my brother?",
    "What is my name?",
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pensieve", description="Stateful LLM serving: chat, generate, compare.")
    parser.add_argument("--version", action="version", version=f"pensieve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("chat", "talk to a model; its KV cache is kept between turns"),
        ("generate", "continue one prompt"),
        ("compare", "run one conversation in both modes and compare them turn by turn"),
        ("profile", "measure what computing and swapping a chunk costs on this machine, for the eviction policy"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        _add_engine_options(command)
        if name != "profile":
            _add_sampling_options(command, greedy=name == "compare")
        if name == "generate":
            command.add_argument("prompt", nargs="?", help="the prompt; without it, standard input")
        if name == "compare":
            command.add_argument(
                "--conversation",
                type=Path,
                metavar="FILE",
                help='a JSON list of user messages, or of {"role", "content"} messages (only user ones are sent); '
                "without it a built-in one of ten turns",
            )
            command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
        if name == "profile":
            command.add_argument("--output", type=Path, metavar="FILE", help="instead of the user's cache folder")
        if name in ("compare", "profile"):
            command.add_argument("--plot", type=Path, metavar="FILE.png", help="plot the figures there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0 = done, 1 = the command failed (compare: outputs differ), 2 = usage."""
    arguments = vars(build_parser().parse_args(argv))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    transformers.logging.set_verbosity_error()
    names = {field.name for field in fields(EngineConfig)}
    options = {name: value for name, value in arguments.items() if name in names and value is not None}
    try:
        if arguments["command"] == "profile":
            return _profile(arguments, options)
        sampling = _sampling(arguments)
        if arguments["command"] == "compare":
            return _compare(arguments, options, sampling)
        with create_server(**options) as server:
            if arguments["command"] == "chat":
                return _chat(server, sampling)
            return _generate(server, arguments["prompt"], sampling)
    except PensieveError as error:
        print(f"pensieve: {error.message}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, BrokenPipeError):
        return 130


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of EngineConfig, so that no option can be forgotten here."""
    hints = typing.get_type_hints(EngineConfig)
    group = parser.add_argument_group("engine options (see docs/configuration.md)")
    for field in fields(EngineConfig):
        hint = hints[field.name]
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
        kind = next(kind for kind in kinds if kind is not type(None))
        flag = "--" + field.name.replace("_", "-")
        text = f"default: {field.default}"
        if field.name == "mode":
            group.add_argument(flag, choices=("pensieve", "stateless", "vllm"), help=f"vllm = stateless; {text}")
        elif field.name == "model":
            group.add_argument(flag, metavar="PATH_OR_HUB_ID", help=text)
        elif kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)


def _add_sampling_options(parser: argparse.ArgumentParser, *, greedy: bool) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=64, help="most tokens of an answer (default: 64)")
    group.add_argument("--ignore-eos", action="store_true", help="generate max-tokens in any case")
    if not greedy:
        group.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
        group.add_argument("--top-k", type=int, default=0)
        group.add_argument("--top-p", type=float, default=1.0)
        group.add_argument("--seed", type=int)


def _sampling(arguments: dict[str, Any]) -> SamplingParams:
    names = ("max_tokens", "ignore_eos", "temperature", "top_k", "top_p", "seed")
    given = {name: arguments[name] for name in names if name in arguments}
    return SamplingParams(**{"temperature": 0.0, **given})


def _chat(server: Server, sampling: SamplingParams) -> int:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"{server.engine.model_name} ({server.engine.config.mode}); /stats, /new, /quit", file=sys.stderr)
    session = 0
    while True:
        try:
            text = input("you> " if is_terminal else "").strip()
        except EOFError:
            return 0
        if text == "/quit":
            return 0
        if text == "/stats":
            print(server.get_statistics_str())
        elif text == "/new":
            session += 1
        elif text:
            try:
                answer = server.chat(f"chat-{session}", text, sampling, lambda piece: print(piece, end="", flush=True))
            except PensieveError as error:
                print(f"pensieve: {error.message}", file=sys.stderr)
                continue
            account = (
                f"[{answer.num_prompt_tokens} prompt tokens, {answer.num_cached_tokens} cached, "
                f"first token {answer.ttft_s * 1e3:.0f} ms]"
            )
            print(f"\n{account}" if is_terminal else "", flush=True)


def _generate(server: Server, prompt: str | None, sampling: SamplingParams) -> int:
    text = sys.stdin.read() if prompt is None else prompt
    server.complete(TextPrompt(text), sampling, on_text=lambda piece: print(piece, end="", flush=True))
    print()
    return 0


def _compare(arguments: dict[str, Any], options: dict[str, Any], sampling: SamplingParams) -> int:
    if "mode" in options:
        print("pensieve: compare runs both modes; --mode is not used", file=sys.stderr)
    turns: tuple[str, ...] = DEMO_CONVERSATION
    if arguments["conversation"] is not None:
        try:
            turns = _read_conversation(arguments["conversation"])
        except (OSError, ValueError) as error:
            print(f"pensieve: cannot read {arguments['conversation']}: {error}", file=sys.stderr)
            return 1
    comparison = compare_modes({**options, "mode": "pensieve"}, turns, sampling)
    print(format_table(comparison))
    if arguments["json"] is not None:
        arguments["json"].write_text(json.dumps(asdict(comparison), indent=2) + "\n")
    if arguments["plot"] is not None:
        plot_comparison(comparison, arguments["plot"])
    return 0 if comparison.is_identical else 1


def _profile(arguments: dict[str, Any], options: dict[str, Any]) -> int:
    config = EngineConfig.from_options(options)
    profile = measure_profile(config)
    path = arguments["output"] or profile_path(config, profile.model, profile.dtype, profile.device)
    profile.save(path)
    for name, value in describe_profile(profile).items():
        print(f"{name}: {value}")
    print(f"written to {path}")
    if arguments["plot"] is not None:
        plot_profile(profile, arguments["plot"])
    return 0


def _read_conversation(path: Path) -> tuple[str, ...]:
    """User messages of a JSON file; raises ValueError where there are none."""
    data = json.loads(path.read_text())
    if not isinstance(data, list):
        raise ValueError("it must hold a list of messages")
    turns = tuple(
        item if isinstance(item, str) else item["content"]
        for item in data
        if isinstance(item, str) or (isinstance(item, dict) and item.get("role") == "user" and "content" in item)
    )
    if not turns:
        raise ValueError("it holds no user message")
    return turns


if __name__ == "__main__":
    sys.exit(main())

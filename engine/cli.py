"""The command line: `pensieve chat`, `generate`, `compare`, `profile`, `size`, `bench`.

`pensieve serve`, `simulate`, `experiment` and `dashboards` are other programs.

Options of the engine are those of EngineConfig, with the same names, groups and help.

What is slow to import (torch, transformers, and the modules that need them) is imported by the command that uses it, after
its options have been checked: `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import typing
import uuid
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import __version__, size_command
from engine.bench import command as bench_command
from engine.chat import chat
from engine.config import GROUPS, EngineConfig
from engine.core.grammar import GrammarSpec
from engine.core.request import SamplingParams
from engine.dialogue.messages import Message
from engine.errors import ConfigError, PensieveError
from engine.option_names import unknown_option
from engine.options import OptionField, options_of
from engine.text.prompt import ChatPrompt, TextPrompt

if TYPE_CHECKING:
    from engine.server import Server

# Most tokens of an answer unless --max-tokens says otherwise; at most a quarter of the window.
MAX_TOKENS = {"chat": chat.MAX_TOKENS, "generate": 256, "compare": 32}
API_KEY_VARIABLE = "PENSIEVE_API_KEY"
# Commands that need no engine, in modules of their own.
COMMANDS = {"size": size_command, "bench": bench_command}
METAVARS = {int: "N", float: "X", str: "TEXT", dict: "NAME=TEXT,..."}
PLOT_SUFFIXES = (".png", ".pdf", ".svg")


# Commands that are programs of the cluster's part: `pensieve NAME` runs `pensieve-NAME`.
PROGRAMS = {
    "serve": "Serve a config file on this machine",
    "simulate": "Say what a cluster of a config file would do with a workload, without a model or a device",
    "dashboards": "Start Prometheus and Grafana beside a running cluster, as far as they are installed",
    "experiment": "Measure and simulate a matrix of configurations and loads on a Ray cluster",
}


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated options, because they would change their meaning with each new option."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def refuse(self, unknown: Sequence[str]) -> typing.NoReturn:
        """Exit with a message about the arguments that no option takes, and what may have been meant."""
        flags = [argument.split("=")[0] for argument in unknown if argument.startswith("-")]
        if not flags:
            self.error(f"unexpected arguments: {' '.join(unknown)}")
        known = {flag[2:].replace("-", "_") for flag in self._option_string_actions if flag.startswith("--")}
        self.error(f"unknown option {flags[0]}; {unknown_option(flags[0], known, _flag, '--help lists them all')}")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and those of the commands by name."""
    parser = Parser(
        prog="pensieve", description="Run a language model whose KV cache is kept between the turns of a conversation."
    )
    parser.add_argument("--version", action="version", version=f"pensieve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    parsers: dict[str, Parser] = {}
    for name, text in (
        ("chat", "Talk to a model, whose KV cache is kept between turns"),
        ("generate", "Answer one prompt, or continue it if the model is no chat model"),
        ("compare", "Hold one conversation with the cache and without, and compare times and answers turn by turn"),
        ("profile", "Measure what computing and loading a chunk costs on this machine, for the eviction policy"),
    ):
        usage = f"pensieve {name} [option ...]" + (" [prompt]" if name == "generate" else "")
        command = parsers[name] = commands.add_parser(name, help=text, description=text, usage=usage)
        if name == "chat":
            command.add_argument(
                "--url", metavar="URL", help="Chat with a running server, such as http://127.0.0.1:8000"
            )
            command.add_argument(
                "--api-key",
                metavar="KEY",
                help=f"Key for that server; better set {API_KEY_VARIABLE} in the environment, which ps does not show",
            )
        if name == "generate":
            command.add_argument("prompt", nargs="?", help="The prompt; without it, standard input is read")
            command.add_argument(
                "--raw", action="store_true", help="Continue the prompt as it is, without the model's chat template"
            )
            form = command.add_mutually_exclusive_group()
            form.add_argument(
                "--json-schema", type=Path, metavar="FILE", help="The answer is JSON that is valid under this schema"
            )
            form.add_argument("--regex", metavar="EXPRESSION", help="The whole answer matches this regular expression")
        if name == "compare":
            command.add_argument(
                "--conversation",
                type=Path,
                metavar="FILE",
                help='A JSON list of user messages, or of {"role", "content"} messages, of which user ones are sent '
                "(default: a built-in conversation of ten turns)",
            )
            command.add_argument(
                "--rounds",
                type=int,
                metavar="N",
                default=3,
                help="Number of runs; times are their medians (default: 3)",
            )
            command.add_argument("--json", type=Path, metavar="FILE", help="Write the figures to this file")
        if name == "profile":
            command.add_argument(
                "--output",
                type=Path,
                metavar="FILE",
                help="Write the profile to this file, and not to the user's cache folder",
            )
            command.add_argument(
                "--steps",
                type=Path,
                metavar="FILE",
                help="Measure instead how long steps take, for pensieve simulate, and write that to this file",
            )
        if name in ("compare", "profile"):
            command.add_argument("--plot", type=Path, metavar="FILE.png", help="Plot the figures to this file")
        if name != "profile":
            _add_sampling_options(command, MAX_TOKENS[name], greedy=name == "compare")
        _add_engine_options(command)
    for name, module in COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=module.DESCRIPTION, description=module.DESCRIPTION)
        module.add_options(parsers[name])
    for name, text in PROGRAMS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser, parsers


def main(argv: Sequence[str] | None = None) -> int:
    """0 = done, 1 = the command failed (compare: outputs differ), 2 = usage."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in PROGRAMS:
        return _run_program(argv)
    parser, parsers = build_parser()
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        parsers[namespace.command].refuse(unknown)
    arguments = vars(namespace)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("engine.model_files").setLevel(logging.INFO)  # what takes half a minute says so
    names = {entry.name for entry in options_of(EngineConfig)}
    options = {name: value for name, value in arguments.items() if name in names and value is not None}
    try:
        if namespace.command in COMMANDS:
            status: int = COMMANDS[namespace.command].run(namespace)
            return status
        config = EngineConfig.from_options(options)
        for name in ("json", "plot", "output", "steps"):
            if arguments.get(name) is not None:
                _check_output_file(name, arguments[name])
        sampling = None if arguments["command"] == "profile" else _sampling(arguments)
        if arguments.get("url") is not None:
            assert sampling is not None
            return _chat_with_server(arguments, options, sampling)
        prompt = _read_prompt(arguments["prompt"]) if arguments["command"] == "generate" else ""
        turns = _compared_turns(arguments, options) if arguments["command"] == "compare" else None
        options = _with_model(options)
        config = replace(config, model=options["model"])
        if sampling is None:
            return _profile(arguments, config)
        if arguments["command"] == "compare":
            return _compare(arguments, options, sampling, turns)
        if arguments["command"] == "chat":
            return _chat(config, sampling)
        return _generate(config, prompt, sampling, is_raw=arguments["raw"])
    except PensieveError as error:
        print(f"pensieve: {error.message}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, BrokenPipeError):
        return 130


def _run_program(argv: Sequence[str]) -> int:
    """The program beside this one, or else on the PATH."""
    name = f"pensieve-{argv[0]}"
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        print(f"pensieve: there is no {name} here; pip install 'pensieve-ray[serve]'", file=sys.stderr)
        return 1
    return subprocess.call([path, *argv[1:]])


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    """One option for each of EngineConfig, in its groups; those that few need come last."""
    tuning = []
    for title, group_of_options in GROUPS:
        entries = options_of(group_of_options)
        tuning += [entry for entry in entries if entry.option.is_tuning]
        group = parser.add_argument_group(f"{title} options")
        for entry in entries:
            if not entry.option.is_tuning:
                _add_engine_option(group, entry)
    group = parser.add_argument_group("tuning options", "Few need these. Measure before and after a change.")
    for entry in tuning:
        _add_engine_option(group, entry)


def _add_engine_option(group: argparse._ArgumentGroup, entry: OptionField) -> None:
    """The value is checked by EngineConfig, as one in YAML is."""
    text = f"{entry.option.help.removesuffix('.')} (default: {entry.shown_default})".replace("`", "").replace("%", "%%")
    if entry.kind is bool:
        group.add_argument(_flag(entry.name), action=argparse.BooleanOptionalAction, default=None, help=text)
        return
    values = [*entry.option.choices, *(alias for alias, _ in entry.option.aliases)]
    metavar = "{" + ",".join(values) + "}" if values else METAVARS[entry.kind]
    kind = _read_mapping if entry.kind is dict else entry.kind
    group.add_argument(_flag(entry.name), type=kind, metavar=metavar, help=text)


def _read_mapping(text: str) -> dict[str, str]:
    """NAME=TEXT,NAME=TEXT as a mapping."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and equals for name, equals, _ in pairs):
        raise argparse.ArgumentTypeError(
            f"must be NAME=TEXT, or several of these with commas between them, got {text!r}"
        )
    return {name: value for name, _, value in pairs}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int, *, greedy: bool) -> None:
    group = parser.add_argument_group("sampling options")
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        default=max_tokens if greedy else None,
        help=f"Most tokens of an answer (default: {max_tokens}"
        + ("" if greedy else ", at most a quarter of the window")
        + ")",
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="Go on to max-tokens even if the model ends its answer"
    )
    if not greedy:
        group.add_argument(
            "--temperature",
            type=float,
            metavar="X",
            default=0.0,
            help="Randomness of sampling; 0 always takes the likeliest token (default: 0)",
        )
        group.add_argument(
            "--top-k",
            type=int,
            metavar="K",
            default=0,
            help="Sample from the K likeliest tokens only; 0 for all (default: 0)",
        )
        group.add_argument(
            "--top-p",
            type=float,
            metavar="P",
            default=1.0,
            help="Sample from the likeliest tokens with this probability together (default: 1)",
        )
        group.add_argument("--seed", type=int, metavar="N", help="Make sampling repeatable")
        group.add_argument(
            "--stop",
            action="append",
            default=[],
            metavar="TEXT",
            help="End the answer before this text; may be given several times",
        )


def _sampling(arguments: dict[str, Any]) -> SamplingParams:
    names = ("max_tokens", "ignore_eos", "temperature", "top_k", "top_p", "seed")
    given = {name: arguments[name] for name in names if name in arguments}
    grammar = _grammar(arguments.get("json_schema"), arguments.get("regex"))
    return SamplingParams(**{"temperature": 0.0, **given}, stop=tuple(arguments.get("stop", ())), grammar=grammar)


def _grammar(schema_file: Path | None, regex: str | None) -> GrammarSpec | None:
    """What the answer has to match. Raises ConfigError if the file cannot be read."""
    if schema_file is None:
        return None if regex is None else GrammarSpec("regex", regex)
    try:
        return GrammarSpec.json_schema(json.loads(schema_file.read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read a JSON schema from {schema_file}: {error}", param="json_schema") from error


def _check_output_file(option: str, path: Path) -> None:
    """Raises ConfigError if a file that is to be written at the end cannot be written."""
    if option == "plot" and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'pensieve-ray[plot]'", param=option)
    if option == "plot" and path.suffix.lower() not in PLOT_SUFFIXES:
        raise ConfigError(f"--plot {path}: the name has to end with one of {', '.join(PLOT_SUFFIXES)}", param=option)
    is_there = path.exists()
    try:
        if option == "output":
            path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if not is_there:
            path.unlink()
    except OSError as error:
        raise ConfigError(
            f"--{option} {path} cannot be written: {error.strerror}; name a file in a folder that exists", param=option
        ) from error


def _read_prompt(prompt: str | None) -> str:
    """The argument, or all of standard input. Raises ConfigError if there is nothing."""
    text = sys.stdin.read() if prompt is None else prompt
    if not text:
        raise ConfigError("the prompt is empty; give one as an argument or on standard input", param="prompt")
    return text


def _load_server(config: EngineConfig) -> Server:
    import transformers

    from engine.server import Server

    transformers.logging.set_verbosity_error()
    return Server(config)


def _with_model(options: dict[str, Any]) -> dict[str, Any]:
    """The options with a `model` that is not "auto"; the log says what is served if the chat model is not installed."""
    from engine.model_files import choose_model

    return {**options, "model": choose_model(options.get("model", "auto"))}


def _chat(config: EngineConfig, sampling: SamplingParams) -> int:
    from engine.chat.partners import EnginePartner

    with contextlib.closing(EnginePartner(config, _load_server)) as partner:
        return _run_chat(partner, sampling)


def _chat_with_server(arguments: dict[str, Any], options: dict[str, Any], sampling: SamplingParams) -> int:
    from engine.chat.partners import ServerPartner

    for name in options.keys() - {"model"}:
        raise ConfigError(
            f"{_flag(name)} is for an engine of this program; with --url, the server has its own", param=name
        )
    key = arguments["api_key"] or os.environ.get(API_KEY_VARIABLE)
    with contextlib.closing(ServerPartner(arguments["url"], key, options.get("model"))) as partner:
        return _run_chat(partner, sampling)


def _run_chat(partner: chat.Partner, sampling: SamplingParams) -> int:
    from engine.chat.screens import PipeScreen, TerminalScreen

    screen: chat.Screen = TerminalScreen() if sys.stdin.isatty() and sys.stdout.isatty() else PipeScreen()
    if screen.is_terminal:
        screen.note(f"{partner.model_name}; /help lists the commands")
    return chat.Chat(partner, screen, sampling, uuid.uuid4().hex).run()


def _generate(config: EngineConfig, text: str, sampling: SamplingParams, *, is_raw: bool) -> int:
    with _load_server(config) as server:
        if sampling.max_tokens is None:
            sampling = replace(
                sampling, max_tokens=min(MAX_TOKENS["generate"], max(1, server.engine.max_model_len // 4))
            )
        is_chat = server.engine.has_chat_template and not is_raw
        prompt = ChatPrompt((Message("user", text),)) if is_chat else TextPrompt(text)
        answer = server.complete(prompt, sampling, on_text=lambda piece: print(piece, end="", flush=True))
    print()
    if answer.finish_reason == "length" and sys.stderr.isatty():
        print(f"[{chat.describe_cut(len(answer.token_ids), sampling)}]", file=sys.stderr)
    return 0


def _compared_turns(arguments: dict[str, Any], options: dict[str, Any]) -> tuple[str, ...] | None:
    """The user messages that --conversation names; None without it."""
    if "mode" in options:
        print("pensieve: compare runs both modes; --mode is not used", file=sys.stderr)
    if arguments["rounds"] < 1:
        raise ConfigError(f"--rounds must be at least 1, got {arguments['rounds']}", param="rounds")
    if arguments["conversation"] is None:
        return None
    try:
        return _read_conversation(arguments["conversation"])
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {arguments['conversation']}: {error}", param="conversation") from error


def _compare(
    arguments: dict[str, Any], options: dict[str, Any], sampling: SamplingParams, turns: tuple[str, ...] | None
) -> int:
    import transformers

    from engine.compare import DEMO_CONVERSATION, compare_modes, format_table, plot_comparison

    transformers.logging.set_verbosity_error()
    comparison = compare_modes(options, turns or DEMO_CONVERSATION, sampling, num_rounds=arguments["rounds"])
    print(format_table(comparison))
    if arguments["json"] is not None:
        arguments["json"].write_text(json.dumps(asdict(comparison), indent=2) + "\n")
    if arguments["plot"] is not None:
        plot_comparison(comparison, arguments["plot"])
    return 0 if comparison.is_identical else 1


def _profile(arguments: dict[str, Any], config: EngineConfig) -> int:
    import transformers

    from engine.profile import describe_profile, measure_profile, plot_profile, profile_path

    transformers.logging.set_verbosity_error()
    if arguments["steps"] is not None:
        from engine.step_measurement import measure_steps

        table = measure_steps(config)
        table.save(arguments["steps"])
        print(f"measured on {table.measured_on}; written to {arguments['steps']}")
        return 0
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
    """User messages of a JSON file; raises ValueError if there are none."""
    data = json.loads(path.read_text())
    if not isinstance(data, list):
        raise ValueError("it must hold a list of messages")
    turns = tuple(
        item if isinstance(item, str) else item["content"]
        for item in data
        if isinstance(item, str) or (isinstance(item, dict) and item.get("role") == "user" and "content" in item)
    )
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError("it must hold user messages, whose content is text")
    return turns


if __name__ == "__main__":
    sys.exit(main())

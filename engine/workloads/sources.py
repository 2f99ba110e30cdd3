"""All workloads by name, as a command line or a YAML file names them.

sharegpt-like  ultrachat-like  synthetic                        drawn from distributions
mooncake:FILE  tau-bench:FILE  oasst:FILE  sharegpt:FILE  vllm:FILE  aiperf:FILE  jsonl:FILE
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

from engine.errors import WorkloadError
from engine.workloads import conversations, mooncake, session_file, synthetic
from engine.workloads.conversations import Reading
from engine.workloads.distributions import Constant, Distribution, Exponential, parse_distribution
from engine.workloads.records import MAX_SESSIONS
from engine.workloads.session import Session, shortened
from engine.workloads.synthetic import Synthetic, ToolUse

FILE_FORMATS = ("mooncake", "tau-bench", "oasst", "sharegpt", "vllm", "aiperf", "jsonl")
DRAWN = ("sharegpt-like", "ultrachat-like", "synthetic")
WRITTEN_FORMATS = ("jsonl", "vllm", "aiperf", "mooncake")


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """What of a workload is to be taken, and how.

    num_sessions: at most; of drawn ones exactly.
    max_context_len: sessions end before the turn that would pass it; None = as they are (drawn ones: 16,384).
    max_turns, max_output_tokens: sessions and answers are cut to these.
    turns, new_tokens, output_tokens: distributions of drawn ones; None = the workload's own.
    think_s, tool_s: pauses of drawn ones, and of files that have no times; None = the workload's own.
    tools: what some turns of `synthetic` are.
    prefix_tokens, num_tenants, tenant_skew: of drawn ones, see Synthetic.
    guess_sessions, block_tokens: of a Mooncake trace.
    count_tokens: of a text.
    """

    num_sessions: int = 100
    max_context_len: int | None = None
    max_turns: int | None = None
    max_output_tokens: int | None = None
    turns: Distribution | None = None
    new_tokens: Distribution | None = None
    output_tokens: Distribution | None = None
    think_s: Distribution | None = None
    tool_s: Distribution | None = None
    tools: tuple[ToolUse, ...] = ()
    prefix_tokens: Distribution = field(default_factory=lambda: Constant(0.0))
    num_tenants: int = 1
    tenant_skew: float = 0.0
    guess_sessions: bool = True
    block_tokens: int = mooncake.BLOCK_TOKENS
    seed: int = 0
    count_tokens: Callable[[str], int] = conversations.estimate_tokens


def load_workload(source: str, options: WorkloadOptions | None = None) -> list[Session]:
    """The sessions of a source (see the module). Raises WorkloadError, also if there is none."""
    options = options or WorkloadOptions()
    if not 1 <= options.num_sessions <= MAX_SESSIONS:
        raise WorkloadError(f"the number of sessions must be from 1 to {MAX_SESSIONS}, got {options.num_sessions}")
    sessions: Iterable[Session] = islice(_read(source, options), options.num_sessions)
    if options.max_turns is not None or options.max_output_tokens is not None:
        sessions = (_cut(session, options) for session in sessions)
    if options.max_context_len is not None:
        sessions = shortened(sessions, options.max_context_len)
    loaded = list(sessions)
    if not loaded:
        raise WorkloadError(
            f"{source} has no session with a turn and an answer that fits; check its format and the limits"
        )
    return loaded


def write_workload(sessions: Iterable[Session], form: str, path: Path) -> None:
    """form: one of WRITTEN_FORMATS. Raises WorkloadError."""
    try:
        if form == "jsonl":
            session_file.write_sessions(sessions, path)
        elif form == "vllm":
            conversations.write_messages(sessions, path)
        elif form == "aiperf":
            conversations.write_aiperf(sessions, path)
        elif form == "mooncake":
            mooncake.write_rows(rows_of(sessions), path)
        else:
            raise WorkloadError(f"no workload is written as {form!r}; choose one of {', '.join(WRITTEN_FORMATS)}")
    except OSError as error:
        raise WorkloadError(
            f"{path} cannot be written: {error.strerror}; name a file in a folder that exists"
        ) from error


def rows_of(sessions: Iterable[Session], block_tokens: int = mooncake.BLOCK_TOKENS) -> list[mooncake.Row]:
    """The requests of sessions as a trace has them, if answers took no time, in order of time."""
    numbers = mooncake.BlockNumbers(block_tokens)
    rows = []
    for session in sessions:
        time_s = session.start_s
        for index, (turn, blocks) in enumerate(zip(session.turns, numbers.of_session(session), strict=True)):
            time_s += turn.pause_s
            delay_s = turn.pause_s if index else None
            prompt_len = session.prompt_lens[index]
            rows.append(mooncake.Row(time_s, prompt_len, turn.output_tokens, blocks, session.session_id, delay_s))
    return sorted(rows, key=lambda row: row.time_s)


def parse_options(values: Mapping[str, Any]) -> WorkloadOptions:
    """Options from a YAML mapping or a command line. Distributions are as in distributions.py. Raises WorkloadError."""
    known = {each.name for each in fields(WorkloadOptions)} - {"count_tokens"}
    if unknown := values.keys() - known:
        raise WorkloadError(
            f"unknown option of a workload: {', '.join(sorted(unknown))}; there are: {', '.join(sorted(known))}"
        )
    parsed: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    for name in _DISTRIBUTIONS & parsed.keys():
        parsed[name] = parse_distribution(parsed[name])
    if "tools" in parsed:
        parsed["tools"] = tuple(_parse_tool(each) for each in parsed["tools"])
        if sum(tool.share for tool in parsed["tools"]) > 1:
            raise WorkloadError(
                "the shares of all tools are more than 1 together; they are shares of the turns after a first"
            )
    for name in _COUNTS & parsed.keys():
        if not isinstance(parsed[name], int) or isinstance(parsed[name], bool) or parsed[name] < 1:
            raise WorkloadError(f"{name} must be a whole number above 0, got {parsed[name]!r}")
    return WorkloadOptions(**parsed)


def _parse_tool(value: Any) -> ToolUse:
    names = {each.name for each in fields(ToolUse)}
    if not isinstance(value, Mapping) or value.keys() != names:
        raise WorkloadError(f"a tool must have {', '.join(sorted(names))}, got {value!r}")
    share = value["share"]
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise WorkloadError(f"the share of a tool must be from 0 to 1, got {share!r}")
    return ToolUse(
        str(value["name"]), share, parse_distribution(value["pause_s"]), parse_distribution(value["result_tokens"])
    )


def _read(source: str, options: WorkloadOptions) -> Iterator[Session]:
    name, _, rest = source.partition(":")
    if name in DRAWN and not rest:
        return synthetic.draw_sessions(_spec(name, options), options.seed)
    if name not in FILE_FORMATS or not rest:
        raise WorkloadError(
            f"unknown workload {source!r}; give {', '.join(DRAWN)}, or FORMAT:FILE with a format of {', '.join(FILE_FORMATS)}"
        )
    path = Path(rest)
    if name == "mooncake":
        return mooncake.read_mooncake(path, guess_sessions=options.guess_sessions, block_tokens=options.block_tokens)
    if name == "jsonl":
        return session_file.read_sessions(path, options.count_tokens)
    pauses = {name: value for name in ("think_s", "tool_s") if (value := getattr(options, name)) is not None}
    return _TEXT_READERS[name](path, Reading(options.count_tokens, seed=options.seed, **pauses))


_TEXT_READERS: dict[str, Callable[[Path, Reading], Iterator[Session]]] = {
    "tau-bench": conversations.read_tau_bench,
    "oasst": conversations.read_oasst,
    "sharegpt": conversations.read_sharegpt,
    "vllm": conversations.read_messages,
    "aiperf": conversations.read_aiperf,
}
_DISTRIBUTIONS = {"turns", "new_tokens", "output_tokens", "think_s", "tool_s", "prefix_tokens"}
_COUNTS = {"num_sessions", "max_context_len", "max_turns", "max_output_tokens", "num_tenants", "block_tokens"}
# `synthetic` without options: a short chat, which the smallest models can hold.
_SHORT_CHAT = (Constant(5), Constant(64), Constant(64), Exponential(1.0))  # turns, tokens in and out, think time


def _spec(name: str, options: WorkloadOptions) -> Synthetic:
    if name == "synthetic":
        spec = Synthetic(options.num_sessions, *_SHORT_CHAT)
    else:
        spec = (synthetic.sharegpt if name == "sharegpt-like" else synthetic.ultrachat)(options.num_sessions)
    given = {
        each: value
        for each in ("turns", "new_tokens", "output_tokens", "think_s", "max_context_len")
        if (value := getattr(options, each)) is not None
    }
    return replace(
        spec,
        **given,
        tools=options.tools,
        prefix_tokens=options.prefix_tokens,
        num_tenants=options.num_tenants,
        tenant_skew=options.tenant_skew,
    )


def _cut(session: Session, options: WorkloadOptions) -> Session:
    turns = session.turns[: options.max_turns]
    if options.max_output_tokens is not None:
        turns = tuple(replace(turn, output_tokens=min(turn.output_tokens, options.max_output_tokens)) for turn in turns)
    return replace(session, turns=turns)

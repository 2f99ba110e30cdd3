"""The workloads on which policies are compared: sessions, the device and model that serve them, and sizes of cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from engine.simulator.devices import DEVICES, MODELS, Device, ModelShape
from engine.workloads.arrivals import Poisson, arrange
from engine.workloads.conversations import Reading, read_tau_bench
from engine.workloads.distributions import Exponential, Lognormal, Pareto
from engine.workloads.mooncake import read_mooncake
from engine.workloads.session import Session, Span, shortened
from engine.workloads.synthetic import Synthetic, draw_sessions, sharegpt

# The first half of FAST25's conversation trace (kvcache-ai/Mooncake, Apache-2.0), which is not part of this repository.
MOONCAKE = Path("conversation_trace_first_half.jsonl")
TAU_BENCH = Path(__file__).parents[1] / "data" / "airline_sessions.json"
# How long the tools of tau-bench run, in seconds. It has no times: these are made up, so that tools differ as they do in the
# field, from a look-up to a job that a person has to confirm.
TOOL_PAUSES = {
    "get_reservation_details": Lognormal(0.8, 0.5),
    "get_user_details": Lognormal(0.5, 0.5),
    "search_direct_flight": Lognormal(3.0, 0.7),
    "search_onestop_flight": Lognormal(6.0, 0.7),
    "calculate": Lognormal(0.1, 0.3),
    "think": Lognormal(0.1, 0.3),
    "list_all_airports": Lognormal(0.5, 0.5),
    "book_reservation": Lognormal(45.0, 0.8),
    "update_reservation_flights": Lognormal(60.0, 0.8),
    "update_reservation_baggages": Lognormal(30.0, 0.8),
    "cancel_reservation": Lognormal(90.0, 0.8),
    "send_certificate": Lognormal(20.0, 0.8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A workload, and what serves it.

    sessions: by seed, with start times, in their order. sizes: tokens of the GPU and of the CPU tier, from small to large.
    """

    name: str
    sessions: Callable[[int], list[Session]]
    model: ModelShape
    device: Device
    chunk_size: int
    window: int
    duration_s: float
    warm_up_s: float
    sizes: tuple[tuple[int, int], ...]


def chats(seed: int) -> list[Session]:
    """ShareGPT-like conversations, with memoryless thinking."""
    spec = replace(sharegpt(int(0.45 * DURATION_S) + 50), think_s=Exponential(60.0))
    return list(arrange(draw_sessions(spec, seed), Poisson(0.45), seed))


def heavy_chats(seed: int) -> list[Session]:
    """Most conversations end at once and few go on for long; users think for seconds or for many minutes."""
    spec = replace(
        sharegpt(int(0.7 * DURATION_S) + 50),
        turns=Pareto(1.0, 1.15, 60.0),
        think_s=Lognormal(90.0, 1.5, 1200.0),
    )
    return list(arrange(draw_sessions(spec, seed), Poisson(0.7), seed))


def mixed_agents(seed: int) -> list[Session]:
    """30 % agents with tools, of one system prompt, and chats of eight applications with a system prompt each."""
    rng = random.Random(f"agents.{seed}")
    num_sessions = int(0.25 * DURATION_S) + 50
    chat_sessions = draw_sessions(
        Synthetic(
            num_sessions,
            turns=Lognormal(5.56, 0.6),
            new_tokens=Lognormal(37.77, 1.0),
            output_tokens=Lognormal(204.58, 1.0),
            think_s=Exponential(60.0),
        ),
        seed,
    )
    agents = _agents(seed, rng)
    prompts = [Span(_PROMPT_STREAM + number, 400 + 300 * number) for number in range(8)]

    def mixed() -> Iterator[Session]:
        for number, chat in enumerate(chat_sessions):
            if rng.random() < 0.3:
                yield replace(next(agents), session_id=f"agent-{number}")
            else:
                prompt = rng.choices(prompts, weights=[1 / (k + 1) for k in range(8)])[0]
                first, *rest = chat.turns
                turns = (replace(first, new=(prompt, *first.new)), *rest)
                yield replace(chat, turns=turns, tenant="")

    return list(arrange(mixed(), Poisson(0.25), seed))


# Streams of prompts and of agents lie above those of the chats.
_PROMPT_STREAM, _AGENT_STREAM = 1 << 24, 1 << 25
DURATION_S = 900.0


def _agents(seed: int, rng: random.Random) -> Iterator[Session]:
    """Recorded sessions in random order, again and again; what is not the system prompt is each one's own."""
    recorded = list(_tau_bench())
    number = 0
    while True:
        for session in rng.sample(recorded, k=len(recorded)):
            number += 1
            turns = []
            for index, turn in enumerate(session.turns):
                new = tuple(
                    span if index == 0 and place == 0 else replace(span, stream=_own_stream(number, index, place))
                    for place, span in enumerate(turn.new)
                )
                pause_s = turn.pause_s
                if turn.kind == "tool":
                    pause_s = TOOL_PAUSES.get(turn.tool, Exponential(5.0)).sample(rng)
                elif index:
                    pause_s = rng.expovariate(1 / 45.0)
                turns.append(replace(turn, new=new, pause_s=pause_s, messages=(), answer=None, answer_stream=None))
            yield Session(session.session_id, tuple(turns))


def _own_stream(number: int, index: int, place: int) -> int:
    return _AGENT_STREAM + (number * 64 + index) * 8 + place


@lru_cache
def _tau_bench() -> tuple[Session, ...]:
    sessions = tuple(read_tau_bench(TAU_BENCH, Reading()))
    # The system prompt is the first span of all of them; its stream must not be one of the chats.
    return tuple(_with_prompt(session) for session in sessions)


def _with_prompt(session: Session) -> Session:
    first, *rest = session.turns
    prompt = replace(first.new[0], stream=_PROMPT_STREAM + 100)
    return replace(session, turns=(replace(first, new=(prompt, *first.new[1:])), *rest))


def mooncake(path: Path) -> Callable[[int], list[Session]]:
    """Every fifth session of the trace, another fifth for each seed."""

    @lru_cache
    def read() -> list[Session]:
        return list(shortened(read_mooncake(path, s_per_token=0.02), MOONCAKE_WINDOW))

    return lambda seed: [session for number, session in enumerate(read()) if number % 5 == seed % 5]


MOONCAKE_WINDOW = 32_768


def settings(mooncake_path: Path) -> list[Setting]:
    """All four."""
    opt = {
        "model": MODELS["opt-13b"],
        "device": DEVICES["a100-80gb"],
        "chunk_size": 128,
        "window": 16_384,
        "duration_s": DURATION_S,
        "warm_up_s": 300.0,
    }
    return [
        Setting(name="chats", sessions=chats, sizes=_sizes(40_000, 40_000, 80_000, 120_000, 160_000), **opt),
        Setting(name="heavy", sessions=heavy_chats, sizes=_sizes(40_000, 20_000, 60_000, 100_000, 160_000), **opt),
        Setting(
            name="mooncake",
            sessions=mooncake(mooncake_path),
            model=MODELS["llama-3.1-8b"],
            device=DEVICES["h100-80gb"],
            chunk_size=512,
            window=MOONCAKE_WINDOW,
            duration_s=1800.0,
            warm_up_s=600.0,
            sizes=_sizes(200_000, 200_000, 500_000, 1_000_000, 2_000_000),
        ),
        Setting(name="agents", sessions=mixed_agents, sizes=_sizes(40_000, 30_000, 60_000, 100_000, 150_000), **opt),
    ]


def _sizes(num_gpu_tokens: int, *num_cpu_tokens: int) -> tuple[tuple[int, int], ...]:
    return tuple((num_gpu_tokens, num) for num in num_cpu_tokens)

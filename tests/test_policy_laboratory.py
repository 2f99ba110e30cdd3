"""The policies of benchmarks/policies: their exact order, what they learn and foresee, and one small table."""

import importlib
import math
import random
import sys
from pathlib import Path

import pytest

from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction import TailOptimisedLRU
from engine.core.cache.index import Chunk
from engine.core.request import Request, SamplingParams
from engine.core.reuse import NUM_TOOL_CLASSES, Reuse

FOLDER = Path(__file__).parents[1] / "benchmarks" / "policies"
COSTS = CostModel(constant=1.0, per_context_token=0.25, chunk_size=4)
NAMES = ("baselines", "clairvoyant", "report", "return_history", "return_value", "runs", "table", "workloads")


@pytest.fixture(scope="module")
def laboratory():
    """Modules by name; afterwards they are forgotten, because scripts of other folders have the same names."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


class Foresight:
    """Next uses that were drawn."""

    def __init__(self) -> None:
        self.uses: dict[bytes, float] = {}

    def next_use_s(self, key: bytes, since_s: float) -> float:
        return self.uses[key]


def make_policy(laboratory, name: str, rng: random.Random):
    """The policy, and its order by definition: a function of chunk and time."""
    value, history = laboratory["return_value"], laboratory["return_history"]
    is_call = laboratory["baselines"]._is_call
    ttl_s = laboratory["baselines"].TOOL_TTL_S

    def retention(chunk: Chunk, now: float) -> tuple:
        idle_s = now - chunk.last_active
        return (COSTS.chunk_cost(chunk.position) / idle_s if idle_s > 0 else math.inf), chunk.position

    if name == "return_value":
        learned = history.ReturnHistory()
        learned.rates = [[rng.choice([1.0, 2.0, 4.0]) for _ in history.EDGES] for _ in range(history.NUM_CLASSES)]
        learned.version += 1

        def by_rate(chunk: Chunk, now: float) -> tuple:
            number = history.class_of(chunk)
            rate = learned.rates[number][history.bucket_of(now - chunk.last_active)]
            return COSTS.chunk_cost(chunk.position) * rate, chunk.position, chunk.last_active, number

        return value.ReturnValue(COSTS, learned), by_rate, None
    if name == "tool_ttl":
        return (
            laboratory["baselines"].ToolTtl(COSTS),
            lambda chunk, now: (is_call(chunk) and now - chunk.last_active <= ttl_s, *retention(chunk, now)),
            None,
        )
    if name == "once_used_first":
        return (
            laboratory["baselines"].OnceUsedFirst(COSTS),
            lambda chunk, now: (chunk.num_uses > 1, chunk.last_active, chunk.position),
            None,
        )
    if name == "tail_optimised_lru":
        costs = CostModel(0.05, 0.0, 4, is_in_seconds=True)
        return (
            TailOptimisedLRU(costs),
            lambda chunk, now: (chunk.position >= 4, chunk.last_active, chunk.position),
            None,
        )
    foresight = Foresight()

    def by_next_use(chunk: Chunk, now: float) -> tuple:
        next_s = foresight.uses[chunk.key]
        if next_s == math.inf:
            return 0.0, chunk.last_active, chunk.position
        return COSTS.chunk_cost(chunk.position) / max(next_s - now, 1e-3), -next_s, chunk.position

    return laboratory["clairvoyant"].Clairvoyant(COSTS, foresight), by_next_use, foresight


@pytest.mark.parametrize("name", ["return_value", "tool_ttl", "once_used_first", "tail_optimised_lru", "clairvoyant"])
def test_victims_are_the_smallest_by_definition_whatever_came_and_went(laboratory, name):
    num_choices = 0
    for seed in range(60):
        rng = random.Random(seed)
        policy, rank, foresight = make_policy(laboratory, name, rng)
        held: list[Chunk] = []  # in order of insertion
        now, num_made = 0.0, 0
        for _ in range(120):
            now += rng.choice([0.0, 0.5, 1.0, 8.0, 64.0])
            what = rng.random()
            if what < 0.5:
                last_active, uses = now - rng.choice([0.0, 0.0, 1.0, 30.0]), rng.choice([1, 1, 2])
                reuse, users = (
                    Reuse(rng.choice([0, 1, 5, NUM_TOOL_CLASSES, NUM_TOOL_CLASSES + 2])),
                    rng.choice([1, 1, 3]),
                )
                for position in range(rng.randrange(1, 6)):
                    made = Chunk(position, [0])
                    made.last_active, made.num_uses, made.reuse, made.num_users = last_active, uses, reuse, users
                    num_made += 1
                    made.key = num_made.to_bytes(4, "big")
                    if foresight is not None:
                        foresight.uses[made.key] = rng.choice([math.inf, now + 1000.0 * rng.random() + 500.0])
                    policy.insert(made)
                    held.append(made)
            elif what < 0.7 and held:
                gone = held.pop(rng.randrange(len(held)))
                policy.remove(gone)
                assert gone not in policy
            elif held:
                victim = policy.choose_victim(now)
                smallest = min(rank(each, now) for each in held)
                assert rank(victim, now) == smallest
                if name not in ("clairvoyant", "tool_ttl"):  # of equal ones, the one that came first
                    assert victim is next(each for each in held if rank(each, now) == smallest)
                other = rng.choice(held)
                if rank(other, now)[0] != smallest[0]:
                    assert policy.goes_before(victim, other, now)
                    assert not policy.goes_before(other, victim, now)
                num_choices += len(held) > 1
                if rng.random() < 0.7:
                    policy.remove(victim)
                    held.remove(victim)
            assert len(policy) == len(held)
        assert set(policy) == set(held)
        assert all(each in policy for each in held)
    assert num_choices > 1500


def test_new_knowledge_and_old_age_rank_what_is_held_anew(laboratory):
    history = laboratory["return_history"].ReturnHistory()
    edges = laboratory["return_history"].EDGES
    policy = laboratory["return_value"].ReturnValue(COSTS, history)
    call, chat = Chunk(0, [0]), Chunk(0, [0])
    call.reuse, chat.reuse, chat.last_active = Reuse(1), Reuse(2), 1.0
    policy.insert(call)
    policy.insert(chat)
    history.rates[1], history.rates[2] = [9.0] * len(edges), [5.0] * len(edges)
    history.version += 1
    assert policy.choose_victim(2.0) is chat
    history.rates[2] = [10.0] * len(edges)
    history.version += 1
    assert policy.choose_victim(2.0) is call
    history.rates[2] = [10.0] * (len(edges) - 1) + [1.0]
    history.version += 1
    assert policy.choose_victim(1.0 + edges[-1] - 0.5) is call
    assert policy.choose_victim(1.0 + edges[-1]) is chat


def test_the_rate_of_return_is_the_best_over_all_times_to_give_up(laboratory):
    module = laboratory["return_history"]
    widths = module._WIDTHS
    for seed in range(20):
        rng = random.Random(seed)
        hazards = [rng.choice([0.0, 0.01, 0.1, 1.0]) * rng.random() for _ in module.EDGES]
        rates = module.rates_of_return(hazards)
        for first in range(0, len(hazards), 7):
            best, alive, chance, seconds = 0.0, 1.0, 0.0, 0.0
            for hazard, width in zip(hazards[first:], widths[first:], strict=True):
                ends = -math.expm1(-hazard * width)
                chance, seconds = chance + alive * ends, seconds + alive * (ends / hazard if hazard else width)
                alive *= 1 - ends
                best = max(best, chance / seconds)
            assert rates[first] == pytest.approx(best)


def leave(history, number: int, now: float, conversation: str) -> Request:
    """A turn of one full chunk has ended."""
    request = Request(f"{conversation}.{now}", [number] * 4, SamplingParams(), conversation_id=conversation)
    chunk = Chunk(0, [0])
    chunk.key = number.to_bytes(32, "big")
    request.chunks, request.chunk_keys = [chunk], [chunk.key]
    chunk.note_use(conversation, history.stamp(request), now)
    history.note_end(request, now)
    return request


def test_history_learns_how_soon_chunks_return_and_how_many_never_do(laboratory):
    """Of 2,000 first turns 60 % go on, after 50 s on average: the chance in the next second falls as the others stay away."""
    history, rng = laboratory["return_history"].ReturnHistory(), random.Random(1)
    events = []
    for number in range(2000):
        begin_s = number * 0.5
        events.append((begin_s, number, False))
        if rng.random() < 0.6:
            events.append((begin_s + rng.expovariate(1 / 50.0), number, True))
    requests = {}
    for now, number, is_return in sorted(events):
        if is_return:
            history.note_start(requests[number], now)
        else:
            requests[number] = leave(history, number, now, f"c{number}")
    history._refresh(1000.0)
    number = laboratory["return_history"].class_of(requests[0].chunks[0])
    for idle_s in (2.0, 20.0, 60.0, 120.0):
        alive = 0.6 * math.exp(-idle_s / 50.0)
        hazard = alive / 50.0 / (alive + 0.4)
        rate = history.rates[number][laboratory["return_history"].bucket_of(idle_s)]
        assert rate == pytest.approx(hazard, rel=0.3)


def test_history_keeps_so_many_chunks_and_no_more(laboratory):
    module = laboratory["return_history"]
    history = module.ReturnHistory()
    for number in range(module.MAX_SAMPLES + 100):
        leave(history, number, float(number), f"c{number}")
    assert len(history._samples) == module.MAX_SAMPLES


def test_a_turn_is_told_by_the_uses_of_what_its_conversation_has_to_itself(laboratory):
    module = laboratory["return_history"]
    history = module.ReturnHistory()
    request = Request("r", range(8), SamplingParams(), conversation_id="a")
    shared, own = Chunk(0, [0]), Chunk(1, [0])
    shared.num_uses, shared.num_users, shared.last_user_id = 99, 40, "b"
    own.num_uses, own.num_users, own.last_user_id = 2, 1, "a"
    request.chunks = [shared, own]
    third_turn = history.stamp(request).reuse_class
    request.chunks = [shared, Chunk(1, [0])]
    assert third_turn - history.stamp(request).reuse_class == 2
    request.reuse = Reuse(3, expected_use_s=5.0)
    assert history.stamp(request) == Reuse(3, expected_use_s=5.0)


def test_a_table_of_a_small_workload(laboratory, tmp_path):
    """What runs give is what the report says of them."""
    from engine.simulator.devices import DEVICES, MODELS
    from engine.workloads.arrivals import Poisson, arrange
    from engine.workloads.synthetic import draw_sessions, sharegpt

    setting = laboratory["workloads"].Setting(
        name="chats",
        sessions=lambda seed: list(arrange(draw_sessions(sharegpt(60), seed), Poisson(0.4), seed)),
        model=MODELS["opt-13b"],
        device=DEVICES["a100-80gb"],
        chunk_size=128,
        window=16_384,
        duration_s=200.0,
        warm_up_s=40.0,
        sizes=((20_000, 8_000),),
    )
    table = laboratory["table"]
    for policy in ("retention_value", "lru", "return_value:ReturnValue", "clairvoyant"):
        for seed in (0, 1):
            figures = laboratory["runs"].run(setting, 0, policy, seed)
            key = {"workload": "chats", "size": 0, "disk_tokens": 0, "policy": policy, "seed": seed}
            table.append_run(tmp_path / "runs.csv", key | figures)
    rows = table.read_runs(tmp_path / "runs.csv")
    by_policy = {row["policy"]: float(row["recompute_s"]) for row in rows if row["seed"] == "0"}
    assert 0 < by_policy["clairvoyant"] < 0.8 * by_policy["retention_value"]
    laboratory["report"].write_report(rows, tmp_path, "retention_value")
    text = (tmp_path / "table.md").read_text()
    assert "clairvoyant" in text
    assert (tmp_path / "table.svg").exists()

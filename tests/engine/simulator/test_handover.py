"""Simulated replicas hand over what conversations left: what comes, from where, and how long it takes."""

import random
from dataclasses import replace

import pytest

from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.plan import BlockCopy, ChunkRecord, SlowTransfer, TransferEnd
from engine.core.tier_table import CPU, PEER, peer_tier
from engine.simulator import cluster, handover
from engine.simulator.clients import Client
from engine.simulator.cluster import Change, Cluster
from engine.simulator.devices import DEVICES, MODELS
from engine.simulator.directory import REFRESH_INTERVAL_S, Directory
from engine.simulator.events import Events
from engine.simulator.handover import Peer
from engine.simulator.network import Network, NetworkSpec
from engine.simulator.outcome import Outcome
from engine.simulator.replica import Replica
from engine.simulator.routing import LeastLoaded
from engine.simulator.simulator import Simulator
from engine.simulator.step_cost import Roofline
from engine.workloads.arrivals import Poisson, arrange
from engine.workloads.session import Session, Span, Turn
from engine.workloads.sources import WorkloadOptions, load_workload

CHUNK_SIZE = 64
SHAPE = MODELS["opt-13b"]
BYTES_PER_BLOCK = SHAPE.kv_bytes_per_token * CHUNK_SIZE
COST = Roofline(SHAPE, DEVICES["a100-80gb"], BYTES_PER_BLOCK)
NETWORK = NetworkSpec(bytes_per_s=12.5e9, latency_s=0.001)
# Of the same prompt, the tokens that are computed in one turn, and so the chunks that it leaves.
PROMPT, ANSWER = 2000, 49
NUM_CHUNKS = -(-(PROMPT + ANSWER - 1) // CHUNK_SIZE)


class Scripted(LeastLoaded):
    """Sends the turns of each session where it is told, in turn, and then to the last one of these."""

    def __init__(self, *ranks: int) -> None:
        super().__init__()
        self._script = ranks
        self._num_placed: dict[str, int] = {}

    def place(self, session_id, is_first_turn, ranks):
        number = self._num_placed[session_id] = self._num_placed.get(session_id, -1) + 1
        rank = self._script[min(number, len(self._script) - 1)]
        return [rank if rank in ranks else ranks[0]]

    def next_home(self, session_id, ranks):
        return ranks[0]


def make_cluster(
    num_replicas: int = 2, *, network=NETWORK, num_gpu_blocks=200, num_cpu_blocks=400, **options
) -> Cluster:
    slow_tiers = (peer_tier(num_cpu_blocks),) if network is not None else ()

    def make_core() -> EngineCore:
        cache = CacheConfig(
            chunk_size=CHUNK_SIZE,
            num_gpu_blocks=num_gpu_blocks,
            num_cpu_blocks=num_cpu_blocks,
            cost_model=COST.cost_model(CHUNK_SIZE),
            slow_tiers=slow_tiers,
        )
        return EngineCore(
            cache, SchedulingConfig(max_model_len=8192, max_num_batched_tokens=2048, max_num_queued_reqs=10_000)
        )

    return Cluster(
        make_core=make_core,
        cost=COST,
        router=options.pop("router", None) or LeastLoaded(),
        num_replicas=num_replicas,
        bytes_per_block=BYTES_PER_BLOCK,
        network=network,
        **options,
    )


def moving_session(pause_s: float = 10.0, num_turns: int = 2, name: str = "a", stream: int = 1) -> Session:
    first = Turn((Span(stream, PROMPT),), ANSWER)
    others = [Turn((Span(stream, 50, PROMPT + 50 * number),), ANSWER, pause_s) for number in range(num_turns - 1)]
    return Session(name, (first, *others))


def run(cluster: Cluster, sessions: list[Session]) -> Outcome:
    """To the end; then the books of every core balance, and nothing is under way."""
    simulation = Simulator(cluster, sessions)
    cores: list[EngineCore] = []
    stop = simulation._stop_replica

    def stop_replica(rank: int, now: float) -> Replica:
        cores.append(simulation._replicas[rank].core)
        return stop(rank, now)

    simulation._stop_replica = stop_replica
    outcome = simulation.run(1e9)
    for core in cores:
        core.check_integrity()
    return outcome


def second_turn(outcome: Outcome):
    (row,) = [row for row in outcome.turns if row.number == 1]
    return row


# -- a request that comes to another replica ---------------------------------------------------------------------------


def test_a_moved_turn_pulls_what_its_session_left():
    """All but the last token, which was never computed, in the time that the bytes take."""
    moved = run(make_cluster(router=Scripted(0, 1)), [moving_session()])
    stayed = run(make_cluster(router=Scripted(0, 0)), [moving_session()])
    row, at_home = second_turn(moved), second_turn(stayed)
    assert (row.rank, row.is_moved, at_home.is_moved) == (1, 1, 0)
    assert row.num_cached_tokens == at_home.num_cached_tokens == PROMPT + ANSWER - 1
    assert row.num_loaded_tokens == PROMPT + ANSWER - 1
    by_rank = {each.rank: each for each in moved.replicas}
    assert by_rank[1].counters["slow_transfers"]["peer_loaded"] == NUM_CHUNKS
    assert by_rank[0].counters["slow_transfers"]["peer_sent"] == NUM_CHUNKS
    assert moved.summary().pulled_gb * 1e9 == pytest.approx(NUM_CHUNKS * BYTES_PER_BLOCK)
    # Two messages each way, the copy out of the GPU tier, the link, and the copy into the GPU tier, with a step for each.
    transfer_s = NUM_CHUNKS * BYTES_PER_BLOCK / NETWORK.bytes_per_s
    extra_s = (row.first_token_s - row.sent_s) - (at_home.first_token_s - at_home.sent_s)
    copies_s = 2 * NUM_CHUNKS * COST.load_s
    assert transfer_s + 4 * NETWORK.latency_s < extra_s < transfer_s + copies_s + 4 * NETWORK.latency_s + 0.05


def test_without_hand_over_it_is_computed_again():
    moved = run(make_cluster(router=Scripted(0, 1), network=None), [moving_session()])
    row = second_turn(moved)
    assert (row.num_cached_tokens, row.is_moved) == (0, 1)
    assert sum(each.num_recomputed_tokens for each in moved.replicas) == PROMPT + ANSWER
    summary = moved.summary()
    assert (summary.moved_share, summary.moved_hit_rate, summary.pulled_gb) == (1.0, 0.0, 0.0)


def test_what_costs_more_to_bring_than_to_compute_is_computed():
    """Once that is known: a link of 0.2 GB/s takes 14 s for what is computed in 0.3 s."""
    slow = replace(NETWORK, rate_bytes_per_s=0.2e9)
    row = second_turn(run(make_cluster(router=Scripted(0, 1), network=slow), [moving_session()]))
    assert row.num_cached_tokens == 0
    assert row.first_token_s - row.sent_s < 0.5


def test_others_hear_of_a_turn_when_they_ask_next():
    directory = Directory()
    directory.note("a", 1, 100, 0.5)
    assert directory.best("a", 2, 1.9) is None
    assert directory.best("a", 2, 2.0) == (1, 100)
    assert directory.best("a", 1, 2.0) is None, "not of itself"
    directory.note("a", 1, 200, 2.5)
    assert directory.best("a", 2, 3.9) == (1, 100), "what they heard before"
    directory.note("a", 3, 200, 3.0)
    assert directory.best("a", 2, 4.0) == (3, 200), "the later one of equals"
    directory.forget_peer(3)
    assert directory.best("a", 2, 4.0) == (1, 200)
    directory.forget("a")
    assert directory.best("a", 2, 4.0) is None


def test_those_that_may_have_the_next_turn_hear_at_once_and_so_do_those_that_come():
    directory = Directory()
    directory.note("a", 1, 100, 0.5, {2}, 0.501)
    assert directory.best("a", 2, 0.5) is None, "it is on its way"
    assert directory.best("a", 2, 0.6) == (1, 100)
    assert directory.best("a", 3, 0.6) is None
    directory.join(4, 0.6)
    assert directory.best("a", 4, 0.6) == (1, 100)
    directory.note("a", 1, 200, 0.7)
    assert directory.best("a", 4, 0.8) is None, "that was later"


def test_a_turn_that_moves_before_that_is_computed_again():
    for pause_s, num_cached in ((0.0, 0), (2.0, PROMPT + ANSWER - 1)):
        row = second_turn(run(make_cluster(router=Scripted(0, 1)), [moving_session(pause_s)]))
        assert row.num_cached_tokens == num_cached


def test_a_turn_that_moves_to_one_of_its_choices_is_not():
    router = Scripted(0, 1)
    router.next_choices = lambda session_id, ranks: ranks
    row = second_turn(run(make_cluster(router=router), [moving_session(0.01)]))
    assert row.num_cached_tokens == PROMPT + ANSWER - 1


class Noted:
    """A replica whose core hears of nothing: the ends of its transfers are noted."""

    def __init__(self) -> None:
        self.core = make_cluster().make_core()
        self.ends: list[tuple[float, TransferEnd]] = []

    def run(self, command, now):
        command()

    def end_transfer(self, now, end):
        self.ends.append((now, end))


def test_a_chunk_that_an_earlier_pull_had_asked_for_takes_no_less_than_its_link():
    """The source waits long; meanwhile the first pull is given up, and a second one asks for the same."""
    events = Events()
    network = Network(NetworkSpec(bytes_per_s=1e9, latency_s=0.001), events, BYTES_PER_BLOCK)
    replicas = [Noted(), Noted()]
    source, asker = (Peer(number, replica, network, 0.0) for number, replica in enumerate(replicas))
    record = ChunkRecord(key=b"k", parent_key=b"", position=0, num_tokens=CHUNK_SIZE, owner_id=None, idle_s=0.0)
    asker._expect(0, [record])

    load, send = BlockCopy(PEER, 0, CPU, 0), BlockCopy(CPU, 0, PEER, 0)
    asker.start(SlowTransfer(transfer_id=1, record=record, copy=load), 0.0)
    asker.tell(0.0)
    while not replicas[1].ends:
        events.run_next(1e9)
    asker.start(SlowTransfer(transfer_id=2, record=record, copy=load), handover.MAX_LOAD_S)
    asker.tell(handover.MAX_LOAD_S)
    sent_s = handover.MAX_LOAD_S + 0.3
    while events.run_next(sent_s) is not None:
        pass
    source.start(SlowTransfer(transfer_id=1, record=record, copy=send), sent_s)
    while len(replicas[1].ends) < 2:
        events.run_next(1e9)
    (_, given_up), (ended_s, second) = replicas[1].ends
    assert not given_up.ok
    assert second.ok
    assert second.seconds == pytest.approx(BYTES_PER_BLOCK / network.spec.bytes_per_s)
    assert ended_s > sent_s + second.seconds


def test_two_that_pull_share_the_link_of_the_one_that_has_it():
    slow = NetworkSpec(bytes_per_s=5e9, latency_s=0.001)
    sessions = [moving_session(name=f"s{number}", stream=number + 1) for number in range(2)]
    alone = run(make_cluster(3, router=Scripted(0, 1), network=slow), sessions[:1])
    both = run(make_cluster(3, router=Scripted(0, 1), network=slow), sessions)
    rows = [row for row in both.turns if row.number == 1]
    assert all(row.num_cached_tokens == PROMPT + ANSWER - 1 for row in rows)
    last_s = max(row.first_token_s for row in rows) - min(row.sent_s for row in rows)
    alone_s = second_turn(alone).first_token_s - second_turn(alone).sent_s
    assert last_s - alone_s > 0.9 * NUM_CHUNKS * BYTES_PER_BLOCK / slow.bytes_per_s


# -- replicas that come and go -----------------------------------------------------------------------------------------


def test_a_drain_takes_the_time_of_its_bytes():
    """Of one conversation, over links of one bandwidth: one block after the other, out of one and into the other at once."""
    spec = NetworkSpec(bytes_per_s=1e9, latency_s=0.001)
    cluster = make_cluster(1, num_cpu_blocks=800, network=spec)
    events = Events()
    network = Network(spec, events, BYTES_PER_BLOCK)
    replicas = [Replica(rank, cluster.make_core(), COST, events, lambda *_: None, replica_id=rank) for rank in range(2)]
    for replica in replicas:
        replica.peer = Peer(replica.rank, replica, network, 0.0)
    client = Client(moving_session(), 0)
    client.ask(0.0)
    request = client.request(CHUNK_SIZE)
    replicas[0].add(request, client.token, 0, 0.0)
    while replicas[0].core.has_requests:
        events.run_next(1e9)
    first, second = (replica.peer for replica in replicas)
    assert first is not None
    assert second is not None
    first.note(request, 5.0)
    ended: list[float] = []
    replicas[0].core.start_drain(10.0)
    first.start_drain()
    first.offer_all(10.0, lambda session_id: 1, ended.append)
    while events.run_next(20.0) is not None:
        pass
    transfer_s = NUM_CHUNKS * BYTES_PER_BLOCK / spec.bytes_per_s
    (end_s,) = ended
    # Beside that: offer, get, a swap-out of the first chunks, the block's latency, and the answer.
    assert transfer_s < end_s - 10.0 < transfer_s + 4 * spec.latency_s + NUM_CHUNKS * COST.store_s + 0.05
    assert transfer_s > 1.6
    assert replicas[1].core.stats.slow_transfers["peer_loaded"] == NUM_CHUNKS
    for replica in replicas:
        replica.core.check_integrity()


def test_what_drains_is_at_its_next_home_when_the_next_turn_comes():
    changes = (Change(15.0, "drain", 1),)
    session = moving_session(pause_s=30.0)
    drained = run(make_cluster(router=Scripted(1, 0), changes=changes), [session])
    row = second_turn(drained)
    assert (row.rank, row.num_cached_tokens) == (0, PROMPT + ANSWER - 1)
    gone = next(each for each in drained.replicas if each.rank == 1)
    assert 15.0 < gone.ended_s < 16.0, "nothing was running"
    at_home = second_turn(run(make_cluster(router=Scripted(1, 1)), [session]))
    assert row.first_token_s - row.sent_s == pytest.approx(at_home.first_token_s - at_home.sent_s, abs=0.05)
    without = run(make_cluster(router=Scripted(1, 0), changes=changes, network=None), [session])
    assert second_turn(without).num_cached_tokens == 0


def test_the_most_valuable_comes_first_if_the_time_does_not_suffice():
    """Three conversations of one length: those used last are worth most. A second is enough for about one of them."""
    sessions = [
        replace(moving_session(60.0, name=f"s{number}", stream=number + 1), start_s=8.0 * number) for number in range(3)
    ]
    slow = NetworkSpec(bytes_per_s=1.2e9, latency_s=0.001)
    cluster = make_cluster(router=Scripted(1, 0), network=slow, changes=(Change(30.0, "drain", 1),), drain_s=1.6)
    rows = sorted((row for row in run(cluster, sessions).turns if row.number == 1), key=lambda row: row.session)
    cached = [row.num_cached_tokens for row in rows]
    assert cached[2] > cached[0]
    assert 0 < sum(cached) < 3 * (PROMPT + ANSWER - 1)


def test_a_new_replica_pulls_what_is_now_at_home_there():
    changes = (Change(12.0, "add", start_s=10.0),)
    outcome = run(make_cluster(1, router=Scripted(0, 1), changes=changes), [moving_session(pause_s=40.0)])
    row = second_turn(outcome)
    assert (row.rank, row.num_cached_tokens) == (1, PROMPT + ANSWER - 1)
    assert next(each.started_s for each in outcome.replicas if each.rank == 1) == 22.0


def test_what_was_lost_with_its_replica_is_computed_again():
    changes = (Change(12.0, "lose", 0, restart_s=1e6),)
    row = second_turn(run(make_cluster(router=Scripted(0, 1), changes=changes), [moving_session(pause_s=40.0)]))
    assert (row.rank, row.num_cached_tokens) == (1, 0)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_replica_that_is_lost_in_the_middle_of_a_pull_holds_up_nothing(lost):
    slow = NetworkSpec(bytes_per_s=0.5e9, latency_s=0.001)
    session = moving_session()
    (first,) = [
        row for row in run(make_cluster(router=Scripted(0, 1), network=slow), [session]).turns if not row.number
    ]
    changes = (Change(first.finished_s + 10.0 + 0.2, "lose", lost, restart_s=5.0),)
    outcome = run(make_cluster(3, router=Scripted(0, 1, 2), network=slow, changes=changes), [session])
    row = second_turn(outcome)
    assert row.num_output_tokens == ANSWER
    # What was on its way to the lost one is on the link still: twice 3.4 s, and the answer.
    assert row.finished_s - row.sent_s < 9.0
    assert outcome.num_unfinished == 0


def test_every_turn_is_answered_once_whatever_happens():
    sessions = list(arrange(load_workload("sharegpt-like", WorkloadOptions(num_sessions=60, seed=1)), Poisson(1.0)))
    changes = (
        Change(15.0, "drain", 1),
        Change(20.0, "add", start_s=3.0),
        Change(35.0, "lose", 0, restart_s=10.0),
        Change(50.0, "drain", 2),
        Change(50.5, "drain", 0),
    )
    cluster = make_cluster(3, network=NetworkSpec(2e9, 0.001), changes=changes)
    outcome = run(cluster, sessions)
    still = run(make_cluster(3, network=None), sessions)
    names = [sorted((row.session, row.number) for row in each.turns) for each in (outcome, still)]
    assert names[0] == names[1]
    assert outcome.num_unfinished == 0
    assert outcome.summary().pulled_gb > 0
    again = run(make_cluster(3, network=NetworkSpec(2e9, 0.001), changes=changes), sessions)
    assert list(again.turns) == list(outcome.turns)
    assert again.messages == outcome.messages


def test_hand_over_that_nothing_needs_changes_nothing():
    """Turns that stay at home take the same time whether their replica has peers or not."""
    sessions = list(arrange(load_workload("sharegpt-like", WorkloadOptions(num_sessions=40, seed=2)), Poisson(1.0)))
    plain, connected = (run(make_cluster(2, network=network), sessions) for network in (None, NETWORK))
    assert list(plain.turns) == list(connected.turns)


def test_steps_that_are_applied_at_once_change_nothing_with_hand_over():
    rng = random.Random(5)
    sessions = [
        replace(moving_session(rng.choice([0.0, 1.0, 4.0]), 4, f"s{number}", number + 1), start_s=0.7 * number)
        for number in range(12)
    ]
    runs = []
    for on_plan in (None, lambda plan, now: None):
        cluster = make_cluster(3, router=Scripted(0, 1, 2, 0), num_gpu_blocks=130, num_cpu_blocks=150)
        runs.append(Simulator(cluster, sessions, on_plan=on_plan).run(1e9))
    assert list(runs[0].turns) == list(runs[1].turns)
    assert [row.counters for row in runs[0].replicas] == [row.counters for row in runs[1].replicas]


def test_constants_are_those_of_the_live_engine():
    from deployments import app, llm_server
    from deployments.routing import engine_client
    from engine.executor.peers import lanes, tier

    assert REFRESH_INTERVAL_S == tier.REFRESH_INTERVAL_S
    assert (handover.MAX_LOAD_S, handover.WATCH_INTERVAL_S) == (lanes.MAX_LOAD_S, lanes.WATCH_INTERVAL_S)
    assert cluster.LOADS_PERIOD_S == engine_client.LOADS_PERIOD_S
    assert cluster.LEAVE_S == llm_server.LEAVE_S
    assert cluster.SHUTDOWN_S == app.SHUTDOWN_S

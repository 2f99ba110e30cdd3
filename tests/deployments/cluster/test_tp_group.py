"""Tensor-parallel groups on a real Ray cluster of two nodes, on this machine, over gloo.

One application of two replicas of two ranks, for most of the module; the test that takes it down comes after those that
use it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.app import build
from deployments.schema import AppArgs
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.generation import Generation
from engine.text.prompt import TokenPrompt
from tests.deployments.local_ray import LocalServe, free_port
from tests.nightly import IS_NIGHTLY, nightly

pytestmark = pytest.mark.ray

APP = "group"
NUM_RANKS = 2
NODE_CPUS = (3, 1)
NODE: dict[str, Any] = {"object_store_memory": 150 * 2**20, "include_dashboard": False}
NUM_CONVERSATIONS = 10
NUM_TURNS = 4
# Two conversations in the GPU tier, less than one in the CPU tier: the others are evicted, swapped, dropped and recomputed.
# And a disk.
TIERS: dict[str, Any] = {"chunk_size": 8, "num_gpu_blocks": 64, "num_cpu_blocks": 24, "kv_disk_size": 0.05}
OPTIONS: dict[str, Any] = {"dtype": "float32", "num_threads": 1}
# Two logits that are closer may change places: other batches and other orders of adding round otherwise.
TIE = 1e-4
# Far longer than anything here takes; only a defect waits for it.
PATIENCE_S = 120.0


def app_args(folder: Path, model: str = "embedded", num_ranks: int = NUM_RANKS, **more: Any) -> AppArgs:
    return AppArgs(
        engine={
            "model": model,
            "tensor_parallel_size": num_ranks,
            "kv_disk_path": str(folder / "kv"),
            **OPTIONS,
            **TIERS,
        },
        num_cpus=0.25,  # of each rank
        ingress_num_cpus=0.1,
        graceful_shutdown_timeout_s=10,
        store_url=f"sqlite:///{folder / 'conversations.db'}",
        **more,
    )


# -- one process, which keeps nothing: what is right -------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """A prompt, all that was said before included; the greedy answer; and at each token how far the second best was."""

    prompt: list[int]
    answer: list[int]
    gaps: list[float]

    def check(self, answer: list[int]) -> None:
        """The same, or the other way at a tie, after which it may say anything."""
        assert len(answer) == len(self.answer)
        differing = [index for index, token in enumerate(answer) if token != self.answer[index]]
        if differing:
            assert self.gaps[differing[0]] < TIE, f"token {differing[0]} of {answer} should be of {self.answer}"


async def hold_conversation(engine: AsyncEngine, number: int) -> list[Turn]:
    rng = random.Random(number)
    turns: list[Turn] = []
    tokens: list[int] = []
    for turn in range(NUM_TURNS):
        tokens = tokens + [rng.randrange(5, 280) for _ in range(rng.randint(10, 40))]
        sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=2)
        answer, gaps = [], []
        generation = Generation(f"{number}-{turn}", None, TokenPrompt(tokens), sampling)
        async for delta in engine.generate(generation):
            answer += delta.token_ids
            gaps += [logprob.top[0].logprob - logprob.top[1].logprob for logprob in delta.logprobs]
        turns.append(Turn(tokens, answer, gaps))
        tokens = tokens + answer
    return turns


async def undisturbed(model: str, num_conversations: int) -> list[list[Turn]]:
    engine = AsyncEngine(EngineConfig(model=model, mode="stateless", **OPTIONS))
    try:
        return [await hold_conversation(engine, number) for number in range(num_conversations)]
    finally:
        await engine.shutdown()


# -- the cluster -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes of the cluster take for /tmp."""
    return tmp_path_factory.mktemp("tp")


@pytest.fixture(scope="module")
def cluster(local_serve: LocalServe, folder: Path) -> Iterator[str]:
    """URL of the proxy."""
    local_serve.stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", tempfile.gettempdir())  # of Ray's own: the paths of its sockets are long
        patch.setenv("TMPDIR", str(folder))
        port = free_port()
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": NODE_CPUS[0], **NODE})
        try:
            nodes.add_node(num_cpus=NODE_CPUS[1], **NODE)
            ray.init(nodes.address, log_to_driver=False)
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()
            nodes.shutdown()


@pytest.fixture(scope="module")
def base_url(cluster: str, folder: Path) -> str:
    serve.run(build(app_args(folder, num_replicas=2)), name=APP, route_prefix="/")
    return cluster


@pytest.fixture
async def http(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture(scope="module")
def expected() -> list[list[Turn]]:
    return asyncio.run(undisturbed("embedded", NUM_CONVERSATIONS))


async def ask_all(method: str, app: str = APP) -> list[Any]:
    engines: DeploymentHandle = serve.get_deployment_handle("LLMServer", app)
    while True:
        try:
            return await engines.broadcast(method).results_async(timeout_s=PATIENCE_S)
        except DeploymentUnavailableError:  # a new handle has not heard of the replicas yet
            await asyncio.sleep(0.1)


async def until(condition: Callable[[], Any]) -> None:
    """Wait for `condition()`, or what it returns to be awaited, to hold."""
    end = time.monotonic() + PATIENCE_S
    while True:
        holds = condition()
        if await holds if asyncio.iscoroutine(holds) else holds:
            return
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.1)


def groups() -> list[dict[str, Any]]:
    """The placement groups that exist."""
    return [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


def processes(title: str) -> list[psutil.Process]:
    """Of this cluster, whose daemons are children of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()[:1]).startswith(title):
                found.append(process)
    return found


def workers() -> list[psutil.Process]:
    return processes("ray::TensorParallelWorker")


async def repeat(http: httpx.AsyncClient, number: int, name: str, turns: list[Turn]) -> None:
    """One conversation, whose answers have to be those of `turns`; every second one streams."""
    for turn in turns:
        body = {"model": "pensieve-recall-0.6m", "prompt": turn.prompt, "max_tokens": len(turn.answer)}
        body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "stream": number % 2 == 0}
        headers = {"x-session-id": f"{name}-{number}"}
        response = await http.post("/v1/completions", json=body, headers=headers)
        assert response.status_code == 200, response.text
        if body["stream"]:
            # Not splitlines(): answers of random bytes hold other ends of lines, such as U+0085.
            lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
            assert lines[-1] == "[DONE]", lines[-1]
            choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
            turn.check([token for choice in choices for token in choice["token_ids"]])
        else:
            turn.check(response.json()["choices"][0]["token_ids"])


async def repeat_all(http: httpx.AsyncClient, name: str, expected: list[list[Turn]]) -> None:
    await asyncio.gather(*(repeat(http, number, name, turns) for number, turns in enumerate(expected)))


async def test_the_answers_are_those_of_one_process_whatever_was_evicted(
    http: httpx.AsyncClient, expected: list[list[Turn]], folder: Path
) -> None:
    for round_number in range(2):
        await repeat_all(http, f"round-{round_number}", expected)
    await ask_all("check_integrity")
    for statistics in await ask_all("get_statistics"):
        assert statistics["num_swap_ins"] > 0
        assert statistics["num_swap_outs"] > 0
        assert statistics["num_dropped_tokens"] > 0
        assert statistics["num_gpu_cached_tokens"] > 0
        assert statistics["slow_transfers"]["disk_stored"] > 0
        assert statistics["tier_problems"] == {}
    parts = sorted(part.name.partition("-")[2] for part in (folder / "kv").iterdir())
    assert parts == [f"{replica}-rank{rank}" for replica in range(2) for rank in range(NUM_RANKS)]


async def test_ray_knows_which_rank_of_which_replica_is_where(base_url: str) -> None:
    replicas = [group["name"].removeprefix("SERVE_REPLICA::") for group in groups()]
    assert len(replicas) == 2
    for group in groups():
        assert (group["state"], group["strategy"]) == ("CREATED", "STRICT_PACK")
        assert group["bundles"] == {rank: {"CPU": 0.25} for rank in range(NUM_RANKS)}
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert names >= {f"TENSOR_PARALLEL_WORKER::{replica}#rank1" for replica in replicas}
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"  # type: ignore[union-attr]
    for group in groups():
        replica = group["name"].removeprefix("SERVE_REPLICA::")
        (log,) = logs.glob(f"replica_*{replica.rpartition('#')[2]}*")
        placed = re.findall(r"rank (\d) of 2: bundle (\d) on node (\w+) .*, process (\d+), cpu;", log.read_text())
        assert [(int(rank), int(bundle), node_id) for rank, bundle, node_id, _ in placed] == [
            (rank, rank, group["bundles_to_node_id"][rank]) for rank in range(NUM_RANKS)
        ]
        assert int(placed[1][3]) in {process.pid for process in workers()}


LOSSES = [("worker", signal.SIGKILL)]
if IS_NIGHTLY:  # a hung worker takes ten seconds to be noticed
    LOSSES += [("replica", signal.SIGKILL), ("worker", signal.SIGSTOP)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "number"), LOSSES, ids=lambda value: getattr(value, "name", value))
async def test_a_group_ends_and_starts_as_a_whole_and_no_conversation_notices(
    http: httpx.AsyncClient, expected: list[list[Turn]], kind: str, number: signal.Signals
) -> None:
    names = {group["name"] for group in groups()}
    pids = {process.pid for process in workers()}
    load = asyncio.create_task(repeat_all(http, f"{kind} {number.name}", expected))

    async def is_under_load() -> bool:
        return all(statistics["num_requests_running"] for statistics in await ask_all("get_statistics"))

    await until(lambda: load.done() or is_under_load())
    assert not load.done()
    victim = (workers() if kind == "worker" else processes(f"ray::ServeReplica:{APP}:LLMServer"))[0]
    victim.send_signal(number)
    await load

    async def is_whole() -> bool:
        states = [group["state"] for group in groups()]
        return states == ["CREATED"] * 2 and len(workers()) == 2 and len(await ask_all("describe")) == 2

    await until(lambda: not victim.is_running())
    await until(is_whole)
    assert len(names & {group["name"] for group in groups()}) == 1
    assert len(pids & {process.pid for process in workers()}) == 1
    await repeat_all(http, f"after {kind} {number.name}", expected[:4])


async def test_a_group_without_a_place_says_why(base_url: str, folder: Path) -> None:
    args = app_args(folder).model_copy(update={"num_cpus": 2.0})
    serve.api._run(build(args), _blocking=False, name="large", route_prefix="/large")
    try:
        async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as http:

            async def is_explained() -> bool:
                response = await http.get("/large/ready")
                return response.status_code == 503 and response.json()["error"]["code"] == "replica_not_placed"

            await until(is_explained)
            message = (await http.get("/large/ready")).json()["error"]["message"]
            assert "2 bundles of 2 CPU, all on one node (STRICT_PACK)" in message
            assert "free on the 2 nodes: " in message
            assert "of 3 CPU" in message
            assert "The cluster is too small even when idle" in message
            assert (await http.get("/ready")).status_code == 200
    finally:
        serve.delete("large")


async def test_shutdown_leaves_nothing_behind(base_url: str, folder: Path) -> None:
    """No process, no placement group, no file, no shared memory."""
    running = workers() + processes("ray::ServeReplica")
    assert len(workers()) == 2
    shared = set()
    for process in running:
        shared |= {Path(segment.path) for segment in process.memory_maps() if segment.path.startswith("/dev/shm/")}
    store = {path for path in shared if path.name.startswith("plasma")}  # Ray's, of the whole node
    serve.delete(APP)
    await until(lambda: not any(process.is_running() for process in running))
    await until(lambda: not groups())
    assert workers() == []
    assert [path for path in shared - store if path.exists()] == []
    assert list(folder.glob("pensieve-*")) == []
    await until(lambda: ray.available_resources().get("CPU", 0) == sum(NODE_CPUS))


@nightly  # tests/engine restarts ranks too
async def test_conversations_come_back_with_their_kv(cluster: str, folder: Path, expected: list[list[Turn]]) -> None:
    """Each rank finds its part again."""
    serve.run(build(app_args(folder)), name=APP, route_prefix="/")
    try:
        async with httpx.AsyncClient(base_url=cluster, timeout=PATIENCE_S) as http:
            await repeat_all(http, "before", expected)
    finally:
        serve.delete(APP)
    serve.run(build(app_args(folder)), name=APP, route_prefix="/")
    try:
        async with httpx.AsyncClient(base_url=cluster, timeout=PATIENCE_S) as http:
            await repeat_all(http, "after", expected)
        (statistics,) = await ask_all("get_statistics")
        assert statistics["num_disk_cached_tokens"] > 0
        assert statistics["slow_transfers"]["disk_load_failed"] == 0
        assert statistics["tier_problems"] == {}
    finally:
        serve.delete(APP)


@pytest.mark.slow
@nightly  # tests/engine has four ranks too
@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "opt", "gpt2"])
async def test_four_ranks_on_two_nodes(
    cluster: str, folder: Path, tiny_model: Callable[[str], Path], family: str
) -> None:
    """More ranks than KV heads, for families that share them; one of them does not fit on the node of the others."""
    if APP in serve.status().applications:  # it would not leave enough room
        serve.delete(APP)
    model = str(tiny_model(family))
    expected = await undisturbed(model, 6)
    args = app_args(folder, model, num_ranks=4)
    named = {**args.engine, "served_model_name": "pensieve-recall-0.6m"}
    args = args.model_copy(update={"engine": named, "num_cpus": 0.9, "placement_group_strategy": "PACK"})
    serve.run(build(args), name=family, route_prefix="/four")
    try:
        (group,) = groups()
        assert len(set(group["bundles_to_node_id"].values())) == 2
        async with httpx.AsyncClient(base_url=f"{cluster}/four", timeout=PATIENCE_S) as http:
            await repeat_all(http, family, expected)
        (statistics,) = await ask_all("get_statistics", family)
        assert statistics["num_swap_ins"] > 0
        assert statistics["num_dropped_tokens"] > 0
    finally:
        serve.delete(family)

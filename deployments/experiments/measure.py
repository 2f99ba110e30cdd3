"""One cell on the cluster: deploy it, wait until it is ready and warm, send the load, hear the replicas, take it down."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import httpx
import ray

from deployments.experiment import Experiment
from deployments.experiments.cells import Cell
from deployments.experiments.deployment import Deployment, serve_config_of
from deployments.experiments.drivers import Driven, Drivers, num_drivers_per_node
from deployments.experiments.figures import Played, PlayedTurn, figures_of, rows_by_time
from deployments.experiments.results import Results
from deployments.experiments.watch import Watch
from deployments.simulated_cluster import make_sessions
from engine import __version__
from engine.bench.apis import Content
from engine.bench.client import Endpoint
from engine.bench.driver import Load
from engine.bench.figures import Lag, errors_of
from engine.bench.files import write_csv
from engine.bench.turns import TurnRecord
from engine.workloads.session import Session

# How often the replicas are asked while a load runs, in seconds.
WATCH_S = 1.0
METRICS_TIMEOUT_S = 30.0
# Of a load at a rate, how many sessions are under way at once is not known; so many processes are made for it.
SESSIONS_AT_A_RATE = 128
_DECISION = re.compile(r"^ray_pensieve_router_decisions_total\{(?P<labels>[^}]*)\} (?P<value>\S+)", re.MULTILINE)
_KIND = re.compile(r'kind="(\w+)"')


def measure_cell(
    experiment: Experiment,
    cell: Cell,
    results: Results,
    loop: asyncio.AbstractEventLoop,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """What results.py keeps of it, and its turns and metrics beside it. Raises PensieveError, or what Ray raises.

    loop: see handle_loop. say: is told what goes on.
    """
    case, options = cell.case, experiment.cluster
    started, load_before = time.strftime("%Y-%m-%d %H:%M:%S"), os.getloadavg()[0]
    drawn, num_active = make_sessions(case, cell.seed)
    sessions = _due(list(drawn), case.duration_s, num_active)
    deployment = Deployment(serve_config_of(experiment, case), loop)
    try:
        say("deploying")
        deploy_s = time.monotonic()
        deployment.start(options.ready_timeout_s)
        deploy_s = time.monotonic() - deploy_s
        drivers = Drivers(f"http://127.0.0.1:{options.port}", _drivers_per_node(experiment, num_active))
        try:
            driven, watch, events, endpoint = _drive(experiment, cell, deployment, drivers, sessions, num_active, say)
        finally:
            drivers.close()
        say(f"{len(driven.records)} turns; reading metrics")
        metrics = read_metrics(experiment)
    finally:
        say("taking down")
        deployment.take_down()
    results.path(cell, ".metrics.txt").write_text(metrics)
    write_csv(results.path(cell, ".turns.csv"), [asdict(record) for record in driven.records])
    lag = Lag.of(driven.records, driven.lags)
    refusal = driven.fault or lag.why_refused(driven.records, options.max_lag_s)
    played = played_of(driven.records, sessions, case.warm_up_s, case.duration_s, watch)
    return {
        "figures": {} if refusal else figures_of(played),
        "by_time": rows_by_time(played, case.duration_s),
        "events": events,
        "refusal": refusal.replace("--max-lag", "max_lag_s").replace("--processes", "drivers_per_node"),
        "errors": errors_of(driven.records),
        "replicas": watch.replicas(),
        "router": router_decisions(metrics),
        "lag": asdict(lag),
        "about": {
            "started": started,
            "deploy_s": round(deploy_s, 1),
            "versions": {"pensieve": __version__, "ray": ray.__version__},
            "nodes": [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]],
            "num_drivers": len(driven.lags),
            "load_average": [load_before, os.getloadavg()[0]],
            "model": endpoint.model,
        },
    }


def _drive(
    experiment: Experiment,
    cell: Cell,
    deployment: Deployment,
    drivers: Drivers,
    sessions: Sequence[Session],
    num_active: int | None,
    say: Callable[[str], None],
) -> tuple[Driven, Watch, list[str], Endpoint]:
    case, options = cell.case, experiment.cluster
    url = f"http://127.0.0.1:{options.port}/v1"
    run_id = f"{cell.key}.{time.time_ns() // 1_000_000:x}"
    content = Content(_seed_of(run_id), f"[{run_id}]", *options.token_ids)
    endpoint = drivers.probe(Endpoint("experiment", url, options.api, timeout_s=options.turn_timeout_s), content)
    say("warming up")
    drivers.warm(endpoint, content, case.num_replicas)
    say(f"driving {case.arrivals} for {case.duration_s:g} s from {len(drivers)} processes")
    watch = Watch()
    watch.look(0.0, [each.replica_id for each in deployment.seen()], deployment.statistics())
    load = Load(run_id, content, num_active, case.duration_s)
    references, start_s = drivers.start(endpoint, load, sessions)
    events, changes = [], sorted(case.changes, key=lambda change: change.time_s)
    waiting = references
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=WATCH_S)
        now = time.time() - start_s
        while changes and changes[0].time_s <= now:
            change = changes.pop(0)
            events.append(f"{now:.1f} s: {_apply(deployment, change.what, change.rank)}")
        watch.look(now, [each.replica_id for each in deployment.seen()], deployment.statistics())
    return drivers.collect(references), watch, events, endpoint


def _apply(deployment: Deployment, what: str, rank: int) -> str:
    if what == "lose":
        return f"replica {rank} is lost: {deployment.kill(rank)} is killed"
    if what == "roll":
        deployment.roll()
        return "all replicas are replaced"
    deployment.scale(1 if what == "add" else -1)
    return "a replica is added" if what == "add" else "a replica is taken away; Serve chooses which"


def _drivers_per_node(experiment: Experiment, num_active: int | None) -> int:
    if experiment.cluster.drivers_per_node is not None:
        return experiment.cluster.drivers_per_node
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    return num_drivers_per_node(num_active or SESSIONS_AT_A_RATE, num_nodes)


def _due(sessions: list[Session], duration_s: float, num_active: int | None) -> list[Session]:
    """Those that may begin before the end: the others would only be sent to the drivers."""
    return sessions if num_active is not None else [session for session in sessions if session.start_s <= duration_s]


def played_of(
    records: Sequence[TurnRecord], sessions: Sequence[Session], warm_up_s: float, duration_s: float, watch: Watch
) -> Played:
    """The run ends with its time, or with its last answer if all sessions were over before."""
    good = {(record.session_id, record.turn): record for record in records if record.is_good}
    is_all = len(good) == sum(len(session.turns) for session in sessions)
    ended_s = min(duration_s, max((record.end_s for record in records), default=0.0)) if is_all else duration_s
    turns = [
        PlayedTurn(
            record.session_id,
            record.turn,
            record.replica,
            record.sent_s,
            record.first_s or record.end_s,
            record.end_s,
            record.num_prompt_tokens or 0,
            _num_known(record, good.get((record.session_id, record.turn - 1))),
            record.num_cached_tokens or 0,
            record.num_output_tokens,
        )
        for record in good.values()
    ]
    num_errors = sum(not record.is_good for record in records)
    return Played(turns, warm_up_s, ended_s, watch.lives, watch.counters(), num_errors)


def _num_known(record: TurnRecord, before: TurnRecord | None) -> int:
    """Tokens of the prompt that the session had before; a history that the client cut may be shorter than it was."""
    if before is None:
        return 0
    return min(record.num_prompt_tokens or 0, (before.num_prompt_tokens or 0) + before.num_output_tokens)


def read_metrics(experiment: Experiment) -> str:
    """The application's series of all nodes, in Prometheus's text format; a comment if they cannot be had."""
    time.sleep(experiment.cluster.metrics_wait_s)
    url = f"http://127.0.0.1:{experiment.cluster.port}/metrics"
    try:
        response = httpx.get(url, timeout=METRICS_TIMEOUT_S, trust_env=False)
        return response.text if response.status_code == 200 else f"# {url} answers {response.status_code}\n"
    except httpx.HTTPError as error:
        return f"# {url}: {error!r}\n"


def router_decisions(metrics: str) -> dict[str, float]:
    """How many requests the routers sent where, by kind; over the whole cell, with its warm-up."""
    counts: Counter[str] = Counter()
    for found in _DECISION.finditer(metrics):
        kind = _KIND.search(found["labels"])
        if kind is not None:
            counts[kind[1]] += float(found["value"])  # type: ignore[assignment]
    return {kind: float(count) for kind, count in sorted(counts.items())}


def _seed_of(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest())

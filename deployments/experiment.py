"""What an experiment asks: a Serve config file, or a file of its own, and the cases that come of it.

    serve: serve_config.yaml        # or engine: {...}, num_replicas, num_fallback_replicas
    simulation:
      device: a100-80gb
      model_shape: opt-13b
      arrivals: [poisson:0.3, poisson:0.5]
      engine.eviction_policy: [retention_value, lru]
    cluster:                        # how `pensieve experiment run` deploys and drives them; `pensieve simulate` needs none
      args: {num_cpus: 1}

Each combination of what lists give is a case, and each case is run with each seed. `configurations` under `simulation` are
names with options that go together: {stateless: {engine.mode: stateless}, gpu only: {engine.kv_offloading_size: 0}}.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from deployments.schema import IMPORT_PATH, AppArgs, check_serve_config, read_serve_config
from engine.bench.apis import APIS
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.simulator.cluster import SHUTDOWN_S, Change
from engine.simulator.devices import Device, ModelShape, find_device, find_model
from engine.workloads.arrivals import parse_arrivals
from engine.workloads.sources import parse_options

# The first one is what serves.
ROUTERS = (
    "price_of_moving",
    "price_of_moving_of_two",
    "affinity",
    "affinity_of_two",
    "least_loaded",
    "power_of_two",
)
# Options of an experiment that may be lists, each value of which makes cases of its own.
VARIED = (
    "arrivals",
    "arrivals_per_replica",
    "routing",
    "num_replicas",
    "num_ingresses",
    "device",
    "model_shape",
    "workload",
    "batching",
)
BATCHINGS = ("unified", "separate")
ENGINE_PREFIX = "engine."
TOP_LEVEL = {"serve", "engine", "num_replicas", "num_fallback_replicas", "simulation", "cluster", "title", "notes"}
# Of a message between replicas, in seconds: an answer that comes later than twice that is not waited for live.
MAX_LATENCY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One cluster and one workload.

    engine: options of each replica. workload_options: see WorkloadOptions. arrivals: see engine/workloads/arrivals.py.
    arrivals_per_replica: rates of arrivals and numbers of sessions are for each replica. routing: one of ROUTERS.
    num_ingresses: each knows the loads by itself. network: between replicas, see NetworkSpec. drain_s: so long a replica that
    drains hands over at most; graceful_shutdown_timeout_s, less the two seconds that it needs to end.
    duration_s, warm_up_s: of the simulated time; turns that are sent in the warm-up do not count. disk: bytes a second and
    seconds of a disk tier. steps: a file of `pensieve profile --steps`, which then says how long steps take, or `distserve`.
    batching: one of BATCHINGS; separate = prompts and decodes are never in one batch, which only the simulator does.
    processes: that share one simulation, in windows of time (engine/simulator/windows.py), any number of them with the same
    figures. None = one, without windows. axes: what sets it apart from the other cases, by the options' names. name: the same
    in words.
    """

    engine: EngineConfig
    num_replicas: int = 1
    num_fallback_replicas: int = 1
    workload: str = "sharegpt-like"
    workload_options: Mapping[str, Any] = field(default_factory=dict)
    arrivals: str = "poisson:0.5"
    arrivals_per_replica: bool = False
    device: Device
    model_shape: ModelShape
    routing: str = ROUTERS[0]
    num_ingresses: int = 1
    network: Mapping[str, float] = field(default_factory=dict)
    drain_s: float = 18.0
    duration_s: float = 600.0
    warm_up_s: float = 200.0
    changes: tuple[Change, ...] = ()
    disk: Mapping[str, float] = field(default_factory=lambda: {"read": 2e9, "write": 1e9, "latency_s": 0.0005})
    steps: str | None = None
    batching: str = BATCHINGS[0]
    processes: int | None = None
    axes: tuple[tuple[str, Any], ...] = ()
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """How a case is deployed and driven on a Ray cluster.

    args: of the application (deployments/options.py), besides `engine` and `num_replicas`. autoscaling_config: Serve's, of
    the engine replicas; `num_replicas` is then how many there are at the beginning. port: of Serve's HTTP proxies.
    api: what is sent, one of engine/bench/apis.py. token_ids: first and end of those that `completions` sends.
    ready_timeout_s: for a deployment to be ready. turn_timeout_s: for an answer. drivers_per_node: actors that send the load;
    None = by the number of sessions. max_lag_s: how late they may be; None = see engine/bench/figures.py. metrics_wait_s: how
    long after a load the metrics are read, because Ray collects them every ten seconds.
    """

    args: Mapping[str, Any] = field(default_factory=dict)
    autoscaling_config: Mapping[str, Any] | None = None
    port: int = 8000
    api: str = "completions"
    token_ids: tuple[int, int] = (100, 1000)
    ready_timeout_s: float = 900.0
    turn_timeout_s: float = 600.0
    drivers_per_node: int | None = None
    max_lag_s: float | None = None
    metrics_wait_s: float = 12.0


@dataclass(frozen=True, slots=True)
class Experiment:
    """All that a file says.

    title, notes: for its report. serve: the content of the Serve config file that it names, or is; None if there is none.
    folder: of the file, in which a model may be.
    """

    title: str
    notes: tuple[str, ...]
    cases: list[Case]
    seeds: list[int]
    cluster: ClusterOptions
    serve: dict[str, Any] | None
    folder: Path


def read_cases(path: str | Path, overrides: Mapping[str, Any] | None = None) -> tuple[list[Case], list[int]]:
    """The cases of a file that is to be simulated, and the seeds. Raises ConfigError.

    overrides: of the options under `simulation`.
    """
    experiment = read_experiment(path, overrides)
    check_simulable(experiment)
    return experiment.cases, experiment.seeds


def check_simulable(experiment: Experiment) -> None:
    """Raises ConfigError if its clusters do what simulated ones do not. What is wrong with one case, make_cluster says."""
    if experiment.cluster.autoscaling_config is not None:
        raise ConfigError(
            "the simulator's clusters do not scale by themselves; measure this file (`pensieve experiment run` without "
            "--simulate), or leave autoscaling_config out",
            param="autoscaling_config",
        )


def read_experiment(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """All that a file says, to be measured or simulated. Raises ConfigError. overrides: as for read_cases."""
    content = read_serve_config(path)
    simulation: dict[str, Any] = {}
    serve_path = path if "applications" in content else None
    options = ClusterOptions()
    if serve_path is not None:
        cluster = _read_cluster(serve_path)
    else:
        _refuse_unknown(content, TOP_LEVEL, str(path))
        if "serve" in content:
            serve_path = Path(path).parent / content["serve"]
        cluster = {} if serve_path is None else _read_cluster(serve_path)
        options = _make_cluster_options(content.get("cluster") or {})
        cluster |= {name: content[name] for name in ("num_replicas", "num_fallback_replicas") if name in content}
        cluster["engine"] = cluster.get("engine", {}) | (content.get("engine") or {})
        simulation = content.get("simulation") or {}
    simulation = {**simulation, **(overrides or {})}
    seeds = simulation.pop("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise ConfigError(f"seeds must be a list of whole numbers, got {seeds!r}", param="seeds")
    if isinstance(simulation.get("steps"), str) and (beside := Path(path).parent / simulation["steps"]).exists():
        simulation["steps"] = str(beside)
    serve = None if serve_path is None else read_serve_config(serve_path)
    notes = content.get("notes") or []
    notes = (notes,) if isinstance(notes, str) else tuple(map(str, notes))
    title = str(content.get("title") or Path(path).stem)
    return Experiment(title, notes, list(_cases(cluster, simulation)), seeds, options, serve, Path(path).parent)


def _make_cluster_options(given: Any) -> ClusterOptions:
    """Raises ConfigError. What `args` says is checked when a case is deployed, with the rest of the application's."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"cluster must have options, got {given!r}", param="cluster")
    _refuse_unknown(given, {each.name for each in fields(ClusterOptions)}, "cluster")
    values = dict(given)
    if "token_ids" in values:
        values["token_ids"] = _make_token_ids(values["token_ids"])
    options = ClusterOptions(**values)
    for name in ("port", "ready_timeout_s", "turn_timeout_s", "drivers_per_node", "max_lag_s", "metrics_wait_s"):
        value = getattr(options, name)
        if value is not None and not _is_count_or_time(value):
            raise ConfigError(f"{name} of cluster must be a number, at least 0, got {value!r}", param=name)
    if not isinstance(options.autoscaling_config, Mapping | None):
        raise ConfigError(
            f"autoscaling_config of cluster must have Serve's options, got {options.autoscaling_config!r}",
            param="autoscaling_config",
        )
    if options.api not in APIS:
        raise ConfigError(f"api of cluster must be one of {', '.join(APIS)}, got {options.api!r}", param="api")
    if not isinstance(options.args, Mapping) or (own := options.args.keys() & {"engine", "num_replicas"}):
        wrong = "options" if not isinstance(options.args, Mapping) else f"no {sorted(own)[0]}, which the cases say"
        raise ConfigError(f"args of cluster must have {wrong}", param="args")
    return options


def _make_token_ids(value: Any) -> tuple[int, int]:
    match value:
        case [int(first), int(end)] if 0 <= first < end:
            return first, end
    raise ConfigError(f"token_ids must be a list of the first id and the end, got {value!r}", param="token_ids")


def _read_cluster(path: str | Path) -> dict[str, Any]:
    """What a Serve config file says of our application."""
    problems = check_serve_config(path)
    if problems:
        raise ConfigError(f"{path}: " + "; ".join(problems))
    for application in read_serve_config(path)["applications"]:
        if application["import_path"] == IMPORT_PATH:
            args = AppArgs.model_validate(application.get("args") or {})
            deployments = {each["name"]: each for each in application.get("deployments") or ()}
            engine = deployments.get("LLMServer", {})
            num_replicas = engine.get("num_replicas", args.num_replicas)
            if not isinstance(num_replicas, int):
                num_replicas = (engine.get("autoscaling_config") or {}).get("min_replicas", 1)
            return {
                "engine": dict(args.engine),
                "num_replicas": num_replicas,
                "num_fallback_replicas": args.num_fallback_replicas,
                "drain_s": max(0.0, args.graceful_shutdown_timeout_s - SHUTDOWN_S),
            }
    raise ConfigError(f"{path}: no application has the import path {IMPORT_PATH}; name a config file of this project")


def _cases(cluster: Mapping[str, Any], simulation: Mapping[str, Any]) -> Iterator[Case]:
    """One for each combination, for each configuration if there are several."""
    configurations = _named_configurations(simulation)
    given = {"num_replicas": cluster.get("num_replicas", 1), **simulation}
    given.pop("configurations", None)
    for name, changed in configurations.items():
        axes = (("configuration", name),) if name else ()
        yield from _combinations(cluster, {**given, **changed}, axes)


def _named_configurations(simulation: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Options by the names of configurations; nothing changed, without a name, if there are none."""
    found = simulation.get("configurations", {"": {}})
    if not isinstance(found, Mapping) or not found or not all(isinstance(each, Mapping) for each in found.values()):
        raise ConfigError(
            f"configurations must be names with the options that each changes, got {found!r}", param="configurations"
        )
    return found


def _combinations(
    cluster: Mapping[str, Any], given: Mapping[str, Any], axes: tuple[tuple[str, Any], ...]
) -> Iterator[Case]:
    engine = dict(cluster.get("engine", {}))
    of_engine = {name: value for name, value in given.items() if name.startswith(ENGINE_PREFIX)}
    options = {name: value for name, value in given.items() if name not in of_engine}
    _refuse_unknown(options, {each.name for each in fields(Case)} - {"engine", "name", "axes"}, "simulation")
    varied = {name: value for name, value in given.items() if isinstance(value, list) and _may_vary(name)}
    if empty := [name for name, value in varied.items() if not value]:
        raise ConfigError(f"{empty[0]} is an empty list; give at least one value", param=empty[0])
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        case = {**given, **chosen}
        of_this = tuple((key.removeprefix(ENGINE_PREFIX), _short(value)) for key, value in chosen.items())
        of_case = {key.removeprefix(ENGINE_PREFIX): case.pop(key) for key in of_engine}
        for shared in ("num_fallback_replicas", "drain_s"):
            if shared in cluster:
                case.setdefault(shared, cluster[shared])
        yield _make_case(engine | of_case, case, (*axes, *of_this))


def _make_case(engine: Mapping[str, Any], options: dict[str, Any], axes: tuple[tuple[str, Any], ...]) -> Case:
    config = EngineConfig.from_options(engine)
    options["model_shape"] = find_model(options.get("model_shape", config.model))
    device = find_device(options.get("device", "a100-80gb"))
    options["device"] = replace(device, num_devices=config.tensor_parallel_size)
    changes = options.get("changes") or ()
    if not isinstance(changes, list | tuple):
        raise ConfigError(f"changes must be a list, got {changes!r}", param="changes")
    options["changes"] = tuple(map(_make_change, changes))
    for number in ("num_replicas", "num_ingresses", "duration_s"):
        value = options.get(number, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ConfigError(f"{number} must be a number above 0, got {value!r}", param=number)
    processes = options.get("processes")
    if processes is not None and (isinstance(processes, bool) or not isinstance(processes, int) or processes < 1):
        raise ConfigError(f"processes must be a whole number above 0, got {processes!r}", param="processes")
    case = Case(engine=config, axes=axes, name=", ".join(f"{name} {value}" for name, value in axes), **options)
    if case.routing not in ROUTERS:
        raise ConfigError(f"routing must be one of {', '.join(ROUTERS)}, got {case.routing!r}", param="routing")
    if case.batching not in BATCHINGS:
        raise ConfigError(f"batching must be one of {', '.join(BATCHINGS)}, got {case.batching!r}", param="batching")
    if case.warm_up_s >= case.duration_s:
        raise ConfigError(
            f"warm_up_s is {case.warm_up_s:g}, and duration_s {case.duration_s:g}; raise duration_s", param="warm_up_s"
        )
    _check_network(case.network)
    parse_arrivals(case.arrivals)
    parse_options(case.workload_options)
    return case


def _make_change(value: Any) -> Change:
    if (
        not isinstance(value, Mapping)
        or not {"time_s", "what"} <= value.keys() <= {each.name for each in fields(Change)}
        or value["what"] not in ("add", "drain", "lose", "roll")
        or not all(_is_count_or_time(number) for name, number in value.items() if name != "what")
    ):
        raise ConfigError(
            "a change must have time_s, what (add, drain, lose or roll), and may have rank, restart_s and start_s, which are "
            f"numbers, at least 0; got {value!r}",
            param="changes",
        )
    return Change(**value)


def _is_count_or_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _check_network(network: Any) -> None:
    names = {"bytes_per_s", "latency_s"}
    if (
        not isinstance(network, Mapping)
        or not network.keys() <= names
        or not all(isinstance(value, int | float) and value > 0 for value in network.values())
        or network.get("latency_s", 0.0) > MAX_LATENCY_S
    ):
        raise ConfigError(
            f"network may have bytes_per_s and latency_s, above 0, the latter at most {MAX_LATENCY_S}; got {network!r}",
            param="network",
        )


def _may_vary(name: str) -> bool:
    return name in VARIED or name.startswith(ENGINE_PREFIX)


def _refuse_unknown(given: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := given.keys() - known:
        raise ConfigError(f"{where}: unknown key {sorted(unknown)[0]}; known are {', '.join(sorted(known))}")


def _short(value: Any) -> Any:
    return str(value.get("base", "custom")) if isinstance(value, Mapping) else value

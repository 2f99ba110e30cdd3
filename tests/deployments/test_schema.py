"""The configuration: what AppArgs refuses, and what the check of a whole file finds that Ray would swallow."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deployments.app import build
from deployments.options import IngressOptions
from deployments.schema import AppArgs, check_serve_config
from engine.config import EngineConfig
from engine.option_names import ABSENT, RENAMED
from engine.options import options_of

KEYS = """
    engine num_replicas num_cpus num_gpus placement_group_strategy num_ingress_replicas ingress_num_cpus
    max_ongoing_requests num_fallback_replicas max_queued_requests max_body_bytes max_header_bytes request_timeout_s
    tenants_file store_url store_password_file retention_days max_stored_bytes max_stored_rows store_requests_per_minute
    store_bytes_per_minute store_min_free_bytes page demo stream_interval_s graceful_shutdown_timeout_s engine_wait_s
    max_surge_percent
"""
SERVE_CONFIG = Path(__file__).parents[2] / "serve_config.yaml"


@pytest.fixture
def config() -> dict:
    return yaml.safe_load(SERVE_CONFIG.read_text())


def problems(config: dict, tmp_path: Path) -> list[str]:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return check_serve_config(path)


def test_the_files_in_this_repository_are_right() -> None:
    examples = sorted((SERVE_CONFIG.parent / "cluster_configs").glob("*.yaml"))
    assert examples
    for path in (SERVE_CONFIG, SERVE_CONFIG.parent / "benchmarks" / "modes.yaml", *examples):
        assert check_serve_config(path) == []


def test_every_level_is_checked(config: dict, tmp_path: Path) -> None:
    config["proxy"] = "EveryNode"
    config["http_options"]["hots"] = "0.0.0.0"
    application = config["applications"][0]
    application["route"] = "/"
    application["args"]["engin"] = {}
    application["deployments"][0]["ray_actor_options"] = {"num_cpu": 1}
    application["deployments"][1]["replicas"] = 2
    assert sorted(problem.split(":")[0] for problem in problems(config, tmp_path)) == [
        "applications[0].args.engin",
        "applications[0].deployments[0].ray_actor_options.num_cpu",
        "applications[0].deployments[1].replicas",
        "applications[0].route",
        "http_options.hots",
        "proxy",
    ]


def test_ray_s_own_complaints_are_reported(config: dict, tmp_path: Path) -> None:
    config["applications"][0]["deployments"][0]["num_replicas"] = -1
    assert any("num_replicas" in problem for problem in problems(config, tmp_path))


def test_a_bad_engine_option_is_found_before_anything_starts(config: dict, tmp_path: Path) -> None:
    config["applications"][0]["args"]["engine"] = {"chunk_sise": 16}
    (problem,) = problems(config, tmp_path)
    assert "unknown option 'chunk_sise'" in problem


@pytest.mark.parametrize(
    ("place", "options", "problem"),
    [
        ("args", {"num_replica": 2}, "args.num_replica: unknown key; did you mean num_replicas?"),
        ("args", {"data_parallel_size": 2}, "args.data_parallel_size: unknown key; it is called num_replicas here"),
        ("args", {"max_num_seqs": 2}, "args.max_num_seqs: unknown key; it belongs under engine, as max_num_seqs"),
        ("args", {"block_size": 2}, "args.block_size: unknown key; it belongs under engine, as chunk_size"),
        ("args", {"max-num-seq": 2}, "args.max-num-seq: unknown key; did you mean max_num_seqs, under engine?"),
        (
            "args",
            {"colour": 2},
            "args.colour: unknown key; known are accelerator_type, cors_allowed_origins, demo, engine,",
        ),
        ("args", {"port": 80}, "args.port: unknown key; give it in the Serve config file, under http_options"),
        ("engine", {"num_gpus": 1}, "args.engine: num_gpus is an option of the application; write it next to engine"),
        ("engine", {"block_size": 16}, "args.engine: unknown option 'block_size'; it is called 'chunk_size' here"),
        ("engine", {"max_num_seqs": 0}, "args.engine: max_num_seqs must be at least 1, got 0"),
    ],
)
def test_an_unknown_or_misplaced_key_leads_to_the_right_one(
    config: dict, tmp_path: Path, place: str, options: dict[str, int], problem: str
) -> None:
    args = config["applications"][0]["args"]
    (args if place == "args" else args["engine"]).update(options)
    (found,) = problems(config, tmp_path)
    assert found.startswith(f"applications[0].{problem}")


def test_the_keys_of_the_application_are_what_they_were() -> None:
    """A literal list: no configuration file may break."""
    keys = KEYS.split()
    assert set(keys) <= set(AppArgs.model_fields)
    defaults = AppArgs()
    assert AppArgs.model_validate({key: getattr(defaults, key) for key in keys}) == defaults


def test_other_servers_names_lead_to_options_that_exist_and_are_none_themselves() -> None:
    engine_options = {entry.name for entry in options_of(EngineConfig)}
    assert set(RENAMED.values()) <= engine_options | set(AppArgs.model_fields)
    assert not (RENAMED.keys() | ABSENT.keys()) & engine_options
    assert not RENAMED.keys() & ABSENT.keys()
    assert not engine_options & set(AppArgs.model_fields)


def test_the_ingress_gets_every_option_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSIEVE_API_KEY", "sk-of-the-environment")
    options = {
        "max_body_bytes": 5,
        "request_timeout_s": 7.0,
        "retention_days": None,
        "page": False,
        "max_stored_rows": 9,
    }
    application = build(AppArgs.model_validate(options))
    (_, config) = application._bound_deployment.init_args
    assert {name: getattr(config, name) for name in options} == options
    assert config.store_limits.quota.max_rows == 9
    assert config.model_dump(include=set(IngressOptions.model_fields)) == IngressOptions(**options).model_dump()
    assert (
        [tenant.id for tenant in config.tenants] == [tenant.id for tenant in config.environment_tenants] == ["default"]
    )


def test_args() -> None:
    args = AppArgs.model_validate({"engine": {"chunk_size": 16}, "num_replicas": 2})
    assert args.engine_config == EngineConfig(chunk_size=16)
    for wrong in ({"num_replicas": 0}, {"num_cpus": -1}, {"replicas": 2}, {"engine": {"chunk_size": 0}}):
        with pytest.raises(ValidationError):
            AppArgs.model_validate(wrong)


def test_a_group_gets_a_bundle_for_each_rank() -> None:
    def placement(**args: object) -> tuple[object, object]:
        (engine,) = build(AppArgs.model_validate(args))._bound_deployment.init_args[0].values()
        options = engine._bound_deployment._replica_config
        return options.placement_group_bundles, options.placement_group_strategy

    assert placement(num_gpus=1, num_cpus=2) == (None, None)
    group = {"engine": {"tensor_parallel_size": 2}, "num_cpus": 2}
    assert placement(**group, num_gpus=1) == ([{"CPU": 2.0, "GPU": 1.0}] * 2, "STRICT_PACK")
    assert placement(**group, placement_group_strategy="PACK") == ([{"CPU": 2.0}] * 2, "PACK")
    for wrong in ({"num_gpus": 0.5}, {"num_gpus": 2}, {"num_cpus": 0}, {"placement_group_strategy": "SPREAD"}):
        with pytest.raises(ValidationError):
            AppArgs.model_validate(group | wrong)


def test_serve_can_read_the_type_of_the_builder_s_argument() -> None:
    # As a string (postponed annotations) it would be ignored, and build called with a plain dict.
    assert build.__annotations__["args"] is AppArgs


@pytest.mark.parametrize(
    ("options", "max_surge_percent"),
    [
        ({}, 20),
        ({"num_gpus": 1}, 0),
        ({"num_gpus": 1, "max_surge_percent": 100}, 100),
        ({"max_surge_percent": 0}, 0),
        ({"engine": {"kv_disk_path": "/kv"}}, 0),
        ({"engine": {"kv_disk_path": "/kv"}, "max_surge_percent": 20}, 20),
    ],
)
def test_a_deploy_starts_no_second_model_beside_one_that_has_a_gpu_or_a_folder(
    options: dict[str, Any], max_surge_percent: int
) -> None:
    ingress = build(AppArgs(**options))
    (engine,) = ingress._bound_deployment.init_args[0].values()
    assert engine._bound_deployment._deployment_config.max_surge_percent == max_surge_percent
    assert ingress._bound_deployment._deployment_config.max_surge_percent == 100

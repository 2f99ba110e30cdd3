"""A file for Ray Serve LLM serves here with another import path: what its entries become, and what cannot be done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.deployment import Application

from deployments.app import build, build_openai_app
from deployments.llm_configs import OpenAIAppArgs
from deployments.schema import AppArgs, check_serve_config

# As in Ray's documentation (Ray Serve LLM, quick start), but for the import path.
FILE = """
applications:
- args:
    llm_configs:
    - model_loading_config:
        model_id: qwen-0.5b
        model_source: Qwen/Qwen2.5-0.5B-Instruct
      accelerator_type: A10G
      deployment_config:
        autoscaling_config: {min_replicas: 1, max_replicas: 2}
    - model_loading_config:
        model_id: meta/llama-3.1-8b
        model_source: meta-llama/Llama-3.1-8B-Instruct
      engine_kwargs: {tensor_parallel_size: 2, max_model_len: 8192, enable_prefix_caching: true, max_num_seqs: 32}
      accelerator_type: H100
      deployment_config: {num_replicas: 3, max_ongoing_requests: 200}
      runtime_env: {env_vars: {HF_HOME: /models}}
    ingress_deployment_config: {num_replicas: 2}
    store_url: postgresql://user@host/database
  import_path: deployments.app:build_openai_app
  name: llm_app
  route_prefix: /
"""


def args(**entry: Any) -> OpenAIAppArgs:
    """Of one model."""
    return OpenAIAppArgs.model_validate({"llm_configs": [{"model_loading_config": {"model_id": "smollm2"}, **entry}]})


def engines_of(application: Application) -> dict[str, Any]:
    """The engine deployments by their models' names."""
    engines = application._bound_deployment.init_args[0]
    return {name: engine._bound_deployment for name, engine in engines.items()}


def test_a_file_for_ray_serve_llm(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(FILE)
    assert check_serve_config(path) == []
    application = build_openai_app(OpenAIAppArgs.model_validate(yaml.safe_load(FILE)["applications"][0]["args"]))
    assert application._bound_deployment.num_replicas == 2
    small, large = engines_of(application).values()
    assert list(engines_of(application)) == ["qwen-0.5b", "meta/llama-3.1-8b"]
    assert (small.name, large.name) == ("LLMServer:qwen-0_5b", "LLMServer:meta--llama-3_1-8b")

    config = small.init_args[0]
    assert (config.model, config.served_model_name) == ("Qwen/Qwen2.5-0.5B-Instruct", "qwen-0.5b")
    scaling = small._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 2)
    resources = small._replica_config.resource_dict
    assert (resources["GPU"], resources["accelerator_type:A10G"]) == (1, 0.001)

    config = large.init_args[0]
    assert (config.tensor_parallel_size, config.max_model_len, config.max_num_seqs) == (2, 8192, 32)
    assert (large.num_replicas, large.max_ongoing_requests) == (3, 200)
    bundle = {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}
    assert large._replica_config.placement_group_bundles == [bundle] * 2
    assert large.ray_actor_options["runtime_env"] == {"env_vars": {"HF_HOME": "/models"}}


def test_serve_can_read_the_type_of_the_builder_s_argument() -> None:
    assert build_openai_app.__annotations__["args"] is OpenAIAppArgs


def test_entries_may_be_files(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("model_loading_config: {model_id: smollm2}\naccelerator_config: {kind: cpu}\n")
    (model,) = OpenAIAppArgs.model_validate({"llm_configs": [str(path)]}).models.values()
    assert (model.num_gpus, model.engine["model"], model.engine["served_model_name"]) == (0, "smollm2", "smollm2")
    with pytest.raises(ValidationError, match="cannot be read as YAML"):
        OpenAIAppArgs.model_validate({"llm_configs": [str(tmp_path / "none.yaml")]})


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({}, (1, 1, "pensieve")),  # a GPU, as there
        ({"accelerator_config": {"kind": "cpu"}}, (1, 0, "pensieve")),
        ({"placement_group_config": {"bundles": [{"CPU": 2}]}}, (2, 0, "pensieve")),
        ({"deployment_config": {"ray_actor_options": {"num_cpus": 4, "num_gpus": 0.5}}}, (4, 0.5, "pensieve")),
        ({"engine_kwargs": {"enable_prefix_caching": False, "trust_remote_code": True}}, (1, 1, "stateless")),
    ],
)
def test_resources_and_mode(entry: dict[str, Any], expected: tuple[float, float, str]) -> None:
    (model,) = args(**entry).models.values()
    assert (model.num_cpus, model.num_gpus, model.engine_config.mode) == expected


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"lora_config": {"max_num_adapters_per_replica": 4}}, "name adapters, or adapter_folder, in engine_kwargs"),
        ({"engine_kwargs": {"quantization": "awq"}}, "quantization must be one of none, int8, int4, auto"),
        ({"engine_kwargs": {"pipeline_parallel_size": 2}}, "no pipeline parallelism"),
        ({"engine_kwargs": {"max_num_seq": 8}}, "max_num_seqs"),
        ({"deployment_config": {"request_router_config": {}}}, "request_router_config is not taken here"),
        ({"deployment_config": {"ray_actor_options": {"memory": 5}}}, "memory is not taken here"),
        ({"placement_group_config": {"bundles": [{"CPU": 1}, {"GPU": 1}, {"CPU": 1}]}}, "have to be the same"),
        ({"model_loading_config": {"model_id": "a", "tokenizer_source": "b"}}, "put it there"),
        ({"accelerator": "H100"}, "Extra inputs"),
    ],
)
def test_what_cannot_be_done_says_so(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        args(**entry)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([], "no model"),
        ([{"model_loading_config": {"model_id": "a"}}] * 2, "two entries have the same model_id"),
        (
            [{"model_loading_config": {"model_id": name}, "engine_kwargs": {"kv_disk_path": "/kv"}} for name in "ab"],
            "give each its own",
        ),
        (
            [
                {"model_loading_config": {"model_id": "a"}, "engine_kwargs": {"adapters": {"b": "/adapters/b"}}},
                {"model_loading_config": {"model_id": "b"}},
            ],
            "an adapter has the name of a model",
        ),
    ],
)
def test_models_are_told_apart(configs: list[Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OpenAIAppArgs.model_validate({"llm_configs": configs})


def test_kinds_of_nodes_and_environments_of_a_single_model() -> None:
    options = {"num_gpus": 1, "accelerator_type": "L4", "max_replicas_per_node": 2}
    (engine,) = engines_of(build(AppArgs(**options, runtime_env={"env_vars": {"A": "b"}}))).values()
    assert engine.ray_actor_options["runtime_env"] == {"env_vars": {"A": "b"}}
    assert engine._replica_config.resource_dict["accelerator_type:L4"] == 0.001
    assert engine._replica_config.max_replicas_per_node == 2
    with pytest.raises(ValidationError, match="max_replicas_per_node must be left out"):
        AppArgs(**options, engine={"tensor_parallel_size": 2})

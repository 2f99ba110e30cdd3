"""The arguments of `deployments.app:build_openai_app`: the `llm_configs` of Ray Serve LLM, and what they mean here.

A file that names `ray.serve.llm:build_openai_app` needs another import path, and nothing else. What cannot be done here is an
error that says so; what needs no option here (enable_prefix_caching, llm_engine, ...) may stay in the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deployments.model_args import ModelArgs
from deployments.options import IngressOptions, ReplicaOptions

# vLLM's arguments that stand for what is always so here, with the values that say that; None = whatever they say.
_ALWAYS_SO: dict[str, tuple[Any, ...] | None] = {
    "enable_prefix_caching": (True,),
    "enable_chunked_prefill": (True,),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "trust_remote_code": None,  # never run; a model that needs it does not load, and says so
    "enable_auto_tool_choice": None,
    "distributed_executor_backend": None,
    "disable_log_stats": None,
    "disable_log_requests": None,
    "enable_log_requests": None,
    "use_tqdm_on_load": None,
}
# Options of a deployment that Serve takes as they are, and those that have a name of their own here.
_FOR_SERVE = {"autoscaling_config", "health_check_period_s", "health_check_timeout_s", "graceful_shutdown_wait_loop_s"}
_RENAMED = {"num_replicas", "max_ongoing_requests", "max_queued_requests", "graceful_shutdown_timeout_s"} | {
    "max_replicas_per_node"
}
_ACTOR_OPTIONS = {"num_cpus", "num_gpus", "runtime_env", "accelerator_type"}
# Serve replicas have to have a number; this one means that autoscaling has bounds of its own.
AUTO = "auto"


class _Args(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ModelLoading(_Args):
    """model_id: what clients ask for. model_source: a folder or a hub id; None = model_id."""

    model_id: str
    model_source: str | None = None
    tokenizer_source: str | None = None

    @model_validator(mode="after")
    def _check_tokenizer(self) -> ModelLoading:
        if self.tokenizer_source not in (None, self.model_source, self.model_id):
            raise ValueError("tokenizer_source: the tokenizer is read from the model's folder; put it there")
        return self


class LLMConfig(_Args):
    """One entry of `llm_configs`; see Ray's LLMConfig."""

    model_loading_config: ModelLoading
    llm_engine: str = "vLLM"
    engine_kwargs: dict[str, Any] = {}
    accelerator_type: str | None = None
    accelerator_config: dict[str, Any] | None = None
    placement_group_config: dict[str, Any] | None = None
    deployment_config: dict[str, Any] = {}
    runtime_env: dict[str, Any] | None = None
    lora_config: None = None
    experimental_configs: dict[str, Any] = {}
    log_engine_metrics: bool | None = True

    @field_validator("lora_config", mode="before")
    @classmethod
    def _check_adapters(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("name adapters, or adapter_folder, in engine_kwargs; see docs/adapters.md")

    @model_validator(mode="after")
    def _check_whole(self) -> LLMConfig:
        self.model_args  # noqa: B018  (raises what is wrong)
        return self

    @property
    def name(self) -> str:
        return self.model_loading_config.model_id

    @property
    def deployment_name(self) -> str:
        """As Ray Serve LLM names it."""
        return "LLMServer:" + self.name.replace("/", "--").replace(".", "_")

    @property
    def model_args(self) -> ModelArgs:
        """Raises ValueError."""
        try:
            return ModelArgs(engine=self._engine_options(), **self._replica_options())
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(str(first["msg"]).removeprefix("Value error, ")) from None

    @property
    def serve_options(self) -> dict[str, Any]:
        """What Serve's deployment takes as it is."""
        return {name: value for name, value in self.deployment_config.items() if name in _FOR_SERVE}

    def _engine_options(self) -> dict[str, Any]:
        options = {
            "model": self.model_loading_config.model_source or self.name,
            "served_model_name": self.name,
        }
        for name, value in self.engine_kwargs.items():
            if name == "enable_prefix_caching" and value is False:
                options["mode"] = "stateless"
            elif name not in _ALWAYS_SO or (_ALWAYS_SO[name] is not None and value not in (_ALWAYS_SO[name] or ())):
                options[name] = value
        return options

    def _replica_options(self) -> dict[str, Any]:
        actor = dict(self.deployment_config.get("ray_actor_options") or {})
        if unknown := sorted(self.deployment_config.keys() - _FOR_SERVE - _RENAMED - {"ray_actor_options", "name"}):
            raise ValueError(
                f"deployment_config: {unknown[0]} is not taken here; known are "
                f"{', '.join(sorted(_FOR_SERVE | _RENAMED | {'ray_actor_options'}))}"
            )
        if unknown := sorted(actor.keys() - _ACTOR_OPTIONS):
            raise ValueError(
                f"ray_actor_options: {unknown[0]} is not taken here; known are {', '.join(_ACTOR_OPTIONS)}"
            )
        options = {name: self.deployment_config[name] for name in _RENAMED if name in self.deployment_config}
        if options.get("num_replicas") in (AUTO, None):
            options.pop("num_replicas", None)
        options |= self._bundle() | {name: value for name, value in actor.items() if value is not None}
        if self.accelerator_type is not None:
            options["accelerator_type"] = self.accelerator_type
        if self.runtime_env is not None:
            options["runtime_env"] = {**options.get("runtime_env", {}), **self.runtime_env}
        return options

    def _bundle(self) -> dict[str, Any]:
        """What each rank gets: a GPU, as in Ray Serve LLM, unless the file says otherwise."""
        if self.placement_group_config is None:
            is_cpu = (self.accelerator_config or {}).get("kind") == "cpu"
            return {"num_gpus": 0 if is_cpu else 1}
        config = self.placement_group_config
        bundles = config.get("bundles") or [config.get("bundle_per_worker") or {}]
        if any(bundle != bundles[-1] for bundle in bundles[1:]) or not config.keys() <= {
            "bundles",
            "bundle_per_worker",
            "strategy",
        }:
            raise ValueError("placement_group_config: the bundles of all ranks have to be the same, as they are here")
        strategy = {"placement_group_strategy": config["strategy"]} if "strategy" in config else {}
        return {"num_cpus": bundles[-1].get("CPU", 1), "num_gpus": bundles[-1].get("GPU", 0), **strategy}


class OpenAIAppArgs(IngressOptions):
    """Arguments of `deployments.app:build_openai_app`: those of Ray Serve LLM, and the options of our own ingress."""

    llm_configs: tuple[LLMConfig, ...]
    ingress_deployment_config: dict[str, Any] = Field(default={})
    ingress_cls_config: None = None
    num_ingress_replicas: int = Field(default=1, ge=1)
    ingress_num_cpus: float = Field(default=0.25, ge=0)
    stream_interval_s: float = Field(default=ReplicaOptions.model_fields["stream_interval_s"].default, ge=0)

    @field_validator("llm_configs", mode="before")
    @classmethod
    def _read_files(cls, configs: Any) -> Any:
        """Entries may be files that have one each."""
        if not isinstance(configs, list | tuple):
            return configs
        return [_read_file(each) if isinstance(each, str) else each for each in configs]

    @field_validator("llm_configs")
    @classmethod
    def _check_models(cls, configs: tuple[LLMConfig, ...]) -> tuple[LLMConfig, ...]:
        names = [each.name for each in configs]
        if not names:
            raise ValueError("no model: give at least one entry")
        if len(set(names)) < len(names):
            raise ValueError("two entries have the same model_id; give each its own")
        adapters = [name for each in configs for name in each.model_args.engine_config.adapters or ()]
        if len({*names, *adapters}) < len(names) + len(adapters):
            raise ValueError("an adapter has the name of a model, or of another model's adapter; give it another one")
        folders = [each.engine_kwargs["kv_disk_path"] for each in configs if each.engine_kwargs.get("kv_disk_path")]
        if len(set(folders)) < len(folders):
            raise ValueError("two models have the same kv_disk_path, which is for one; give each its own")
        return configs

    @field_validator("ingress_deployment_config")
    @classmethod
    def _check_ingress(cls, options: dict[str, Any]) -> dict[str, Any]:
        known: tuple[Literal["num_replicas", "autoscaling_config"], ...] = ("num_replicas", "autoscaling_config")
        if unknown := sorted(options.keys() - set(known)):
            raise ValueError(f"{unknown[0]} is not taken here; known are {', '.join(known)}")
        return options

    @property
    def models(self) -> dict[str, ModelArgs]:
        """By the names of their deployments."""
        return {each.deployment_name: each.model_args for each in self.llm_configs}


def _read_file(path: str) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None

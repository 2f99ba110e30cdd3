"""What one model of an application is served with: its engine's options, its replicas, and what Ray gives them."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from deployments.options import IngressOptions, ReplicaOptions
from engine.config import EngineConfig
from engine.errors import ConfigError


class ModelArgs(ReplicaOptions):
    """One model."""

    engine: dict[str, Any] = Field(default={}, description="Options of the engine, EngineConfig's.")

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, options: dict[str, Any]) -> dict[str, Any]:
        of_application = ReplicaOptions.model_fields.keys() | IngressOptions.model_fields.keys()
        misplaced = [name for name in options if name in of_application]
        if misplaced:
            raise ValueError(f"{misplaced[0]} is an option of the application; write it next to engine, not inside it")
        try:
            EngineConfig.from_options(options)
        except ConfigError as error:
            raise ValueError(error.message) from None
        return options

    @model_validator(mode="after")
    def _check_group(self) -> ModelArgs:
        if self.engine_config.tensor_parallel_size > 1:
            if self.num_gpus not in (0, 1):
                raise ValueError(f"num_gpus must be 1, or 0 on CPUs, for each rank of a group; got {self.num_gpus:g}")
            if self.num_cpus == self.num_gpus == 0:
                raise ValueError("num_cpus or num_gpus must be above 0 if tensor_parallel_size is above 1")
            if self.max_replicas_per_node is not None:
                raise ValueError(
                    "max_replicas_per_node must be left out if tensor_parallel_size is above 1: Ray places a group as a "
                    "whole; num_gpus bounds how many fit on a node"
                )
        return self

    @property
    def engine_config(self) -> EngineConfig:
        return EngineConfig.from_options(self.engine)

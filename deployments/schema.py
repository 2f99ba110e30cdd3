"""What `serve_config.yaml` may say: AppArgs, the `args` of our application, and a check of the whole file
against Ray's own schema, because Ray takes unknown keys in silence. Starts nothing.

    python -m deployments.schema serve_config.yaml
"""

from __future__ import annotations

import difflib
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ray.serve.schema import ServeDeploySchema

from deployments.store.url import check_store_url
from deployments.tenants import load_tenants
from engine.config import EngineConfig
from engine.errors import ConfigError

IMPORT_PATH = "deployments.app:build"


class AppArgs(BaseModel):
    """Arguments of `deployments.app:build`. A change of these replaces every replica, one after the other, and with it every
    cache; the number of replicas is better changed under `deployments:` in the file, which leaves running ones alone. See
    docs/operations.md.

    engine: options of EngineConfig. num_replicas: engine replicas; each holds the model and its own cache.
    num_cpus, num_gpus: what Ray sets aside for one of them (fractions are fine; CPUs are not enforced); with a
    tensor_parallel_size above 1 under `engine`, for each rank of one of them. placement_group_strategy: where the ranks
    of a replica go, STRICT_PACK = all on one node, PACK = on as few as possible.
    num_ingress_replicas, ingress_num_cpus: the HTTP side. num_fallback_replicas: how many replicas, next in a session's
    order, may take a request that its home refuses, because as many run and wait there as may (max_num_seqs and
    max_num_queued_reqs of the engine). max_ongoing_requests: a lower limit for one engine replica, by Serve's count, which
    knows no tenants; none = the engine's own. max_queued_requests: how many may wait in one ingress replica where that
    limit is reached everywhere; above that, 429. Serve also counts those that are just being routed, so a small number
    refuses bursts.
    max_body_bytes, max_header_bytes: of a request. request_timeout_s: how long an answer may take where the request says
    nothing (`timeout`); none = any time. tenants_file: API keys and limits, see deployments/tenants.py; without one, and
    without PENSIEVE_API_KEY in the environment, only this machine is served.
    store_url: where /v1/responses and /v1/conversations keep what was said, "postgresql://user@host/database" without a
    password, or "sqlite:///file"; none = a file in the user's data folder. With a file all ingress replicas run on the
    cluster's head node. store_password_file: on the ingress's node, instead of PENSIEVE_STORE_PASSWORD in its environment.
    retention_days: how long it is kept, none = for ever, or until the disk is full. max_stored_bytes, max_stored_rows: what
    one tenant may keep; store_requests_per_minute, store_bytes_per_minute: what it may send to the paths that only store;
    all of them for a tenant whose entry in tenants_file does not say otherwise, none = any number. store_min_free_bytes:
    with less on the disk of a store in a file, new turns are not stored.
    page: the chat and the live picture of the cache at `/`. demo: POST /v1/cache/demo, with which those who may see the whole
    cache (all, or with API keys an operator's) make its tiers smaller to watch evictions; no answer changes.
    stream_interval_s: least time between two chunks of one stream, seconds, more with many streams.
    graceful_shutdown_timeout_s: what running requests get to end in when an engine replica is stopped, seconds; what does
    not end is taken over by another replica. engine_wait_s: how long a request waits when no engine replica is ready, as in a
    deploy of a single one, before it is refused (503), seconds. max_surge_percent: how many engine replicas may be there
    beyond num_replicas while a deploy replaces them, so that an old one goes when a new one is ready; 0 = none, old ones go
    first. None = 20 (at least one replica) on CPUs, and 0 with num_gpus: a deploy waits for ever for a GPU that is not there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)  # a URL may have a password

    engine: dict[str, Any] = {}
    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    placement_group_strategy: Literal["STRICT_PACK", "PACK"] = "STRICT_PACK"
    num_ingress_replicas: int = Field(default=1, ge=1)
    ingress_num_cpus: float = Field(default=0.25, ge=0)
    max_ongoing_requests: int | None = Field(default=None, ge=1)
    num_fallback_replicas: int = Field(default=1, ge=0)
    max_queued_requests: int = Field(default=256, ge=1)
    max_body_bytes: int = Field(default=4 * 2**20, ge=1)
    max_header_bytes: int = Field(default=32 * 2**10, ge=1)
    request_timeout_s: float | None = Field(default=None, gt=0)
    tenants_file: str | None = None
    store_url: str | None = None
    store_password_file: str | None = None
    retention_days: float | None = Field(default=30.0, gt=0)
    max_stored_bytes: int | None = Field(default=8 * 2**30, ge=0)
    max_stored_rows: int | None = Field(default=4_000_000, ge=0)
    store_requests_per_minute: int | None = Field(default=6000, ge=1)
    store_bytes_per_minute: int | None = Field(default=64 * 2**20, ge=1)
    store_min_free_bytes: int = Field(default=256 * 2**20, ge=0)
    page: bool = True
    demo: bool = False
    stream_interval_s: float = Field(default=0.01, ge=0)
    graceful_shutdown_timeout_s: float = Field(default=20.0, ge=0)
    engine_wait_s: float = Field(default=60.0, ge=0)
    max_surge_percent: int | None = Field(default=None, ge=0, le=100)

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, options: dict[str, Any]) -> dict[str, Any]:
        try:
            EngineConfig.from_options(options)
        except ConfigError as error:
            raise ValueError(error.message) from None
        return options

    @field_validator("tenants_file")
    @classmethod
    def _check_tenants(cls, path: str | None) -> str | None:
        try:
            load_tenants(path, {})
        except ConfigError as error:
            raise ValueError(error.message) from None
        return path

    @field_validator("store_url")
    @classmethod
    def _check_store_url(cls, url: str | None) -> str | None:
        try:
            if url is not None:
                check_store_url(url)
        except ConfigError as error:
            raise ValueError(error.message) from None
        return url

    @model_validator(mode="after")
    def _check_group(self) -> AppArgs:
        if self.engine_config.tensor_parallel_size > 1:
            if self.num_gpus not in (0, 1):
                raise ValueError(f"num_gpus must be 1, or 0 on CPUs, for each rank of a group; got {self.num_gpus:g}")
            if self.num_cpus == self.num_gpus == 0:
                raise ValueError("num_cpus or num_gpus must be above 0 where tensor_parallel_size is above 1")
        return self

    @property
    def engine_config(self) -> EngineConfig:
        return EngineConfig.from_options(self.engine)


def read_serve_config(path: str | Path) -> dict[str, Any]:
    """A Serve config file as YAML reads it. Raises ConfigError, with the line and column of a mistake."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a Serve config file, such as serve_config.yaml") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no text in UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ConfigError(f"{path}: {place}is no YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        found = "is empty" if config is None else f"is {type(config).__name__!r} and not a mapping"
        raise ConfigError(f"{path}: {found}; a Serve config file has the keys applications, http_options and more")
    return config


def check_serve_config(path: str | Path) -> list[str]:
    """What is wrong with a Serve config file, one line each: unknown keys at any level, what Ray's schema
    refuses, and arguments of our application that AppArgs refuses. Raises ConfigError where it is no such file at all."""
    config = read_serve_config(path)
    problems = list(_unknown_keys(config, ServeDeploySchema, ""))
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        return problems + _problems(error, "")
    for index, application in enumerate(config["applications"]):
        if application["import_path"] == IMPORT_PATH:
            try:
                AppArgs.model_validate(application.get("args") or {})
            except ValidationError as error:
                problems += _problems(error, f"applications[{index}].args.", AppArgs.model_fields)
    return problems


def _problems(error: ValidationError, prefix: str, known: Iterable[str] = ()) -> list[str]:
    """One line for each. known: the keys of the model, to name those that were perhaps meant."""
    return [
        _unknown_key(f"{prefix}{detail['loc'][0]}", str(detail["loc"][0]), known)
        if detail["type"] == "extra_forbidden"
        else f"{prefix}{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
        for detail in error.errors()
    ]


def _unknown_key(place: str, key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
    return f"{place}: unknown key; {hint}"


def _unknown_keys(value: Any, kind: Any, where: str) -> Iterator[str]:
    """Walks value and type side by side, into pydantic models only; a plain dict may hold any key."""
    model = _model_in(kind)
    if model is None:
        return
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown_keys(item, model, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            name = f"{where}.{key}" if where else str(key)
            if key in model.model_fields:
                yield from _unknown_keys(item, model.model_fields[key].annotation, name)
            else:
                yield _unknown_key(name, str(key), model.model_fields)


def _model_in(kind: Any) -> type[BaseModel] | None:
    """The model that a type is, or holds as a list or an alternative."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    if typing.get_origin(kind) in (list, Union, types.UnionType):
        return next(filter(None, map(_model_in, typing.get_args(kind))), None)
    return None


if __name__ == "__main__":
    try:
        found = [problem for path in sys.argv[1:] for problem in check_serve_config(path)]
    except ConfigError as error:
        found = [error.message]
    sys.exit("\n".join(found) if found else 0)

"""The options of the Serve application, each declared once: type, default, range and help.

AppArgs inherits all groups under flat names; the ingress takes those that it reads as a whole. A description is what
docs/configuration.md says; "none" there is null in YAML.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from deployments.store.values import Quota, StoreLimits


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)  # a URL may have a password


class ReplicaOptions(_Options):
    """How many replicas there are, what they get, and how they are replaced."""

    num_replicas: int = Field(
        default=1,
        ge=1,
        description="Engine replicas; each holds the model and its own cache. Better set under `deployments:` in the file, "
        "where a change leaves running replicas alone.",
    )
    num_cpus: float = Field(
        default=1.0,
        ge=0,
        description="CPUs that Ray sets aside for an engine replica, or for each of its ranks. Fractions are fine; Ray does "
        "not enforce it.",
    )
    num_gpus: float = Field(
        default=0.0,
        ge=0,
        description="GPUs that Ray sets aside for an engine replica, or for each of its ranks. A fraction lets several "
        "replicas share one.",
    )
    accelerator_type: str | None = Field(
        default=None,
        description="Kind of GPU that a replica needs, as Ray names it: `H100`, `A10G`, `L4`, ... None: any. For nodes of "
        "several kinds.",
    )
    max_replicas_per_node: int | None = Field(
        default=None,
        ge=1,
        description="Most engine replicas on one node, so that a lost node takes no more of them. Not with "
        "tensor_parallel_size. None: any number.",
    )
    runtime_env: dict[str, Any] | None = Field(
        default=None,
        description="Ray's runtime environment of the engine replicas, such as `{env_vars: {HF_HOME: /models}}`.",
    )
    placement_group_strategy: Literal["STRICT_PACK", "PACK"] = Field(
        default="STRICT_PACK",
        description="Where the ranks of a replica go: `STRICT_PACK` is all on one node, `PACK` on as few nodes as possible.",
    )
    num_ingress_replicas: int = Field(default=1, ge=1, description="Replicas of the HTTP ingress.")
    ingress_num_cpus: float = Field(default=0.25, ge=0, description="CPUs that Ray sets aside for an ingress replica.")
    max_ongoing_requests: int | None = Field(
        default=None,
        ge=1,
        description="A lower limit of requests in one engine replica, by Serve's count, which knows no tenants. None: the "
        "engine's own, `max_num_seqs` and `max_num_queued_reqs`.",
    )
    max_queued_requests: int = Field(
        default=256,
        ge=1,
        description="Most requests that wait in one ingress replica when all engine replicas have reached that limit; "
        "further ones get HTTP status 429. Serve also counts requests that are being routed, so a small number rejects "
        "bursts.",
    )
    routing: Literal["affinity", "power_of_two"] = Field(
        default="affinity",
        description="Which engine replica gets a request: `affinity` is the home of its session, with its cache; "
        "`power_of_two` is Serve's own router, which takes the less busy of two, as a baseline.",
    )
    stream_interval_s: float = Field(
        default=0.01,
        ge=0,
        description="Least seconds between two chunks of one stream; more with many streams.",
    )
    graceful_shutdown_timeout_s: float = Field(
        default=20.0,
        ge=0,
        description="Seconds that running requests have to end when an engine replica is stopped. Another replica takes over "
        "those that do not.",
    )
    max_surge_percent: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Percentage of engine replicas that may be there beyond `num_replicas` while a deploy replaces them, so "
        "that an old one goes when a new one is ready. 0: old ones go first. None: 20 (at least one replica) on CPUs; 0 "
        "with `num_gpus`, as a deploy would wait forever for a GPU that does not exist, and with `kv_disk_path`, as the new "
        "one takes over the folder of the old one.",
    )


class HttpOptions(_Options):
    """What clients meet: limits of requests, routing, tenants and the page."""

    max_body_bytes: int = Field(default=4 * 2**20, ge=1, description="Largest body of a request.")
    max_header_bytes: int = Field(default=32 * 2**10, ge=1, description="Most bytes of a request's headers together.")
    request_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds that an answer may take if the request does not say (`timeout`). None: any time.",
    )
    strict_parameters: bool = Field(
        default=False,
        description="Refuse requests with parameters that are unknown, at any level. False: they are ignored, and the header "
        "`x-pensieve-ignored` of the answer names them.",
    )
    cors_allowed_origins: tuple[str, ...] = Field(
        default=(),
        description="Origins of web pages that may ask from a browser, such as `https://chat.example.org`. Without API keys, "
        "only pages of origins that are named here are served, besides those of this machine; `*` names none.",
    )
    num_fallback_replicas: int = Field(
        default=1,
        ge=0,
        description="How many replicas, next in a session's order, may take a request that its home replica rejects because "
        "it is full.",
    )
    engine_wait_s: float = Field(
        default=60.0,
        ge=0,
        description="Seconds that a request waits when no engine replica is ready, such as during a deploy of a single one, "
        "before it is rejected with HTTP status 503.",
    )
    tenants_file: str | None = Field(
        default=None,
        description="File with API keys and limits of tenants, see below. None: without `PENSIEVE_API_KEY` in the "
        "environment, only clients on this machine are served.",
    )
    page: bool = Field(default=True, description="Serve the chat and the live picture of the cache at `/`.")
    demo: bool = Field(
        default=False,
        description="Serve `POST /v1/cache/demo`, which makes the tiers smaller to watch evictions, for clients that may see "
        "the whole cache (all, or with API keys an operator's). Answers do not change.",
    )


class StoreOptions(_Options):
    """Where and for how long conversations and responses are kept, and how much of them."""

    store_url: str | None = Field(
        default=None,
        description="Store of `/v1/responses` and `/v1/conversations`: `postgresql://user@host/database`, without a "
        "password, or `sqlite:///file`. None: a file in the user's data folder. With a file, all ingress replicas run on the "
        "cluster's head node.",
    )
    store_password_file: str | None = Field(
        default=None,
        description="File with the store's password on the ingress's nodes, instead of `PENSIEVE_STORE_PASSWORD` in their "
        "environment.",
    )
    retention_days: float | None = Field(
        default=30.0, gt=0, description="Days that what was said is kept. None: forever, or until the disk is full."
    )
    max_stored_bytes: int | None = Field(
        default=8 * 2**30,
        ge=0,
        description="Most bytes that one tenant stores, unless its entry in `tenants_file` says otherwise. None: any number.",
    )
    max_stored_rows: int | None = Field(
        default=4_000_000,
        ge=0,
        description="Most rows that one tenant stores, unless its entry says otherwise. None: any number.",
    )
    store_requests_per_minute: int | None = Field(
        default=6000,
        ge=1,
        description="Most requests a minute of one tenant to the paths that only store, unless its entry says otherwise. "
        "None: any number.",
    )
    store_bytes_per_minute: int | None = Field(
        default=64 * 2**20,
        ge=1,
        description="Most bytes a minute of one tenant to the paths that only store, unless its entry says otherwise. None: "
        "any number.",
    )
    store_min_free_bytes: int = Field(
        default=256 * 2**20,
        ge=0,
        description="New turns are not stored if a store in a file has less free space on its disk than this.",
    )

    @property
    def store_limits(self) -> StoreLimits:
        """Those of a tenant whose own entry does not say otherwise."""
        return StoreLimits(
            Quota(self.max_stored_rows, self.max_stored_bytes),
            self.store_requests_per_minute,
            self.store_bytes_per_minute,
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is what it is in
        return False


class WatchOptions(_Options):
    """What is told of each request to those who watch the server."""

    log_requests: bool = Field(
        default=False,
        description="A line in the ingress's log for each generation that has ended: times by phase, tokens by tier and by "
        "reason, never a text. With `logging_config: {encoding: JSON}` in the file, its field `generation` has all of it.",
    )
    traces: Literal["off", "otlp", "console"] = Field(
        default="off",
        description="OpenTelemetry spans of each generation: `otlp` sends them to a collector, which the environment names "
        "(`OTEL_EXPORTER_OTLP_ENDPOINT`, ...), and needs `pip install 'pensieve-ray[traces]'`; `console` prints them.",
    )
    metrics_names: Literal["pensieve", "vllm", "both"] = Field(
        default="pensieve",
        description="Under which names the engine replicas export what they measure: `pensieve` are those of "
        "docs/observability.md, `vllm` those of vLLM, for dashboards and autoscalers that exist for it.",
    )

    @field_validator("traces")
    @classmethod
    def _check_traces(cls, kind: str) -> str:
        if kind == "otlp" and not _is_installed("opentelemetry.exporter.otlp.proto.http"):
            raise ValueError("packages for otlp are not installed: pip install 'pensieve-ray[traces]', or omit traces")
        return kind


class IngressOptions(HttpOptions, StoreOptions, WatchOptions):
    """What an ingress replica reads."""


# The groups as they are listed for users.
GROUPS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("replicas", ReplicaOptions),
    ("HTTP", HttpOptions),
    ("store", StoreOptions),
    ("logs and traces", WatchOptions),
)

"""The application that `serve run` builds: ingress replicas in front of engine replicas.

Wiring only; what the options mean is written in `deployments/options.py`.
"""

# No `from __future__ import annotations`: Serve reads the annotation of `build` to make AppArgs of a plain dict.

import os
from dataclasses import replace

from ray import serve
from ray.serve.config import BackpressureConfig, RequestRouterConfig
from ray.serve.deployment import Application

from deployments.cluster.placement import group_bundles
from deployments.ingress import Ingress, IngressConfig
from deployments.llm_server import LLMServer
from deployments.options import IngressOptions
from deployments.routing.session_router import SessionRouter
from deployments.schema import AppArgs
from deployments.store.url import is_file
from deployments.tenants import environment_tenants, load_tenants
from engine.config import EngineConfig
from engine.model_files import choose_model

# An ingress replica holds what runs and what waits, and refuses the rest with an OpenAI error body itself;
# these bound only what is still arriving.
INGRESS_MAX_ONGOING_REQUESTS = 4096
INGRESS_MAX_QUEUED_REQUESTS = 4096
RETRY_AFTER_S = 2.0
# A resource that Ray gives the head node of a cluster alone.
HEAD_NODE = "node:__internal_head__"
# Requests in an engine replica that the engine has not admitted or refused yet.
IN_TRANSIT = 64
# How soon a dead engine is noticed, and how long a busy one may take to answer, in seconds.
HEALTH_CHECK_PERIOD_S = 2.0
HEALTH_CHECK_TIMEOUT_S = 10.0
# How many engine replicas, of 100, a deploy on CPUs may start before it stops old ones; rounded up.
SURGE_PERCENT = 20
# How long an ingress replica that is replaced stays for the streams that it holds, in seconds. It needs next to nothing
# meanwhile; and when all is stopped, the engines end the streams.
INGRESS_SHUTDOWN_TIMEOUT_S = 300.0
# What an engine replica needs to end, of its graceful_shutdown_timeout_s, once its KV is on disk.
SHUTDOWN_S = 2.0
# How soon the routers hear of ranks that changed in a scale-down, in seconds.
ROUTING_STATS_PERIOD_S = 2.0


def build(args: AppArgs) -> Application:
    """A Serve application from the `args` of its configuration. Loads nothing: the replicas do."""
    # Chosen here, once: replicas on several nodes must not choose differently.
    engine_config = replace(args.engine_config, model=choose_model(args.engine_config.model))
    num_ranks = engine_config.tensor_parallel_size
    placement = {}
    if num_ranks > 1:
        placement = {
            "placement_group_bundles": group_bundles(num_ranks, args.num_cpus, args.num_gpus),
            "placement_group_strategy": args.placement_group_strategy,
        }
    overload = BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S)
    engine = serve.deployment(
        LLMServer,
        name="LLMServer",
        num_replicas=args.num_replicas,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        **placement,
        max_ongoing_requests=args.max_ongoing_requests or _engine_limit(engine_config),
        max_queued_requests=args.max_queued_requests,
        backpressure_config=overload,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s,
        max_surge_percent=_surge_percent(args),
        request_router_config=_router(args),
    )
    # A store in a file is on one node: another node's ingress would make an empty one there, and nothing would say so.
    where = {"resources": {HEAD_NODE: 0.001}} if is_file(args.store_url) else {}
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=args.num_ingress_replicas,
        ray_actor_options={"num_cpus": args.ingress_num_cpus, **where},
        max_ongoing_requests=INGRESS_MAX_ONGOING_REQUESTS,
        max_queued_requests=INGRESS_MAX_QUEUED_REQUESTS,
        backpressure_config=overload,
        graceful_shutdown_timeout_s=max(INGRESS_SHUTDOWN_TIMEOUT_S, args.graceful_shutdown_timeout_s),
        max_surge_percent=100,
    )
    config = IngressConfig(
        **args.model_dump(include=set(IngressOptions.model_fields)),
        tenants=load_tenants(args.tenants_file, os.environ),
        environment_tenants=environment_tenants(os.environ),
    )
    drain_s = max(0.0, args.graceful_shutdown_timeout_s - SHUTDOWN_S)
    return ingress.bind(engine.bind(engine_config, args.stream_interval_s, drain_s=drain_s), config)


def _router(args: AppArgs) -> RequestRouterConfig:
    own = {}
    if args.routing == "affinity":
        own = {
            "request_router_class": SessionRouter,
            "request_router_kwargs": {"num_fallback_replicas": args.num_fallback_replicas},
        }
    return RequestRouterConfig(**own, request_routing_stats_period_s=ROUTING_STATS_PERIOD_S)


def _surge_percent(args: AppArgs) -> int:
    """By default a deploy starts a second model only on CPUs, which can be shared, and without a disk tier.

    A replica that starts before the one that it replaces has ended has another rank, and finds the folder of its own in use.
    """
    if args.max_surge_percent is not None:
        return args.max_surge_percent
    return 0 if args.num_gpus or args.engine_config.kv_disk_path is not None else SURGE_PERCENT


def _engine_limit(config: EngineConfig) -> int:
    """More requests than an engine lets run and wait, so that the engine rejects requests and not Serve.

    The engine is exact and fair between tenants. Serve's queues know no tenants, and a request that waits for a full replica
    blocks all behind it.
    """
    return config.max_num_seqs + config.max_num_queued_reqs + IN_TRANSIT

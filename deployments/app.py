"""The applications that `serve run` builds: ingress replicas in front of engine replicas.

Wiring only; what the options mean is written in `deployments/options.py`.
"""

# No `from __future__ import annotations`: Serve reads the annotations of the builders to make their arguments of plain dicts.

import os
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ray import serve
from ray.serve.config import BackpressureConfig, RequestRouterConfig
from ray.serve.deployment import Application

from deployments.cluster.placement import placement_options
from deployments.ingress import Ingress, IngressConfig
from deployments.llm_configs import OpenAIAppArgs
from deployments.llm_server import LLMServer
from deployments.model_args import ModelArgs
from deployments.options import IngressOptions
from deployments.routing.session_router import SessionRouter
from deployments.schema import ENGINE_DEPLOYMENT, AppArgs
from deployments.store.url import is_file
from deployments.tenants import environment_tenants, load_tenants
from engine.config import EngineConfig
from engine.model_files import choose_model

# An ingress replica holds what runs and what waits, and refuses the rest with an OpenAI error body itself;
# these bound only what is still arriving.
INGRESS_MAX_ONGOING_REQUESTS = 4096
INGRESS_MAX_QUEUED_REQUESTS = 4096
OVERLOAD = BackpressureConfig(status_code=429, retry_after_s=2.0)
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
    """A Serve application of one model, from the `args` of its configuration. Loads nothing: the replicas do."""
    return _application({"": _engines(ENGINE_DEPLOYMENT, args, args)}, args, args.num_ingress_replicas, {})


def build_openai_app(args: OpenAIAppArgs) -> Application:
    """An application of all models in `llm_configs`: a file for Ray Serve LLM needs only this import path."""
    engines = {
        each.name: _engines(each.deployment_name, each.model_args, args, each.serve_options)
        for each in args.llm_configs
    }
    options = dict(args.ingress_deployment_config)
    return _application(engines, args, options.pop("num_replicas", args.num_ingress_replicas), options)


def _engines(
    name: str, model: ModelArgs, args: AppArgs | OpenAIAppArgs, serve_options: Mapping[str, Any] = MappingProxyType({})
) -> Application:
    """The engine replicas of a model, as a deployment of that name. serve_options: what Serve takes as it is."""
    # Chosen here, once: replicas on several nodes must not choose differently.
    config = replace(model.engine_config, model=choose_model(model.engine_config.model))
    scale: dict[str, Any] = {} if "autoscaling_config" in serve_options else {"num_replicas": model.num_replicas}
    health = {"health_check_period_s": HEALTH_CHECK_PERIOD_S, "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S}
    deployment = serve.deployment(
        LLMServer,
        name=name,
        **placement_options(config.tensor_parallel_size, model),
        max_ongoing_requests=model.max_ongoing_requests or _engine_limit(config),
        max_queued_requests=model.max_queued_requests,
        backpressure_config=OVERLOAD,
        graceful_shutdown_timeout_s=model.graceful_shutdown_timeout_s,
        max_surge_percent=_surge_percent(model),
        request_router_config=_router(model, args.num_fallback_replicas),
        **{**scale, **health, **serve_options},
    )
    drain_s = max(0.0, model.graceful_shutdown_timeout_s - SHUTDOWN_S)
    return deployment.bind(
        config,
        args.stream_interval_s,
        drain_s=drain_s,
        traces=args.traces,
        metrics_names=args.metrics_names,
        num_fallback_replicas=args.num_fallback_replicas,
    )


def _application(
    engines: Mapping[str, Application],
    args: AppArgs | OpenAIAppArgs,
    num_replicas: int,
    serve_options: Mapping[str, Any],
) -> Application:
    """An ingress before engines, by the names of their models."""
    # A store in a file is on one node: another node's ingress would make an empty one there, and nothing would say so.
    where = {"resources": {HEAD_NODE: 0.001}} if is_file(args.store_url) else {}
    timeout_s = max(model.graceful_shutdown_timeout_s for model in args.models.values())
    scale: dict[str, Any] = {} if "autoscaling_config" in serve_options else {"num_replicas": num_replicas}
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        ray_actor_options={"num_cpus": args.ingress_num_cpus, **where},
        max_ongoing_requests=INGRESS_MAX_ONGOING_REQUESTS,
        max_queued_requests=INGRESS_MAX_QUEUED_REQUESTS,
        backpressure_config=OVERLOAD,
        graceful_shutdown_timeout_s=max(INGRESS_SHUTDOWN_TIMEOUT_S, timeout_s),
        max_surge_percent=100,
        **{**scale, **serve_options},
    )
    config = IngressConfig(
        **args.model_dump(include=set(IngressOptions.model_fields)),
        tenants=load_tenants(args.tenants_file, os.environ),
        environment_tenants=environment_tenants(os.environ),
    )
    return ingress.bind(dict(engines), config)


def _router(model: ModelArgs, num_fallback_replicas: int) -> RequestRouterConfig:
    own = {}
    if model.routing == "affinity":
        own = {
            "request_router_class": SessionRouter,
            "request_router_kwargs": {"num_fallback_replicas": num_fallback_replicas},
        }
    return RequestRouterConfig(**own, request_routing_stats_period_s=ROUTING_STATS_PERIOD_S)


def _surge_percent(args: ModelArgs) -> int:
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

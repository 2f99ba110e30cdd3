"""OpenTelemetry spans of a generation, with the names and attributes of its GenAI conventions as far as these go.

    chat MODEL               the generation, in the ingress; of the client's trace, if it sent a `traceparent`
    |-- route                the way to the replica and back; its event `replica_lost` says that another one had to go on
    |-- prepare ... decode   one for each phase, in the replica; suspended ones are those of a preemption

The ingress's span is a parent that the request takes along as `traceparent`. What phases there were is known at the end, so
their spans are made then. Everything else is OpenTelemetry's, and follows its environment variables. Only `start_tracing`
imports its SDK.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deployments.generation import GenerationRequest
from deployments.origin import Origin
from deployments.watched import End, Outcome
from engine import __version__
from engine.core.request import SamplingParams
from engine.errors import ConfigError
from engine.explanation import Explanation
from engine.text.output import OutputDelta
from engine.text.prompt import ChatPrompt

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

SERVICE_NAME = "pensieve"
REMEDY = "pip install 'pensieve-ray[traces]', or leave out `traces`"


def start_tracing(kind: str) -> TracerProvider:
    """What makes spans and sends them: in batches, from a thread of its own. To be shut down.

    kind: "otlp", or "console". Raises ConfigError if packages for it are missing.
    """
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME as NAME
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

        exporter: SpanExporter
        if kind == "console":
            exporter = ConsoleSpanExporter()
        else:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
    except ImportError as error:
        raise ConfigError(f"traces: {kind} needs packages that are not installed ({error}): {REMEDY}") from error
    resource = Resource.create()  # of OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
    if str(resource.attributes[NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({NAME: SERVICE_NAME}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


class IngressTraces:
    """The spans of the ingress; see Watch."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("pensieve.ingress", __version__)

    def begin(self, request: GenerationRequest) -> tuple[GenerationRequest, End]:
        """A span begins, which what follows is part of. See Watch."""
        from opentelemetry import trace

        name = operation_of(request)
        span = self._tracer.start_span(
            f"{name} {request.model}",
            _parent(request.origin),
            trace.SpanKind.SERVER,
            {"gen_ai.operation.name": name, **_asked(request)},
        )
        inner = trace.set_span_in_context(span)

        def end(outcome: Outcome) -> None:
            span.set_attributes(_told(outcome))
            explanation = None if outcome.last is None else outcome.last.explanation
            if explanation is not None and explanation.route is not None:
                self._add_route(explanation, inner)
            if not outcome.is_finished:
                span.set_attribute("error.type", "aborted" if outcome.error is None else outcome.error.kind)
                span.set_status(trace.StatusCode.ERROR, outcome.word)
            span.end(_ns(outcome.ended_s))

        return replace(request, origin=_within(request.origin, inner)), end

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()

    def _add_route(self, explanation: Explanation, inner: Context) -> None:
        route = explanation.route
        assert route is not None
        span = self._tracer.start_span(
            "route",
            inner,
            attributes={
                "pensieve.replica": route.replica_rank,
                "pensieve.lost_replicas": len(route.losses),
                **({} if route.is_home is None else {"pensieve.is_home": route.is_home}),
            },
            start_time=_ns(route.begun_s),
        )
        for loss in route.losses:
            told: dict[str, Any] = {"error.type": loss.kind, "gen_ai.usage.output_tokens": loss.num_output_tokens}
            span.add_event("replica_lost", told, _ns(loss.at_s))
        span.end(_ns(route.begun_s + route.lost_s + route.seconds))


class ReplicaTraces:
    """The spans of an engine replica."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("pensieve.replica", __version__)

    def add_phases(self, origin: Origin, explanation: Explanation, replica_rank: int) -> None:
        """One span for each phase of a generation that has ended, part of the span that `origin` names."""
        if not origin.is_sampled:
            return
        parent = _parent(origin)
        for phase, start_s, end_s in explanation.unix_spans():
            attributes = {"pensieve.replica": replica_rank, **_of_phase(phase, explanation)}
            span = self._tracer.start_span(phase, parent, attributes=attributes, start_time=_ns(start_s))
            span.end(_ns(end_s))

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def operation_of(request: GenerationRequest) -> str:
    """What GenAI's conventions call it."""
    return "chat" if isinstance(request.prompt, ChatPrompt) else "text_completion"


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _parent(origin: Origin) -> Context:
    """The span that a request is part of: of Serve's own tracing, if that is on, else what its client named."""
    from opentelemetry import context, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if trace.get_current_span().get_span_context().is_valid:
        return context.get_current()
    carrier = {"traceparent": origin.traceparent, "tracestate": origin.tracestate}
    return TraceContextTextMapPropagator().extract({name: value for name, value in carrier.items() if value})


def _within(origin: Origin, inner: Context) -> Origin:
    """The same for what is part of that span."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, inner)
    return replace(origin, traceparent=carrier.get("traceparent", ""), tracestate=carrier.get("tracestate", ""))


def _asked(request: GenerationRequest) -> dict[str, Any]:
    sampling: SamplingParams = request.sampling
    told = {
        "gen_ai.provider.name": SERVICE_NAME,
        "gen_ai.request.model": request.model,
        "gen_ai.request.stream": request.stream,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.response.id": request.request_id,
        "pensieve.tenant": request.tenant.tenant_id,
        "http.request.header.x-request-id": request.origin.request_id,
    }
    return {name: value for name, value in told.items() if value is not None}


def _told(outcome: Outcome) -> dict[str, Any]:
    delta: OutputDelta | None = outcome.last
    if delta is None:
        return {}
    told: dict[str, Any] = {
        "gen_ai.usage.input_tokens": delta.num_prompt_tokens,
        "gen_ai.usage.output_tokens": delta.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": delta.num_cached_tokens,
    }
    if delta.num_reasoning_tokens:
        told["gen_ai.usage.reasoning.output_tokens"] = delta.num_reasoning_tokens
    if delta.finish_reason is not None:
        told["gen_ai.response.finish_reasons"] = (delta.finish_reason,)
    if outcome.first_s is not None:
        told["gen_ai.response.time_to_first_chunk"] = outcome.first_s
    if delta.recomputed is not None:
        reason, num_tokens = delta.recomputed
        told[f"pensieve.recomputed_tokens.{reason}"] = num_tokens
    return told


def _of_phase(phase: str, explanation: Explanation) -> dict[str, Any]:
    """What is told with that phase's span: what was found where with the load, and what was missing with the computation."""
    stats = explanation.stats
    if phase == "load":
        return _counts("pensieve.cached_tokens", stats.cached_by_tier)
    if phase == "prefill":
        return {
            "gen_ai.usage.input_tokens": stats.num_prompt_tokens,
            **_counts("pensieve.cached_tokens", stats.cached_by_tier),
            **_counts("pensieve.computed_tokens", explanation.computed_by_reason),
        }
    if phase == "decode":
        return {"gen_ai.usage.output_tokens": stats.num_output_tokens, "pensieve.suspensions": stats.num_suspensions}
    return {}


def _counts(prefix: str, counts: Mapping[str, int]) -> dict[str, int]:
    return {f"{prefix}.{name}": number for name, number in counts.items()}

"""The protocol between the core's driver and what computes a step: a model in this process, or a group of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from engine.core.grammar import GrammarSpec
from engine.core.plan import StepPlan, StepResult
from engine.core.thinking import ThinkingLimit


class ComputationFailedError(Exception):
    """The step's computation failed, but every copy of its plan was made: only its own requests are lost."""


class SamplingFailedError(ComputationFailedError):
    """The logits were there, on all ranks that compute them together; only choosing tokens failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a loaded model says of itself; of the whole model, if it is sharded.

    fingerprint: identity of what makes its KV.
    max_model_len: the window by its config, in tokens.
    head_dim: of a key, in the first layer.
    """

    fingerprint: str
    dtype: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    num_layers: int
    num_attention_heads: int
    head_dim: int

    def window(self, limit: int | None) -> int:
        """The longest context in tokens: the model's, or fewer if there is a lower limit; None = no limit."""
        return min(self.max_model_len, limit or self.max_model_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorFacts:
    """What an executor has, once it has loaded its model.

    device: as torch names it, "cpu" or "cuda:0"; of rank 0.
    attention_backend: the one in use.
    num_gpu_blocks, num_cpu_blocks: sizes of the tiers, in blocks.
    bytes_per_block: in the GPU tier, of all ranks together. bytes_per_cold_block: in the tiers behind it.
    """

    model: ModelFacts
    device: str
    attention_backend: str
    num_gpu_blocks: int
    num_cpu_blocks: int
    bytes_per_block: int
    bytes_per_cold_block: int

    @property
    def is_on_cpu(self) -> bool:
        """Whether the GPU tier is a pool in host memory."""
        return self.device.startswith("cpu")


class Grammars(Protocol):
    """Where an executor finds the grammars of the requests that it starts; see engine/grammar."""

    def matcher(self, spec: GrammarSpec | None, token_ids: Iterable[int], thinking: ThinkingLimit | None) -> Any:
        """A Matcher that has accepted `token_ids`, the beginning of an answer. Raises InvalidParameterError."""
        ...


class PendingStep(Protocol):
    """A step that was submitted; a concurrent.futures.Future of its result is one."""

    def result(self, timeout: float | None = None) -> StepResult:
        """Wait for it; as `execute` otherwise. Call it once, in the order of the steps."""
        ...


class Executor(Protocol):
    """Computes plans, in order.

    max_steps_in_flight: how many steps may be submitted that have not been waited for. If it is more than one, a step
        begins without knowing what the one before it sampled.
    """

    max_steps_in_flight: int

    @property
    def facts(self) -> ExecutorFacts:
        """What it has; never changes."""
        ...

    def use_grammars(self, grammars: Grammars) -> None:
        """Tell it where the grammars of requests are found, before the first step; else no request may have one."""
        ...

    def load_adapter(self, folder: str) -> str:
        """Read a low-rank adapter on all ranks, beside the steps; blocking. Returns its identity, see RequestStart.

        Raises AdapterError; nothing changed then.
        """
        ...

    def unload_adapter(self, identity: str) -> None:
        """Forget an adapter. No later plan starts a request with it; those that run keep it."""
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step in the caller's thread, or wait for it.

        On any exception the driver fails the requests of the plan and goes on with the next one. It assumes that none of the
        plan's copies completed, unless the exception is ComputationFailedError.
        """
        ...

    def submit(self, plan: StepPlan) -> PendingStep:
        """`execute` elsewhere; returns at once."""
        ...

    def check_health(self) -> None:
        """Raise EngineStoppedError if no step can be computed any more."""
        ...

    def shutdown(self) -> None:
        """Give devices and workers back. No call follows."""
        ...

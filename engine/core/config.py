"""The options that the core goes by, and their resolved values: what EngineCore, Scheduler and CacheManager take whole.

A group of options (CacheOptions, SchedulingOptions) declares each option once. EngineConfig inherits the groups, because a
user sets options under flat names; the configs inherit them too, and add what is known once a model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from engine.core.cache.cost_model import CostModel


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Options of the cache that the core reads. Has no instances of its own."""

    __slots__ = ()

    chunk_size: int = 32
    eviction_policy: str = "retention_value"
    swap_out_watermark: float = 0.25
    write_through: bool = False


@dataclass(frozen=True, kw_only=True)
class SchedulingOptions:
    """Options of the scheduler and of its queue. Has no instances of its own."""

    __slots__ = ()

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    prefill_batch_tokens: int | None = None
    max_num_queued_reqs: int = 256
    max_num_queued_tokens: int | None = None
    decode_reserve: float = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig(CacheOptions):
    """What a cache manager goes by: the options, and what the executor and the model say.

    num_gpu_blocks, num_cpu_blocks: sizes of the tiers in blocks.
    keep: False is the stateless mode: nothing outlives its request, nothing is shared, and the CPU tier is not used.
    model: fingerprint of the model, part of each chunk's key.
    cost_model: what computing and loading a chunk costs; None = CostModel's defaults for this chunk size.
    max_swap_outs: most blocks that one step swaps out ahead of time.
    """

    num_gpu_blocks: int
    num_cpu_blocks: int = 0
    keep: bool = True
    model: str = ""
    cost_model: CostModel | None = None
    max_swap_outs: int = 16

    @classmethod
    def of(cls, options: CacheOptions, **resolved: Any) -> Self:
        """The options, with the other fields as given."""
        return cls(**_values(CacheOptions, options), **resolved)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingConfig(SchedulingOptions):
    """What a scheduler goes by: the options, and the window.

    max_model_len: most tokens of one context, prompt and answer together.
    """

    max_model_len: int

    @classmethod
    def of(cls, options: SchedulingOptions, **resolved: Any) -> Self:
        """The options, with the other fields, and options that are resolved here, as given."""
        return cls(**{**_values(SchedulingOptions, options), **resolved})


def _values(group: type, options: Any) -> dict[str, Any]:
    return {option.name: getattr(options, option.name) for option in fields(group)}

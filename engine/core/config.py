"""The options that the core goes by, and their resolved values: what EngineCore, Scheduler and CacheManager take whole.

A group of options (CacheOptions, SchedulingOptions) declares each option once. EngineConfig inherits the groups, because a
user sets options under flat names; the configs inherit them too, and add what is known once a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, Self

from engine.core.cache.cost_model import CostModel
from engine.core.cache.eviction import EVICTION_POLICIES, EvictionPolicy
from engine.core.retention import HINT_MODES
from engine.core.tier_table import TierSpec, tier_row
from engine.options import Option

# SchedulingOptions.prefill_batch_tokens of a CPU: its matrix kernels are at their full speed with some dozens of rows.
CPU_PREFILL_BATCH_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Options of the cache that the core reads. Has no instances of its own."""

    __slots__ = ()

    chunk_size: Annotated[int, Option("Tokens of a chunk, the unit of caching and eviction.", at_least=1)] = 32
    eviction_policy: Annotated[
        str,
        Option(
            "Which chunks leave a full tier first.",
            "`retention_value`: those that are cheapest to recompute for the time they have been idle. `lru`: those unused "
            "for longest. `trailing_lru`: of the contexts unused for longest, the last chunks first, as radix caches do. "
            "`tail_optimised_lru`: first what a next turn computes again in time, else as `lru`. "
            "`MODULE:NAME`: a class of your own, see docs/extending.md.",
            choices=EVICTION_POLICIES,
            or_import_path=True,
        ),
    ] = "retention_value"
    kv_hints: Annotated[
        str,
        Option(
            "Hints on which contexts are worth keeping, and for how long.",
            "`off`: those of clients are refused, with that reason. `client`: they are carried out. `learned`: these, and "
            "what the server has learned of how long each tool takes until its conversation goes on.",
            choices=HINT_MODES,
        ),
    ] = "off"
    kv_retention_share: Annotated[
        float,
        Option(
            "Part of the GPU and CPU tiers that hints may keep, shared by the tenants' weights; more is clipped.",
            above=0,
            at_most=1,
        ),
    ] = 0.5
    write_through: Annotated[
        bool,
        Option("Copy what a turn leaves to the CPU tier at its end, and not only when GPU blocks run short."),
    ] = False
    swap_out_watermark: Annotated[
        float,
        Option(
            "Copy chunks to the CPU tier ahead of time when a smaller share of GPU blocks is free or reclaimable.",
            at_least=0,
            below=1,
            is_tuning=True,
        ),
    ] = 0.25
    max_swap_outs: Annotated[
        int | None,
        Option(
            "Most blocks that one step copies to the CPU tier ahead of time.",
            "A quarter of it in a step that also loads blocks, because the two directions slow each other down.",
            default="what a GPU copies in the time of its shortest step, if `pensieve profile` has measured that; else 16",
            at_least=1,
            is_tuning=True,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SchedulingOptions:
    """Options of the scheduler and of its queue. Has no instances of its own."""

    __slots__ = ()

    max_num_seqs: Annotated[
        int,
        Option("Most requests that run at once.", "At most `max_num_batched_tokens`.", at_least=1),
    ] = 64
    max_num_batched_tokens: Annotated[
        int, Option("Token budget of a step.", "Longer prompts are computed in pieces.", at_least=1)
    ] = 512
    max_num_queued_reqs: Annotated[
        int,
        Option("Most requests that wait to be started; further ones are rejected with HTTP status 429.", at_least=1),
    ] = 256
    max_num_queued_tokens: Annotated[
        int | None,
        Option("Most tokens that the waiting requests have together.", default="no limit", at_least=1),
    ] = None
    prefill_batch_tokens: Annotated[
        int | None,
        Option(
            "Further prompts join a step only while its prompts have fewer tokens than this.",
            "A CPU computes no faster with more of them, and all requests of a step wait for its end.",
            default="128 on a CPU, max_num_batched_tokens on a GPU",
            at_least=1,
            is_tuning=True,
        ),
    ] = None
    speculative: Annotated[
        dict[str, Any] | None,
        Option(
            "Guess tokens of an answer from where its last ones have been before, and verify several in one step.",
            "`{method: ngram, num_tokens: 8}`: up to so many, from the context and recent answers of the same tenant. "
            "Answers are the same. How many are verified, if any, follows what they cost and how often they come true; see "
            "docs/speculation.md.",
            default="none",
        ),
    ] = None
    decode_reserve: Annotated[
        float,
        Option(
            "Share of GPU blocks that stay free, when requests are started, for running answers to grow.",
            at_least=0,
            below=1,
            is_tuning=True,
        ),
    ] = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig(CacheOptions):
    """What a cache manager goes by: the options, and what the executor and the model say.

    num_gpu_blocks, num_cpu_blocks: sizes of the fast tiers in blocks.
    slow_tiers: those behind the CPU tier, the fastest first.
    keep: False is the stateless mode: nothing outlives its request, nothing is shared, and the CPU tier is not used.
    model: fingerprint of the model, part of each chunk's key.
    cost_model: what computing and loading a chunk costs; None = CostModel's defaults for this chunk size.
    own_policy: makes the eviction policy, if that is none of the named ones.
    """

    num_gpu_blocks: int
    num_cpu_blocks: int = 0
    keep: bool = True
    model: str = ""
    cost_model: CostModel | None = None
    own_policy: Callable[[CostModel], EvictionPolicy] | None = None
    slow_tiers: tuple[TierSpec, ...] = ()

    @property
    def tiers(self) -> tuple[TierSpec, ...]:
        """All tiers that are used, the fastest first. Raises ConfigError if they do not go together."""
        if not self.keep:
            return tier_row(self.num_gpu_blocks, 0)
        return tier_row(self.num_gpu_blocks, self.num_cpu_blocks, self.slow_tiers)

    @classmethod
    def of(cls, options: CacheOptions, **resolved: Any) -> Self:
        """The options, with the other fields, and options that are resolved here, as given."""
        return cls(**{**_values(CacheOptions, options), **resolved})


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

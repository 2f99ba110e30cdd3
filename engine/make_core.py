"""From an engine's options and its executor to its core.

What a loaded model and a device decide is put in here, once.
"""

from __future__ import annotations

import logging

from engine.config import EngineConfig
from engine.core.config import CPU_PREFILL_BATCH_TOKENS, CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore
from engine.core.executor_protocol import Executor
from engine.core.tier_table import TierSpec
from engine.errors import ConfigError
from engine.own_policy import load_policy
from engine.profile import choose_max_swap_outs, load_cost_model

logger = logging.getLogger(__name__)


def make_core(config: EngineConfig, executor: Executor, slow_tiers: tuple[TierSpec, ...] = ()) -> EngineCore:
    """The core that plans for this executor.

    slow_tiers: those behind the CPU tier, the fastest first.

    Raises ConfigError for a window that the model or the GPU tier does not have.
    """
    facts = executor.facts
    return EngineCore(
        CacheConfig.of(
            config,
            num_gpu_blocks=facts.num_gpu_blocks,
            num_cpu_blocks=facts.num_cpu_blocks,
            keep=config.mode == "pensieve",
            model=facts.model.fingerprint,
            cost_model=load_cost_model(config, facts),
            max_swap_outs=choose_max_swap_outs(config, facts),
            own_policy=load_policy(config.eviction_policy),
            slow_tiers=slow_tiers,
        ),
        SchedulingConfig.of(
            config,
            max_model_len=_resolve_max_model_len(config, facts.model.max_model_len, facts.num_gpu_blocks),
            prefill_batch_tokens=config.prefill_batch_tokens or (CPU_PREFILL_BATCH_TOKENS if facts.is_on_cpu else None),
        ),
    )


def _resolve_max_model_len(config: EngineConfig, model_window: int, num_gpu_blocks: int) -> int:
    """The window in tokens: the one asked for, or as much of the model's as the GPU tier holds."""
    capacity = num_gpu_blocks * config.chunk_size
    if config.max_model_len is None:
        if capacity < model_window:
            logger.warning("the GPU tier holds %d tokens: the window is that, not %d", capacity, model_window)
        return min(model_window, capacity)
    if config.max_model_len > model_window:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but the model's window is {model_window} tokens; lower it",
            param="max_model_len",
        )
    return config.max_model_len

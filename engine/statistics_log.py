"""A line of the engine's statistics in the log, every few seconds while it computes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

# Least time between two lines, in seconds.
LOG_INTERVAL_S = 10.0


class StatisticsLog:
    """Writes the statistics to the log if the last time is long enough ago."""

    def __init__(self, get_statistics: Callable[[], dict[str, Any]]) -> None:
        """get_statistics: as AsyncEngine.get_statistics."""
        self._get_statistics = get_statistics
        self._logged_s = time.monotonic()

    def write_if_due(self) -> None:
        """Call it after each step."""
        now = time.monotonic()
        if now - self._logged_s < LOG_INTERVAL_S:
            return
        self._logged_s = now
        stats = self._get_statistics()
        logger.info(
            "running %d, waiting %d; prompt tokens: %d in GPU, %d in CPU, %d not loaded, %d dropped, %d new; output "
            "tokens %d; blocks free: GPU %d/%d, CPU %d/%d; swapped in %.1f MB, out %.1f MB; %d suspensions",
            stats["num_requests_running"],
            stats["num_requests_waiting"],
            stats["num_gpu_cached_tokens"],
            stats["num_cpu_cached_tokens"],
            stats["num_not_loaded_tokens"],
            stats["num_dropped_tokens"],
            stats["num_new_tokens"],
            stats["num_output_tokens"],
            stats["num_gpu_blocks_free"],
            stats["num_gpu_blocks"],
            stats["num_cpu_blocks_free"],
            stats["num_cpu_blocks"],
            stats["num_swap_in_bytes"] / 1e6,
            stats["num_swap_out_bytes"] / 1e6,
            stats["num_suspensions"],
        )

"""A line of the engine's statistics in the log, every few seconds while it computes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from engine.core.tier_table import PEER, tier_title

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
        logger.info("%s", statistics_line(self._get_statistics()))


def statistics_line(stats: Mapping[str, Any]) -> str:
    """What matters most of AsyncEngine.get_statistics."""
    tiers = stats["tiers"]
    cached = [f"{stats[f'num_{tier}_cached_tokens']} in {tier_title(tier)}" for tier in tiers]
    computed = [f"{stats[f'num_{what}_tokens']} {what.replace('_', ' ')}" for what in ("not_loaded", "dropped", "new")]
    blocks = [
        f"{tier_title(tier)} {stats[f'num_{tier}_blocks_free']}/{stats[f'num_{tier}_blocks']}"
        for tier in tiers
        if tier != PEER  # whose blocks are no memory
    ]
    return "; ".join(
        [
            f"running {stats['num_requests_running']}, waiting {stats['num_requests_waiting']}",
            f"prompt tokens: {', '.join([*cached, *computed])}",
            f"output tokens {stats['num_output_tokens']}",
            f"blocks free: {', '.join(blocks)}",
            f"swapped in {_mb(stats['num_swap_in_bytes'])}, out {_mb(stats['num_swap_out_bytes'])}",
            *slow_transfers_lines(stats),
            f"{stats['num_suspensions']} suspensions",
        ]
    )


def slow_transfers_lines(stats: Mapping[str, Any]) -> list[str]:
    """For each slow tier, the chunks by how their transfers ended, as far as there were any."""
    lines = []
    for tier in stats["tiers"]:
        counts = {**stats.get("slow_transfers", {})}
        counts |= {f"{what}_refused": count for what, count in stats.get("slow_refusals", {}).items()}
        told = []
        for what, count in counts.items():
            if count and what.startswith(f"{tier}_"):
                num_bytes = stats["num_slow_transfer_bytes"].get(what)
                size = "" if num_bytes is None else f" ({_mb(num_bytes)})"
                told.append(f"{count} {what.removeprefix(f'{tier}_').replace('_', ' ')}{size}")
        if told:
            lines.append(f"chunks of {tier_title(tier)}: {', '.join(told)}")
    return lines


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"

"""The series of one application, from the metrics ports of Ray's nodes, as Prometheus reads them.

Ray collects on each node what the processes there measure, and exports it on a port of the node. This gathers what bears the
application's label. Knows no metric by its name.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable

import httpx
import ray

logger = logging.getLogger("ray.serve")

# How long a node may take, in seconds, and the most bytes of what it exports that are read.
NODE_TIMEOUT_S = 3.0
MAX_NODE_BYTES = 64 * 2**20
# vLLM's own metrics have a colon in their names, which Ray does not take.
_VLLM_NAME = re.compile(r"^((?:# \w+ )?)ray_vllm_")
_VLLM_PREFIX = r"\1vllm:"
# Of a name in a sample, what belongs to the family.
_SUFFIX = re.compile(r"_(bucket|count|sum|total|created)$")


def node_urls() -> list[str]:
    """Where the nodes of this process's Ray export their metrics. Blocks."""
    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"] and node["MetricsExportPort"]
    ]


class ApplicationMetrics:
    """Asks all nodes at once."""

    def __init__(self, application: str, find_urls: Callable[[], list[str]] = node_urls) -> None:
        """find_urls: where to ask; may block."""
        self._label = f'application="{application}"'
        self._find_urls = find_urls

    async def __call__(self) -> str:
        """All series of the application. A comment says which nodes did not answer: theirs are missing then."""
        urls = await asyncio.to_thread(self._find_urls)
        async with httpx.AsyncClient(timeout=NODE_TIMEOUT_S, trust_env=False) as client:
            texts = await asyncio.gather(*(_export(client, url) for url in urls))
        text = await asyncio.to_thread(select_series, filter(None, texts), self._label)
        missing = [url for url, found in zip(urls, texts, strict=True) if found is None]
        return text + "".join(f"# {url} did not answer\n" for url in missing)


async def _export(client: httpx.AsyncClient, url: str) -> str | None:
    """What a node exports; None if it does not answer, or with too much."""
    try:
        async with asyncio.timeout(NODE_TIMEOUT_S), client.stream("GET", url) as response:
            response.raise_for_status()
            parts, num_bytes = [], 0
            async for part in response.aiter_bytes():
                parts.append(part)
                num_bytes += len(part)
                if num_bytes > MAX_NODE_BYTES:
                    raise httpx.DecodingError(f"more than {MAX_NODE_BYTES} bytes")
            return b"".join(parts).decode(errors="replace")
    except (TimeoutError, httpx.HTTPError) as error:
        logger.warning("no metrics from %s: %r", url, error)
        return None


def select_series(texts: Iterable[str], label: str) -> str:
    """The samples with that label in texts of Prometheus's format, each family once and with what is said of it."""
    comments: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        for line in text.splitlines():
            if line.startswith("# "):
                name = line.split(" ", 3)[2] if line.count(" ") >= 2 else ""
                told = comments.setdefault(name, [])
                if line not in told:
                    told.append(line)
            elif label in line and (found := re.match(r"[\w:]+", line)) is not None:
                family = found[0] if found[0] in comments else _SUFFIX.sub("", found[0])
                samples.setdefault(family, []).append(line)
    lines = (line for name, of_name in samples.items() for line in (*comments.get(name, ()), *of_name))
    return "".join(f"{_VLLM_NAME.sub(_VLLM_PREFIX, line, count=1)}\n" for line in lines)

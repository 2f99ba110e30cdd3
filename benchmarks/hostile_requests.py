"""What one tenant's hostile requests do to another tenant's stream: its largest gap.

    python benchmarks/hostile_requests.py
    python benchmarks/hostile_requests.py --model PATH_OR_HUB_ID --repeats 5

One server (proxy, ingress, one engine replica), two tenants. The victim streams an answer; beside it the other tenant sends
one kind of request again and again for as long as the stream lasts:

- `long_text`: one message of 3.9 MB that can never fit the model's window
- `empty_messages`: 130,000 messages without text (3.8 MB)
- `stop_strings`: an answer of its own with 16 stop strings of 30,000 characters
- `allowed_stop_strings`: the same with the most and longest stop strings that the server accepts
- `plain_answer`: an answer of its own without any, which is what a polite neighbour costs

Every kind runs in turns with the undisturbed stream; the figure is the ratio of the medians of the largest gaps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from machine import write_result
from serve_app import serve_app
from tqdm import tqdm

from deployments.tenants import hash_key

VICTIM, HOSTILE = "sk-victim", "sk-hostile"
SERVED = "it"
# A refusal takes milliseconds: without a pause the attack would be one of many requests instead of large ones.
PAUSE_S = 0.05
NUM_EMPTY_MESSAGES = 130_000
LONG_TEXT = "a b " * 975_000


def chat(messages: list[dict[str, str]], **options: Any) -> bytes:
    body = {"model": SERVED, "messages": messages, "temperature": 0, **options}
    return json.dumps(body, separators=(",", ":")).encode()


def make_attacks(max_stop: int, max_stop_chars: int, num_tokens: int) -> dict[str, bytes | None]:
    """The body of each kind of request; None sends nothing.

    max_stop, max_stop_chars: what the server accepts.
    """
    question = [{"role": "user", "content": "tell me a story"}]
    answer = {"max_tokens": num_tokens, "ignore_eos": True}
    return {
        "none": None,
        "plain_answer": chat(question, **answer),
        "long_text": chat([{"role": "user", "content": LONG_TEXT}]),
        "empty_messages": chat([{"role": "user", "content": ""}] * NUM_EMPTY_MESSAGES),
        "stop_strings": chat(question, stop=[f"{number:02}" + "ab" * 14_999 for number in range(16)], **answer),
        "allowed_stop_strings": chat(
            question, stop=[f"{number:02}".ljust(max_stop_chars, "a") for number in range(max_stop)], **answer
        ),
    }


async def keep_sending(http: aiohttp.ClientSession, url: str, body: bytes, statuses: dict[int, int]) -> None:
    """Until it is cancelled; counts the answers by status."""
    headers = {"authorization": f"Bearer {HOSTILE}", "content-type": "application/json"}
    while True:
        async with http.post(f"{url}/v1/chat/completions", data=body, headers=headers) as response:
            await response.read()
            statuses[response.status] = statuses.get(response.status, 0) + 1
        await asyncio.sleep(PAUSE_S)


async def stream(http: aiohttp.ClientSession, url: str, name: str, num_tokens: int) -> list[float]:
    """Seconds between the pieces of one answer of the victim."""
    body = {"model": SERVED, "prompt": "once upon a time", "max_tokens": num_tokens, "temperature": 0}
    headers = {"authorization": f"Bearer {VICTIM}", "x-session-id": name}
    times = []
    async with http.post(
        f"{url}/v1/completions", json=body | {"ignore_eos": True, "stream": True}, headers=headers
    ) as response:
        if response.status != 200:
            sys.exit(f"the victim was refused ({response.status}): {await response.text()}")
        async for _ in response.content.iter_any():
            times.append(time.perf_counter())
    return [later - earlier for earlier, later in pairwise(times)]


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """Largest gaps in seconds, a list for each kind, and the statuses of the hostile answers."""
    kinds = make_attacks(options.max_stop, options.max_stop_chars, options.num_tokens)
    gaps: dict[str, list[float]] = {kind: [] for kind in kinds}
    statuses: dict[str, dict[int, int]] = {kind: {} for kind in kinds}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        for repeat in tqdm(range(-1, options.repeats), desc="rounds"):  # the first one warms up
            for kind, body in kinds.items():
                sender = None if body is None else asyncio.create_task(keep_sending(http, url, body, statuses[kind]))
                found = await stream(http, url, f"{kind}-{repeat}", options.num_tokens)
                if sender is not None:
                    sender.cancel()
                    await asyncio.gather(sender, return_exceptions=True)
                if repeat >= 0:
                    gaps[kind].append(max(found))
    return {"largest_gaps_s": gaps, "statuses": statuses}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--num-tokens", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-stop", type=int, default=16, help="most stop strings that the server accepts")
    parser.add_argument("--max-stop-chars", type=int, default=256, help="longest stop string that it accepts")
    options = parser.parse_args()
    engine = {"served_model_name": SERVED, "model": options.model, "num_threads": 1, "gpu_memory_gib": 0.25}
    with tempfile.TemporaryDirectory() as folder:
        tenants = [
            {"id": name, "api_keys_sha256": [hash_key(key)]} for name, key in (("victim", VICTIM), ("hostile", HOSTILE))
        ]
        path = Path(folder) / "tenants.yaml"
        path.write_text(yaml.safe_dump({"tenants": tenants}))
        with serve_app(engine, fast_path=False, tenants_file=str(path)) as url:
            results = asyncio.run(measure(url, options))
    quiet = statistics.median(results["largest_gaps_s"]["none"])
    results["ratios"] = {
        kind: statistics.median(gaps) / quiet for kind, gaps in results["largest_gaps_s"].items() if kind != "none"
    }
    for kind, gaps in results["largest_gaps_s"].items():
        ratio = f", {results['ratios'][kind]:.2f}x" if kind != "none" else ""
        print(f"{kind:21} largest gap {1e3 * statistics.median(gaps):6.0f} ms{ratio}  {results['statuses'][kind]}")
    write_result("hostile_requests", {"settings": vars(options), **results})


if __name__ == "__main__":
    main()

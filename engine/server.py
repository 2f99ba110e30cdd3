"""Serves scripts and notebooks in-process: blocking calls, conversations by session id; no network.

server = create_server(mode="pensieve", model="gpt2")
server.process_request("session_1", "Hello, how are you?")
server.process_request("session_1", "Tell me about AI")
print(server.get_statistics_str())
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.core.tier_table import tier_title
from engine.dialogue.messages import Dialogue
from engine.errors import EngineStoppedError
from engine.generation import Generation
from engine.statistics_log import slow_transfers_lines
from engine.tenant import LOCAL_TENANT, Tenant
from engine.text.output import OutputDelta
from engine.text.prompt import ChatPrompt, Prompt

# How long `close` brings KV to the disk tier, in seconds.
MAX_DRAIN_S = 20.0
GREEDY = SamplingParams(temperature=0.0, max_tokens=128)


@dataclass(frozen=True, slots=True)
class Answer:
    """One complete answer. Token counts are as in OpenAI's usage.

    ttft_s: seconds from the call to the first token.
    total_s: seconds from the call to the last token.
    explanation: how it came about, as docs/http_api.md says; None if that was not asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int
    ttft_s: float
    total_s: float
    explanation: dict[str, Any] | None = None

    @property
    def num_computed_tokens(self) -> int:
        """Prompt tokens that were not in the cache."""
        return self.num_prompt_tokens - self.num_cached_tokens


class Server:
    """Serves scripts and notebooks in-process: an AsyncEngine with an event loop in a thread of its own.

    Thread-safe; calls from several threads run concurrently.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Load the model; blocking. Raises ModelLoadError or ConfigError."""
        self.engine = AsyncEngine(config)
        self._messages: dict[str, list[tuple[str, str]]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server", daemon=True)
        self._thread.start()

    def process_request(
        self,
        session_id: str,
        text: str,
        sampling: SamplingParams = GREEDY,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """The assistant's answer to one more user message of a session.

        on_text: called with each new piece of text.
        """
        return self.chat(session_id, text, sampling, on_text).text

    def chat(
        self,
        session_id: str,
        text: str,
        sampling: SamplingParams = GREEDY,
        on_text: Callable[[str], None] | None = None,
        tenant: Tenant = LOCAL_TENANT,
    ) -> Answer:
        """As `process_request`, with the account of the turn.

        A turn that fails or is interrupted leaves the session as it was.

        tenant: whose KV may be shared; a session must always have the same one.
        """
        messages = [*self._messages.get(session_id, ()), ("user", text)]
        answer = self.complete(ChatPrompt(Dialogue.of(messages).messages), sampling, session_id, on_text, tenant)
        self._messages[session_id] = [*messages, ("assistant", answer.text)]
        return answer

    def complete(
        self,
        prompt: Prompt,
        sampling: SamplingParams = GREEDY,
        session_id: str | None = None,
        on_text: Callable[[str], None] | None = None,
        tenant: Tenant = LOCAL_TENANT,
        explains: bool = False,
    ) -> Answer:
        """The answer to any prompt; nothing is added to it.

        explains: it comes with an explanation.
        """
        coroutine = self._complete(prompt, sampling, session_id, on_text, tenant, explains)
        future = None
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            return future.result()
        except BaseException:  # Ctrl-C while waiting: the engine must not go on generating
            if future is not None:
                future.cancel()
            else:
                with contextlib.suppress(RuntimeError, ValueError):  # it has begun after all
                    coroutine.close()
            raise

    def forget_session(self, session_id: str) -> None:
        """Forget what was said in a session: its next message begins a new conversation."""
        self._messages.pop(session_id, None)

    def get_statistics(self) -> dict[str, Any]:
        """Counters since the start and the state now; see EngineCore.get_statistics."""
        return self.engine.get_statistics()

    def get_statistics_str(self) -> str:
        """The statistics that matter most, for people."""
        stats = self.get_statistics()
        prompt = max(1, stats["num_prompt_tokens"])
        found, used = [], []
        for tier in stats["tiers"]:
            title, num_cached, num_blocks = (
                tier_title(tier),
                stats[f"num_{tier}_cached_tokens"],
                stats[f"num_{tier}_blocks"],
            )
            found.append(f"{num_cached} found in the {title} tier ({num_cached / prompt:.1%})")
            used.append(f"{title} tier: {num_blocks - stats[f'num_{tier}_blocks_free']} of {num_blocks} blocks used")
        return "\n".join(
            [
                f"{stats['model']}, mode {stats['mode']}: {stats['num_finished']} requests finished, "
                f"{stats['num_aborted']} aborted, {stats['num_failed']} failed",
                f"prompt tokens {stats['num_prompt_tokens']}: {', '.join(found)}, "
                f"{stats['num_not_loaded_tokens']} computed because that is faster than loading, "
                f"{stats['num_dropped_tokens']} recomputed because dropped, {stats['num_new_tokens']} new",
                f"output tokens {stats['num_output_tokens']} in {stats['num_steps']} steps; "
                f"{stats['num_suspensions']} suspensions",
                "; ".join(used),
                f"swapped out {stats['num_swap_out_bytes'] / 1e6:.1f} MB, in {stats['num_swap_in_bytes'] / 1e6:.1f} MB; "
                "evictions: " + ", ".join(f"{reason} {count}" for reason, count in stats["evictions"].items()),
                *slow_transfers_lines(stats),
            ]
        )

    def close(self) -> None:
        """End running requests, free the model. Further calls raise EngineStoppedError.

        With a disk tier, what the others hold is brought there first.
        """
        if not self._loop.is_closed():
            with contextlib.suppress(EngineStoppedError):
                asyncio.run_coroutine_threadsafe(self.engine.drain(MAX_DRAIN_S), self._loop).result()
            asyncio.run_coroutine_threadsafe(self.engine.shutdown(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def _complete(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        session_id: str | None,
        on_text: Callable[[str], None] | None,
        tenant: Tenant,
        explains: bool,
    ) -> Answer:
        start_s = time.perf_counter()
        first_s: float | None = None
        pieces: list[str] = []
        token_ids: list[int] = []
        last = OutputDelta()
        generation = Generation(uuid.uuid4().hex, session_id, prompt, sampling, tenant=tenant, explains=explains)
        async for delta in self.engine.generate(generation):
            if first_s is None:
                first_s = time.perf_counter()
            last = delta
            pieces.append(delta.text)
            token_ids.extend(delta.token_ids)
            if on_text is not None and delta.text:
                on_text(delta.text)
        end_s = time.perf_counter()
        assert last.finish_reason is not None
        assert first_s is not None
        return Answer(
            "".join(pieces),
            tuple(token_ids),
            last.finish_reason,
            last.num_prompt_tokens,
            last.num_cached_tokens,
            first_s - start_s,
            end_s - start_s,
            None if last.explanation is None else last.explanation.as_json(last.recomputed),
        )


def create_server(mode: str = "pensieve", model: str = "embedded", **options: Any) -> Server:
    """Make an in-process server of one model; blocking.

    mode: "pensieve" keeps KV between turns; "stateless" (alias "vllm") keeps nothing.
    model: a folder, a hub id, or "embedded".
    options: those of EngineConfig.

    Raises ConfigError or ModelLoadError.
    """
    return Server(EngineConfig.from_options({"mode": mode, "model": model, **options}))

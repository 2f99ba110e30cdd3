"""Fixtures that several test folders share.

Tiny random models of many families, and a driver that steps an engine core in the test's own thread.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

# Where there is no GPU, Triton's interpreter runs the kernel for GPUs. triton reads this when torch imports it.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Every Ray that a test starts takes a token, as under pensieve-serve. Ray reads this when it is imported.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from engine.config import EngineConfig
from engine.core.engine_core import EngineCore, RequestOutput
from engine.core.plan import StepPlan
from engine.core.request import FinishReason, Request, SamplingParams
from engine.core.tier_table import TierSpec
from engine.errors import EngineError
from engine.executor.group import GroupExecutor
from engine.executor.local import LocalExecutor
from engine.make_core import make_core
from engine.step_loop import LookAhead, StepLoop
from engine.transports import Transports
from tests.delayed_tier import DelayedTier
from tests.group_workers import WarmWorkers
from tests.peer_double import PeerEnd

torch.set_num_threads(1)

VOCAB_SIZE = 288
_BASE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_GPT = {"vocab_size": VOCAB_SIZE, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
FAMILIES: dict[str, dict] = {
    "llama": _BASE,
    "qwen3": {**_BASE, "head_dim": 16},
    "mistral": {**_BASE, "sliding_window": 24},
    "gemma2": {
        **_BASE,
        "head_dim": 16,
        "sliding_window": 24,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
    },
    "gpt2": _GPT,
    "opt": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 32,
    },
    "phi3": _BASE,
    "mixtral": {**_BASE, "num_local_experts": 4},
    "bloom": {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "n_layer": 3, "n_head": 4},
    "gptj": {**_GPT, "rotary_dim": 8},
}


def save_tiny_model(family: str, folder: Path, **overrides: object) -> Path:
    """A random model of that family in `folder`, with a byte-level tokenizer and no chat template."""
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **overrides})
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, None if name != "pad_token_id" else 0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)  # large enough for attention to matter
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """A replica that a module makes in this process gives the engine's lines to Serve's logger, for that module only."""
    before = [
        (logger, logger.handlers[:], logger.level, logger.propagate)
        for logger in map(logging.getLogger, ("engine", "ray.serve"))
    ]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> folder of its tiny random model, made once per session."""
    folders: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in folders:
            folders[family] = save_tiny_model(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return get


class Answers:
    """What the requests of a driver got. A step that fails raises.

    outputs, cached, finished: by request id. latest: what the last step gave.
    before_result: called once the next step is drafted or launched, before the result of the first one is waited for.
    """

    def __init__(self, before_result: Callable[[], None]) -> None:
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.cached: dict[str, int] = {}
        self.finished: dict[str, FinishReason] = {}
        self.latest: list[RequestOutput] = []
        self._before_result = before_result

    def add(self, outputs: Iterable[RequestOutput]) -> None:
        self.latest = list(outputs)
        for output in self.latest:
            self.outputs[output.request_id].append(output)
            self.cached[output.request_id] = output.num_cached_tokens
            if output.finish_reason is not None:
                self.finished[output.request_id] = output.finish_reason

    def deliver(self) -> None:
        self._before_result()

    def fail(self, request_ids: Iterable[str], error: EngineError) -> None:
        raise error


class Driver:
    """Drives one core with one executor by the engine's own loop, in the test's thread. Time is the number of the step."""

    def __init__(self, executor: LocalExecutor | GroupExecutor, core: EngineCore) -> None:
        """Slow tiers of the core are in memory, behind a delay; see `slow_tier` and `peers`."""
        self.executor = executor
        self.core = core
        self.now = 0.0
        self.answers = Answers(self._abort)
        self.slow_tier: DelayedTier | None = None
        self.peers: PeerEnd | None = None
        transports = {}
        for tier in core.cache_config.slow_tiers:
            if tier.is_store:
                transports[tier.name] = self.slow_tier = DelayedTier(self._read, self._write)
            else:
                transports[tier.name] = self.peers = PeerEnd(core, self._read, self._write, lambda: self.now)
        transport = Transports(transports) if transports else None
        self.loop = StepLoop(
            self.core, executor, self.answers, lambda: self.now, LookAhead.DRAFT, transport, self.peers
        )
        self.outputs, self.cached, self.finished = self.answers.outputs, self.answers.cached, self.answers.finished
        self._finished_plans: list[StepPlan] = []
        self._to_abort: str | None = None

    @property
    def plans(self) -> list[StepPlan]:
        """All plans that were executed, or are."""
        return [*self._finished_plans, *self.loop.in_flight]

    def add(
        self,
        request_id: str,
        token_ids: list[int],
        conversation_id: str | None = None,
        sampling: SamplingParams | None = None,
        **kwargs: object,
    ) -> None:
        sampling = sampling or SamplingParams(temperature=0.0, max_tokens=8, logprobs=2)
        request = Request(request_id, token_ids, sampling, conversation_id=conversation_id, **kwargs)  # type: ignore[arg-type]
        self.core.add_request(request, self.now)
        if self.peers is not None:
            self.peers.find(request)
        self.outputs[request_id] = []

    def step(self, abort_in_flight: str | None = None) -> list[RequestOutput]:
        """One step; `abort_in_flight` is aborted while it is under way."""
        self.now += 1
        self.answers.latest, self._to_abort = [], abort_in_flight
        plan = self.loop.step()
        if plan is not None:
            self._finished_plans.append(plan)
        return self.answers.latest

    def _abort(self) -> None:
        if self._to_abort is not None and self.loop.in_flight:
            self.core.abort(self._to_abort, self.now)

    def _read(self, cpu_block: int) -> bytes:
        return self.executor.cpu_store.storage[cpu_block].view(torch.uint8).numpy().tobytes()

    def _write(self, cpu_block: int, content: bytes | None) -> None:
        row = self.executor.cpu_store.storage[cpu_block].view(torch.uint8)
        if content is None:
            row.fill_(0xFF)  # NaN
        else:
            row.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))

    def run(self) -> None:
        while self.core.has_requests or self.loop.in_flight:
            self.step()

    def generate(self, request_id: str, token_ids: list[int], **kwargs: object) -> list[int]:
        self.add(request_id, token_ids, **kwargs)  # type: ignore[arg-type]
        self.run()
        return self.tokens(request_id)

    def tokens(self, request_id: str) -> list[int]:
        return [output.token_id for output in self.outputs[request_id]]


@pytest.fixture(scope="session")
def warm_workers() -> Iterator[WarmWorkers]:
    """The workers of one tensor-parallel group after the other."""
    workers = WarmWorkers()
    yield workers
    workers.close()


@pytest.fixture
def make_driver(request: pytest.FixtureRequest) -> Iterator[Callable[..., Driver]]:
    """(model folder, EngineConfig options) -> Driver."""
    groups: list[GroupExecutor] = []

    def make(model: Path | str, slow_tiers: tuple[TierSpec, ...] = (), **options: object) -> Driver:
        defaults = {"model": str(model), "dtype": "float32", "num_threads": 1, "max_num_queued_reqs": 1024}
        config = EngineConfig.from_options({**defaults, **options})
        if config.tensor_parallel_size > 1:
            groups.append(GroupExecutor(config, request.getfixturevalue("warm_workers").starter()))
            executor: LocalExecutor | GroupExecutor = groups[-1]
        else:
            executor = LocalExecutor(config)
        core = make_core(config, executor)
        if slow_tiers:
            core = EngineCore(replace(core.cache_config, slow_tiers=slow_tiers), core.scheduling_config)
        return Driver(executor, core)

    yield make
    for group in groups:
        group.shutdown()


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)

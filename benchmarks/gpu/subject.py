"""A model that checks are made of: its executor, answers over it, and what two answers may differ by."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import stand_ins
import torch
import transformers
from answers import Answers
from setting import CHUNK_SIZE, TINY_LLAMA, TINY_OPT, Setting, Shape
from steps import make_config

from engine.config import EngineConfig
from engine.core.config import CacheConfig, SchedulingConfig
from engine.core.engine_core import EngineCore, RequestOutput
from engine.core.plan import StepPlan
from engine.core.request import Request, SamplingParams
from engine.executor.local import LocalExecutor
from engine.step_loop import LookAhead, StepLoop

# Large enough for attention to matter: with the families' own, a wrong cache hardly changes the logits.
INIT_STD = 0.15
_GATED = {**TINY_LLAMA.values, "initializer_range": INIT_STD}
_MIXTRAL = {**_GATED, "num_local_experts": 4}
SHAPES = {
    "tiny Llama": Shape("llama", _GATED),
    "tiny OPT": Shape("opt", {**TINY_OPT.values, "init_std": INIT_STD}),
    "tiny Gemma2": Shape(
        "gemma2",
        {**_GATED, "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    ),
    "tiny Mixtral": Shape("mixtral", {**_MIXTRAL, "num_experts_per_tok": 2}),
    "dense Mixtral": Shape("mixtral", {**_MIXTRAL, "num_experts_per_tok": 4}),
}
# How far behind the best token the other side's may be, in log-probability, if the two sides choose different ones. What a
# wrong cache gives is nowhere near the best: it is not even among the ALTERNATIVES.
TIE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
ALTERNATIVES = 10


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the checks.

    max_num_seqs: of the recorded sizes, too.
    num_conversations, num_turns, output_len: of the conversations.
    prompt_len: the longest.
    gpu_blocks, cpu_blocks: of their tiers.
    num_swapped: blocks in each copy of the round trip.
    kept_tokens: of an engine's prompt.
    """

    max_num_seqs: int
    num_conversations: int
    num_turns: int
    prompt_len: int
    output_len: int
    gpu_blocks: int
    cpu_blocks: int
    num_swapped: int
    kept_tokens: int


FOR_GPU = Sizes(48, 10, 4, 90, 12, 36, 60, 24, 200)
FOR_SMOKE = Sizes(4, 4, 3, 40, 3, 9, 8, 2, 40)


class Subject:
    """A model, and its executor with two tiers from the first check that uses it until `close`."""

    def __init__(
        self,
        setting: Setting,
        folder: Path,
        name: str,
        shape: Shape,
        dtype: torch.dtype,
        sizes: Sizes | None = None,
        **options: Any,
    ) -> None:
        """sizes: None = those of the setting. options: of the engine."""
        self.setting = setting
        self.name = f"{name} {str(dtype).removeprefix('torch.')}"
        self.sizes = sizes or (FOR_SMOKE if setting.is_smoke else FOR_GPU)
        self.dtype = dtype
        self._shape = shape
        self._folder = folder
        self._options = options

    def config(self, **options: Any) -> EngineConfig:
        path = self._folder / self.name.replace(" ", "-")
        options = {**self._options, **options}
        if not path.exists():
            self._shape.save(path)
            if options.get("load_format") == "auto":
                self._save_weights(path)
        return make_config(
            self.setting,
            str(path),
            **{
                "dtype": str(self.dtype).removeprefix("torch."),
                "attention_backend": "reference" if self.setting.is_smoke else "triton",
                "max_num_seqs": self.sizes.max_num_seqs,
                "max_num_batched_tokens": 512,
                "compile_layers": False,
                "pack_weights": not self.setting.is_smoke,  # on a CPU it differs between processors
                **options,
            },
        )

    @staticmethod
    def _save_weights(folder: Path) -> None:
        """Random ones: where only weights from files are served."""
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
        model.save_pretrained(folder)

    @cached_property
    def executor(self) -> LocalExecutor:
        sizes = self.sizes
        blocks = max(sizes.gpu_blocks, 3 * sizes.num_swapped + 4, 6 * sizes.max_num_seqs)
        cpu_blocks = max(sizes.cpu_blocks, 3 * sizes.num_swapped)
        config = self.config(num_gpu_blocks=blocks, num_cpu_blocks=cpu_blocks, verify_swaps=True)
        executor = LocalExecutor(config)
        if self.setting.is_smoke:
            stand_ins.give_graphs(executor, config.max_num_seqs, config.max_num_batched_tokens)
        return executor

    def close(self) -> str:
        executor = self.__dict__.pop("executor", None)
        if executor is None:
            return "was never started"
        executor.shutdown()
        del executor
        gc.collect()
        if self.setting.device.type != "cuda":
            return "shut down"
        torch.cuda.empty_cache()
        return f"{torch.cuda.memory_allocated() >> 20} MiB are left allocated"


def make_core(subject: Subject, *, speculative: dict[str, Any] | None = None, **cache: Any) -> EngineCore:
    """cache: of CacheConfig."""
    return EngineCore(
        CacheConfig(chunk_size=CHUNK_SIZE, **cache),
        SchedulingConfig(
            max_model_len=min(512, cache["num_gpu_blocks"] * CHUNK_SIZE),
            max_num_seqs=subject.sizes.max_num_seqs,
            max_num_batched_tokens=128,
            speculative=speculative,
        ),
    )


def answer(
    core: EngineCore, executor: LocalExecutor, requests: Iterable[Request], *, is_ahead: bool
) -> dict[str, list[RequestOutput]]:
    """Of all requests at once, by their ids. is_ahead: as the engine does it on a GPU."""
    for request in requests:
        core.add_request(request, 0.0)
    answers = Answers()
    num_steps = 0
    look_ahead = LookAhead.LAUNCH if is_ahead else LookAhead.DRAFT
    loop = StepLoop(core, executor, answers, lambda: float(num_steps), look_ahead)  # each step takes as long
    while core.has_requests or loop.in_flight:
        num_steps += 1
        loop.step()
        assert not core.stats.num_corrupted_swaps, "a swap-in brought something else than was swapped out"
    # The core tells it with its next step.
    executor.execute(StepPlan(0, (), ended=tuple(answers.outputs)))
    return answers.outputs


def answer_contexts(
    core: EngineCore,
    executor: LocalExecutor,
    contexts: Mapping[str, Sequence[int]],
    prefix: str,
    output_len: int,
    *,
    is_ahead: bool,
) -> dict[str, list[RequestOutput]]:
    """The next greedy turn of each conversation, all at once, by their names."""
    sampling = SamplingParams(temperature=0.0, max_tokens=output_len, logprobs=ALTERNATIVES, ignore_eos=True)
    requests = [
        Request(f"{prefix}.{name}", list(context), sampling, conversation_id=name) for name, context in contexts.items()
    ]
    answers = answer(core, executor, requests, is_ahead=is_ahead)
    return {name: answers[f"{prefix}.{name}"] for name in contexts}


def tokens_of(outputs: Iterable[RequestOutput]) -> list[int]:
    return [output.token_id for output in outputs]


@contextmanager
def replays_counted(executor: LocalExecutor) -> Iterator[list[int]]:
    """The sizes of the graphs that are replayed."""
    sizes: list[int] = []
    replay = executor.runner.graphs.replay

    def note_and_replay(size: int) -> torch.Tensor:
        sizes.append(size)
        return replay(size)

    with patch.object(executor.runner.graphs, "replay", note_and_replay):
        yield sizes


def is_tie(actual: Sequence[RequestOutput], expected: Sequence[RequestOutput], dtype: torch.dtype, where: str) -> bool:
    """Say whether two answers differ where rounding decides; raise AssertionError if they differ elsewhere."""
    assert len(actual) == len(expected), f"{where}: {len(actual)} tokens instead of {len(expected)}"
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        if one.token_id == other.token_id:
            continue
        assert other.logprobs is not None
        best = dict(other.logprobs.top)
        gap = max(best.values()) - best.get(one.token_id, float("-inf"))
        assert gap <= TIE[dtype], (
            f"{where}: token {number} is {one.token_id} and not {other.token_id}, {gap:.3g} behind it"
        )
        return True
    return False

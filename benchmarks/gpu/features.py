"""Checks of what came behind graphs and swaps: cold tiers, speculation, adapters, sampling on the device, the disk tier.

As those in checks.py: each returns a line of what it saw, or raises.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import stand_ins
import torch
import transformers
from eager import GREEDY, logits_kept, without_graphs
from safetensors.torch import load_file, save_file
from setting import CHUNK_SIZE
from steps import swapping_by
from subject import ALTERNATIVES, Subject, answer, is_tie, make_core, replays_counted, tokens_of

from engine.async_engine import AsyncEngine
from engine.core.cache.prices import LoadPrices
from engine.core.engine_core import RequestOutput
from engine.core.plan import BlockCopy, Logprobs, QuerySegment, RequestStart, StepPlan
from engine.core.request import FinishReason, Request, SamplingParams
from engine.core.tier_table import CPU, GPU
from engine.executor.lora.peft_config import CONFIG_NAME
from engine.executor.lora.peft_files import PREFIX, WEIGHTS_NAME, A, B
from engine.executor.sampler import SamplingState, sample
from engine.executor.tiers.block_copy import load_cold_copiers
from engine.executor.tiers.cold_format import LEVELS, ColdFormat
from engine.executor.tiers.kv_store import ColdStore
from engine.executor.tiers.swapper import StreamSwapper, make_swapper
from engine.generation import Generation
from engine.text.prompt import TokenPrompt

COLD_KINDS = ("fp8", "int8", "int4")
# Of a number of that dtype, relative: what is added to a cold tier's own error.
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}
SPECULATIVE = {"method": "ngram", "num_tokens": 6}
# Answers of few different tokens, so that rows of them come again and are guessed.
FEW = tuple((token_id, 25.0) for token_id in range(60, 66))
# Of a log-probability, between two ways to compute it in float32.
LOGPROB_TOLERANCE = 1e-3
# Of the largest logit, between an adapter that is added and one whose weights are merged.
MERGED_TOLERANCE = 1e-3


# -- cold tiers ------------------------------------------------------------------------------------------------------------


def check_cold_tiers(subject: Subject) -> str:
    """Swap blocks out and in by the kernels of the cold tiers, whole and in groups of layers.

    Records and restored values have to be those of the reference on the host, bit for bit, their error bounded, and a
    restored block's record the same again.
    """
    executor, n = subject.executor, subject.sizes.num_swapped // 2
    errors = []
    for number, kind in enumerate(COLD_KINDS):
        with _cold_store(subject, kind, 3 * n) as (cold, swapper), swapping_by(executor, swapper):
            errors.append(_check_cold(subject, cold, random.Random(number), n))
    return f"{2 * n} blocks of each; largest errors " + ", ".join(
        f"{kind} {error:.1e}" for kind, error in zip(COLD_KINDS, errors, strict=True)
    )


@contextmanager
def _cold_store(subject: Subject, kind: str, num_blocks: int) -> Iterator[tuple[ColdStore, StreamSwapper]]:
    """A CPU tier of records beside the executor's own, and its swapper."""
    loaded, gpu, is_smoke = subject.executor.loaded, subject.executor.gpu_store, subject.setting.is_smoke
    cold_format = ColdFormat(kind, loaded.layers, CHUNK_SIZE, loaded.dtype)
    cold = ColdStore(cold_format, num_blocks=num_blocks, pin_memory=not is_smoke)
    if is_smoke:
        swapper = StreamSwapper(gpu, cold, stand_ins.streams(), load_cold_copiers(gpu, cold), verify=True)
    else:
        made = make_swapper(gpu, cold, verify=True)
        assert isinstance(made, StreamSwapper)
        swapper = made
    try:
        yield cold, swapper
    finally:
        swapper.shutdown()
        cold.unpin()


def _check_cold(subject: Subject, cold: ColdStore, rng: random.Random, n: int) -> float:
    """Returns the largest error, relative to the largest value of its block."""
    executor, kind = subject.executor, cold.format.kind
    gpu = executor.gpu_store.storage
    with torch.inference_mode():  # many magnitudes, and zeros
        gpu.normal_().mul_(torch.randn_like(gpu).exp_()).mul_(torch.rand_like(gpu) > 0.1)
    cold.storage.zero_()
    before = gpu.cpu()
    own, *blocks = rng.sample(range(len(gpu)), 1 + 4 * n)
    sources, targets = blocks[: 2 * n], blocks[2 * n :]
    num_valid = [CHUNK_SIZE - 5 if number % 3 == 1 else None for number in range(2 * n)]
    cold_blocks = rng.sample(range(len(cold.storage)), 2 * n)
    out = tuple(
        BlockCopy(GPU, *pair, num) for pair, num in zip(_between(sources, CPU, cold_blocks), num_valid, strict=True)
    )
    executor.execute(StepPlan(0, (), evictions=out[:n], swap_outs=out[n:]))
    back = tuple(BlockCopy(CPU, *pair) for pair in _between(cold_blocks, GPU, targets))
    start = RequestStart("s", CHUNK_SIZE, CHUNK_SIZE, GREEDY, (), (own,))
    segment = QuerySegment("s", 0, tuple(range(8, 8 + CHUNK_SIZE)), True)
    try:
        whole = executor.execute(StepPlan(0, (), swap_ins=back[:n]))
        groups = executor.execute(StepPlan(0, (segment,), (start,), swap_ins=back[n:]))
    finally:
        executor.execute(StepPlan(0, (), ended=("s",)))
    assert not whole.failed_swap_ins + groups.failed_swap_ins, f"{kind}: a record changed while it lay in the CPU tier"
    after = gpu.cpu()
    largest = 0.0
    for copy, target, num in zip(out, targets, num_valid, strict=True):
        what = f"{kind}, {'whole blocks' if copy in out[:n] else 'groups of layers'}"
        record = cold.format.encode(before[copy.source], num)
        num_other = int((cold.storage[copy.target] != record).sum())
        assert num_other == 0, f"{num_other} of {len(record)} bytes of a record are not the reference's ({what})"
        restored = torch.empty_like(before[0])
        cold.format.decode(record, restored, range(len(cold.format.layers)))
        num_other = int((after[target] != restored).sum())
        assert num_other == 0, f"{num_other} of {len(restored)} restored values are not the reference's ({what})"
        largest = max(largest, _assert_bounded(cold.format, before[copy.source], after[target], num))
    again = tuple(
        BlockCopy(GPU, target, CPU, block, num)
        for target, block, num in zip(targets, cold_blocks, num_valid, strict=True)
    )
    records = cold.storage.clone()
    executor.execute(StepPlan(0, (), swap_outs=again))
    assert torch.equal(cold.storage, records), f"{kind}: restored blocks have other records"
    return largest


def _between(sources: list[int], target_tier: str, targets: list[int]) -> Iterator[tuple[int, str, int]]:
    return ((source, target_tier, target) for source, target in zip(sources, targets, strict=True))


def _assert_bounded(cold: ColdFormat, before: torch.Tensor, after: torch.Tensor, num_tokens: int | None) -> float:
    """By the step between two numbers of each value's group; returns the largest error, relative to the largest value."""
    largest = 0.0
    for part in (part for parts in cold.layers for part in parts):
        size = part.heads * cold.chunk_size * part.dim
        exact, restored = (
            block[part.elements : part.elements + size]
            .view(part.heads, cold.chunk_size, part.dim)[:, :num_tokens]
            .float()
            for block in (before, after)
        )
        errors = (restored - exact).abs()
        if cold.kind == "fp8":  # half a step of three bits, or of the least numbers
            allowed = exact.abs() * 2.0**-4 + exact.abs().amax((1, 2), keepdim=True) * 2.0**-16
        else:
            axis = 1 if part.is_key else 2
            step = (exact.amax(axis, keepdim=True) - exact.amin(axis, keepdim=True)) / LEVELS[cold.kind]
            allowed = step / 2
        allowed = allowed * 1.001 + torch.maximum(exact.abs(), restored.abs()) * ROUNDING[cold.dtype]
        assert (errors <= allowed).all(), f"{cold.kind}: a restored value is further off than a step allows"
        assert errors.max() > 0, f"{cold.kind}: nothing was converted"
        largest = max(largest, float(errors.max() / exact.abs().max()))
    return largest


# -- speculation -----------------------------------------------------------------------------------------------------------


def check_speculation(subject: Subject) -> str:
    """Compare answers with guesses, by graphs and steps running ahead, with those without guesses, each alone."""
    sizes, executor = subject.sizes, subject.executor
    rng = random.Random(0)
    sampling = SamplingParams(temperature=0.0, max_tokens=2 * sizes.output_len + 18, ignore_eos=True, logit_bias=FEW)
    prompts = {f"p{number}": _repetitive(rng, 40 + number) for number in range(3)}

    def requests() -> dict[str, Request]:
        return {name: Request(name, list(prompt), sampling) for name, prompt in prompts.items()}

    core = make_core(subject, num_gpu_blocks=executor.num_gpu_blocks, speculative=SPECULATIVE)
    with replays_counted(executor) as replayed:
        given = answer(core, executor, requests().values(), is_ahead=True)
        # Alone, so that nothing but its own guesses decides which steps run ahead.
        given |= answer(core, executor, [Request("alone", list(prompts["p0"]), sampling)], is_ahead=True)
    core.check_integrity()
    statistics = core.get_statistics()
    expected = _alone(subject, requests())
    for name, outputs in given.items():
        wanted = tokens_of(expected["p0" if name == "alone" else name])
        assert tokens_of(outputs) == wanted, f"{name}: {tokens_of(outputs)} with guesses, {wanted} without"
    for name in ("num_guessed_tokens", "num_accepted_tokens", "num_steps_ahead"):
        assert statistics[name] > 0, f"{name} is 0: the answers do not show what they should"
    assert replayed, "no step was replayed by a graph"
    return (
        f"{len(given)} answers; {statistics['num_accepted_tokens']} of {statistics['num_guessed_tokens']} guesses came true, "
        f"{statistics['num_steps_ahead']} steps ahead, {len(replayed)} replayed"
    )


def _repetitive(rng: random.Random, num_tokens: int) -> list[int]:
    """A prompt that says the same again and again, with changes."""
    phrase = [rng.randrange(8, 2000) for _ in range(7)]
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        tokens += phrase if rng.random() < 0.8 else [rng.randrange(8, 2000) for _ in range(3)]
    return tokens[:num_tokens]


def _alone(subject: Subject, requests: dict[str, Request]) -> dict[str, list[RequestOutput]]:
    """Each request computed alone, from nothing, without graphs and steps ahead."""
    executor = subject.executor
    core = make_core(subject, num_gpu_blocks=executor.num_gpu_blocks, keep=False)
    with without_graphs(executor):
        return {
            name: answer(core, executor, [request], is_ahead=False)[request.request_id]
            for name, request in requests.items()
        }


# -- adapters --------------------------------------------------------------------------------------------------------------


def check_adapters(subject: Subject, folder: Path) -> str:
    """Compare requests of two adapters and of none, in one batch, with each request alone.

    And logits of requests alone with those of transformers' own model on the host, into which the adapter is merged.
    """
    sizes, executor = subject.sizes, subject.executor
    assert executor.loaded.adapters is not None
    executor.loaded.adapters.layers.step.kernel = None  # by torch's operations, on a CPU too
    folders = [_write_adapter(subject, folder / f"adapter-{rank}", rank, size) for rank, size in ((4, 0.1), (8, 0.2))]
    identities = ["", *(executor.load_adapter(str(path)) for path in folders)]
    rng = random.Random(0)
    prompts = [[rng.randrange(8, 2000) for _ in range(sizes.prompt_len // 2 + 3 * i)] for i in range(2)]
    requests: dict[str, tuple[list[int], str, SamplingParams]] = {}
    for number, identity in enumerate(identities):
        for i, prompt in enumerate(prompts):
            # Those without an adapter go on alone, by graphs.
            max_tokens = sizes.output_len * (1 if identity else 4)
            sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=ALTERNATIVES, ignore_eos=True)
            requests[f"adapter {number}, prompt {i}"] = (prompt, identity, sampling)

    def made() -> dict[str, Request]:
        return {
            name: Request(name, list(prompt), sampling, adapter=identity)
            for name, (prompt, identity, sampling) in requests.items()
        }

    core = make_core(subject, num_gpu_blocks=executor.num_gpu_blocks)
    with replays_counted(executor) as replayed:
        given = answer(core, executor, made().values(), is_ahead=True)
    core.check_integrity()
    expected = _alone(subject, made())
    num_ties = sum(is_tie(given[name], expected[name], subject.dtype, name) for name in given)
    for identity, path in zip(identities, (None, *folders), strict=True):
        before = executor.runner.num_eager_forwards
        _compare_with_merged(subject, prompts[0], identity, path)
        assert identity or executor.runner.num_eager_forwards == before, (
            "a step without adapters ran without the compiled code of the layers"
        )
    for i in range(len(prompts)):
        of_prompt = [tokens_of(expected[f"adapter {number}, prompt {i}"])[: sizes.output_len] for number in range(3)]
        assert len({tuple(tokens) for tokens in of_prompt}) == 3, f"adapters change nothing: {of_prompt}"
    assert replayed, "no step of requests without adapters was replayed by a graph"
    assert core.get_statistics()["num_steps_ahead"] > 0, "no step ran ahead"
    for identity in identities[1:]:
        executor.unload_adapter(identity)
    return f"{len(given)} answers of two adapters and of none, {num_ties} of them with a tie; {len(replayed)} steps replayed"


def _compare_with_merged(subject: Subject, prompt: list[int], identity: str, adapter: Path | None) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    with logits_kept(subject.executor) as kept:
        _alone(subject, {"": Request("merged", list(prompt), greedy, adapter=identity)})
    actual = torch.cat(kept).float().cpu()[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        subject.config().model, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        if adapter is not None:
            config, tensors = json.loads((adapter / CONFIG_NAME).read_text()), load_file(adapter / WEIGHTS_NAME)
            for name in tensors:
                if name.endswith(A):
                    layer = model.get_submodule(name.removeprefix(PREFIX).removesuffix(A))
                    layer.weight += config["lora_alpha"] / config["r"] * tensors[name.replace(A, B)] @ tensors[name]
        expected = model(torch.tensor([prompt])).logits[0, -1]
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error < MERGED_TOLERANCE, f"logits with an adapter differ by {error:.1e} from those with its weights merged"


def _write_adapter(subject: Subject, folder: Path, rank: int, size: float) -> Path:
    """An adapter as peft saves it: random weights for all linear layers. size: of the weights."""
    adapters = subject.executor.loaded.adapters
    assert adapters is not None
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": "all-linear", "bias": "none"}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for name, (in_features, out_features) in sorted(adapters.layers.shapes.items()):
        tensors[f"{PREFIX}{name}{A}"] = size * torch.randn(rank, in_features, generator=generator)
        tensors[f"{PREFIX}{name}{B}"] = size * torch.randn(out_features, rank, generator=generator)
    save_file(tensors, folder / WEIGHTS_NAME)
    return folder


# -- sampling --------------------------------------------------------------------------------------------------------------


def check_sampling(subject: Subject) -> str:
    """Compare requests of every kind of sampling in one batch, with graphs and steps ahead, with each alone.

    The tokens of those alone have to be what the sampler chooses on the host from the same logits, and their
    log-probabilities those of the logits.
    """
    executor = subject.executor
    core = make_core(subject, num_gpu_blocks=executor.num_gpu_blocks)
    requests = _sampled_requests(subject)
    runner = executor.runner
    with (
        replays_counted(executor) as replayed,
        patch.object(runner, "_correct", wraps=runner._correct) as corrected,
    ):
        given = answer(core, executor, (_request(name, *parts) for name, parts in requests.items()), is_ahead=True)
    core.check_integrity()
    num_tokens = 0
    for name, (prompt, sampling) in requests.items():
        with logits_kept(executor) as kept:
            (expected,) = _alone(subject, {name: _request(name, prompt, sampling)}).values()
        logits = torch.cat(kept).float().cpu()
        assert len(logits) == len(expected), f"{name}: logits of {len(logits)} rows for {len(expected)} tokens"
        assert tokens_of(given[name]) == tokens_of(expected), (
            f"{name}: {tokens_of(given[name])} in a batch, {tokens_of(expected)} alone"
        )
        assert given[name][-1].finish_reason == expected[-1].finish_reason, f"{name}: it ends otherwise in a batch"
        _compare_with_host(name, prompt, sampling, expected, logits)
        for outputs in (given[name], expected):
            _compare_logprobs(name, outputs, logits)
        num_tokens += len(expected)
    stopped = given["stop"]
    assert stopped[-1].finish_reason is FinishReason.STOP, "a stop token did not end its answer"
    assert len(given["min_tokens"]) > len(stopped), "a stop token ended an answer before min_tokens"
    scored, greedy = given["scored"][0].prompt_logprobs, given["greedy"]
    for row, output in zip(scored[-len(greedy) :], greedy, strict=True):
        assert output.logprobs is not None
        assert abs(row.chosen - output.logprobs.chosen) < LOGPROB_TOLERANCE, "a prompt's log-probability is another one"
    statistics = core.get_statistics()
    assert statistics["num_steps_ahead"] > 0, "no step ran ahead"
    assert replayed, "no step was replayed by a graph"
    if subject.setting.device.type == "cuda":
        assert corrected.call_count > 0, "no filter kept more tokens than are sorted at first"
    return (
        f"{len(requests)} requests, {num_tokens} tokens; {statistics['num_steps_ahead']} steps ahead, {len(replayed)} "
        f"replayed, {corrected.call_count} corrected"
    )


def _request(name: str, prompt: list[int], sampling: SamplingParams) -> Request:
    return Request(name, list(prompt), sampling)


def _sampled_requests(subject: Subject) -> dict[str, tuple[list[int], SamplingParams]]:
    """(prompt, sampling) by what is special about them. Half of them have the same prompt, as choices of one answer have."""
    rng = random.Random(1)
    greedy = SamplingParams(temperature=0.0, max_tokens=subject.sizes.output_len, logprobs=3, ignore_eos=True)
    prompt = [rng.randrange(8, 2000) for _ in range(subject.sizes.prompt_len)]
    (first,) = _alone(subject, {"": _request("first", prompt, greedy)}).values()
    tokens = tokens_of(first)
    stop = tokens[1]
    drawn = replace(greedy, temperature=1.0, seed=1)
    penalised = replace(greedy, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4, logit_bias=FEW)
    shared = {
        "greedy": greedy,
        "choice 1": replace(drawn, seed=11),
        "choice 2": replace(drawn, seed=12, logprobs=None),
        "stop": replace(greedy, stop_token_ids=(stop,)),
        "min_tokens": replace(greedy, stop_token_ids=(stop,), min_tokens=len(tokens)),
        "barred": replace(greedy, logit_bias=((tokens[0], -100.0),), logprobs=0),
    }
    others = {
        "top_k": replace(drawn, seed=2, top_k=20),
        "top_p": replace(drawn, seed=3, top_p=0.7),
        "min_p": replace(drawn, seed=4, min_p=0.05, temperature=0.7),
        "all filters": replace(drawn, seed=5, top_k=50, top_p=0.9, min_p=0.01),
        # Keeps more than are sorted at first, so that steps that were launched behind are computed again. Goes on when the
        # others have ended, because with penalties each step waits for the one in front.
        "nearly uniform": replace(drawn, seed=6, temperature=20.0, top_p=0.9, max_tokens=2 * subject.sizes.output_len),
        "penalties": penalised,
        "drawn with penalties": replace(penalised, temperature=0.8, seed=7, top_p=0.95),
    }
    requests = {name: (prompt, sampling) for name, sampling in shared.items()}
    for name, sampling in others.items():
        requests[name] = ([rng.randrange(8, 2000) for _ in range(rng.randint(5, len(prompt)))], sampling)
    requests["scored"] = ([*prompt, *tokens], replace(greedy, prompt_logprobs=2))
    return requests


def _compare_with_host(
    name: str, prompt: list[int], sampling: SamplingParams, outputs: list[RequestOutput], logits: torch.Tensor
) -> None:
    """logits: [tokens of the answer, vocabulary], in host memory."""
    state = SamplingState(sampling, len(prompt), len(prompt), sampling.stop_token_ids, prompt)
    for number, row in enumerate(logits):
        (token_id,), _ = sample(row[None], [state])
        assert token_id == outputs[number].token_id, (
            f"{name}: token {number} is {outputs[number].token_id}, and {token_id} as the host samples"
        )


def _compare_logprobs(name: str, outputs: list[RequestOutput], logits: torch.Tensor) -> None:
    for output, row in zip(outputs, logits.log_softmax(-1), strict=True):
        if output.logprobs is None:
            continue
        told: Logprobs = output.logprobs
        expected = torch.stack([row[output.token_id], *(row[token_id] for token_id, _ in told.top)])
        actual = torch.tensor([told.chosen, *(value for _, value in told.top)])
        error = float((actual - expected).abs().max())
        assert error < LOGPROB_TOLERANCE, f"{name}: a log-probability is off by {error:.1e}"
        if told.top:
            behind = float((row.topk(len(told.top)).values - actual[1:]).abs().max())
            assert behind < LOGPROB_TOLERANCE, f"{name}: others than the most probable tokens are told"


# -- disk tier -------------------------------------------------------------------------------------------------------------


def check_disk_tier(subject: Subject, folder: Path) -> str:
    """Start an engine over the folder that an earlier one has left: what it loads from there gives the same answer."""
    texts = []
    for cold_dtype in ("same", "int8"):
        options: dict[str, Any] = {
            "num_gpu_blocks": 32,
            "num_cpu_blocks": 32,
            "kv_disk_path": str(folder / cold_dtype),
            "kv_disk_size": 0.1,
            "kv_cold_dtype": cold_dtype,
            "enforce_eager": True,  # other checks record graphs
        }
        answers, counts = [], []
        # However slow the disk is.
        with patch.object(LoadPrices, "note_load", lambda *_: None):
            for _ in range(2):
                engine = AsyncEngine(subject.config(**options))
                tokens, statistics = asyncio.run(_answer_and_drain(engine, subject.sizes.kept_tokens))
                answers.append(tokens)
                counts.append(statistics["num_disk_cached_tokens"])
                assert not statistics["tier_problems"], f"{cold_dtype}: {statistics['tier_problems']}"
                assert not statistics["num_corrupted_swaps"], f"{cold_dtype}: a block came back damaged"
        assert counts[0] == 0, f"{cold_dtype}: the first engine found something on the disk"
        assert counts[1] > 0, f"{cold_dtype}: the second engine found nothing on the disk"
        if cold_dtype == "same":
            assert answers[0] == answers[1], f"answers before and after a restart: {answers}"
        texts.append(f"{cold_dtype}: {counts[1]} tokens came from the disk")
    return "; ".join(texts)


async def _answer_and_drain(engine: AsyncEngine, num_tokens: int) -> tuple[list[int], dict[str, Any]]:
    """One turn, and what the engine counted; what it has kept is on the disk afterwards."""
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    prompt = TokenPrompt(tuple(range(8, 8 + num_tokens)))
    tokens: list[int] = []
    try:
        async for delta in engine.generate(Generation("r", "s", prompt, sampling)):
            tokens += delta.token_ids
        statistics = engine.get_statistics()
        await engine.drain(30.0)
    finally:
        await engine.shutdown()
    return tokens, statistics

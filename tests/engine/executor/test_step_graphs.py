"""Recorded decode steps.

The stand-in for CUDA graphs records every operation of torch, and replays it on the same tensors: what Python decided
while it was recorded stays decided. As CUDA does, it rejects what would wait for the device.
"""

from __future__ import annotations

import gc
import random
import weakref
from contextlib import ExitStack
from dataclasses import fields
from importlib.util import find_spec
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.attention.choice import choose_backend
from engine.core.plan import QuerySegment, RequestStart, StepPlan
from engine.core.request import SamplingParams
from engine.errors import ConfigError, DeviceFailedError
from engine.executor import step_inputs
from engine.executor.model_runner import ModelRunner
from engine.executor.step_graphs import CudaGraphMaker, StepGraphs, bucket_sizes
from engine.executor.step_inputs import StepLimits
from tests.nightly import nightly

# Operations whose result's size the host has to ask for, or that bring there what was made in Python; and methods that ask
# the device for a number.
WAITING = {torch.ops.aten.lift_fresh.default, torch.ops.aten.nonzero.default}
ASKING = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITING:
            raise RuntimeError(f"{func} is not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out


def refuse(*_: object) -> None:
    raise RuntimeError("operation not permitted when stream is capturing")


class RecordedGraph:
    def __init__(self, operations: list[tuple], output: torch.Tensor) -> None:
        self._operations = operations
        self.output = output
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, out in self._operations:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RecordingMaker:
    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []

    def capture(self, run) -> RecordedGraph:
        run()
        with Recorder() as recorder, ExitStack() as stack:
            for name in ASKING:
                stack.enter_context(patch.object(torch.Tensor, name, refuse))
            output = run()
        graph = RecordedGraph(recorder.operations, output)
        self.graphs.append(graph)
        return graph

    @property
    def num_replays(self) -> int:
        return sum(graph.num_replays for graph in self.graphs)


class RerunningMaker(RecordingMaker):
    """For what no recorder of torch's operations sees, kernels of Triton: a replay calls the function again."""

    def capture(self, run) -> RecordedGraph:
        output = run()
        graph = RecordedGraph([(run, (), {}, output)], output)
        self.graphs.append(graph)
        return graph


def record(executor, max_num_seqs: int, backend: str = "cpu", prompt_sizes: tuple[int, ...] = ()) -> RecordingMaker:
    """Give the executor a runner with everything in one place and recorded steps, as on a GPU."""
    limits = StepLimits(max_num_seqs, 512, executor.num_gpu_blocks)
    chosen = choose_backend(backend, torch.device("cpu"), torch.float32)
    executor.runner = ModelRunner(executor.loaded, executor.gpu_store, executor.runner.swapper, chosen, limits)
    maker = RerunningMaker() if backend == "triton" else RecordingMaker()
    executor.runner.capture_graphs(maker, bucket_sizes(max_num_seqs), prompt_sizes if chosen.CAN_REPLAY_PROMPTS else ())
    return maker


def tensors_of(value: object) -> list[torch.Tensor]:
    """All tensors in a value of dicts, sequences and dataclasses."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_of(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_of(item)]
    names = [field.name for field in fields(value)] if hasattr(value, "__dataclass_fields__") else []
    return [tensor for name in names for tensor in tensors_of(getattr(value, name))]


@pytest.mark.skipif(find_spec("triton") is None, reason="its kernel is the one whose tiling a graph reads")
def test_a_graph_keeps_alive_all_that_was_recorded(tiny_model, make_driver, options, cuda_calls):
    """CUDA replays addresses: the memory of a tensor that only the recorded function held would be given to others."""
    executor = make_driver(tiny_model("llama"), **options).executor
    chosen = choose_backend("triton", torch.device("cpu"), torch.float32)
    runner = ModelRunner(executor.loaded, executor.gpu_store, executor.runner.swapper, chosen, StepLimits(4, 512, 60))
    maker = CudaGraphMaker(torch.device("cpu"))
    read: list[weakref.ref[torch.Tensor]] = []

    class Watching:
        def capture(self, run):
            graph = maker.capture(run)
            tensors, metadata = run.args
            assert tensors_of(metadata.derived), "the backend derives a tiling"
            read.extend(map(weakref.ref, tensors_of([tensors, metadata, metadata.derived])))
            return graph

    runner.capture_graphs(Watching(), (1, 2, 4))
    assert read
    assert all(reference() is not None for reference in read)


def test_an_executor_that_is_shut_down_frees_its_memory_at_once(tiny_model, make_driver, options, cuda_calls):
    """Graphs and the runner hold each other; the next engine of the process would find the device full."""
    executor = make_driver(tiny_model("llama"), **options).executor
    chosen = choose_backend("cpu", torch.device("cpu"), torch.float32)
    executor.runner = ModelRunner(
        executor.loaded, executor.gpu_store, executor.runner.swapper, chosen, StepLimits(4, 512, 60)
    )
    executor.runner.capture_graphs(CudaGraphMaker(torch.device("cpu")), (1, 2, 4))
    pool = weakref.ref(executor.gpu_store)
    gc.collect()
    gc.disable()
    try:
        executor.shutdown()
        assert pool() is None
    finally:
        gc.enable()


def test_a_broken_device_is_not_taken_for_a_model_that_cannot_be_recorded(cuda_calls, monkeypatch):
    """An illegal address is a RuntimeError, as is whatever a recording refuses; only the device can tell them apart."""

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def run() -> torch.Tensor:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", fail)
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(DeviceFailedError, match=r"illegal memory access.*restart it"):
        StepGraphs().capture(CudaGraphMaker(torch.device("cuda")), (1,), lambda size: run)


def test_sizes_are_powers_of_two_then_steps_of_16_and_the_largest():
    assert bucket_sizes(1) == (1,)
    assert bucket_sizes(6) == (1, 2, 4, 6)
    assert bucket_sizes(64) == (1, 2, 4, 8, 16, 32, 48, 64)
    assert bucket_sizes(50) == (1, 2, 4, 8, 16, 32, 48, 50)
    graphs = StepGraphs()
    assert graphs.size_for(1) is None
    graphs.capture(RecordingMaker(), bucket_sizes(50), lambda size: lambda: torch.zeros(size))
    assert [graphs.size_for(n) for n in (1, 3, 8, 9, 49, 50, 51)] == [1, 4, 8, 16, 50, 50, None]


@pytest.fixture
def options() -> dict:
    return {"num_gpu_blocks": 60, "num_cpu_blocks": 0, "chunk_size": 4, "pack_weights": False}


CASES = [(family, "cpu") for family in ("llama", "qwen3", "mistral", "gemma2", "gpt2", "opt")]
if find_spec("triton") is not None and not torch.cuda.is_available():  # in its interpreter
    CASES += [("llama", "triton"), pytest.param("gemma2", "triton", marks=nightly)]


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_replayed_decodes_equal_eager_ones(family, backend, tiny_model, make_driver, options):
    """Random batches of requests that are at different places in their contexts: logits, and KV down to the last slot."""
    executor = make_driver(tiny_model(family), **options).executor
    eager = executor.runner
    maker = record(executor, 6, backend)
    assert len(maker.graphs) == len(bucket_sizes(6)), "the model does what cannot be recorded"
    recorded = executor.runner
    rng = random.Random(0)
    blocks = list(range(60))
    rng.shuffle(blocks)
    contexts = [[rng.randrange(3, 250) for _ in range(rng.randint(1, 28))] for _ in range(6)]
    greedy = SamplingParams(temperature=0.0, logprobs=3)
    starts = tuple(
        RequestStart(str(i), len(context), len(context), greedy, (), tuple(blocks[i * 10 : i * 10 + 10]))
        for i, context in enumerate(contexts)
    )
    prefills = tuple(QuerySegment(str(i), 0, tuple(context), True) for i, context in enumerate(contexts))
    storage = executor.gpu_store.storage
    storage.fill_(float("nan"))
    lengths = list(map(len, contexts))
    for runner in (eager, recorded):
        runner.execute(StepPlan(1, prefills, starts))
    before = maker.num_replays
    num_steps = 10 if backend == "cpu" else 4  # the interpreter is slow
    for step_id in range(2, 2 + num_steps):
        chosen = rng.sample(range(6), rng.randint(1, 6))
        segments = tuple(QuerySegment(str(i), lengths[i], None, True) for i in chosen)
        for i in chosen:
            lengths[i] += 1
        start = storage.clone()
        results, contents = [], []
        for runner in (eager, recorded):
            storage.copy_(start)
            results.append(runner.execute(StepPlan(step_id, segments)))
            contents.append(storage.clone())
        assert results[0].token_ids == results[1].token_ids
        for one, other in zip(*(result.logprobs for result in results), strict=True):
            assert one.chosen == pytest.approx(other.chosen, abs=1e-4)
        torch.testing.assert_close(*contents, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert maker.num_replays == before + num_steps
    executor.shutdown()


@pytest.mark.skipif(find_spec("triton") is None or torch.cuda.is_available(), reason="in its interpreter")
def test_replayed_steps_of_any_kind_equal_eager_ones(tiny_model, make_driver, options, monkeypatch):
    """Prompts, parts of prompts, decodes and guesses in any mixture: tokens, and KV down to the last slot."""
    monkeypatch.setattr(step_inputs, "MIN_KEPT_ROWS", 8)
    executor = make_driver(tiny_model("llama"), **options).executor
    eager = executor.runner
    maker = record(executor, 5, "triton", (8, 20))
    assert executor.runner.prompt_graphs.sizes == [8, 20]
    recorded = executor.runner
    rng = random.Random(0)
    blocks = list(range(60))
    rng.shuffle(blocks)
    greedy = SamplingParams(temperature=0.0)
    starts = tuple(RequestStart(str(i), 1, 1, greedy, (), tuple(blocks[i * 12 : i * 12 + 12])) for i in range(5))
    storage = executor.gpu_store.storage
    storage.normal_()
    for runner in (eager, recorded):
        runner.execute(StepPlan(0, (), starts))
    lengths = [rng.randint(0, 20) for _ in range(5)]
    steps = [
        [(0, 1), (1, 6)],
        [(2, 20)],
        [(i, 3) for i in range(5)],  # nine rows choose
        [(1, 3), (2, 1)],
        [(4, 1), (3, 2)],
        [(0, 5), (1, 1), (2, 1), (4, 9)],
    ]
    for step_id, step in enumerate(steps, 1):
        segments = []
        for i, num_rows in step:
            tokens = tuple(rng.randrange(3, 250) for _ in range(num_rows))
            num_guesses = 2 if num_rows == 3 and i in (1, 3) else 0
            segments.append(QuerySegment(str(i), lengths[i], tokens, num_rows != 2, num_guesses=num_guesses))
            lengths[i] += num_rows
        start, results, contents = storage.clone(), [], []
        before = maker.num_replays
        for runner in (eager, recorded):
            storage.copy_(start)
            results.append(runner.execute(StepPlan(step_id, tuple(segments))))
            contents.append(storage.clone())
        assert results[0].token_ids == results[1].token_ids
        torch.testing.assert_close(*contents, atol=1e-4, rtol=1e-4)
        assert maker.num_replays == before + (sum(segment.num_chosen for segment in segments) <= 8)
    executor.shutdown()


def test_conversations_over_two_small_tiers_are_the_same_with_recorded_decodes(tiny_model, make_driver):
    """Prefills, decodes, swaps, suspensions and shared prefixes in any mixture; steps that swap in are not replayed."""
    tokens, scores = {}, {}
    for is_recorded in (False, True):
        driver = make_driver(
            tiny_model("llama"),
            num_gpu_blocks=24,
            num_cpu_blocks=40,
            chunk_size=4,
            max_num_seqs=5,
            max_num_batched_tokens=40,
            max_model_len=64,
            pack_weights=False,
        )
        maker = record(driver.executor, 5) if is_recorded else None
        rng = random.Random(1)
        contexts = {f"c{i}": [rng.randrange(3, 250) for _ in range(9)] for i in range(7)}
        for turn in range(3):
            for number, (name, context) in enumerate(contexts.items()):
                sampling = SamplingParams(
                    temperature=0.0 if number % 2 else 1.0,
                    top_p=0.8,
                    seed=3,
                    max_tokens=5,
                    prompt_logprobs=None if number else 2,
                )
                driver.add(f"{name}.{turn}", list(context), conversation_id=name, sampling=sampling)
            driver.run()
            for name, context in contexts.items():
                context += [*driver.tokens(f"{name}.{turn}"), 7, 8]
        driver.core.check_integrity()
        tokens[is_recorded] = contexts
        scores[is_recorded] = [
            score.chosen for turn in range(3) for score in driver.outputs[f"c0.{turn}"][0].prompt_logprobs
        ]
        if maker is not None:
            num_steps = len(driver.plans)
            num_swapping = sum(bool(plan.swap_ins) for plan in driver.plans)
            assert num_swapping > 0
            assert 0 < maker.num_replays < num_steps - num_swapping
        driver.executor.shutdown()
    assert tokens[False] == tokens[True]
    assert len(scores[True]) == 8 + 15 + 22
    assert scores[False] == pytest.approx(scores[True], abs=1e-3)


def test_a_model_that_cannot_be_recorded_runs_eagerly_and_the_log_says_so(tiny_model, make_driver, options, caplog):
    """It asks the device for a number."""
    driver = make_driver(tiny_model("llama"), **options)
    expected = driver.generate("a", [5, 6, 7])
    other = make_driver(tiny_model("llama"), **options)
    other.executor.loaded.model.register_forward_pre_hook(lambda *_: torch.ones(2).sum().item() and None)
    maker = record(other.executor, 4)
    assert maker.graphs == []
    assert "steps run without CUDA graphs" in caplog.text
    assert "not permitted when stream is capturing" in caplog.text
    assert other.generate("a", [5, 6, 7]) == expected


def test_no_memory_for_graphs_says_what_to_lower():
    class Full:
        def capture(self, run):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    with pytest.raises(ConfigError, match=r"CUDA graphs.*lower gpu_memory_utilization.*enforce_eager"):
        StepGraphs().capture(Full(), [1, 2], lambda size: lambda: torch.zeros(size))

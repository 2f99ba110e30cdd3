"""Compiled decoder layers compute the same logits.

One piece of code serves all layers of a kind and any number of rows. Whatever prevents compiling, the model is served as
it was.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from engine.attention.transformers_door import ShapeProbe
from engine.config import EngineConfig
from engine.executor import compiled_layers, model_loader
from engine.executor.compiled_layers import compile_layers, find_layers
from engine.executor.model_check import probe_logits
from engine.executor.model_loader import load_model
from engine.executor.packed_linear import JoinedLinear, PlainWeight
from engine.executor.warm_up import warm_up
from engine.step_loop import LookAhead

TRACED = "aot_eager"  # torch's front end without its code generator, which takes half a minute a model


@pytest.fixture
def traced(monkeypatch) -> None:
    monkeypatch.setattr(compiled_layers, "COMPILER", TRACED)


def load(folder, **options):
    return load_model(EngineConfig(model=str(folder), dtype="float32", **options))


def layers_of(loaded) -> list[nn.Module]:
    return find_layers(loaded.model, loaded.model.config.get_text_config().num_hidden_layers)


def are_compiled(loaded) -> bool:
    states = {layer._compiled_call_impl is not None for layer in layers_of(loaded)}
    assert len(states) == 1
    return states.pop()


def logits(loaded, num_rows: int) -> torch.Tensor:
    return probe_logits(loaded.model, loaded.model.config.get_text_config(), ShapeProbe(), num_rows)


@pytest.mark.parametrize(
    ("family", "num_kinds"),
    [("llama", 1), ("qwen3", 1), ("mistral", 1), ("gemma2", 2), ("gpt2", 1), ("opt", 1), ("mixtral", 1)],
)
def test_one_piece_of_code_serves_all_layers_of_a_kind_and_any_number_of_rows(family, num_kinds, tiny_model, traced):
    """One row is a case of its own to torch. Nothing is compiled while it serves."""
    plain = load(tiny_model(family), pack_weights=False)
    before = counters["stats"]["unique_graphs"]
    compiled = load(tiny_model(family), compile_layers=True)
    assert are_compiled(compiled)
    num_graphs = counters["stats"]["unique_graphs"] - before
    assert 0 < num_graphs <= 2 * num_kinds
    for num_rows in (1, 2, 7, 16, 33, 100):
        torch.testing.assert_close(logits(compiled, num_rows), logits(plain, num_rows), atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] - before == num_graphs


@pytest.mark.slow
def test_torchs_own_code_computes_the_same(tiny_model):
    plain, compiled = load(tiny_model("llama"), pack_weights=False), load(tiny_model("llama"), compile_layers=True)
    assert are_compiled(compiled)
    for num_rows in (1, 5, 64):
        torch.testing.assert_close(logits(compiled, num_rows), logits(plain, num_rows), atol=1e-4, rtol=1e-4)


def test_joined_layers_are_compiled_too(tiny_model, traced, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(model_loader, "choose_packing", lambda dtype, device: PlainWeight)
    monkeypatch.setattr(model_loader, "replace_norms", lambda model, dtype: [])  # a CPU's
    joined = load(tiny_model("llama"))
    assert any(isinstance(module, JoinedLinear) for module in joined.model.modules())
    expected = {num_rows: logits(joined, num_rows) for num_rows in (1, 2, 30)}
    assert compile_layers("a model", layers_of(joined), lambda num_rows: logits(joined, num_rows), 1e-3, None)
    num_graphs = counters["stats"]["unique_graphs"]
    for num_rows, values in expected.items():
        torch.testing.assert_close(logits(joined, num_rows), values, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == num_graphs


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_conversations_over_two_tiny_tiers_equal_stateless_ones(family, tiny_model, make_driver, traced):
    """With steps that run ahead, as on a GPU."""
    options = {"chunk_size": 8, "max_model_len": 120, "max_num_seqs": 4}
    kept = make_driver(tiny_model(family), num_gpu_blocks=20, num_cpu_blocks=24, compile_layers=True, **options)
    fresh = make_driver(tiny_model(family), num_gpu_blocks=64, mode="stateless", **options)
    assert are_compiled(kept.executor.loaded)
    kept.loop.look_ahead = LookAhead.LAUNCH
    histories = {name: [10 + i, 50, 60, *range(70, 80 + i)] for i, name in enumerate("abcdef")}
    for turn in range(4):
        for name, history in histories.items():
            kept.add(f"{name}{turn}", history, name)
        kept.run()
        kept.core.check_integrity()
        for name in histories:
            fresh.generate(f"{name}{turn}", histories[name])
            assert kept.tokens(f"{name}{turn}") == fresh.tokens(f"{name}{turn}")
            histories[name] = [*histories[name], *kept.tokens(f"{name}{turn}"), 90 + turn, 91]
    statistics = kept.core.get_statistics()
    assert min(statistics["num_swap_ins"], statistics["num_gpu_cached_tokens"], statistics["num_steps_ahead"]) > 0


def test_what_is_not_compiled_yet_is_computed_without_a_compiler_while_it_serves(
    tiny_model, make_driver, traced, caplog
):
    """Another number of threads is enough for torch to compile anew. That it is slower shows in the log, once."""
    driver = make_driver(tiny_model("llama"), num_gpu_blocks=8, chunk_size=8, compile_layers=True)
    driver.loop.look_ahead = LookAhead.NOTHING  # the steps run in this thread
    runner = driver.executor.runner
    expected = driver.generate("a", [5, 6, 7])
    assert runner.num_forwards > 0
    assert runner.num_eager_forwards == 0
    num_compiled = runner.num_forwards
    num_graphs = counters["stats"]["unique_graphs"]
    torch.set_num_threads(2)
    try:
        assert driver.generate("b", [5, 6, 7]) == expected
        assert counters["stats"]["unique_graphs"] == num_graphs
        assert runner.num_eager_forwards == runner.num_forwards - num_compiled > 1
        (warning,) = [message for message in caplog.messages if "without compiled code" in message]
        assert warning.startswith("a forward of 3 rows ran 3 of its 3 layers without compiled code, and slower")
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_log_says_how_many_of_the_first_steps_ran_compiled(num_threads, tiny_model, make_driver, traced, caplog):
    caplog.set_level("INFO", "engine")
    executor = make_driver(tiny_model("llama"), num_gpu_blocks=8, chunk_size=8, compile_layers=True).executor
    torch.set_num_threads(num_threads)
    try:
        warm_up(EngineConfig(), executor.loaded, executor.gpu_store, executor.runner)
    finally:
        torch.set_num_threads(1)
    (record,) = [record for record in caplog.records if "before the first request" in record.message]
    assert (record.message, record.levelname) == (
        ("compiled layers: 3 of 3 forwards before the first request", "INFO")
        if num_threads == 1
        else ("compiled layers: 0 of 3 forwards before the first request", "WARNING")
    )


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x)) + x


class Stack(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module] = Layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.small = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.layers = nn.ModuleList(layer() for _ in range(3))

    @torch.inference_mode()
    def forward(self, num_rows: int) -> torch.Tensor:
        x = torch.linspace(-1, 1, 8 * num_rows).view(num_rows, 8)
        for layer in self.layers:
            x = layer(x)
        return x


class AsksForANumber(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum().item() > 0 else x


class AsksForItsRows(Layer):
    """A layer of which one piece of code does not serve all numbers of rows.

    Torch would compile another one, or, while serving, run it as it is written.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (1 if len(x) == 16 else 2)


def wrong(module: torch.fx.GraphModule, _: object) -> Callable:
    return lambda *args: [2 * out for out in module(*args)]


def assert_refused(stack: Stack, why: str, caplog, seconds_of=None) -> None:
    layers, before = find_layers(stack, 3), stack(5)
    assert layers == list(stack.layers)
    assert not compile_layers("a model", layers, stack, 1e-3, seconds_of)
    assert "a model: served without compiled layers: " in caplog.text
    assert why in caplog.text
    assert torch.equal(stack(5), before)
    assert all(layer._compiled_call_impl is None for layer in layers)


def test_what_cannot_be_compiled_whole_is_not_compiled(caplog, traced):
    assert_refused(Stack(AsksForANumber), "data-dependent", caplog)


def test_code_that_does_not_serve_all_steps_is_not_taken_for_compiled(caplog, traced):
    assert_refused(Stack(AsksForItsRows), "Detected recompile", caplog)


def test_torch_says_nothing_of_whole_layers_that_it_runs_as_they_are_written(traced):
    """Some versions warn (here an error) or raise after such a call, so that every step would fail: pytorch#181817."""
    layer = Layer()
    x, others = torch.ones(3, 8), torch.ones(4, 8)
    expected = layer(others)
    layer.compile(dynamic=False, fullgraph=True, backend=TRACED)
    layer(x)
    num_graphs = counters["stats"]["unique_graphs"]
    with compiled_layers.never_compiling():
        torch.testing.assert_close(layer(others), expected)
    assert counters["stats"]["unique_graphs"] == num_graphs


def test_a_compiler_that_fails_costs_nothing_but_the_gain(caplog, monkeypatch):
    def fails(*_: object) -> Callable:
        raise OSError("no C compiler here")

    monkeypatch.setattr(compiled_layers, "COMPILER", fails)
    assert_refused(Stack(), "no C compiler here", caplog)


def test_code_that_computes_something_else_is_not_used(caplog, monkeypatch):
    monkeypatch.setattr(compiled_layers, "COMPILER", wrong)
    assert_refused(Stack(), "its logits differ then by", caplog)


def test_a_model_without_a_list_of_layers_is_served_as_it_is(caplog):
    assert find_layers(Stack(), 4) == []
    assert not compile_layers("a model", [], Stack(), 1e-3, None)
    assert "its decoder layers were not found" in caplog.text


@pytest.mark.parametrize("compiled_s", [0.5, 1.0, 1.5])
def test_it_is_kept_where_it_pays(compiled_s, caplog, traced):
    caplog.set_level("INFO")
    seconds = iter([1.0, compiled_s])

    def seconds_of(call: Callable[[], torch.Tensor]) -> float:
        assert len(call()) == 1
        return next(seconds)

    if compiled_s >= 1.0:
        assert_refused(Stack(), "and 1000.00 ms without", caplog, seconds_of)
        return
    stack = Stack()
    assert compile_layers("a model", find_layers(stack, 3), stack, 1e-3, seconds_of)
    assert "a decode step takes 0.50 of the time" in caplog.text


def test_where_it_is_compiled_unless_it_is_told(monkeypatch):
    def wants(device: str, **options) -> bool:
        return model_loader._wants_compiled_layers(EngineConfig(**options), torch.device(device))

    assert wants("cuda")
    assert not wants("cpu")
    assert wants("cpu", compile_layers=True)
    assert not wants("cuda", compile_layers=False)
    assert not wants("cuda", enforce_eager=True)
    assert not wants("cuda", tensor_parallel_size=2)

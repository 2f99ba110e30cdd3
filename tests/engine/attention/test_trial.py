"""What `auto` takes on a GPU: the fastest of the backends that load and are right, by injected times.

The trials are tiny here, and run on a CPU.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine.attention import choice, device_clock, reference, self_check
from engine.attention import trial as trials
from engine.attention.choice import choose_backend
from engine.attention.protocol import AttentionCall, AttentionMetadata, AttentionParams, LayerShape
from engine.attention.registry import BackendRow
from engine.errors import ConfigError, DeviceFailedError, KernelBuildError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYERS = (LayerShape(2, 16, 16), LayerShape(1, 8, 12), LayerShape(2, 16, 16))
NUM_HEADS, CHUNK_SIZE = 4, 4
CALLS = tuple(
    AttentionCall(layer, NUM_HEADS, AttentionParams(0.25, sliding_window=window, softcap=softcap))
    for layer, window, softcap in zip(LAYERS, (None, 4, None), (None, None, 0.5), strict=True)
)


class Backend:
    """The reference, which notes its calls and takes so many seconds for each batch."""

    CAN_REPLAY_DECODES = True

    def __init__(self, *seconds: float) -> None:
        self.seconds = iter(seconds)
        self.calls: list[AttentionMetadata] = []

    def attend(self, query, k_pool, v_pool, metadata, params):
        self.calls.append(metadata)
        return reference.attend(query, k_pool, v_pool, metadata, params)


class Wrong(Backend):
    """Off by more than rounding, in one row of one head; or NaN."""

    def __init__(self, error: float) -> None:
        super().__init__(0.1, 0.1, 0.1)
        self._error = error

    def attend(self, *args):
        out = super().attend(*args)
        out[-1, -1] *= 1 + self._error
        return out


class Failing(Backend):
    def attend(self, *_):
        raise RuntimeError("no kernel image is available")


def seconds_of(call) -> float:
    """By the backend whose step it is."""
    call()
    return next(call.args[0].seconds)


@pytest.fixture(autouse=True)
def tiny_batches(monkeypatch):
    monkeypatch.setattr(trials, "BATCHES", (((9, 9),), ((3, 18),), (*((1, 7),) * 3, (5, 5))))


def make_trials():
    return trials.make_trials(CPU, torch.float32, CALLS, CHUNK_SIZE)


def fastest(candidates) -> str:
    return trials.choose_fastest(candidates, make_trials(), seconds_of, tolerance=1e-4)


def test_the_smallest_mean_of_the_times_in_relation_to_the_first_is_chosen(caplog):
    """One that is faster in the longest batch alone is slower in the mean."""
    caplog.set_level("INFO")
    candidates = {
        "triton": Backend(1.0, 1.0, 10.0),
        "flashinfer": Backend(1.0, 0.5, 16.0),
        "other": Backend(2.0, 2.0, 5.0),
    }
    assert fastest(candidates) == "flashinfer"
    assert caplog.messages == [
        "attention: auto measured triton 1.00, flashinfer 0.93, other 1.26 (relative time); flashinfer is used"
    ]


def test_the_first_stays_where_none_is_faster():
    assert fastest({"triton": Backend(1.0, 1.0, 1.0), "other": Backend(1.0, 1.0, 1.0)}) == "triton"


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (Failing(), "it failed in its trial: RuntimeError('no kernel image is available')"),
        (Wrong(1e-3), "its output differs from triton's by 0.001, more than rounding (0.0001)"),
        (Wrong(float("nan")), "its output differs from triton's by nan"),
    ],
)
def test_what_fails_or_differs_is_left_out_with_a_warning(broken, reason, caplog):
    caplog.set_level("INFO")
    candidates = {"triton": Backend(3.0, 3.0, 3.0), "flashinfer": broken, "other": Backend(1.5, 1.5, 1.5)}
    assert fastest(candidates) == "other"
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(f"attention: auto leaves out flashinfer: {reason}")
    assert caplog.messages[-1] == "attention: auto measured triton 1.00, other 0.50 (relative time); other is used"


def test_what_fails_in_a_later_batch_is_left_out_too():
    candidates = {"triton": Backend(1.0, 1.0, 1.0), "flashinfer": Backend(0.1, 0.1)}  # no third time: StopIteration
    assert fastest(candidates) == "triton"


def test_the_trial_has_the_windows_and_softcaps_of_the_model():
    """A backend may have other kernels for them; one that is wrong in one kind of call is left out."""

    class WrongInWindows(Backend):
        def attend(self, query, k_pool, v_pool, metadata, params):
            return super().attend(query, k_pool, v_pool, metadata, replace(params, sliding_window=None))

    class WrongInSoftcaps(Backend):
        def attend(self, query, k_pool, v_pool, metadata, params):
            return super().attend(query, k_pool, v_pool, metadata, replace(params, softcap=None))

    for wrong in (WrongInWindows, WrongInSoftcaps):
        assert fastest({"triton": Backend(1.0, 1.0, 1.0), "flashinfer": wrong(0.1, 0.1, 0.1)}) == "triton"


def test_a_rounding_error_is_none():
    assert fastest({"triton": Backend(1.0, 1.0, 1.0), "flashinfer": Wrong(1e-5)}) == "flashinfer"


def test_each_step_has_all_layers_and_is_planned_anew():
    timed = Backend()
    (trial, *_) = make_trials()
    for _ in range(2):
        trial.run(timed)
    # By the metadata, where backends keep their plans.
    first, second = timed.calls[:3], timed.calls[3:]
    assert len(second) == len(LAYERS)
    for calls in (first, second):
        assert all(metadata is calls[0] for metadata in calls)
    assert first[0].derived is not second[0].derived


# -- the trials --------------------------------------------------------------------------------------------------------


def test_trials_are_ragged_batches_in_the_shapes_of_the_layers():
    for trial, lengths in zip(make_trials(), trials.BATCHES, strict=True):
        segments = trial.metadata.host_segments
        assert [tuple(each) for each in segments[:, 1:3]] == list(lengths)
        assert segments[:, 0].tolist() == (segments[:, 1].cumsum() - segments[:, 1]).tolist()
        assert torch.equal(trial.metadata.segments, torch.from_numpy(segments))
        assert trial.calls == CALLS
        for layer in LAYERS:
            inputs = trial.inputs[layer, NUM_HEADS]
            assert inputs.query.shape == (NUM_HEADS, segments[:, 1].sum(), layer.k_dim)
            assert inputs.k_pool.shape[1:] == (layer.num_kv_heads, CHUNK_SIZE, layer.k_dim)
            assert inputs.v_pool.shape[1:] == (layer.num_kv_heads, CHUNK_SIZE, layer.v_dim)


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 32])
def test_what_the_contexts_do_not_fill_holds_nan_and_nothing_else_does(chunk_size):
    for trial in trials.make_trials(CPU, torch.float32, CALLS[:1], chunk_size):
        (inputs,) = trial.inputs.values()
        filled = torch.zeros(len(inputs.k_pool), chunk_size, dtype=torch.bool)
        for _, _, context_len, row in trial.metadata.segments.tolist():
            for position in range(context_len):
                filled[trial.metadata.block_tables[row, position // chunk_size], position % chunk_size] = True
        last = filled[-len(trial.metadata.segments) :]  # those before are whole, and shared by chance
        for pool in (inputs.k_pool, inputs.v_pool):
            holds_nan = pool.isnan().any(dim=3).any(dim=1)
            assert torch.equal(holds_nan, pool.isnan().all(dim=3).all(dim=1))
            assert torch.equal(holds_nan[-len(last) :], ~last)
            assert not holds_nan[: -len(last)].any()


def test_long_contexts_share_blocks(monkeypatch):
    monkeypatch.setattr(trials, "BATCHES", (((1, 4000),) * 3,))
    monkeypatch.setattr(trials, "POOL_BYTES", 100 * 2 * 2 * 16 * CHUNK_SIZE * 4)
    (trial,) = trials.make_trials(CPU, torch.float32, CALLS[:1], CHUNK_SIZE)
    assert len(trial.inputs[LAYERS[0], NUM_HEADS].k_pool) == 100 + 3
    assert trial.metadata.block_tables.shape == (3, 1000)
    assert trial.metadata.block_tables.max() == 102


# -- the option ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def load(monkeypatch):
    """Say what each name loads: a backend, or an error that it raises."""
    monkeypatch.setattr(trials, "make_trials", lambda _, *shapes, make=trials.make_trials: make(CPU, *shapes))
    monkeypatch.setattr(choice, "find_fault", lambda *_: None)  # see test_cpu.py

    def let(**loaded: Backend | Exception) -> None:
        def load(row, place):
            if isinstance(loaded[row.name], Exception):
                raise loaded[row.name]
            return choice._Loaded(row, loaded[row.name], f"kernel of {row.name}")

        monkeypatch.setattr(choice, "BACKENDS", tuple(BackendRow(name, "", ("cuda",)) for name in loaded))
        monkeypatch.setattr(choice, "_load", load)

    return let


def auto():
    return choose_backend("auto", CUDA, torch.float32, CALLS, CHUNK_SIZE, seconds_of)


def test_auto_takes_the_fastest_on_a_gpu(load, caplog):
    caplog.set_level("INFO")
    fast = Backend(0.5, 0.5, 0.5)
    load(triton=Backend(1.0, 1.0, 1.0), flashinfer=fast, other=Backend(2.0, 2.0, 2.0))
    assert auto() is fast
    assert caplog.messages == [
        "attention: auto measured triton 1.00, flashinfer 0.50, other 2.00 (relative time); flashinfer is used",
        "attention: kernel of flashinfer",
    ]


def test_one_that_is_wrong_on_this_gpu_is_not_used(load, monkeypatch, caplog):
    seen = []

    def find_fault(chosen, device, *shapes):
        seen.append((chosen, device, *shapes))
        return "its output differs"

    triton = Backend(1.0, 1.0, 1.0)
    load(triton=triton, flashinfer=KernelBuildError("not installed"), other=KernelBuildError("pages of 256"))
    monkeypatch.setattr(choice, "find_fault", find_fault)
    assert auto() is reference
    assert seen == [(triton, CUDA, torch.float32, CALLS, CHUNK_SIZE)]
    assert "kernel of triton, is wrong here for this model in torch.float32: its output differs" in caplog.text
    with pytest.raises(ConfigError, match="its output differs"):
        choose_backend("triton", CUDA, torch.float32, CALLS, CHUNK_SIZE)


def test_a_broken_device_is_not_taken_for_a_backend_that_is_wrong(monkeypatch):
    """Another backend would find it as broken."""

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(DeviceFailedError, match="illegal memory access"):
        self_check.find_fault(Failing(), CUDA, torch.float32, CALLS, CHUNK_SIZE)


def test_auto_does_without_what_does_not_load(load, caplog):
    caplog.set_level("INFO")
    triton = Backend(1.0, 1.0, 1.0)
    load(triton=triton, flashinfer=RuntimeError("driver"), other=Backend(2.0, 2.0, 2.0))
    assert auto() is triton
    assert caplog.messages == [
        "attention: auto does without flashinfer: RuntimeError('driver')",
        "attention: auto measured triton 1.00, other 2.00 (relative time); triton is used",
        "attention: kernel of triton",
    ]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "INFO"]


def test_auto_measures_nothing_where_triton_is_the_only_one(load, caplog):
    caplog.set_level("INFO")
    triton = Backend()  # has no time to tell
    load(triton=triton, flashinfer=KernelBuildError("not installed"), other=KernelBuildError("pages of 256"))
    assert auto() is triton
    assert caplog.messages == [
        "attention: auto does without flashinfer: not installed",
        "attention: auto does without other: pages of 256",
        "attention: auto had nothing to measure: triton is the only one for this model here",
        "attention: kernel of triton",
    ]
    assert {record.levelname for record in caplog.records} == {"INFO"}


@pytest.mark.parametrize("trial", ["fails", "does not fit"])
def test_a_trial_that_cannot_be_held_leaves_triton(load, trial, monkeypatch, caplog):
    triton = Failing() if trial == "fails" else Backend()
    load(triton=triton, flashinfer=Backend(0.5, 0.5, 0.5), other=KernelBuildError("pages of 256"))
    if trial == "does not fit":

        def run_out(*_):
            raise torch.OutOfMemoryError("of memory")

        monkeypatch.setattr(trials, "_make_trial", run_out)
    assert auto() is triton
    assert "attention: auto could not measure, and takes triton: " in caplog.text


def test_a_backend_asked_for_by_name_is_not_measured(load):
    named = Backend()
    load(triton=Failing(), flashinfer=named)
    assert choose_backend("flashinfer", CUDA, torch.float32, CALLS, CHUNK_SIZE, seconds_of) is named


def test_the_clock_takes_the_median_after_a_call_that_does_not_count(monkeypatch):
    durations = iter([100.0, 3.0, 1.0, 9.0, 2.0, 4.0])
    now = [0.0]

    def wait(device):
        now[0] += next(durations)

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(device_clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert device_clock.seconds_on(CUDA)(lambda: None) == 3.0

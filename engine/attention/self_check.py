"""Checks that a backend computes, on this machine and in a model's shapes, what reference.py computes.

A processor or a driver may behave like none on which the backend was tested. Knows no backend by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from engine.attention import reference
from engine.attention.device_health import check_device
from engine.attention.protocol import AttentionBackend, AttentionCall, AttentionMetadata
from engine.attention.trial import LayerInputs, Trial, make_trials

# (query_len, context_len) of a batch's segments: prompts, prompts behind a context and decodes, of few rows and of many, side
# by side; one long context alone, which a backend may share out; and prompts alone, which it may cut into larger tiles.
BATCHES = (((70, 130), (1, 300), (5, 90), (2, 64), (1, 33), (33, 33)), ((1, 1100),), ((150, 400), (128, 128)))
# A window that some of these contexts exceed stands for a larger one.
MAX_WINDOW = 80
# Of the output of a row and head, what error is still rounding, in relation to its length. What is wrong is as long itself.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# Standard deviation of the scores, whatever the model's scaling: neither all keys alike nor one of them alone.
SCORE_STD = 1.5
NUM_WRITTEN_BLOCKS = 3


@torch.inference_mode()
def find_fault(
    backend: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    calls: Sequence[AttentionCall],
    chunk_size: int,
) -> str | None:
    """Say what the backend computes differently from reference.py in float32; None if nothing.

    calls: of the model; of calls that are alike one is tried, of none nothing.
    chunk_size: of the pools, in tokens.
    Raises DeviceFailedError if the device is broken: the next backend would find it broken, too.
    """
    tried = tuple(_at_test_size(call) for call in {(c.kind, c.params.sinks is None): c for c in calls}.values())
    if not tried:
        return None
    try:
        for call in tried:
            if not _writes_right(backend, device, dtype, call, chunk_size):
                return "K and V do not arrive in their slots"
        for trial in make_trials(device, dtype, tried, chunk_size, BATCHES):
            for call in tried:
                error = _largest_error(backend, trial, call)
                if not error <= TOLERANCE[dtype]:
                    most = TOLERANCE[dtype]
                    return f"its output differs from torch's operations' by {error:.2g}, more than rounding ({most})"
    except Exception as exception:  # whatever a kernel and its driver raise
        check_device(device)
        return f"it failed: {exception!r}"
    return None


def _at_test_size(call: AttentionCall) -> AttentionCall:
    window = call.params.sliding_window
    if window is None:
        return call
    return replace(call, params=replace(call.params, sliding_window=min(window, MAX_WINDOW)))


def _writes_right(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, call: AttentionCall, chunk_size: int
) -> bool:
    """To every slot of a few blocks but one, in random order."""
    shape, num_slots = call.shape, NUM_WRITTEN_BLOCKS * chunk_size
    generator = torch.Generator(device).manual_seed(0)
    slots = torch.randperm(num_slots, generator=generator, device=device)[: max(1, num_slots - 1)]
    nothing = torch.zeros(0, 4, dtype=torch.int32, device=device)
    metadata = AttentionMetadata(slots, nothing, nothing, chunk_size, host_segments=nothing.cpu().numpy())
    dims = (shape.k_dim, shape.v_dim)
    key, value = (
        torch.randn(len(slots), shape.num_kv_heads, dim, generator=generator, device=device, dtype=dtype).transpose(
            0, 1
        )
        for dim in dims
    )
    pools = [
        [
            torch.zeros(NUM_WRITTEN_BLOCKS, shape.num_kv_heads, chunk_size, dim, device=device, dtype=dtype)
            for dim in dims
        ]
        for _ in range(2)
    ]
    for writer, (k_pool, v_pool) in zip((backend, reference), pools, strict=True):
        writer.write_kv(k_pool, v_pool, key, value, replace(metadata, derived={}))
    return all(torch.equal(actual, expected) for actual, expected in zip(*pools, strict=True))


def _largest_error(backend: AttentionBackend, trial: Trial, call: AttentionCall) -> float:
    """See TOLERANCE; NaN if the output holds NaN."""
    inputs = trial.inputs[call.shape, call.num_heads]
    std = SCORE_STD / (call.params.scaling * call.shape.k_dim**0.5)
    inputs = LayerInputs(inputs.query * std, inputs.k_pool, inputs.v_pool)
    actual, expected = (
        each.attend(given.query, given.k_pool, given.v_pool, replace(trial.metadata, derived={}), call.params).float()
        for each, given in (
            (backend, inputs),
            (reference, LayerInputs(inputs.query.float(), inputs.k_pool.float(), inputs.v_pool.float())),
        )
    )
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max())

"""The decoder layers of a model, compiled by torch.compile.

On a GPU the many small operations between the matrix multiplications become a few kernels. Layers of one kind share their
code, which serves any number of rows; attention in it is a call (see engine/attention/transformers_door.py). Knows no model
family: what cannot be compiled whole stays as it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from engine.attention.device_clock import SecondsOf, seconds_on
from engine.attention.device_health import check_device
from engine.executor.step_graphs import CudaGraphMaker

logger = logging.getLogger(__name__)

COMPILER = "inductor"
# Rows of the forwards that are looked at: torch compiles one row by itself, and any other number once.
NUMS_OF_ROWS = (1, 24)
# Rows of forwards that have to run by the code that was compiled for those; no more, for the window may be small.
SERVED_NUMS_OF_ROWS = (1, 2, 16, 23)
# How many versions of its code torch keeps of a function. All layers of all models are one function to it, and where it may
# keep no more, it raises instead of compiling. Counted for each thread.
MAX_VERSIONS = 64
# Of what torch says when it fails, which fills pages.
MAX_REASON_CHARS = 200


def find_layers(model: nn.Module, num_layers: int) -> list[nn.Module]:
    """The decoder layers: of the module lists as long as the model is deep, the one with most parameters.

    Empty if there is none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers]
    return list(max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=()))


def logits_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference in a row of logits, relative to the largest logit of all; the median over the rows.

    actual, expected: [..., vocabulary].

    Single rows may differ by any amount and say nothing: a router on a tie, an id that the model was never trained on.
    Rows that are not finite in `expected` do not count; NaN if there is no other one, or if `actual` holds NaN.
    """
    rows, others = expected.float().flatten(0, -2), actual.float().flatten(0, -2)
    is_finite = rows.isfinite().all(dim=-1)
    rows, others = rows[is_finite], others[is_finite]
    if not len(rows):
        return float("nan")
    largest = rows.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float(((others - rows).abs().amax(dim=-1) / largest).median())


def compile_layers(
    name: str,
    layers: Sequence[nn.Module],
    forward: Callable[[int], torch.Tensor],
    tolerance: float,
    seconds_of: SecondsOf | None,
) -> bool:
    """Compile layers in place, unless the model then computes something else or gets no faster.

    Takes half a minute, the first time. Layers that are not kept compiled are left as they were.

    name: of the model, for the log.
    forward: number of rows -> logits of the whole model.
    tolerance: of `logits_difference`.
    seconds_of: times a forward of one row; None = keep the compiled layers whether or not they are faster.

    Returns whether the layers are compiled, and their code is what runs. Raises only what `forward` raises before.
    """
    import torch._dynamo  # not above: it takes a second

    expected = [forward(num_rows) for num_rows in NUMS_OF_ROWS]

    def decode() -> torch.Tensor:
        return forward(1)

    eager_s = 0.0 if seconds_of is None else seconds_of(decode)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VERSIONS)
    start_s = time.perf_counter()
    reason = ""
    try:
        for layer in layers:
            layer.compile(dynamic=True, fullgraph=True, backend=COMPILER)
        for num_rows, logits in zip(NUMS_OF_ROWS, expected, strict=True):
            error = logits_difference(forward(num_rows), logits)
            if not error <= tolerance:
                reason = f"its logits differ then by {error:.1e}"
        if not layers:
            reason = "its decoder layers were not found"
        with torch.compiler.set_stance("fail_on_recompile"):
            for num_rows in SERVED_NUMS_OF_ROWS:
                forward(num_rows)
        compiled_s = 0.0 if seconds_of is None else seconds_of(decode)
        if not reason and seconds_of is not None and not compiled_s < eager_s:
            reason = f"a decode step takes {compiled_s * 1e3:.2f} ms then, and {eager_s * 1e3:.2f} ms without"
    except Exception as failure:  # whatever the compilers and the model's code raise
        check_device(expected[0].device)
        reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:MAX_REASON_CHARS]}"
    if reason:
        for layer in layers:
            layer._compiled_call_impl = None  # undoes `compile`
        logger.warning("%s: served without compiled layers: %s", name, reason)
        return False
    gain = "" if seconds_of is None else f"; a decode step takes {compiled_s / eager_s:.2f} of the time"
    logger.info("%s: %d layers compiled in %.0f s%s", name, len(layers), time.perf_counter() - start_s, gain)
    return True


def never_compiling() -> AbstractContextManager[object]:
    """Run as written what the compiled code is not made for, so that no request waits for a compiler."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("eager_on_recompile")
    return stance


def recorded_seconds(device: torch.device) -> SecondsOf:
    """Time what a CUDA device does; the time to launch it counts only if it cannot be recorded."""

    def seconds_of(call: Callable[[], torch.Tensor]) -> float:
        try:
            return seconds_on(device)(CudaGraphMaker(device).capture(call).replay)
        except RuntimeError:
            check_device(device)
            return seconds_on(device)(call)

    return seconds_of

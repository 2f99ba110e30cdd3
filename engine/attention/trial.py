"""Measures which of several backends is the fastest for a model, on the device that it will run on.

Each computes a few ragged batches in the model's shapes, which must equal what the first backend computes, and is
timed on these. Knows no backend by name.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from engine.attention.device_clock import SecondsOf
from engine.attention.device_health import check_device
from engine.attention.protocol import AttentionBackend, AttentionCall, AttentionMetadata, LayerShape

logger = logging.getLogger(__name__)

# (query_len, context_len) of each batch's segments: a prompt, new tokens at the end of a context, a prompt among decodes.
# Most contexts end within a chunk, and so do these.
BATCHES = (
    ((2045, 2045),),
    ((512, 4093),),
    (*((1, 2045),) * 32, (253, 253)),
)
# K and V of a batch, in all: more than the caches of the device hold, little enough to find room beside the weights. Contexts
# that need more share blocks.
POOL_BYTES = 64 << 20
# Of the output of a row and head, what error is still rounding, in relation to its length.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True, eq=False)
class LayerInputs:
    """query: [num_heads, num_tokens, k_dim]; pools: as AttentionBackend has them."""

    query: torch.Tensor
    k_pool: torch.Tensor
    v_pool: torch.Tensor


@dataclass(frozen=True, slots=True)
class Trial:
    """The attention of a step: its calls in order, and their inputs, the same for all of one shape."""

    metadata: AttentionMetadata
    calls: tuple[AttentionCall, ...]
    inputs: Mapping[tuple[LayerShape, int], LayerInputs]

    def run(self, backend: AttentionBackend) -> None:
        """All layers, and what the backend does on the host for a step."""
        for _ in self._outputs(backend, self.calls):
            pass

    def largest_error(self, backend: AttentionBackend, other: AttentionBackend) -> float:
        """Between the two in a call of each kind, see TOLERANCE; NaN where an output holds NaN."""
        calls = tuple({call.kind: call for call in self.calls}.values())
        errors = [
            (_lengths(actual - expected) / _lengths(expected)).max()
            for actual, expected in zip(self._outputs(backend, calls), self._outputs(other, calls), strict=True)
        ]
        return float(torch.stack(errors).max())

    def _outputs(self, backend: AttentionBackend, calls: tuple[AttentionCall, ...]) -> Iterator[torch.Tensor]:
        metadata = replace(self.metadata, derived={})  # nothing is left from the step before
        for call in calls:
            inputs = self.inputs[call.shape, call.num_heads]
            yield backend.attend(inputs.query, inputs.k_pool, inputs.v_pool, metadata, call.params)


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    return rows.norm(dim=-1, dtype=torch.float32)


@torch.inference_mode()
def choose_fastest(
    candidates: Mapping[str, AttentionBackend], trials: Iterable[Trial], seconds_of: SecondsOf, tolerance: float
) -> str:
    """Return the name of the candidate with the smallest geometric mean of times relative to the first.

    Candidates that raise, or differ from the first, are left out. Logs what was measured. Raises what the first one raises.
    """
    first, *others = candidates
    ratios: dict[str, list[float]] = {name: [] for name in others}
    for trial in trials:
        first_s = seconds_of(partial(trial.run, candidates[first]))
        for name in list(ratios):
            try:
                error = trial.largest_error(candidates[name], candidates[first])
                if error <= tolerance:
                    ratios[name].append(seconds_of(partial(trial.run, candidates[name])) / first_s)
                    continue
                reason = f"its output differs from {first}'s by {error:.2g}, more than rounding ({tolerance})"
            except Exception as exception:
                check_device(trial.metadata.segments.device)
                reason = f"it failed in its trial: {exception!r}"
            logger.warning("attention: auto leaves out %s: %s", name, reason)
            del ratios[name]
        del trial  # its memory serves the next one
    means = {first: 1.0} | {name: statistics.geometric_mean(values) for name, values in ratios.items()}
    fastest = min(means, key=lambda name: means[name])
    figures = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
    logger.info("attention: auto measured %s (relative time); %s is used", figures, fastest)
    return fastest


def make_trials(
    device: torch.device,
    dtype: torch.dtype,
    calls: Sequence[AttentionCall],
    chunk_size: int,
    batches: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> Iterator[Trial]:
    """One for each of the batches (None = BATCHES), made when it is asked for."""
    generator = torch.Generator(device).manual_seed(0)
    for lengths in BATCHES if batches is None else batches:
        yield _make_trial(generator, lengths, dtype, calls, chunk_size)


def _make_trial(
    generator: torch.Generator,
    lengths: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    calls: Sequence[AttentionCall],
    chunk_size: int,
) -> Trial:
    """Make a trial: contexts in random blocks, their last, partly filled ones in blocks of their own.

    What is not filled holds NaN: it must not be read.
    """
    device, shapes = generator.device, dict.fromkeys((call.shape, call.num_heads) for call in calls)
    query_lens, context_lens = torch.tensor(lengths).T
    num_blocks = -(-context_lens // chunk_size)
    block_bytes = chunk_size * dtype.itemsize * sum(shape.numel_per_token for shape, _ in shapes)
    num_shared = max(1, min(int(num_blocks.sum()), POOL_BYTES // block_bytes))
    num_segments, numbers = len(lengths), torch.arange(len(lengths))
    tables = torch.randint(
        num_shared, (num_segments, int(num_blocks.max())), generator=generator, device=device, dtype=torch.int32
    )
    last_blocks = num_shared + numbers
    tables[numbers, num_blocks - 1] = last_blocks.to(tables)
    is_unfilled = torch.arange(chunk_size) >= (context_lens - (num_blocks - 1) * chunk_size)[:, None]

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    def make_pool(shape: LayerShape, dim: int) -> torch.Tensor:
        pool = random(num_shared + num_segments, shape.num_kv_heads, chunk_size, dim)
        pool[num_shared:].masked_fill_(is_unfilled[:, None, :, None].to(device), float("nan"))
        return pool

    num_tokens = int(query_lens.sum())
    inputs = {
        (shape, num_heads): LayerInputs(
            # As most models hand it over: a transposed view.
            random(num_tokens, num_heads, shape.k_dim).transpose(0, 1),
            make_pool(shape, shape.k_dim),
            make_pool(shape, shape.v_dim),
        )
        for shape, num_heads in shapes
    }
    first_rows = query_lens.cumsum(0) - query_lens
    segments = torch.stack([first_rows, query_lens, context_lens, numbers], dim=1).int()
    metadata = AttentionMetadata(
        torch.empty(0, dtype=torch.long, device=device),  # nothing is written
        segments.to(device),
        tables,
        chunk_size,
        host_segments=segments.numpy(),
    )
    return Trial(metadata, tuple(calls), inputs)

"""The machine's roofs, and attention below them: against contiguous attention, and Figure 12."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from setting import CHUNK_SIZE, Setting, Shape
from timing import first_call, measure, timed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm

from engine.attention import triton_paged
from engine.attention.choice import choose_backend
from engine.attention.device_health import check_device
from engine.attention.protocol import AttentionBackend, AttentionCall, AttentionMetadata, AttentionParams, LayerShape
from engine.errors import ConfigError

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CPU_KERNELS = {"math": SDPBackend.MATH}
# What is measured beside the Triton kernel where it can serve a model, and the chunks it is given.
OTHER_BACKENDS = {"flashinfer": CHUNK_SIZE}
CPU_OTHER_BACKENDS = {"reference": CHUNK_SIZE}
# Rows at the end of each request that are compared: all of a long prompt would take tens of gigabytes.
CHECKED_ROWS = 256


def measure_roofs(setting: Setting) -> dict[str, Any]:
    """Measure bytes/s of copies and of reading, and the rate of a matrix multiplication.

    Copies on the device (read and written), and from and to pinned memory, alone and both at once. Reading is that of
    reductions: a decode step writes next to nothing, and kernels read faster than the device copies.
    """
    device, dtype, n = setting.device, setting.dtype, setting.matrix_size
    numbers = torch.randn(setting.read_bytes // dtype.itemsize, device=device, dtype=dtype)
    reading = measure({"sum": numbers.sum, "max": numbers.amax}, device, setting.repeats)
    del numbers
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(setting.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    is_cuda = device.type == "cuda"
    hosts = [torch.zeros(setting.copy_bytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)]
    seconds = measure({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, device, setting.repeats)

    def both_ways() -> None:
        if not is_cuda:
            source.copy_(hosts[0])
            hosts[1].copy_(target)
            return
        current = torch.cuda.current_stream()
        streams = [torch.cuda.Stream() for _ in range(2)]
        for stream in streams:
            stream.wait_stream(current)
        with torch.cuda.stream(streams[0]):
            source.copy_(hosts[0], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            hosts[1].copy_(target, non_blocking=True)
        for stream in streams:
            current.wait_stream(stream)

    ways = {
        "host_to_device": lambda: source.copy_(hosts[0], non_blocking=True),
        "device_to_host": lambda: hosts[1].copy_(target, non_blocking=True),
        "both_ways": both_ways,
    }
    # Not by measure(): recorded copies are no different, and this is what the engine does.
    per_way = {name: min(timed(call, device) for _ in range(setting.repeats + 1)) for name, call in ways.items()}
    return {
        "copy_bytes_per_s": 2 * setting.copy_bytes / seconds["copy"],
        "read_bytes_per_s": setting.read_bytes / min(reading.values()),
        "matmul_flop_per_s": 2 * n**3 / seconds["matmul"],
        "host_to_device_bytes_per_s": setting.copy_bytes / per_way["host_to_device"],
        "device_to_host_bytes_per_s": setting.copy_bytes / per_way["device_to_host"],
        "both_ways_bytes_per_s": 2 * setting.copy_bytes / per_way["both_ways"],
    }


class Batch:
    """`batch` requests with `query_len` new tokens each, at the end of contexts of `context_len`.

    Contiguous, and in blocks in random order in a pool twice as large.
    """

    def __init__(
        self,
        setting: Setting,
        shape: Shape,
        batch: int,
        query_len: int,
        context_len: int,
        backend: AttentionBackend = triton_paged,
        chunk_size: int = CHUNK_SIZE,
    ) -> None:
        generator = torch.Generator(setting.device).manual_seed(0)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=setting.device, dtype=setting.dtype)

        self.batch, self.query_len, self.context_len = batch, query_len, context_len
        self._backend, self._chunk_size = backend, chunk_size
        self._kernels = CPU_KERNELS if setting.is_smoke else KERNELS
        h, kv, d = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self.scaling = d**-0.5
        self.enable_gqa = h != kv
        self.keys, self.values = random(batch, kv, context_len, d), random(batch, kv, context_len, d)
        self.query = random(batch, h, query_len, d)
        self.blocks_each = -(-context_len // chunk_size)
        num_blocks = 2 * batch * self.blocks_each
        self.tables = torch.randperm(num_blocks, generator=generator, device=setting.device)
        self.tables = self.tables[: num_blocks // 2].view(batch, self.blocks_each)
        self.pools = [
            torch.zeros(num_blocks, kv, chunk_size, d, dtype=setting.dtype, device=setting.device) for _ in "kv"
        ]
        for pool, contiguous in zip(self.pools, (self.keys, self.values), strict=True):
            padded = F.pad(contiguous, (0, 0, 0, self.blocks_each * chunk_size - context_len))
            pool[self.tables] = padded.view(batch, kv, self.blocks_each, chunk_size, d).transpose(1, 2)
        self.rows = self.query.permute(1, 0, 2, 3).reshape(h, batch * query_len, d)

    def metadata(self, query_len: int | None = None, context_len: int | None = None) -> AttentionMetadata:
        query_len, context_len = query_len or self.query_len, context_len or self.context_len
        segments = torch.tensor(
            [(i * query_len, query_len, context_len, i) for i in range(self.batch)], dtype=torch.int32
        )
        device = self.query.device
        return AttentionMetadata(
            torch.empty(0, dtype=torch.long, device=device),
            segments.to(device),
            self.tables.int(),
            self._chunk_size,
            host_segments=segments.numpy(),
        )

    def paged(self) -> Callable[[], torch.Tensor]:
        metadata, params = self.metadata(), AttentionParams(self.scaling)
        return lambda: self._backend.attend(self.rows, *self.pools, metadata, params)

    def one_token_at_a_time(self) -> Callable[[], list[torch.Tensor]]:
        """As a kernel for decodes would do it: a call for each new token (paper, section 4.4)."""
        params = AttentionParams(self.scaling)
        first = self.context_len - self.query_len + 1
        calls = [
            (self.query[:, :, i].transpose(0, 1).contiguous(), self.metadata(1, first + i))
            for i in range(self.query_len)
        ]
        return lambda: [self._backend.attend(rows, *self.pools, metadata, params) for rows, metadata in calls]

    def decoded(self) -> Callable[[], torch.Tensor]:
        """As recorded decode steps do it, whose tiles depend on the number of requests alone."""
        metadata, params = (
            replace(self.metadata(), is_decode_batch=True, host_segments=None),
            AttentionParams(self.scaling),
        )
        return lambda: self._backend.attend(self.rows, *self.pools, metadata, params)

    def contiguous(self) -> dict[str, Callable[[], torch.Tensor]]:
        return {
            name: lambda kernel=kernel: self._sdpa(kernel, self.keys, self.values)  # type: ignore[misc]
            for name, kernel in self._kernels.items()
        }

    def copied_out(self, kernel: str) -> Callable[[], torch.Tensor]:
        """Gathered into contiguous memory first."""

        def call() -> torch.Tensor:
            keys, values = (
                pool[self.tables].transpose(1, 2).flatten(2, 3)[:, :, : self.context_len] for pool in self.pools
            )
            return self._sdpa(self._kernels[kernel], keys, values)

        return call

    def _sdpa(
        self, kernel: SDPBackend, keys: torch.Tensor, values: torch.Tensor, num_rows: int | None = None
    ) -> torch.Tensor:
        """num_rows: the last so many of each request; None = all."""
        query = self.query if num_rows is None else self.query[:, :, self.query_len - num_rows :]
        query_len = query.shape[2]
        mask = None
        is_causal = 1 < query_len == self.context_len
        if 1 < query_len < self.context_len:
            mask = causal_lower_right(query_len, self.context_len)
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, is_causal=is_causal, enable_gqa=self.enable_gqa
            )

    @property
    def can_check(self) -> bool:
        """The check needs several times the memory of K and V in float32."""
        return 4 * self.keys.numel() <= 4 << 30

    def expected(self) -> torch.Tensor:
        """float32 [batch, heads, rows, dim] of the last rows of each request, by torch's plain operations."""
        return self._sdpa(SDPBackend.MATH, self.keys, self.values, self._num_checked).float()

    def check(self, call: Callable[[], torch.Tensor] | None = None) -> float:
        """Return the largest difference between paged and contiguous attention.

        Raises AssertionError if it is not rounding.

        call: gives [tokens, heads, dim]; None = `paged()`.
        """
        rows = (call or self.paged())().unflatten(0, (self.batch, self.query_len)).transpose(1, 2)
        return self._difference(rows, self.expected())

    def wrong_kernels(self) -> dict[str, str]:
        """Of torch's contiguous kernels those that differ from its plain operations: name -> how."""
        expected, wrong = self.expected(), {}
        for name, call in self.contiguous().items():
            try:
                self._difference(call(), expected)
            except AssertionError as error:
                wrong[name] = " ".join(str(error).split())
            except RuntimeError:  # not for this shape, or the device is broken
                check_device(self.query.device)
        return wrong

    @property
    def _num_checked(self) -> int:
        return min(self.query_len, CHECKED_ROWS)

    def _difference(self, actual: torch.Tensor, expected: torch.Tensor) -> float:
        actual = actual[:, :, self.query_len - self._num_checked :].float()
        tolerance = 1e-4 if self.query.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
        return float((actual - expected).abs().max())


def load_others(setting: Setting, shape: Shape) -> dict[str, AttentionBackend]:
    """The other backends that can serve a model of this shape here."""
    layer = LayerShape(shape.num_kv_heads, shape.head_dim, shape.head_dim)
    calls = (AttentionCall(layer, shape.num_heads, AttentionParams(shape.head_dim**-0.5)),)
    backends = {}
    for name, chunk_size in (CPU_OTHER_BACKENDS if setting.is_smoke else OTHER_BACKENDS).items():
        try:
            backends[name] = choose_backend(name, setting.device, setting.dtype, calls, chunk_size)
        except ConfigError as error:
            print(f"  {error}")
    return backends


def measure_other(setting: Setting, batch: Batch) -> dict[str, Any]:
    """The time of the kernels; what they are planned by on the host is not in it.

    One that is wrong has none.
    """
    try:
        error = batch.check() if batch.can_check else None
    except (AssertionError, RuntimeError) as failure:
        check_device(setting.device)
        return {"failure": str(failure)}
    seconds = measure({"paged": batch.paged()}, setting.device, setting.repeats)
    return {"largest_error": error, **{f"{name}_ms": value * 1e3 for name, value in seconds.items()}}


def measure_attention(setting: Setting) -> Iterator[list[dict[str, Any]]]:
    """All rows so far, after each shape. Raises AssertionError at the end if a shape came out wrong."""
    others = {name: load_others(setting, shape) for name, shape in setting.models.items()}
    chunk_sizes = OTHER_BACKENDS | CPU_OTHER_BACKENDS
    rows: list[dict[str, Any]] = []
    cases = [(name, *case) for name in setting.models for case in setting.attention]
    for name, batch_size, query_len, context_len in tqdm(cases, desc="attention", unit="shape"):
        shape = setting.models[name]
        batch = Batch(setting, shape, batch_size, query_len, context_len)
        rows.append({"model": name, "batch": batch_size, "query_len": query_len, "context_len": context_len})
        rows[-1].update(_measure_shape(setting, shape, batch))
        yield rows
        del batch  # the memory is needed for the next one
        for other, backend in others[name].items():
            case = (batch_size, query_len, context_len, backend, chunk_sizes[other])
            rows[-1]["others"][other] = measure_other(setting, Batch(setting, shape, *case))
            yield rows
    rows.append({"first_calls_ms": measure_first_calls(setting)})
    yield rows
    wrong = [row for row in rows if "failure" in row]
    assert not wrong, f"{len(wrong)} of {len(rows)} shapes came out wrong"


def _measure_shape(setting: Setting, shape: Shape, batch: Batch) -> dict[str, Any]:
    """Times of one shape beside the fastest of torch's kernels that computes it right."""
    figures: dict[str, Any] = {"others": {}}
    if batch.can_check:
        try:
            figures["largest_error"] = batch.check()
        except AssertionError as failure:
            figures["failure"] = str(failure)
        figures["wrong_contiguous"] = batch.wrong_kernels()
    calls = {"paged": batch.decoded() if batch.query_len == 1 else batch.paged(), **batch.contiguous()}
    seconds = measure(calls, setting.device, setting.repeats)
    paged = seconds.pop("paged")
    right = {name: value for name, value in seconds.items() if name not in figures.get("wrong_contiguous", {})}
    num_pairs = batch.batch * batch.query_len * (batch.context_len - (batch.query_len - 1) / 2)
    num_bytes = 2 * batch.batch * shape.num_kv_heads * batch.context_len * shape.head_dim * setting.dtype.itemsize
    figures |= {
        "paged_ms": paged * 1e3,
        "contiguous_ms": {kernel: value * 1e3 for kernel, value in seconds.items()},
        "kv_bytes_per_s": num_bytes / paged,
        "flop_per_s": 4 * num_pairs * shape.num_heads * shape.head_dim / paged,
    }
    if right:
        best = min(right, key=lambda kernel: right[kernel])
        figures |= {"best_contiguous": best, "paged_over_contiguous": paged / right[best]}
    return figures


def measure_first_calls(setting: Setting) -> dict[str, list[float]]:
    """Milliseconds of prompts of lengths that no call had before, by kernel: some make a plan for each."""
    shape = next(iter(setting.models.values()))
    milliseconds: dict[str, list[float]] = {}
    for length in setting.first_call_lens:
        for name, call in Batch(setting, shape, 1, length, length).contiguous().items():
            try:
                milliseconds.setdefault(name, []).append(first_call(call, setting.device) * 1e3)
            except RuntimeError:  # not for this shape
                check_device(setting.device)
    return milliseconds


def measure_figure_12(setting: Setting) -> Iterator[list[dict[str, Any]]]:
    """All rows so far, after each: milliseconds by past tokens.

    For `figure_12_batch` requests with `figure_12_new` query tokens each.
    """
    shape = list(setting.models.values())[-1]
    rows: list[dict[str, Any]] = []
    for past in tqdm(setting.figure_12, desc="figure 12", unit="length"):
        batch = Batch(setting, shape, setting.figure_12_batch, setting.figure_12_new, past + setting.figure_12_new)
        batch.check()
        contiguous = measure(batch.contiguous(), setting.device, setting.repeats)
        best = min(contiguous, key=lambda kernel: contiguous[kernel])
        calls = {
            "copy-out and attention": batch.copied_out(best),
            "one token at a time": batch.one_token_at_a_time(),
            "ours": batch.paged(),
        }
        seconds = measure(calls, setting.device, setting.repeats)
        rows.append(
            {
                "past_tokens": past,
                "kernel": best,
                "contiguous": contiguous[best] * 1e3,
                **{name: value * 1e3 for name, value in seconds.items()},
            }
        )
        yield rows

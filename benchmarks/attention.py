"""The C++ paged attention kernel against torch's attention on contiguous K and V of the same shape.

Decoding is also compared with reading as many bytes once. All in one process, measured alternately.

    python benchmarks/attention.py                      2 threads where there are two cores
    python benchmarks/attention.py --num-threads 1 --repeats 40

A ratio of 1.0 or less: paging, ragged batches and causality cost nothing over the contiguous kernel. The blocks lie in random
order in a pool twice as large as needed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from machine import RESULTS, write_result
from tqdm import tqdm

from engine.attention import cpu, reference
from engine.attention.protocol import AttentionMetadata, AttentionParams

CHUNK_SIZE = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """`batch` requests with `query_len` new tokens each, at the end of a context of `context_len`."""

    batch: int
    query_len: int
    context_len: int
    num_heads: int = 12
    num_kv_heads: int = 12
    head_dim: int = 64

    def __str__(self) -> str:
        return (
            f"{self.batch} x {self.query_len} over {self.context_len}, heads {self.num_heads}/{self.num_kv_heads}, "
            f"dim {self.head_dim}"
        )


CONTEXTS = (512, 1024, 2048, 4096, 8192)
GROUPED = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
SHAPES = [
    *(Shape(1, 1, context_len) for context_len in CONTEXTS),
    *(Shape(8, 1, context_len) for context_len in CONTEXTS),
    *(Shape(1, 1, context_len, **GROUPED) for context_len in CONTEXTS),
    Shape(1, 256, 2048),
    Shape(1, 256, 2048, **GROUPED),
    Shape(1, 512, 512),
    Shape(1, 16, 2048),
]


def make_calls(shape: Shape, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> one attention of this shape; all of them give the same."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    b, h, kv, d = shape.batch, shape.num_heads, shape.num_kv_heads, shape.head_dim
    keys, values = random(b, kv, shape.context_len, d), random(b, kv, shape.context_len, d)
    query = random(b, h, shape.query_len, d)
    blocks_each = -(-shape.context_len // CHUNK_SIZE)
    block_ids = torch.randperm(2 * b * blocks_each, generator=generator)[: b * blocks_each].view(b, blocks_each)
    pools = []
    for source in (keys, values):
        pool = torch.zeros(2 * b * blocks_each, kv, CHUNK_SIZE, d, dtype=dtype)
        pool[block_ids] = source.view(b, kv, blocks_each, CHUNK_SIZE, d).transpose(1, 2)
        pools.append(pool)
    segments = torch.tensor(
        [(i * shape.query_len, shape.query_len, shape.context_len, i) for i in range(b)], dtype=torch.int32
    )
    metadata = AttentionMetadata(torch.empty(0, dtype=torch.long), segments, block_ids.int(), CHUNK_SIZE)
    params = AttentionParams(d**-0.5)
    rows = query.transpose(0, 1).reshape(h, b * shape.query_len, d)
    mask = None
    if 1 < shape.query_len < shape.context_len:
        mask = torch.ones(shape.query_len, shape.context_len, dtype=torch.bool)
        mask = mask.tril(shape.context_len - shape.query_len)
    is_causal = shape.query_len == shape.context_len
    flat = torch.cat([keys.flatten(), values.flatten()]).view(torch.float32)
    calls = {
        "paged": lambda: cpu.attend(rows, *pools, metadata, params),
        "contiguous": lambda: F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=is_causal, enable_gqa=h != kv
        ),
        "gathered": lambda: reference.attend(rows, *pools, metadata, params),
    }
    expected = calls["contiguous"]().float().permute(0, 2, 1, 3).flatten(0, 1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name in ("paged", "gathered"):
        torch.testing.assert_close(calls[name]().float(), expected, atol=tolerance, rtol=tolerance)
    if shape.query_len == 1:
        # Adding up everything once: the time that the memory, or the cache that K and V fit into, needs at least.
        calls["read"] = lambda: flat.sum()
    return calls


def measure(calls: dict[str, Callable[[], torch.Tensor]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, taken in turns, after two rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def plot(rows: list[dict], path: str) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True)
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        mine = [row for row in rows if row["dtype"] == dtype]
        axis.barh([row["name"] for row in mine], [row["paged_over_contiguous"] for row in mine], color="tab:blue")
        axis.axvline(1.0, color="black", linewidth=1)
        axis.set_xlabel("time of paged attention / contiguous scaled_dot_product_attention")
        axis.set_title(dtype)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--name", default="attention", help="of the result files")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    capability = cpu.load_kernel()
    rows = []
    cases = [(shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in SHAPES]
    with torch.inference_mode(), tqdm(cases, unit="shape") as progress:
        for shape, dtype in progress:
            seconds = measure(make_calls(shape, dtype), arguments.repeats)
            num_bytes = 2 * shape.batch * shape.num_kv_heads * shape.context_len * shape.head_dim * dtype.itemsize
            flops = 4 * shape.batch * shape.num_heads * shape.head_dim * shape.query_len
            flops *= shape.context_len - (shape.query_len - 1) / 2
            row = {
                "name": str(shape),
                "dtype": str(dtype).removeprefix("torch."),
                **asdict(shape),
                **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
                "paged_over_contiguous": seconds["paged"] / seconds["contiguous"],
                "gathered_over_contiguous": seconds["gathered"] / seconds["contiguous"],
                "paged_over_read": seconds["paged"] / seconds["read"] if "read" in seconds else None,
                "gb_per_s": num_bytes / seconds["paged"] / 1e9,
                "gflop_per_s": flops / seconds["paged"] / 1e9,
            }
            rows.append(row)
            read = f", {row['paged_over_read']:.2f}x of reading" if row["paged_over_read"] else ""
            progress.write(
                f"{row['dtype']:9} {row['name']:42} {row['paged_ms']:8.3f} ms = {row['paged_over_contiguous']:.2f}x of "
                f"contiguous{read}; gathered {row['gathered_over_contiguous']:.2f}x; {row['gflop_per_s']:.0f} GFLOP/s"
            )
    write_result(arguments.name, {"num_threads": arguments.num_threads, "kernel": capability, "shapes": rows})
    plot(rows, str(RESULTS / f"{arguments.name}.png"))


if __name__ == "__main__":
    main()

"""The other backends than the Triton kernel on a GPU, each if it loads, against the torch reference.

They run step after step without waiting for the device, because the next step is planned while kernels of the last one
may still run. FlashInfer compiles each kind of kernel once, for minutes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton, which is optional, is not installed")

from engine.attention.choice import choose_backend
from engine.attention.protocol import AttentionCall, AttentionParams, LayerShape
from engine.errors import ConfigError
from tests.engine.attention.test_cpu import expected_output, make_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 2e-2}
BATCHES = [[(70, 300), (1, 5000), (33, 33), (5, 2000)], [(1, 1), (1, 3000), (1, 77)], [(900, 900)]]
PARAMS = [
    AttentionParams(0.1),
    AttentionParams(0.1, sliding_window=1),
    AttentionParams(0.1, sliding_window=300),
    AttentionParams(0.1, softcap=30.0),
    AttentionParams(0.1, sinks=torch.linspace(-1, 1, 8)),
]


@pytest.mark.parametrize(
    ("num_kv_heads", "dim", "dtype"),
    [(2, 128, torch.bfloat16), (8, 64, torch.float16), (1, 256, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize(("name", "chunk_size"), [("flashinfer", 32), ("flashinfer", 5)])
def test_on_a_gpu_they_equal_the_reference(name, chunk_size, num_kv_heads, dim, dtype):
    device = torch.device("cuda")
    try:
        calls = [AttentionCall(LayerShape(num_kv_heads, dim, dim), 8, params) for params in PARAMS]
        backend = choose_backend(name, device, dtype, calls, chunk_size)
    except ConfigError as error:
        pytest.skip(error.message)
    batches = [make_batch(1, segments, (8, num_kv_heads), dim, dim, chunk_size, dtype) for segments in BATCHES]
    steps = []
    for query, k_pool, v_pool, metadata in batches:
        moved = replace(
            metadata,
            segments=metadata.segments.to(device),
            block_tables=metadata.block_tables.to(device),
            host_segments=metadata.segments.numpy(),
        )
        steps.append((*(tensor.to(device) for tensor in (query, k_pool, v_pool)), moved))
    on_device = [replace(each, sinks=None if each.sinks is None else each.sinks.to(device)) for each in PARAMS]
    outputs = [[backend.attend(*step, params) for params in on_device] for step in steps]
    for batch, outs in zip(batches, outputs, strict=True):
        for params, out in zip(PARAMS, outs, strict=True):
            expected = expected_output(*batch, params)
            torch.testing.assert_close(out.cpu().float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])

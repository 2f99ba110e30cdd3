"""What CUDA's part of torch does, without a device."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch


@pytest.fixture
def cuda_calls(monkeypatch) -> None:
    """What CudaGraphMaker calls in torch.cuda, without a device: a recording runs the function and keeps nothing of it."""
    for name in ("graph", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    for name in ("CUDAGraph", "Stream", "graph_pool_handle", "synchronize", "current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: None)

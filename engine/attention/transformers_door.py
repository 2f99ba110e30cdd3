"""Connects transformers' model code with paged attention: one function in its attention registry.

It passes each call to the handler that the engine has set for the current forward. A ContextVar carries that, because some
families drop keyword arguments on the way to attention. Layers are told apart by the order of their calls, which
every forward repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from engine.attention import reference
from engine.attention.protocol import AttentionBackend, AttentionCall, AttentionMetadata, AttentionParams, LayerShape

ATTENTION_NAME = "pensieve_paged"


class AttentionHandler(Protocol):
    """Handles the attention calls of one forward.

    num_compiled_calls: calls that compiled layers made, counted here.
    """

    num_compiled_calls: int

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """Compute one call.

        query: [num_heads, num_tokens, k_dim].
        key, value: [num_kv_heads, num_tokens, dim].
        Returns [num_tokens, num_heads, v_dim].
        """
        ...


_handler: ContextVar[AttentionHandler] = ContextVar("pensieve_attention_handler")


@contextmanager
def attention_handled_by(handler: AttentionHandler) -> Iterator[None]:
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with transformers' signature.

    query: [1, num_heads, num_tokens, dim].
    attention_mask: not used; causality comes from the positions of the segments.
    Returns [1, num_tokens, num_heads, v_dim].
    """
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    # Compiled code has to call an operator: it must not look inside.
    function = _operator if torch.compiler.is_compiling() else _attend
    return function(query[0], key[0], value[0], scaling, sliding_window, softcap, s_aux)[None], None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    return attend(query, key, value, AttentionParams(scaling, sliding_window, softcap, sinks))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams) -> torch.Tensor:
    """One call of attention in the current forward; see AttentionHandler."""
    return _handler.get().attend(query, key, value, params)


@torch.library.custom_op("pensieve_layers::attend", mutates_args=())
def _operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """That it writes to the pools, the compiler need not know: nothing else that it sees reads them."""
    _handler.get().num_compiled_calls += 1
    return _attend(query, key, value, scaling, sliding_window, softcap, sinks).contiguous()


@_operator.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(query.shape[1], query.shape[0], value.shape[2])


AttentionInterface.register(ATTENTION_NAME, paged_attention)


class PagedAttention:
    """Serves one forward from the pools by `backend`.

    layer_pools: (k_pool, v_pool) for each layer, in order of the calls.
    wait_for_layer: called before a layer touches its pools, if some of its KV is still being copied there.
    """

    def __init__(
        self,
        backend: AttentionBackend,
        metadata: AttentionMetadata,
        layer_pools: list[tuple[torch.Tensor, torch.Tensor]],
        wait_for_layer: Callable[[int], None] | None = None,
    ) -> None:
        self._backend = backend
        self._metadata = metadata
        self._layer_pools = layer_pools
        self._wait_for_layer = wait_for_layer
        self.num_calls = 0
        self.num_compiled_calls = 0

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        k_pool, v_pool = self._layer_pools[self.num_calls]
        if self._wait_for_layer is not None:
            self._wait_for_layer(self.num_calls)
        self.num_calls += 1
        # All K and V of the step first: a segment may attend to another one of the same request.
        self._backend.write_kv(k_pool, v_pool, key, value, self._metadata)
        return self._backend.attend(query, k_pool, v_pool, self._metadata, params)


# What attention computes in if rounding is to be less than that of the dtype.
WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}


class ShapeProbe:
    """Serves one forward of a single sequence without a pool, and notes each call in `calls`, in order."""

    def __init__(self, *, is_wide: bool = False) -> None:
        """is_wide: compute in a wider dtype, and round the result."""
        self.calls: list[AttentionCall] = []
        self.num_compiled_calls = 0
        self._is_wide = is_wide

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        shape = LayerShape(key.shape[0], key.shape[2], value.shape[2])
        self.calls.append(AttentionCall(shape, query.shape[0], params))
        dtype = WIDER[value.dtype] if self._is_wide else value.dtype
        out = reference.attend_dense(query.to(dtype), key.to(dtype), value.to(dtype), params)
        return out.to(value.dtype).transpose(0, 1)

"""Decoder layers but for their attention, by two calls each of the C++ code of fused_layer.cpp.

Written as transformers' models have it, a layer is some forty operations of torch. In a decode of a small model, calling
them takes longer than computing them, and in a prompt each of them reads and writes all rows. Knows no model family: what a
layer is made of is seen (layer_parts.py), and it is replaced only if two calls give the same.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.attention.protocol import AttentionCall, AttentionParams
from engine.attention.transformers_door import attend
from engine.errors import KernelBuildError
from engine.executor.layer_parts import GELU_TANH, SILU, Census, Parts, WatchedLayer, inputs_noted, parts_of
from engine.executor.packed_linear import NativeProduct, PackedLinear
from engine.executor.rms_norm import RmsNorm
from engine.kernel_build import ISA_FLAGS, load_library

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("fused_layer.cpp")
# As fused_layer.cpp numbers them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = {SILU: 0, GELU_TANH: 1}
# Rows that a model is to be run with for its layers to be seen.
NUM_SEEN_ROWS = 64
# What a layer is tried with: its own input, and random ones, by whose size what it adds is smaller or larger than they are.
TRIED_SIZES = (1e-3, 1.0)
NUMS_OF_TRIED_ROWS = (1, 5, NUM_SEEN_ROWS)
# Difference of outputs, in relation to their length, that is rounding; and the share of numbers that may differ at all, which
# in bfloat16 are few: everything is rounded alike, but activations are computed to the last bit but one.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
MAX_SHARE_OF_OTHERS = {torch.float32: 1.0, torch.bfloat16: 0.02}


class Product(ctypes.Structure):
    _fields_ = (("multiply", ctypes.c_void_p), ("weight", ctypes.c_void_p))


class Norm(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("length", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "activation")),
        *((name, ctypes.c_int64) for name in ("hidden", "query", "key", "value", "head", "rotary", "intermediate")),
        ("rms_norm", ctypes.c_void_p),
        *((name, Norm) for name in ("before_attention", "of_queries", "of_keys")),
        *((name, Norm) for name in ("behind_attention", "before_mlp", "behind_mlp")),
        *((name, Product) for name in ("qkv", "output", "gate_up", "down")),
    )  # fmt: skip


class FusedLayer:
    """Stands for the forward of a decoder layer, which is called for more than `max_rows` rows, and for adapters."""

    def __init__(
        self,
        layer: nn.Module,
        parts: Parts,
        call: AttentionCall,
        num_rotary: int,
        has_adapters: Callable[[], bool],
    ) -> None:
        """Prepare the calls.

        call: of the layer's attention.
        num_rotary: elements of a head that are turned.
        has_adapters: whether the step that runs changes what a layer computes.

        Raises ValueError if the parts do not fit each other, or C++ code cannot multiply by a weight, and KernelBuildError.
        """
        self._forward = layer.forward
        self._params: AttentionParams = call.params
        self._has_adapters = has_adapters
        self._is_turned, self._num_rotary = parts.is_turned, num_rotary
        self._parts = parts  # keeps the memory
        dtype = parts.qkv.dtype
        shape = call.shape
        self._head, self._value_head = shape.k_dim, shape.v_dim
        self._num_heads, self._num_kv_heads = call.num_heads, shape.num_kv_heads
        self._query, self._key = call.num_heads * shape.k_dim, shape.num_kv_heads * shape.k_dim
        self._qkv = self._query + self._key + shape.num_kv_heads * shape.v_dim
        hidden, intermediate = parts.qkv.in_features, parts.down.in_features
        expected = {
            "qkv": (hidden, self._qkv),
            "output": (call.num_heads * shape.v_dim, hidden),
            "gate_up": (hidden, 2 * intermediate),
            "down": (intermediate, hidden),
        }
        linears: dict[str, PackedLinear] = {name: getattr(parts, name) for name in expected}
        sizes = {name: (linear.in_features, sum(linear.sizes)) for name, linear in linears.items()}
        if sizes != expected:
            raise ValueError(f"its products are {sizes}, not {expected}")
        natives = {name: _native(linear) for name, linear in linears.items()}
        self.max_rows = min(native.max_rows for native in natives.values())
        self._hidden = hidden
        self._library = load_kernel()
        norms = {
            "before_attention": (parts.before_attention, hidden),
            "of_queries": (parts.of_queries, self._query),
            "of_keys": (parts.of_keys, self._key),
            "behind_attention": (parts.behind_attention, hidden),
            "before_mlp": (parts.before_mlp, hidden),
            "behind_mlp": (parts.behind_mlp, hidden),
        }
        kernels = [norm.kernel for norm, _ in norms.values() if norm is not None]
        self._layer = Layer(
            dtype=DTYPES[dtype],
            activation=ACTIVATIONS[parts.activation],
            hidden=hidden,
            query=self._query,
            key=self._key,
            value=self._qkv - self._query - self._key,
            head=self._head,
            rotary=num_rotary if parts.is_turned else 0,
            intermediate=intermediate,
            rms_norm=_address(kernels[0]) if kernels else None,
            **{name: _norm(norm, length) for name, (norm, length) in norms.items()},
            **{
                name: Product(_address(native.function), ctypes.cast(native.weight, ctypes.c_void_p))
                for name, native in natives.items()
            },
        )
        self._pointer = ctypes.byref(self._layer)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the layer's own forward."""
        num_elements = hidden_states.numel()
        if num_elements > self.max_rows * self._hidden or self._has_adapters():
            out: torch.Tensor = self._forward(hidden_states, *args, **kwargs)
            return out
        num_rows, num_threads = num_elements // self._hidden, torch.get_num_threads()
        hidden = hidden_states.contiguous()
        qkv = hidden.new_empty(num_rows, self._qkv)
        cos_address = sin_address = None
        if self._is_turned:
            cos, sin = (angles.contiguous() for angles in kwargs["position_embeddings"])
            if not cos.numel() == sin.numel() == num_rows * self._num_rotary:
                raise ValueError(f"angles of {tuple(cos.shape)} and {tuple(sin.shape)} for {num_rows} rows")
            cos_address, sin_address = cos.data_ptr(), sin.data_ptr()
        self._library.layer_before_attention(
            self._pointer, hidden.data_ptr(), cos_address, sin_address, qkv.data_ptr(), num_rows, num_threads
        )
        attended = attend(
            qkv.as_strided((self._num_heads, num_rows, self._head), (self._head, self._qkv, 1)),
            qkv.as_strided((self._num_kv_heads, num_rows, self._head), (self._head, self._qkv, 1), self._query),
            qkv.as_strided(
                (self._num_kv_heads, num_rows, self._value_head),
                (self._value_head, self._qkv, 1),
                self._query + self._key,
            ),
            self._params,
        ).contiguous()
        out = torch.empty_like(hidden)
        self._library.layer_behind_attention(
            self._pointer, hidden.data_ptr(), attended.data_ptr(), out.data_ptr(), num_rows, num_threads
        )
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The own forward of the copy of the layer: this holds addresses of the first one's weights."""
        return copy.deepcopy(self._forward, memo)


def fuse_layers(
    layers: Sequence[nn.Module],
    forward: Callable[[], Any],
    has_adapters: Callable[[], bool] = lambda: False,
) -> int:
    """Put a FusedLayer in the place of the forward of each layer that computes what it does; `separate` undoes it.

    forward: runs the model, on NUM_SEEN_ROWS tokens if its window has them.
    has_adapters: whether the step that runs changes what layers compute.

    Returns how many; 0, with a line in the log, without a compiler.
    """
    watched = [WatchedLayer(layer) for layer in layers]
    with inputs_noted(watched):
        forward()
    num_fused = 0
    for seen in watched:
        try:
            fused = _fuse(seen, has_adapters)
        except KernelBuildError as error:
            logger.warning("decoder layers are computed by torch's operations, which is slow for decodes; %s", error)
            return 0
        except Exception as error:  # ours, or what a layer raises that is called with fewer rows than the model's
            logger.debug("a decoder layer stays as it is: %r", error)
            continue
        seen.layer.forward = fused
        num_fused += 1
    return num_fused


def separate(layers: Sequence[nn.Module]) -> None:
    """Give layers their own forward back."""
    for layer in layers:
        if isinstance(layer.forward, FusedLayer):
            del layer.forward


@functools.cache
def load_kernel() -> Any:
    """The library, built unless that was done. Raises KernelBuildError."""
    capability: str = torch.backends.cpu.get_cpu_capability()
    # What torch rounds twice is rounded twice.
    flags = ("-fopenmp", "-ffp-contract=off", *ISA_FLAGS.get(capability, ()))
    library = load_library(SOURCE, "decoder layers", capability, flags)
    pointers = (ctypes.c_void_p,) * 5
    library.layer_before_attention.argtypes = (*pointers, ctypes.c_int64, ctypes.c_int)
    library.layer_behind_attention.argtypes = (*pointers[:4], ctypes.c_int64, ctypes.c_int)
    library.layer_before_attention.restype = library.layer_behind_attention.restype = None
    return library


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


def _native(linear: PackedLinear) -> NativeProduct:
    native = linear.native
    if native is None:
        raise ValueError(f"{linear.packing.__name__} cannot be called by C++ code")
    return native


def _norm(norm: RmsNorm | None, length: int) -> Norm:
    """length: of what it is to normalise, in rows of its own length."""
    if norm is None:
        return Norm()
    own = len(norm.weight)
    if length % own:
        raise ValueError(f"{length} numbers are not normalised in rows of {own}")
    return Norm(norm.weight.data_ptr(), own, norm.eps, norm.scale)


def _fuse(seen: WatchedLayer, has_adapters: Callable[[], bool]) -> FusedLayer:
    """Raises ValueError if nothing computes as the layer does, and KernelBuildError."""
    angles = seen.angles
    call, candidates = parts_of(seen)
    if call.params.sinks is not None:
        raise ValueError("its attention has sinks, which may be made anew by each call")
    for parts in candidates:
        if parts.is_turned and angles is None:
            raise ValueError("queries and keys are turned by angles that it is not given")
        num_rotary = 0 if angles is None else angles[0].shape[-1]
        if num_rotary > call.shape.k_dim or num_rotary % 2 or parts.qkv.dtype not in DTYPES:
            raise ValueError(f"{num_rotary} elements of a head of {call.shape.k_dim} are turned, in {parts.qkv.dtype}")
        fused = FusedLayer(seen.layer, parts, call, num_rotary, has_adapters)
        if _is_same(seen, fused):
            return fused
    raise ValueError("two calls give something else")


def _is_same(seen: WatchedLayer, fused: FusedLayer) -> bool:
    """Whether both give the same, and give the same to attention, for the layer's own input and for random ones."""
    own = seen.hidden
    generator = torch.Generator().manual_seed(0)
    inputs = [own[:, : min(own.shape[1], max(NUMS_OF_TRIED_ROWS))]]
    for size in TRIED_SIZES:
        for num_rows in NUMS_OF_TRIED_ROWS:
            rows = torch.randn(1, min(num_rows, own.shape[1]), own.shape[2], generator=generator)
            inputs.append((size * rows).to(own.dtype))
    for hidden in inputs:
        expected, actual = Census(), Census()
        expected_out = seen.call(hidden, expected)
        actual_out = seen.call(hidden, actual, fused)
        if [call.kind for call in expected.calls] != [call.kind for call in actual.calls]:
            return False
        pairs = zip([expected_out, *expected.attended], [actual_out, *actual.attended], strict=True)
        for theirs, ours in pairs:
            if ours.shape != theirs.shape:
                return False
            error, share = (ours.float() - theirs.float()).norm(), (ours != theirs).float().mean()
            is_rounding = error <= TOLERANCE[own.dtype] * theirs.float().norm()
            if not (is_rounding and share <= MAX_SHARE_OF_OTHERS[own.dtype]):
                return False
    return True

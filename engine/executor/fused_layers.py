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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.attention.protocol import AttentionCall, AttentionParams
from engine.attention.transformers_door import attend
from engine.errors import KernelBuildError
from engine.executor.layer_parts import GELU_TANH, SILU, Census, Parts, WatchedLayer, inputs_noted, parts_of
from engine.executor.lora.layers import AdaptedLinear, RunningStep
from engine.executor.native_product import NativeProduct
from engine.executor.packed_linear import PackedLinear
from engine.executor.rms_norm import RmsNorm
from engine.kernel_build import ISA_FLAGS, load_library

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("fused_layer.cpp")
# As fused_layer.cpp numbers them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = {SILU: 0, GELU_TANH: 1}
# Its functions, and how many buffers each takes: the two calls, and their stages.
CALLS = {
    "before_attention": 4,
    "behind_attention": 3,
    "make_qkv": 3,
    "turn_heads": 3,
    "make_output": 2,
    "make_gates": 5,
    "make_down": 3,
    "finish": 2,
}
# Rows that a model is to be run with for its layers to be seen.
NUM_SEEN_ROWS = 64
# What a layer is tried with: its own input, and a few random rows, by whose size what it adds is smaller or larger than they.
TRIED_SIZES = (1e-3, 1.0)
NUMS_OF_TRIED_ROWS = (1, 5)
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
    """Stands for the forward of a decoder layer, and calls that forward for more than `max_rows` rows.

    In a step with adapters, what they change is added between the stages of the two calls.
    """

    def __init__(self, layer: nn.Module, parts: Parts, call: AttentionCall, num_rotary: int) -> None:
        """Prepare the calls.

        call: of the layer's attention.
        num_rotary: elements of a head that are turned.

        Raises ValueError if the parts do not fit each other, or C++ code cannot multiply by a weight, and KernelBuildError.
        """
        self._forward = layer.forward
        self._params: AttentionParams = call.params
        self._is_turned, self._num_rotary = parts.is_turned, num_rotary
        self._parts = parts  # keeps the memory
        dtype, shape = parts.qkv.dtype, call.shape
        self._head, self._value_head = shape.k_dim, shape.v_dim
        self._num_heads, self._num_kv_heads = call.num_heads, shape.num_kv_heads
        self._query, self._key = call.num_heads * shape.k_dim, shape.num_kv_heads * shape.k_dim
        self._qkv = self._query + self._key + shape.num_kv_heads * shape.v_dim
        hidden, intermediate = parts.qkv.in_features, parts.down.in_features
        self._hidden, self._intermediate = hidden, intermediate
        expected = {
            "qkv": (hidden, self._qkv),
            "output": (call.num_heads * shape.v_dim, hidden),
            "gate_up": (hidden, 2 * intermediate),
            "down": (intermediate, hidden),
        }
        linears: dict[str, PackedLinear] = {name: getattr(parts, name) for name in expected}
        sizes = {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}
        if sizes != expected:
            raise ValueError(f"its products are {sizes}, not {expected}")
        if any(linear.dtype != dtype for linear in linears.values()):
            raise ValueError("its products are of several dtypes")
        natives = {name: _native(linear) for name, linear in linears.items()}
        self.max_rows = min(native.max_rows for native in natives.values())
        self._adapted = _slices(parts.adapted, {name: output for name, (_, output) in sizes.items()})
        self._step = parts.adapted[0].step if parts.adapted else RunningStep()
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
            rotary=num_rotary,
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
        num_rows = hidden_states.numel() // self._hidden
        if num_rows > self.max_rows:
            own: torch.Tensor = self._forward(hidden_states, *args, **kwargs)
            return own
        size = num_rows, torch.get_num_threads()
        hidden = hidden_states.contiguous()
        angles = self._angles(kwargs["position_embeddings"], num_rows) if self._is_turned else ()
        cos, sin = (part.data_ptr() for part in angles) if angles else (None, None)
        qkv = hidden.new_empty(num_rows, self._qkv)
        if self._step.parts:
            self._before_attention_adapted(hidden, cos, sin, qkv, size)
        else:
            self._library.layer_before_attention(self._pointer, hidden.data_ptr(), cos, sin, qkv.data_ptr(), *size)
        row = self._qkv
        attended = attend(
            qkv.as_strided((self._num_heads, num_rows, self._head), (self._head, row, 1)),
            qkv.as_strided((self._num_kv_heads, num_rows, self._head), (self._head, row, 1), self._query),
            qkv.as_strided(
                (self._num_kv_heads, num_rows, self._value_head), (self._value_head, row, 1), self._query + self._key
            ),
            self._params,
        ).contiguous()
        out = torch.empty_like(hidden)
        if self._step.parts:
            self._behind_attention_adapted(hidden, attended, out, size)
        else:
            self._library.layer_behind_attention(
                self._pointer, hidden.data_ptr(), attended.data_ptr(), out.data_ptr(), *size
            )
        return out

    def _angles(self, given: tuple[torch.Tensor, torch.Tensor], num_rows: int) -> list[torch.Tensor]:
        """Cosine and sine as they are read. Raises ValueError if they are of other rows."""
        angles = [part.contiguous() for part in given]
        if any(part.numel() != num_rows * self._num_rotary for part in angles):
            raise ValueError(f"angles of {[tuple(part.shape) for part in angles]} for {num_rows} rows")
        return angles

    def _before_attention_adapted(
        self, hidden: torch.Tensor, cos: int | None, sin: int | None, qkv: torch.Tensor, size: tuple[int, int]
    ) -> None:
        call = self._library
        x = hidden if self._parts.before_attention is None else torch.empty_like(hidden)
        call.layer_make_qkv(self._pointer, hidden.data_ptr(), x.data_ptr(), qkv.data_ptr(), *size)
        self._adapt("qkv", qkv, x)
        call.layer_turn_heads(self._pointer, cos, sin, qkv.data_ptr(), *size)

    def _behind_attention_adapted(
        self, hidden: torch.Tensor, attended: torch.Tensor, out: torch.Tensor, size: tuple[int, int]
    ) -> None:
        call, added = self._library, torch.empty_like(hidden)
        x = out if self._parts.before_mlp is None else torch.empty_like(hidden)
        gates, gated = (hidden.new_empty(size[0], num * self._intermediate) for num in (2, 1))
        call.layer_make_output(self._pointer, attended.data_ptr(), added.data_ptr(), *size)
        self._adapt("output", added, attended)
        buffers = (part.data_ptr() for part in (hidden, added, out, x, gates))
        call.layer_make_gates(self._pointer, *buffers, *size)
        self._adapt("gate_up", gates, x)
        call.layer_make_down(self._pointer, gates.data_ptr(), gated.data_ptr(), added.data_ptr(), *size)
        self._adapt("down", added, gated)
        call.layer_finish(self._pointer, added.data_ptr(), out.data_ptr(), *size)

    def _adapt(self, product: str, out: torch.Tensor, x: torch.Tensor) -> None:
        """Add what the adapters of the step change of a product."""
        linear: PackedLinear = getattr(self._parts, product)
        rows, inputs = out.view(-1, linear.out_features), x.view(-1, linear.in_features)
        for name, columns in self._adapted[product]:
            self._step.add(name, rows[:, columns], inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The own forward of the copy of the layer: this holds addresses of the first one's weights."""
        return copy.deepcopy(self._forward, memo)


def fuse_layers(layers: Sequence[nn.Module], forward: Callable[[], Any]) -> int:
    """Put a FusedLayer in the place of the forward of each layer that computes what it does; `separate` undoes it.

    forward: runs the model, on NUM_SEEN_ROWS tokens if its window has them.

    Returns how many; none, with a line in the log, without a compiler.
    """
    watched = [WatchedLayer(layer) for layer in layers]
    with inputs_noted(watched):
        forward()
    num_fused = 0
    for seen in watched:
        try:
            fused = _fuse(seen)
        except KernelBuildError as error:
            logger.warning("decoder layers are computed by torch's operations, which is slow for decodes; %s", error)
            return num_fused
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
    for name, num_buffers in CALLS.items():
        function = getattr(library, f"layer_{name}")
        function.argtypes = (ctypes.c_void_p, *[ctypes.c_void_p] * num_buffers, ctypes.c_int64, ctypes.c_int)
        function.restype = None
    return library


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


def _native(linear: PackedLinear) -> NativeProduct:
    native = linear.native
    if native is None:
        raise ValueError(f"{linear.packing.__name__} cannot be called by C++ code")
    return native


def _slices(adapted: Sequence[AdaptedLinear], widths: Mapping[str, int]) -> dict[str, list[tuple[str, slice]]]:
    """Of each product, the layers that adapters change, and which of its outputs are theirs.

    adapted: in the order of their calls; all of them, or none. widths: outputs of each product, in the same order.

    Raises ValueError if these are not those.
    """
    layers = iter(adapted)
    slices: dict[str, list[tuple[str, slice]]] = {name: [] for name in widths}
    for name, width in widths.items() if adapted else ():
        end = 0
        while end < width:
            layer = next(layers, None)
            if layer is None:
                raise ValueError(f"adapters change only a part of it, up to {name}")
            slices[name].append((layer.name, slice(end, end + layer.out_features)))
            end += layer.out_features
        if end != width:
            raise ValueError(f"what adapters change of {name} has {end} outputs, not {width}")
    return slices


def _norm(norm: RmsNorm | None, length: int) -> Norm:
    """length: of what it is to normalise, in rows of its own length."""
    if norm is None:
        return Norm()
    own = len(norm.weight)
    if length % own:
        raise ValueError(f"{length} numbers are not normalised in rows of {own}")
    return Norm(norm.weight.data_ptr(), own, norm.eps, norm.scale)


def _fuse(seen: WatchedLayer) -> FusedLayer:
    """Raises ValueError if nothing computes as the layer does, and KernelBuildError."""
    angles = seen.angles
    call, candidates = parts_of(seen)
    if call.params.sinks is not None:
        raise ValueError("its attention has sinks, which may be made anew by each call")
    for parts in candidates:
        if parts.is_turned and angles is None:
            raise ValueError("queries and keys are turned by angles that it is not given")
        num_rotary = angles[0].shape[-1] if angles is not None and parts.is_turned else 0
        if num_rotary > call.shape.k_dim or num_rotary % 2 or parts.qkv.dtype not in DTYPES:
            raise ValueError(f"{num_rotary} elements of a head of {call.shape.k_dim} are turned, in {parts.qkv.dtype}")
        fused = FusedLayer(seen.layer, parts, call, num_rotary)
        if _is_same(seen, fused):
            return fused
    raise ValueError("two calls give something else")


def _is_same(seen: WatchedLayer, fused: FusedLayer) -> bool:
    """Whether both give the same, and give the same to attention, for the layer's own input and for random ones."""
    own = seen.hidden
    generator = torch.Generator().manual_seed(0)
    inputs = [own]
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

"""Linear layers that get the same input, joined to one multiplication (Q, K and V; gate and up).

For a CPU, their weights are also laid out once for its matrix kernels. Knows no model family: which layers share their
input is seen in a forward.

On a CPU torch packs a weight anew at every call; with few rows, as in decoding, that costs more than the multiplication.
oneDNN's packing operations are those that torch's own compiler uses, but private, FBGEMM's those of its quantization: if
they are missing or fail, nothing is packed.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from engine.errors import KernelBuildError
from engine.executor.native_product import NativeProduct
from engine.executor.panel_kernel import PanelWeight

logger = logging.getLogger(__name__)

# Rows that oneDNN's layout is chosen for. One layout serves all steps; this one was best or near it from 1 to 512.
NUM_ROWS_HINT = 64
# Numbers of rows that a layout is tried with: each may be computed by other code.
NUMS_OF_TRIED_ROWS = (1, 5, 70)
# Of the numbers that a kind is tried with, each so many-th is as large as they get.
NUM_BETWEEN_LIMITS = 16
# Of the output of a layer on random rows, what error is still rounding, in relation to its length.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}


class PackedWeight(Protocol):
    """A weight [out_features, in_features] and a bias in a kernel's own layout.

    PACKS_SINGLE_LAYERS: whether a layer that is joined to no other one gains by it too.
    CHECKED_LIMITS: of a weight and of an input; integers up to them are multiplied exactly, if each row reaches them.
    LOSS: error of the output of a layer, in relation to its length, beyond which a layer is not packed so; besides rounding
        in the dtype. 0 if the weight is kept as it is.
    """

    PACKS_SINGLE_LAYERS: bool
    CHECKED_LIMITS: tuple[int, int]
    LOSS: float

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None: ...

    @property
    def num_bytes(self) -> int:
        """That are not parameters."""
        ...

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of x."""
        ...

    def unpack(self) -> torch.Tensor:
        """The weight, a copy in float32 or its own dtype."""
        ...

    @property
    def native(self) -> NativeProduct | None:
        """For C++ code, as long as this object lives; None if it cannot call it."""
        ...


class OneDnnWeight:
    """Computes in the dtype of the weight: float32, or bfloat16 if the processor has instructions for it.

    Rows are multiplied by a kernel of ours that reads the same layout, if it can, and is not slower.
    """

    PACKS_SINGLE_LAYERS = True
    CHECKED_LIMITS = (2, 1)
    LOSS = 0.0

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, NUM_ROWS_HINT)
        self.num_bytes = weight.nbytes
        self._bias = bias
        self.panels: PanelWeight | None = None
        try:
            self.panels = PanelWeight(self._packed, weight, bias)
        except (KernelBuildError, AttributeError, RuntimeError) as error:  # what tells of a layout is private to torch
            _say_once(f"weights are multiplied by oneDNN, which is slower for decodes: {error}")

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.panels is not None and x.numel() // x.shape[-1] <= self.panels.native.max_rows:
            return self.panels.multiply(x)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out

    def unpack(self) -> torch.Tensor:
        dense: torch.Tensor = self._packed.to_dense()
        return dense

    @property
    def native(self) -> NativeProduct | None:
        """See PackedWeight."""
        return None if self.panels is None else self.panels.native

    def __deepcopy__(self, memo: dict[int, Any]) -> OneDnnWeight:
        return OneDnnWeight(self.unpack(), copy.deepcopy(self._bias, memo))  # torch cannot copy what oneDNN laid out


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


class FbgemmWeight:
    """A half-precision weight for a processor that cannot compute in its dtype.

    It is kept as float16 and multiplied in float32. Every bfloat16 between 2**-14 and 65504 is a float16 too; smaller
    ones lose bits that never matter beside the others.
    """

    PACKS_SINGLE_LAYERS = True
    CHECKED_LIMITS = (2, 1)
    LOSS = 0.0
    native = None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        if weight.abs().max() > torch.finfo(torch.float16).max:
            raise ValueError("a weight is beyond the range of float16")
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None if bias is None else bias.float())
        self.num_bytes = weight.nbytes

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self._packed)
        return out.to(x.dtype)

    def unpack(self) -> torch.Tensor:
        dense: torch.Tensor = torch.ops.quantized.linear_unpack_fp16(self._packed)[0]
        return dense


class PlainWeight(nn.Module):
    """As it is, for layers that nothing else packs, and for GPUs.

    A GPU has a small multiplication done before all of its processors have begun.
    """

    PACKS_SINGLE_LAYERS = False
    CHECKED_LIMITS = (2, 1)
    LOSS = 0.0
    num_bytes = 0
    native = None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        # Parameters, for which compiled code is not specialised.
        self._weight = nn.Parameter(weight, requires_grad=False)
        self._bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def unpack(self) -> torch.Tensor:
        return self._weight


def choose_packing(dtype: torch.dtype, device: torch.device) -> type[PackedWeight] | None:
    """What packs weights of that dtype with this torch on this device; None if nothing does."""
    if device.type != "cpu":
        return PlainWeight
    half = dtype in (torch.bfloat16, torch.float16)
    candidates: tuple[type[PackedWeight], ...] = (OneDnnWeight, FbgemmWeight) if half else (OneDnnWeight,)
    for packing in candidates:
        try:
            if is_right(packing, dtype):
                return packing
            logger.warning("%s is wrong on this machine in %s, and packs nothing", packing.__name__, dtype)
        except (RuntimeError, AttributeError) as error:
            logger.debug("%s does not pack %s: %s", packing.__name__, dtype, error)
    return None


def is_right(packing: type[PackedWeight], dtype: torch.dtype) -> bool:
    """Whether a kind of weight multiplies correctly, and gives back what it packed.

    The elements differ from their neighbours, so that another order shows, and every sum of them is exact in float32.
    """
    generator = torch.Generator().manual_seed(0)
    weight_limit, input_limit = packing.CHECKED_LIMITS

    def integers(limit: int, *size: int) -> torch.Tensor:
        values = torch.randint(-limit, limit + 1, size, generator=generator)
        values[..., ::NUM_BETWEEN_LIMITS] = limit
        return values

    weight, bias = integers(weight_limit, 24, 96), integers(9, 24)
    packed = packing(weight.to(dtype), bias.to(dtype))
    if not torch.equal(packed.unpack().to(dtype), weight.to(dtype)):
        return False
    for num_rows in NUMS_OF_TRIED_ROWS:
        x = integers(input_limit, num_rows, 96)
        product = packed.multiply(x.to(dtype))
        if product.dtype != dtype or not torch.equal(product, (x @ weight.T + bias).to(dtype)):
            return False
    return True


class PackedLinear(nn.Module):
    """One or several linear layers on the same input, as one multiplication.

    weight: [out_features of all, in_features].
    """

    def __init__(self, layers: list[nn.Linear], packing: type[PackedWeight]) -> None:
        super().__init__()
        self.in_features = layers[0].in_features
        self.sizes = [layer.out_features for layer in layers]
        self.out_features = sum(self.sizes)
        self.dtype = layers[0].weight.dtype
        self.bias: torch.Tensor | None = None
        if any(layer.bias is not None for layer in layers):
            biases = [
                layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers
            ]
            self.bias = torch.cat(biases).detach()
        weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
        self._packed = packing(weight.detach().contiguous(), self.bias)

    @property
    def packing(self) -> type[PackedWeight]:
        """How its weight is kept."""
        return type(self._packed)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight, if it is no parameter of the model."""
        return self._packed.num_bytes

    @property
    def native(self) -> NativeProduct | None:
        """See PackedWeight."""
        return self._packed.native

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._packed.multiply(input)

    @property
    def weight(self) -> torch.Tensor:
        """The weight, unpacked: a copy, for code that looks at its dtype or values."""
        return self._packed.unpack().to(self.dtype)


class _JoinedInput:
    """Multiplies for all members of a group at once.

    It does so when the first of them is called, and keeps the results until the last one has taken its own. An input
    that is not the kept one starts anew, so any order of calls is right, only slower.
    """

    def __init__(self, linear: PackedLinear) -> None:
        self.linear = linear
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []

    def take(self, x: torch.Tensor, index: int) -> torch.Tensor:
        if x is not self._input or self._outputs[index] is None:
            self._input = x
            self._outputs = list(self.linear(x).split(self.linear.sizes, dim=-1))
        out = self._outputs[index]
        assert out is not None
        self._outputs[index] = None
        if not any(output is not None for output in self._outputs):
            self._input, self._outputs = None, []
        return out


class JoinedLinear(nn.Module):
    """Stands where one layer of a group stood."""

    def __init__(self, joined: _JoinedInput, index: int) -> None:
        super().__init__()
        self._joined, self._index = joined, index
        if index == 0:
            self.linear = joined.linear  # whose parameters are the model's
        self.in_features = joined.linear.in_features
        self.out_features = joined.linear.sizes[index]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._joined.take(input, self._index)

    @property
    def weight(self) -> torch.Tensor:
        """[out_features, in_features], unpacked; a copy."""
        return self._joined.linear.weight.split(self._joined.linear.sizes)[self._index]

    @property
    def bias(self) -> torch.Tensor | None:
        bias = self._joined.linear.bias
        return None if bias is None else bias.split(self._joined.linear.sizes)[self._index]


def pack_linears(
    model: nn.Module,
    forward: Callable[[], Any],
    *packings: type[PackedWeight],
    own: Mapping[nn.Module, Sequence[type[PackedWeight]]] | None = None,
) -> int:
    """Replace the linear layers of `model`, group by group, so that only one group is in memory twice.

    forward: runs the model on a few tokens, in the order that every step repeats. Layers that it does not call stay as
        they are.
    packings: in order of preference; a layer gets the first with which it computes the same, but for its loss.
    own: instead of these for some layers.

    Returns the number of layers that got the first one. Raises ValueError, and leaves the model half packed, if a layer
    computes the same with none. A weight that another module uses too (a tied embedding) stays there beside its packed copy.
    """
    own = own or {}
    groups, inputs = _find_groups(model, forward)
    places = {child: (parent, name) for parent in model.modules() for name, child in parent.named_children()}
    num_packed = 0
    for group, x in zip(groups, inputs, strict=True):
        candidates = own.get(group[0], packings)
        if len(group) == 1 and not candidates[0].PACKS_SINGLE_LAYERS:
            continue
        replacements, packing = _pack_group(group, x, candidates)
        for layer, replacement in zip(group, replacements, strict=True):
            parent, name = places.pop(layer)
            setattr(parent, name, replacement)
        num_packed += len(group) if packing is packings[0] else 0
        group.clear()  # the last reference to the unpacked weights
    return num_packed


def _pack_group(
    group: list[nn.Linear], x: torch.Tensor, packings: Sequence[type[PackedWeight]]
) -> tuple[list[nn.Module], type[PackedWeight]]:
    """What stands for the layers of a group, and by which packing.

    x: an input that the model gave them.

    Raises ValueError if no packing is right.
    """
    for packing in packings:
        try:
            linear = PackedLinear(group, packing)
            joined = _JoinedInput(linear)
            replacements = [linear] if len(group) == 1 else [JoinedLinear(joined, index) for index in range(len(group))]
            _check_same(group, replacements, _random_rows(group[0]), TOLERANCE[linear.dtype] + packing.LOSS)
            if packing.LOSS:  # an input may be what its weights are worst at
                _check_same(group, replacements, x, max(TOLERANCE[linear.dtype], packing.LOSS))
            return replacements, packing
        except ValueError as error:
            if packing is packings[-1]:
                raise
            logger.debug("%s with %s", error, packing.__name__)
    raise AssertionError("no packing was given")


def unpack_linears(model: nn.Module) -> None:
    """Put plain layers, with copies of the weights in their dtype, in place of packed ones."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, JoinedLinear | PackedLinear):
                weight, bias = child.weight, child.bias
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
                layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
                if bias is not None:
                    layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
                setattr(parent, name, layer)


def leave_files(model: nn.Module) -> None:
    """Copy the weights that are not packed out of the mapped files.

    While one of them lies in a file, all of that file stays in memory.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def num_packed_bytes(model: nn.Module) -> int:
    """Bytes of the weights that are not the model's parameters any more."""
    return sum(module.num_bytes for module in model.modules() if isinstance(module, PackedLinear))


@torch.inference_mode()
def _check_same(
    layers: Sequence[nn.Linear], replacements: Sequence[nn.Module], x: torch.Tensor, tolerance: float
) -> None:
    """Raise ValueError if two layers' outputs differ by more than that, in relation to their length."""
    for layer, replacement in zip(layers, replacements, strict=True):
        expected, actual = layer(x).float(), replacement(x).float()
        if not (actual - expected).norm() <= tolerance * expected.norm():
            raise ValueError(f"a layer of {layer.out_features} x {layer.in_features} does not compute the same")


def _random_rows(layer: nn.Linear) -> torch.Tensor:
    """Inputs that show more than a model's own."""
    weight = layer.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    size = (max(NUMS_OF_TRIED_ROWS), layer.in_features)
    return torch.randn(*size, generator=generator, device=weight.device, dtype=weight.dtype)


def _find_groups(model: nn.Module, forward: Callable[[], Any]) -> tuple[list[list[nn.Linear]], list[torch.Tensor]]:
    """The linear layers that `forward` calls, in the order of their calls, in groups, and the input of each group.

    A group is the children of one module that were given the very same tensor.
    """
    parent_of = {child: parent for parent in model.modules() for child in parent.children()}
    groups: dict[tuple[int, int], list[nn.Linear]] = {}
    called: dict[nn.Linear, int] = {}
    inputs: dict[nn.Linear, torch.Tensor] = {}  # the last one of each
    alive: list[torch.Tensor] = []  # so that no id is used twice

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, nn.Linear)
        x = args[0] if args else kwargs["input"]
        called[layer] = called.get(layer, 0) + 1
        inputs[layer] = x
        alive.append(x)
        groups.setdefault((id(parent_of[layer]), id(x)), []).append(layer)

    hooks: list[RemovableHandle] = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if type(module) is nn.Linear
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    # A layer that is called several times a forward (shared between layers) is packed alone.
    alone = {layer for layer, count in called.items() if count > 1}
    packed = [[layer for layer in group if layer not in alone] for group in groups.values()]
    found = [group for group in packed if group] + [[layer] for layer in alone]
    return found, [inputs[group[0]] for group in found]

"""The linear layers of a model to which adapters are added, and which rows of the running step get which one.

An adapter is added to what a layer gives, so it makes no difference how the layer itself is kept: joined with others,
packed, quantised, or a part of a tensor-parallel group's. Knows no files.

    step       rows 0..4: a prompt with adapter "x"; row 5: a decode of the model alone; row 6: a decode with "x"
    layer      out = inner(input); out[[0..4, 6]] += scale * (input[[0..4, 6]] @ a.T) @ b.T
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from engine.executor.lora.peft_files import LinearShape, LowRank
from engine.executor.process_group import ProcessGroup
from engine.executor.sharding import GatheredLinear, LocalPart, SummedLinear, part_on_rank


class Change(NamedTuple):
    """What an adapter adds to a layer, or to a rank's part of it: scale * (x @ a.T) @ b.

    a: [rank, in_features]. b: [rank, out_features]. Both contiguous, on the device, in the model's dtype.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class AdaptedRows(NamedTuple):
    """Rows of a step that get the same adapter.

    changes: by the name of the layer.
    rows: consecutive ones, or int64 [number of rows] on the device.
    is_few: so few that the kernel for them is faster; rows is a tensor then.
    """

    changes: Mapping[str, Change]
    rows: slice | torch.Tensor
    is_few: bool


class RunningStep:
    """What the layers ask for during a forward.

    parts: of the step that runs; empty, as it is between forwards, for the model alone.
    kernel: adds to a few rows, see low_rank.cpp; None = no part has few.
    """

    __slots__ = ("kernel", "parts")

    def __init__(self) -> None:
        self.parts: Sequence[AdaptedRows] = ()
        self.kernel: Callable[..., None] | None = None

    def add(self, name: str, out: torch.Tensor, x: torch.Tensor) -> None:
        """What the adapters of the step add to the output of a layer, in place.

        out: [num_rows, out_features]. x: [num_rows, in_features].
        """
        few: list[tuple[Change, slice | torch.Tensor]] = []
        for part in self.parts:
            change = part.changes.get(name)
            if change is None:
                continue
            if part.is_few:
                few.append((change, part.rows))
            else:
                _add(out, x, part.rows, change)
        if few:
            assert self.kernel is not None
            a, b, scales = zip(*(change for change, _ in few), strict=True)
            self.kernel(out, x, a, b, scales, [rows for _, rows in few])


class AdaptedLinear(nn.Module):
    """A linear layer, and what the adapters of the running step add to its rows.

    name: of the layer in the model.
    """

    def __init__(self, inner: nn.Module, name: str, step: RunningStep) -> None:
        super().__init__()
        self.inner = inner
        self.name = name
        self.step = step

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(input)
        if self.step.parts:
            self.step.add(self.name, out.view(-1, out.shape[-1]), input.reshape(-1, input.shape[-1]))
        return out

    def __getattr__(self, name: str) -> Any:
        """What a model's code looks at, such as the dtype of the weight, is the layer's own."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def _add(out: torch.Tensor, x: torch.Tensor, rows: slice | torch.Tensor, change: Change) -> None:
    """By torch's operations; see RunningStep.add."""
    low = x[rows] @ change.a.T
    if isinstance(rows, slice):
        out[rows].addmm_(low, change.b, alpha=change.scale)
    else:
        out.index_add_(0, rows, low @ change.b, alpha=change.scale)


class AdaptedLayers:
    """The places for adapters in one model, or in one rank's shard of it.

    shapes: of the layers that an adapter may change, by name; of the whole model.
    step: which the layers read.
    """

    def __init__(self, shapes: Mapping[str, LinearShape], parts: Mapping[str, LocalPart], step: RunningStep) -> None:
        self.shapes = shapes
        self.step = step
        self._parts = parts

    def take_part(self, name: str, layer: LowRank, device: torch.device, dtype: torch.dtype) -> Change:
        """What this rank needs of what is added to a layer, on its device."""
        part = self._parts[name]
        a = layer.a[:, part.inputs]
        b = torch.cat([layer.b[rows] for rows in part.outputs])
        return Change(a.to(device, dtype).contiguous(), b.T.to(device, dtype).contiguous(), layer.scale)

    def num_bytes(self, rank: int, itemsize: int) -> int:
        """Of an adapter of that rank that changes all layers, as a whole."""
        return sum(rank * sum(shape) for shape in self.shapes.values()) * itemsize


def install_layers(
    model: nn.Module,
    hf_config: Any,
    plan: Mapping[str, str],
    group: ProcessGroup | None,
    forward: Callable[[], torch.Tensor],
) -> AdaptedLayers:
    """Make room for adapters at each linear layer but the output's, in place.

    Left out are layers that do not see each row of a step once, such as experts.

    plan: how the model is sharded for the ranks of `group`.
    forward: runs the model on a few tokens and returns its logits, [1, num_tokens, vocabulary].
    """
    step, shapes, parts = RunningStep(), _linears_of(hf_config), {}
    installed: dict[str, tuple[nn.Module, str, AdaptedLinear]] = {}
    for name, shape in shapes.items():
        part = part_on_rank(name, shape, plan, hf_config.get_text_config(), group)
        if part is None:
            continue
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        if isinstance(
            getattr(holder, child), SummedLinear | GatheredLinear
        ):  # inside, before the ranks add what they have
            holder, child = getattr(holder, child), "part"
        layer = AdaptedLinear(getattr(holder, child), name, step)
        setattr(holder, child, layer)
        installed[name], parts[name] = (holder, child, layer), part
    seen = _rows_seen([layer for _, _, layer in installed.values()], forward)
    for name, (holder, child, layer) in installed.items():
        if not seen[layer]:
            setattr(holder, child, layer.inner)
            del parts[name]
    return AdaptedLayers({name: shapes[name] for name in parts}, parts, step)


def _linears_of(hf_config: Any) -> dict[str, LinearShape]:
    """The linear layers of a model but that of its output, by name."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    shapes = {}
    for name, module in model.named_modules():
        if module is model.get_output_embeddings():
            continue
        if isinstance(module, nn.Linear):
            shapes[name] = LinearShape(module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shapes[name] = LinearShape(module.nx, module.nf)
    return shapes


def _rows_seen(layers: Sequence[AdaptedLinear], forward: Callable[[], torch.Tensor]) -> dict[AdaptedLinear, bool]:
    """Whether a layer is called once in a forward, with all rows."""
    calls: dict[AdaptedLinear, list[int]] = {layer: [] for layer in layers}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, AdaptedLinear)
        x = args[0] if args else kwargs["input"]
        calls[layer].append(x.numel() // x.shape[-1])

    hooks: list[RemovableHandle] = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        num_rows = forward().shape[1]
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: seen == [num_rows] for layer, seen in calls.items()}

"""What a decoder layer of any model is made of, seen as it computes.

Its normalisations and products show by their modules, everything else by torch's operations: a layer is of a known form if
it takes just the operations of that form, and no other. Whether it computes what the form says is for others to try.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.attention.protocol import AttentionCall, AttentionParams
from engine.attention.transformers_door import ShapeProbe, attention_handled_by
from engine.executor.lora.layers import AdaptedLinear
from engine.executor.packed_linear import PackedLinear
from engine.executor.rms_norm import RmsNorm

# A layer by the modules that it calls: normalisations N, products P and attention A.
FORM = re.compile(r"(?P<first>N?)P(?P<heads>(NN)?)AP(?P<middle>N{0,2})PP(?P<last>N?)")
# By torch's operations.
ACTIVATIONS = SILU, GELU_TANH = "silu", "gelu(approximate='tanh')"
# torch's operations that compute nothing (no model is in training), or what PackedLinear is seen to do anyway.
NOT_COUNTED = {
    "alias", "as_strided", "chunk", "clone", "contiguous", "detach", "dropout", "empty", "empty_like", "empty_strided",
    "expand", "flatten", "new_empty", "new_empty_strided", "permute", "reshape", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unsqueeze", "view", "_unsafe_view", "_linear_pointwise",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a layer, in the order of their computation; None if it has no such normalisation.

    activation: by the name of torch's operation.
    is_turned: whether queries and keys are, by the angles of their positions.
    adapted: the layers that adapters may change, in the order of their calls.
    """

    before_attention: RmsNorm | None
    qkv: PackedLinear
    of_queries: RmsNorm | None
    of_keys: RmsNorm | None
    output: PackedLinear
    behind_attention: RmsNorm | None
    before_mlp: RmsNorm | None
    gate_up: PackedLinear
    down: PackedLinear
    behind_mlp: RmsNorm | None
    activation: str
    is_turned: bool
    adapted: tuple[AdaptedLinear, ...]


class WatchedLayer:
    """A layer, and what it is called with."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what it is called with; a hook of torch."""
        self.args, self.kwargs = args, dict(kwargs)

    def call(self, hidden: torch.Tensor, handler: Any, layer: Callable[..., Any] | None = None) -> Any:
        """What it gives for its input, or another one of so many rows or fewer.

        layer: instead of the layer.
        """
        with attention_handled_by(handler), torch.inference_mode():
            return (layer or self.layer)(hidden, *self.args[1:], **self._of_rows(hidden.shape[1]))

    @property
    def hidden(self) -> torch.Tensor:
        """Its input [1, num_rows, hidden]. Raises ValueError if it is not called with that."""
        if not self.args or not isinstance(self.args[0], torch.Tensor) or self.args[0].dim() != 3:
            raise ValueError("it is not called with rows of hidden states")
        return self.args[0]

    @property
    def angles(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosine and sine [1, num_rows, elements], if it is given them."""
        given = self.kwargs.get("position_embeddings")
        shape = (1, self.hidden.shape[1])
        if (
            isinstance(given, tuple)
            and len(given) == 2
            and all(isinstance(part, torch.Tensor) and part.dim() == 3 and part.shape[:2] == shape for part in given)
            and given[0].shape == given[1].shape
            and all(part.dtype == self.hidden.dtype for part in given)
        ):
            return given
        return None

    def _of_rows(self, num_rows: int) -> dict[str, Any]:
        """What it is called with for the first rows alone: angles, positions."""
        shape = (1, self.hidden.shape[1])

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(cut(part) for part in value)
            has_rows = isinstance(value, torch.Tensor) and tuple(value.shape[:2]) == shape
            return value[:, :num_rows] if has_rows else value

        return {name: cut(value) for name, value in self.kwargs.items()}


@contextmanager
def inputs_noted(watched: Sequence[WatchedLayer]) -> Iterator[None]:
    """Layers note what they are called with."""
    hooks = [seen.layer.register_forward_pre_hook(seen.note, with_kwargs=True) for seen in watched]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Census(TorchDispatchMode):
    """Counts torch's operations, but for those within attention, and notes what modules are called and when attention is."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.modules: list[nn.Module | None] = []  # None = attention
        self.adapted: list[AdaptedLinear] = []
        self.attended: list[torch.Tensor] = []  # queries, keys and values
        self.num_compiled_calls = 0
        self._probe = ShapeProbe()
        self._is_in_attention = False

    @property
    def calls(self) -> list[AttentionCall]:
        """Of attention."""
        return self._probe.calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count by name, in place or not, and options: of two GELUs one is another operation."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__.rstrip("_") if hasattr(func, "overloadpacket") else str(func)
        out = func(*args, **kwargs)
        is_nothing = name in NOT_COUNTED or (name == "to" and out.dtype == args[0].dtype)
        if not self._is_in_attention and not is_nothing:
            options = ", ".join(f"{key}={value!r}" for key, value in sorted(kwargs.items()))
            self.counts[f"{name}({options})" if options else name] += 1
        return out

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        """See AttentionHandler."""
        self._is_in_attention = True
        try:
            self.modules.append(None)
            self.attended += [query.clone(), key.clone(), value.clone()]
            return self._probe.attend(query, key, value, params)
        finally:
            self._is_in_attention = False

    def note(self, module: nn.Module, *_: Any) -> None:
        """Keep that a module is called; a hook of torch."""
        if isinstance(module, AdaptedLinear):
            self.adapted.append(module)
        else:
            self.modules.append(module)


def _look(seen: WatchedLayer, num_rows: int) -> Census:
    """Run the first rows of a layer's input, and count what it does. Raises ValueError if it does not give such rows."""
    census = Census()
    hooks = [
        module.register_forward_pre_hook(census.note)
        for module in seen.layer.modules()
        if isinstance(module, PackedLinear | RmsNorm | AdaptedLinear)
        or (not list(module.children()) and list(module.parameters()))
    ]
    hidden = seen.hidden[:, :num_rows]
    try:
        with census:
            out = seen.call(hidden, census)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(out, torch.Tensor) or out.shape != hidden.shape or out.dtype != hidden.dtype:
        raise ValueError("it does not give rows as it gets them")
    return census


def parts_of(seen: WatchedLayer) -> tuple[AttentionCall, tuple[Parts, ...]]:
    """How a layer calls attention, and what it may be made of: one of these. Raises ValueError if its form is not known."""
    census, of_one_row = _look(seen, seen.hidden.shape[1]), _look(seen, 1)
    if (census.counts, census.modules) != (of_one_row.counts, of_one_row.modules):
        raise ValueError("what it computes depends on how many rows there are")
    kinds = {RmsNorm: "N", PackedLinear: "P", type(None): "A"}
    form = "".join(kinds.get(type(module), "?") for module in census.modules)
    match = FORM.fullmatch(form)
    if match is None:
        raise ValueError(f"it is of the form {form}")
    modules: Iterator[Any] = iter(census.modules)

    def take(group: str, most: int) -> list[Any]:
        """The normalisations of a group; if there are none, as many None as there might be."""
        return [next(modules) for _ in match[group]] or [None] * most

    (first,), qkv, (of_queries, of_keys) = take("first", 1), next(modules), take("heads", 2)
    _, output, middle = next(modules), next(modules), take("middle", 2)
    gate_up, down, (last,) = next(modules), next(modules), take("last", 1)
    activation, is_turned = _operations(census.counts)
    # A single one in the middle normalises what attention gives, or what the rest gets.
    pairs = [(None, *middle), (*middle, None)] if len(middle) == 1 else [(middle[0], middle[1])]
    computed = activation, is_turned, tuple(census.adapted)
    return census.calls[0], tuple(
        Parts(first, qkv, of_queries, of_keys, output, behind, before, gate_up, down, last, *computed)
        for behind, before in pairs
    )


def _operations(counts: Counter[str]) -> tuple[str, bool]:
    """(activation, whether queries and keys are turned) that take just these operations of torch.

    Raises ValueError if there are others: a value may be limited, say, which an input need not show. What code does only for
    other inputs than those that it was tried with, nothing shows.
    """
    for activation in ACTIVATIONS:
        residuals_and_gate = Counter({"add": 2, "mul": 1, activation: 1})
        turns = Counter({"mul": 4, "neg": 2, "cat": 2, "add": 2})
        # Of heads that are turned in part, the rest is joined to it again.
        for is_turned, expected in (
            (False, residuals_and_gate),
            (True, residuals_and_gate + turns),
            (True, residuals_and_gate + turns + Counter({"cat": 2})),
        ):
            if counts == expected:
                return activation, is_turned
    raise ValueError(f"it takes {dict(counts)}")

"""The files of a quantised checkpoint, as if they had the model's weights.

transformers' loader gets a mapping of names to what it takes for slices of files. What is quantised becomes a weight when it
is read, on the device that it is for, and one at a time: besides the model, memory holds a few times the largest of them.
Parallel ranks cut such a weight as any other, and the loader's own conversions (of a mixture's experts) work on it.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from engine.errors import ModelLoadError
from engine.executor.checkpoint.weight_format import WeightFormat, num_bits

# What a tensor that is not quantised may hold, as safetensors call it.
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
# Names of tensors that have no part in a weight: they are for quantised inputs, outputs or KV, which stay in the model's
# dtype here.
UNREAD = re.compile(r"(input|output|activation|act|[qkv])_(scale|zero_point|global_scale|scale_ub)")


class StoredWeight:
    """A weight in the files, as far as transformers' loader asks of a slice of a file."""

    def __init__(
        self,
        name: str,
        stored: WeightFormat,
        parts: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        turn: threading.Lock,
    ) -> None:
        """Take a weight whose parts fit each other.

        parts: the slices of its files.
        device: where it is made, and is left.
        turn: held while a weight is made, which takes several times its memory.

        Raises ValueError if they do not.
        """
        self.shape = stored.shape(parts)
        self._name, self._stored, self._parts = name, stored, parts
        self._device, self._dtype, self._turn = device, dtype, turn

    @property
    def num_bytes(self) -> int:
        """In the files."""
        return sum(math.prod(part.get_shape()) * num_bits(part.get_dtype()) // 8 for part in self._parts.values())

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return "F32"

    @torch.no_grad()
    def __getitem__(self, index: Any) -> torch.Tensor:
        with self._turn:
            parts = {name: part[...].to(self._device) for name, part in self._parts.items()}
            try:
                weight = self._stored.dequantize(parts)
                if weight.shape != self.shape:
                    raise ValueError(f"it comes out as {list(weight.shape)} instead of {list(self.shape)}")
            except (ValueError, TypeError, LookupError) as error:
                raise ModelLoadError(
                    f"the files have a damaged {self._name} ({error!r}); get the checkpoint again", param="model"
                ) from error
            part = weight[index]
            if part.numel() < weight.numel():
                part = part.clone()  # not a view that keeps all of it
            return part.to(self._dtype)


def find_files(location: str) -> list[str]:
    """The safetensors files of a checkpoint in a folder or of the hub, on this machine. Raises ModelLoadError or OSError."""
    file = cached_file(location, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if file is not None:  # as transformers prefers it to an index beside it
        return [file]
    index = cached_file(location, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        raise ModelLoadError(
            f"{location!r} is a quantised checkpoint without {SAFE_WEIGHTS_NAME}, and is read from no other kind of file; "
            "take one that has its weights as safetensors",
            param="model",
        )
    try:
        files, _ = get_checkpoint_shard_files(location, index)
    except (LookupError, TypeError, AttributeError) as error:
        raise ModelLoadError(
            f"{SAFE_WEIGHTS_INDEX_NAME} of {location!r} is damaged ({error!r}); get the checkpoint again", param="model"
        ) from error
    return list(files)


@contextmanager
def open_weights(
    location: str, formats: Sequence[WeightFormat], device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """All tensors of a checkpoint's files by name, with those that are quantised as StoredWeight.

    formats: how its weights may be held.

    Valid inside of the `with`. Raises ModelLoadError.
    """
    with ExitStack() as stack:
        slices: dict[str, Any] = {}
        for file in find_files(location):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
        yield _collect(location, slices, formats, device, dtype)


def _collect(
    location: str,
    slices: dict[str, Any],
    formats: Sequence[WeightFormat],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Takes what it understands out of `slices`."""

    def refuse(what: str) -> ModelLoadError:
        return ModelLoadError(
            f"{location!r} cannot be read: {what}; get the checkpoint again if its download was cut, or take one that is not "
            "quantised",
            param="model",
        )

    weights: dict[str, Any] = {}
    turn = threading.Lock()
    for stored in formats:
        for name in [name for name in slices if name.endswith(f".{stored.mark}")]:
            layer = name.removesuffix(stored.mark)
            parts = {
                part: slices.pop(layer + part) for part in (*stored.parts, *stored.optional) if layer + part in slices
            }
            if missing := [part for part in stored.parts if part not in parts]:
                raise refuse(f"its files have {name} but no {layer}{missing[0]}")
            target = layer + stored.target
            try:
                weights[target] = StoredWeight(target, stored, parts, device, dtype, turn)
            except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:  # of damaged parts
                raise refuse(f"of {target}, {error}") from error
    for name, part in slices.items():
        if UNREAD.fullmatch(name.rpartition(".")[2]):
            continue
        if name in weights:
            raise refuse(f"its files have {name} twice, quantised and not")
        if part.get_dtype() not in PLAIN_DTYPES:
            raise refuse(
                f"its files have {name} in {part.get_dtype()}, and nothing beside it that says how it is quantised"
            )
        weights[name] = part
    return weights

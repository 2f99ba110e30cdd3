"""Checks that the attention of a model's family is what reference.attend_dense computes.

In one forward of the family's own code each call is made twice more, by that code and by ours, on the same random Q,
K and V in float64; and its mask is asked what it shows at positions as far apart as the window. So neither weights
nor tokens nor the dtype decide what is found.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine.attention import reference
from engine.attention.protocol import AttentionCall, AttentionParams, LayerShape
from engine.attention.transformers_door import WIDER, attention_handled_by, paged_attention

OWN_NAME = "eager"
# Of the output of a row and head, in relation to its length. The families compute the softmax in float32.
TOLERANCE = 1e-3
# Standard deviation of the scores, whatever the model's scaling: a softcap bends them, and no key has all the weight.
SCORE_STD = 4.0
# Positions that a mask is asked for, at most.
MAX_POSITIONS = 1 << 17
# Names of the function with which a family's code computes attention under OWN_NAME.
OWN_FUNCTIONS = ("eager_attention_forward", "text_eager_attention_forward", "simple_eager_attention_forward")

AttentionFunction = Callable[..., tuple[torch.Tensor, Any]]
MaskFunction = Callable[..., torch.Tensor]


class NoOwnAttentionError(Exception):
    """The family has no attention function by a name that is known here: nothing can be compared."""


class Comparison:
    """What one forward of a single sequence has shown.

    num_calls: of attention. fault: of the first call that is not the same, in words; None if there is none.
    num_unknown_masks: calls with a mask of the family's own making, which is compared at the tokens of this forward alone.
    """

    def __init__(self, num_positions: int) -> None:
        """num_positions: of the longest context that is to be served."""
        self.num_calls = 0
        self.num_unknown_masks = 0
        self.fault: str | None = None
        self._num_positions = min(num_positions, MAX_POSITIONS)
        self._masks: list[tuple[torch.Tensor, MaskFunction]] = []

    def note_mask(self, mask: torch.Tensor, function: MaskFunction) -> None:
        self._masks.append((mask, function))

    def compare(
        self,
        own: AttentionFunction,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> None:
        """A call that `own` is made with; only the shapes of Q, K and V matter."""
        self.num_calls += 1
        generator = torch.Generator(query.device).manual_seed(self.num_calls)
        dense = _Dense()

        def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            with attention_handled_by(dense):
                return paged_attention(module, query, key, value, None, **options)[0]

        inputs = [
            torch.randn(*given.shape, generator=generator, device=given.device, dtype=torch.float64)
            for given in (query, key, value)
        ]
        ours(*inputs)  # to see how it scales
        assert dense.call is not None
        inputs[0] *= SCORE_STD / (dense.call.params.scaling * query.shape[-1] ** 0.5)
        actual, expected = ours(*inputs), None
        with suppress(RuntimeError, TypeError):  # one that computes in the model's dtype alone
            expected = own(module, *inputs, mask, **options)[0].reshape(actual.shape)
        fault = None if expected is None else _fault_of_output(actual, expected, dense.call)
        fault = fault or self._fault_of_mask(mask, dense.call, query.device)
        if fault is not None and self.fault is None:
            self.fault = f"in attention call {self.num_calls}, {fault}"

    def _fault_of_mask(self, mask: torch.Tensor | None, call: AttentionCall, device: torch.device) -> str | None:
        function = next((function for known, function in self._masks if known is mask), None)
        if function is not None:
            # Not all are written for whole tensors of positions.
            with suppress(RuntimeError, TypeError, ValueError, IndexError):
                return self._fault_of_mask_function(function, call.params.sliding_window, device)
        self.num_unknown_masks += 1
        return None

    def _fault_of_mask_function(self, function: MaskFunction, window: int | None, device: torch.device) -> str | None:
        last = self._num_positions - 1
        near = () if window is None else (window - 1, window, window + 1, 2 * window)
        rows = sorted({position for position in (0, 1, last // 2, last, *near) if 0 <= position <= last})
        queries = torch.tensor(rows, device=device)[None, None, :, None]
        keys = torch.arange(self._num_positions, device=device)[None, None, None, :]
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        is_shown = function(zero, zero, queries, keys)
        expected = keys <= queries
        if window is not None:
            expected &= keys > queries - window
        if torch.equal(is_shown.expand(expected.shape).bool(), expected):
            return None
        told = "no sliding window" if window is None else f"a sliding window of {window} tokens"
        return f"the mask does not show what the interface is told of: a token and those before it, with {told}"


class _Dense:
    """Computes by the reference; call: the last one."""

    call: AttentionCall | None = None
    num_compiled_calls = 0

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        self.call = AttentionCall(LayerShape(key.shape[0], key.shape[2], value.shape[2]), query.shape[0], params)
        return reference.attend_dense(query, key, value, params).transpose(0, 1)


def _fault_of_output(actual: torch.Tensor, expected: torch.Tensor, call: AttentionCall) -> str | None:
    error = ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
    if error <= TOLERANCE:
        return None
    params = call.params
    sinks = "no sinks" if params.sinks is None else "sinks"
    told = f"scaling {params.scaling:.3g}, sliding window {params.sliding_window}, softcap {params.softcap}, {sinks}"
    return f"the outputs differ by {error:.1e} ({told})"


_comparison: ContextVar[Comparison | None] = ContextVar("pensieve_comparison", default=None)
_lock = threading.Lock()


@contextmanager
def compared_by(comparison: Comparison) -> Iterator[None]:
    """Compare the forwards inside, of models under OWN_NAME.

    Their attention is computed in a wider dtype than the model's (transformers_door.WIDER), and its result is
    rounded. A forward raises NoOwnAttentionError if it cannot be compared.
    """
    with _lock:
        ALL_ATTENTION_FUNCTIONS[OWN_NAME] = _compared_attention
        ALL_MASK_ATTENTION_FUNCTIONS[OWN_NAME] = _compared_mask
        token = _comparison.set(comparison)
        try:
            yield
        finally:
            _comparison.reset(token)
            del ALL_ATTENTION_FUNCTIONS[OWN_NAME], ALL_MASK_ATTENTION_FUNCTIONS[OWN_NAME]


def _compared_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, Any]:
    """See transformers_door.paged_attention."""
    namespace = vars(sys.modules[type(module).__module__])
    own: AttentionFunction | None = next((namespace[name] for name in OWN_FUNCTIONS if name in namespace), None)
    if own is None:
        raise NoOwnAttentionError(type(module).__module__)
    comparison = _comparison.get()
    if comparison is None:  # another thread's forward
        return own(module, query, key, value, attention_mask, **options)
    comparison.compare(own, module, query, key, value, attention_mask, options)
    try:
        wide = (given.to(WIDER[value.dtype]) for given in (query, key, value))
        return own(module, *wide, attention_mask, **options)[0].to(value.dtype), None
    except (RuntimeError, TypeError):
        return own(module, query, key, value, attention_mask, **options)


def _compared_mask(*args: Any, **options: Any) -> torch.Tensor:
    """As the family's own code gets it; what it was made by is kept."""
    mask = eager_mask(*args, **options)
    comparison = _comparison.get()
    if comparison is not None:
        comparison.note_mask(mask, options.get("mask_function", causal_mask_function))
    return mask

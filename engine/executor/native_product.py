"""A product as C++ code calls it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

# As all of these functions number them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class NativeProduct(NamedTuple):
    """function(dtype, weight, x, out, num_rows, num_threads), as long as what it was made of lives.

    weight: what the function takes for it. in_features, out_features: of the weight. max_rows: more, it is not made for.
    """

    function: Any
    weight: Any
    in_features: int
    out_features: int
    max_rows: int

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of x. Raises ValueError for other features."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"an input of {x.shape[-1]} features for a weight of {self.in_features}")
        x = x.contiguous()
        out = x.new_empty((*x.shape[:-1], self.out_features))
        self.function(
            DTYPES[x.dtype],
            self.weight,
            x.data_ptr(),
            out.data_ptr(),
            x.numel() // self.in_features,
            torch.get_num_threads(),
        )
        return out

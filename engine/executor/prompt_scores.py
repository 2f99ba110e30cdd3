"""How probable the tokens of a prompt were in their places, from the logits of the positions before them. Owns no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.core.plan import Logprobs
from engine.executor.sampler import HostCopy

# Rows that are looked at together: as float32 over the vocabulary they take twice the room of half-precision logits.
ROWS_AT_ONCE = 32


class PromptScores:
    """Those of one step, on their way to host memory."""

    def __init__(self, logits: torch.Tensor, targets: torch.Tensor, nums_top: Sequence[int]) -> None:
        """Start to compute them; waits for nothing.

        logits: [rows, vocabulary], any float dtype, not kept.
        targets: int64 [rows], the tokens that follow, on the same device.
        nums_top: for each row, how many of the most probable tokens are wanted, too.
        """
        self._nums_top = nums_top
        self._num_top = min(max(nums_top), logits.shape[-1])
        parts = []
        for rows, ids in zip(logits.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True):
            logprobs = rows.float().log_softmax(-1)
            chosen = logprobs.gather(-1, ids[:, None])
            ranks = 1 + (logprobs > chosen).sum(-1, keepdim=True)
            values, top_ids = logprobs.topk(self._num_top)
            floats = torch.cat([chosen, values], -1).double().view(torch.int64)
            parts.append(torch.cat([floats, ranks, top_ids], -1))
        self._copy = HostCopy(torch.cat(parts))

    def finish(self) -> tuple[Logprobs, ...]:
        """Wait for them. One for each row."""
        numbers = self._copy.wait()
        num_floats = 1 + self._num_top
        floats = np.ascontiguousarray(numbers[:, :num_floats]).view(np.float64).tolist()
        others = numbers[:, num_floats:].tolist()
        return tuple(
            Logprobs(chosen, tuple(zip(top_ids[:num], values[:num], strict=True)), rank)
            for (chosen, *values), (rank, *top_ids), num in zip(floats, others, self._nums_top, strict=True)
        )

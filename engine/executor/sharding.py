"""Which rank of a tensor-parallel group holds which part of the weights, and the layers that compute with such a part.

Names and parts are those of transformers' tensor-parallel plans, with which its loader reads on each rank that rank's part
alone; families without one have a plan here. What it leaves as distributed tensors with hooks is then put into plain local
layers with one explicit collective each: the same arithmetic at less cost a step, and layers that can be packed.

    colwise                 a slice of the output features; no collective             nn.Linear
    rowwise                 a slice of the input features; the products are added     SummedLinear
    colwise_gather_output   a slice of the vocabulary, in the head; rank 0 gets all   GatheredLinear
    embedding_rowwise       a slice of the vocabulary; the lookups are added          SummedEmbedding
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from engine.errors import UnsupportedModelError
from engine.executor.process_group import ProcessGroup

OWN_PLANS = {
    "opt": {
        "model.decoder.embed_tokens": "embedding_rowwise",
        "model.decoder.layers.*.self_attn.q_proj": "colwise",
        "model.decoder.layers.*.self_attn.k_proj": "colwise",
        "model.decoder.layers.*.self_attn.v_proj": "colwise",
        "model.decoder.layers.*.self_attn.out_proj": "rowwise",
        "model.decoder.layers.*.fc1": "colwise",
        "model.decoder.layers.*.fc2": "rowwise",
        "lm_head": "colwise_gather_output",
    },
}


def make_plan(name: str, hf_config: Any, size: int) -> dict[str, str]:
    """Module or parameter (`*` for the number of a layer) -> style. Raises UnsupportedModelError where the model cannot be
    sharded that way."""
    text_config = hf_config.get_text_config()
    family = text_config.model_type
    with torch.device("meta"):
        plan: dict[str, str] = dict(AutoModelForCausalLM.from_config(hf_config).tp_plan or {})
    plan = plan or OWN_PLANS.get(family, {})
    if not plan:
        raise UnsupportedModelError(
            f"{name!r} ({family}) has no tensor-parallel plan, neither in transformers nor here; use tensor_parallel_size 1",
            param="tensor_parallel_size",
        )
    num_heads = text_config.num_attention_heads
    if num_heads % size:
        raise UnsupportedModelError(
            f"{name!r} ({family}) has {num_heads} attention heads, which {size} ranks cannot share evenly; use a divisor of "
            f"{num_heads} as tensor_parallel_size",
            param="tensor_parallel_size",
        )
    return plan


class SummedLinear(nn.Module):
    """`part` multiplies this rank's slice of the input; the products of all ranks are added."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.part(input)
        dist.all_reduce(out)
        return out


class GatheredLinear(nn.Module):
    """`part` gives this rank's slice of the output features; rank 0 gets all of them, the others keep their own."""

    def __init__(self, part: nn.Module, out_features: int, group: ProcessGroup) -> None:
        super().__init__()
        self.part = part
        self.out_features = out_features
        self._group = group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.part(input)
        width = -(-self.out_features // self._group.size)
        sent = nn.functional.pad(out, (0, width - out.shape[-1])).contiguous()
        if self._group.rank != 0:
            dist.gather(sent, dst=0)
            return out
        parts = [torch.empty_like(sent) for _ in range(self._group.size)]
        dist.gather(sent, parts, dst=0)
        return torch.cat(parts, dim=-1)[..., : self.out_features]


class SummedEmbedding(nn.Module):
    """The rows from `first_row` on; a token that is on another rank is 0 here, and the lookups of all ranks are added."""

    def __init__(self, weight: torch.Tensor, first_row: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._first_row = first_row

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input - self._first_row
        is_here = (rows >= 0) & (rows < len(self.weight))
        out = nn.functional.embedding(rows.where(is_here, 0), self.weight) * is_here[..., None]
        dist.all_reduce(out)
        return out


def localize(model: nn.Module, plan: dict[str, str], group: ProcessGroup) -> None:
    """Put local layers in place of the distributed ones of a loaded model."""
    for name, module in list(model.named_modules()):
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        weight = getattr(module, "weight", None)
        if not isinstance(weight, DTensor):
            continue
        local = weight.to_local()
        replacement: nn.Module | None = None
        if type(module) is nn.Linear and style in ("colwise", "rowwise", "colwise_gather_output", "colwise_rep"):
            bias = None if module.bias is None else _local(module.bias)
            if style == "rowwise" and group.rank != 0:
                bias = None  # added once
            part = nn.Linear(local.shape[1], local.shape[0], bias is not None, device="meta")
            part.weight = nn.Parameter(local, requires_grad=False)
            if bias is not None:
                part.bias = nn.Parameter(bias, requires_grad=False)
            if style == "colwise":
                replacement = part
            elif style == "rowwise":
                replacement = SummedLinear(part)
            else:
                replacement = GatheredLinear(part, module.out_features, group)
        elif isinstance(module, nn.Embedding) and style == "embedding_rowwise":
            replacement = SummedEmbedding(local, group.rank * -(-weight.shape[0] // group.size))
        if replacement is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()

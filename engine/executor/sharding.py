"""Which rank of a tensor-parallel group holds which part of the weights, and layers for such parts.

Names and parts are those of transformers' tensor-parallel plans, with which its loader reads on each rank that rank's
part alone; families without one have a plan here. What it leaves as distributed tensors with hooks is then put into
plain local
layers with one explicit collective each: the same arithmetic at less cost a step, and layers that can be packed.

    style                    part of a rank                   becomes
    colwise                  output features                  nn.Linear
    rowwise                  input features                   SummedLinear: the products of all ranks are added
    rowwise_split_input      input features                   SummedLinear, which takes its part of the input itself
    colwise_gather_output    output features                  GatheredLinear: all get all; of the head, rank 0 alone
    embedding_rowwise        rows of the vocabulary           SummedEmbedding
    moe_tp_experts           a part of every expert           the same module, whose results are added
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from transformers import AutoModelForCausalLM
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.pytorch_utils import Conv1D

from engine.errors import UnsupportedModelError
from engine.executor.process_group import ProcessGroup

# Styles of our own, in transformers' registry. Replicated: nothing is cut at load. The others: of GPT-2's Conv1D, which keeps
# its weight as [in_features, out_features], and Q, K and V in one.
REPLICATED, FUSED_QKV, CONV_COLWISE, CONV_ROWWISE = (
    f"pensieve_{name}" for name in ("replicated", "fused_qkv", "conv_colwise", "conv_rowwise")
)
# Those of transformers that become layers of this module.
_COLWISE = ("colwise", "colwise_gather_output", "colwise_rep")
_ROWWISE = ("rowwise", "rowwise_split_input", "rowwise_rep")
_OPT_LAYER, _GPT2_LAYER = "model.decoder.layers.*.", "transformer.h.*."
OWN_PLANS = {
    "opt": {
        **{f"{_OPT_LAYER}self_attn.{name}_proj": "colwise" for name in "qkv"},
        f"{_OPT_LAYER}self_attn.out_proj": "rowwise",
        f"{_OPT_LAYER}fc1": "colwise",
        f"{_OPT_LAYER}fc2": "rowwise",
        "lm_head": "colwise_gather_output",
    },
    "gpt2": {
        f"{_GPT2_LAYER}attn.c_attn": FUSED_QKV,
        f"{_GPT2_LAYER}attn.c_proj": CONV_ROWWISE,
        f"{_GPT2_LAYER}mlp.c_fc": CONV_COLWISE,
        f"{_GPT2_LAYER}mlp.c_proj": CONV_ROWWISE,
        "lm_head": "colwise_gather_output",
    },
}
# What modules of those families count of the whole model, and have to count of a rank's part.
OWN_COUNTS = {"opt": ("num_heads",), "gpt2": ("num_heads", "split_size")}


class ConvPart(TensorParallelLayer):
    """placements: of the parameters by name, for transformers' loader."""

    def __init__(self, placements: dict[str, Placement]) -> None:
        self._placements = placements

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        if param in self._placements:
            whole = module._parameters[param]
            assert whole is not None
            part = distribute_tensor(whole, mesh, [self._placements[param]], src_data_rank=None)
            module._parameters[param] = nn.Parameter(part, requires_grad=whole.requires_grad)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        return module  # `localize` does


ALL_PARALLEL_STYLES.register(REPLICATED, ConvPart({}))
ALL_PARALLEL_STYLES.register(
    FUSED_QKV, ConvPart({"weight": _StridedShard(1, split_factor=3), "bias": _StridedShard(0, split_factor=3)})
)
ALL_PARALLEL_STYLES.register(CONV_COLWISE, ConvPart({"weight": Shard(1), "bias": Shard(0)}))
ALL_PARALLEL_STYLES.register(CONV_ROWWISE, ConvPart({"weight": Shard(0)}))


def make_plan(name: str, hf_config: Any, size: int) -> dict[str, str]:
    """The style of each module or parameter, with `*` for the number of a layer.

    Raises UnsupportedModelError if the model cannot be sharded so many ways.
    """
    text_config = hf_config.get_text_config()
    family = text_config.model_type
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    plan: dict[str, str] = dict(OWN_PLANS.get(family) or model.tp_plan or {})

    def refuse(why: str, remedy: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{name!r} ({family}) cannot be shared by {size} ranks: {why}; {remedy}", param="tensor_parallel_size"
        )

    if not any("*" in key for key in plan):  # some have one for the head alone
        raise refuse(
            "neither transformers nor this engine has a tensor-parallel plan for it", "use tensor_parallel_size 1"
        )
    num_heads = text_config.num_attention_heads
    if num_heads % size:
        raise refuse(f"it has {num_heads} attention heads", f"use a tensor_parallel_size that divides {num_heads}")
    num_kv_heads = getattr(text_config, "num_key_value_heads", None) or num_heads
    kv_projections = [key for key, style in plan.items() if _is_kv_projection(key) and style == "colwise"]
    if kv_projections and num_kv_heads % size:
        if size % num_kv_heads:
            raise refuse(
                f"it has {num_kv_heads} KV heads",
                f"use a tensor_parallel_size that divides {num_kv_heads}, or a multiple of it",
            )
        plan |= dict.fromkeys(kv_projections, REPLICATED)
    embedding = next(key for key, module in model.named_modules() if module is model.get_input_embeddings())
    plan.setdefault(_generic(embedding), "embedding_rowwise")
    return plan


def is_own(plan: dict[str, str], text_config: Any) -> bool:
    """Whether transformers alone could not compute with that plan: `localize` has to come first."""
    return text_config.model_type in OWN_PLANS or REPLICATED in plan.values()


def localize(model: Any, plan: dict[str, str], group: ProcessGroup) -> None:
    """Put local layers in place of the distributed ones of a loaded model."""
    text_config = model.config.get_text_config()
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        style = plan.get(_generic(name))
        if style == "moe_tp_experts":
            _localize_experts(module)
        replacement: nn.Module | None = None
        if style == REPLICATED:
            _keep_kv_head(module, text_config, group)
        elif style in (FUSED_QKV, CONV_COLWISE, CONV_ROWWISE):
            replacement = _local_conv(module, style, group)
        elif type(module) is nn.Linear and isinstance(module.weight, DTensor):
            replacement = _local_linear(module, style, group, is_head=module is head)
        elif type(module) is nn.Embedding and isinstance(module.weight, DTensor):  # not one that scales, too
            first_row = group.rank * -(-module.weight.shape[0] // group.size)
            replacement = SummedEmbedding(local_part(module.weight), first_row)
        if replacement is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)
    for module in model.modules():
        for count in OWN_COUNTS.get(text_config.model_type, ()):
            if hasattr(module, count):
                setattr(module, count, getattr(module, count) // group.size)
        if REPLICATED in plan.values() and hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = text_config.num_attention_heads // group.size


class LocalPart(NamedTuple):
    """Which features of a linear layer a rank has: those of the input, and ranges of those of the output."""

    inputs: slice
    outputs: tuple[slice, ...]


def part_on_rank(
    name: str, shape: tuple[int, int], plan: Mapping[str, str], text_config: Any, group: ProcessGroup | None
) -> LocalPart | None:
    """What `localize` leaves on this rank of the linear layer of that name; None if that is not known here.

    shape: (in_features, out_features) of the whole layer.
    plan: see make_plan.
    """
    style, everything = plan.get(_generic(name)), slice(None)
    if group is None or style is None:
        return LocalPart(everything, (everything,))
    in_features, out_features = shape

    def own(start: int, num_features: int) -> slice:
        width = -(-num_features // group.size)
        first = min(group.rank * width, num_features)
        return slice(start + first, start + min(first + width, num_features))

    if style in (*_COLWISE, CONV_COLWISE):
        return LocalPart(everything, (own(0, out_features),))
    if style in (*_ROWWISE, CONV_ROWWISE):
        return LocalPart(own(0, in_features), (everything,))
    if style == REPLICATED:
        return LocalPart(everything, (_kv_head(out_features, text_config, group),))
    if style == FUSED_QKV:
        third = out_features // 3
        return LocalPart(everything, tuple(own(number * third, third) for number in range(3)))
    return None


def num_local_bytes(model: nn.Module) -> int:
    """Bytes of the weights on this rank; a tied weight counts once."""
    return sum({weights.data_ptr(): weights.nbytes for weights in map(local_part, model.parameters())}.values())


class SummedLinear(nn.Module):
    """`part` multiplies this rank's slice of the input; the products of all ranks are added."""

    def __init__(self, part: nn.Module, features: slice = slice(None)) -> None:
        """Wrap a rank's part of a layer.

        features: of the input, if it comes whole.
        """
        super().__init__()
        self.part = part
        self._features = features

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.part(input[..., self._features])
        dist.all_reduce(out)
        return out


class GatheredLinear(nn.Module):
    """A linear layer of which each rank has a slice of the output features, `part`.

    All ranks get all of them; or rank 0 alone does, and the others go on with their own.
    """

    def __init__(self, part: nn.Module, out_features: int, group: ProcessGroup, *, to_all: bool) -> None:
        super().__init__()
        self.part = part
        self.out_features = out_features
        self._group = group
        self._to_all = to_all

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.part(input)
        rank, size = self._group.rank, self._group.size
        width = -(-self.out_features // size)  # the last rank's slice may be shorter
        sent = nn.functional.pad(out, (0, width - out.shape[-1])).contiguous()
        parts = [torch.empty_like(sent) for _ in range(size)] if self._to_all or rank == 0 else None
        if sent.numel() == 0:
            pass  # a step that chooses no token
        elif self._to_all:
            dist.all_gather(parts, sent)
        else:
            dist.gather(sent, parts, dst=0)
        return out if parts is None else torch.cat(parts, dim=-1)[..., : self.out_features]


class SummedEmbedding(nn.Module):
    """The rows of an embedding from `first_row` on.

    A token that is on another rank is 0 here, and the lookups of all ranks are added.
    """

    def __init__(self, weight: torch.Tensor, first_row: int) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self._first_row = first_row

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input - self._first_row
        is_here = (rows >= 0) & (rows < len(self.weight))
        out = nn.functional.embedding(rows.where(is_here, 0), self.weight) * is_here[..., None]
        dist.all_reduce(out)
        return out


def _local_linear(layer: nn.Linear, style: str | None, group: ProcessGroup, *, is_head: bool) -> nn.Module | None:
    """None for a style that stays with transformers' hooks."""
    weight = local_part(layer.weight)
    bias = None if layer.bias is None else local_part(layer.bias)
    is_summed = style in _ROWWISE
    if is_summed and group.rank != 0:
        bias = None  # which is to be added once
    part = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    part.weight = _parameter(weight)
    if bias is not None:
        part.bias = _parameter(bias)
    if is_summed:
        first = group.rank * -(-layer.in_features // group.size)
        return SummedLinear(part, slice(None) if style == "rowwise" else slice(first, first + weight.shape[1]))
    if style in ("colwise_gather_output", "colwise_rep"):
        return GatheredLinear(part, layer.out_features, group, to_all=not is_head)
    return part if style == "colwise" else None


def _localize_experts(experts: nn.Module) -> None:
    """In place; each rank has a part of every expert, and the results of all ranks are added."""
    if not any(isinstance(weight, DTensor) for weight in experts.parameters(recurse=False)):
        return
    for key, weight in list(experts.named_parameters(recurse=False)):
        experts._parameters[key] = _parameter(local_part(weight))
    experts.__dict__.pop("forward", None)  # transformers' hook

    def add(_module: nn.Module, _args: Any, out: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(out)
        return out

    experts.register_forward_hook(add)


def _local_conv(layer: Conv1D, style: str, group: ProcessGroup) -> nn.Module:
    weight, bias = local_part(layer.weight), local_part(layer.bias)
    if style == CONV_ROWWISE and group.rank != 0:
        bias = torch.zeros_like(bias)
    layer.weight, layer.bias, layer.nf = _parameter(weight), _parameter(bias), weight.shape[1]
    return SummedLinear(layer) if style == CONV_ROWWISE else layer


def _keep_kv_head(layer: nn.Linear, text_config: Any, group: ProcessGroup) -> None:
    """Of all KV heads, the one that this rank's query heads attend to; its neighbours keep the same."""
    head = _kv_head(layer.out_features, text_config, group)
    layer.weight = _parameter(layer.weight[head].clone())
    if layer.bias is not None:
        layer.bias = _parameter(layer.bias[head].clone())
    layer.out_features = head.stop - head.start


def _kv_head(out_features: int, text_config: Any, group: ProcessGroup) -> slice:
    """The features of this rank's one KV head."""
    num_kv_heads = text_config.num_key_value_heads
    head_dim = out_features // num_kv_heads
    first = group.rank * num_kv_heads // group.size * head_dim
    return slice(first, first + head_dim)


def _is_kv_projection(key: str) -> bool:
    return key.rsplit(".", 1)[-1] in ("k_proj", "v_proj")


def _generic(name: str) -> str:
    """As the plans write it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)

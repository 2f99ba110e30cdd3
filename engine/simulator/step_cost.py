"""How long a step takes, from what it computes and copies."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from engine.core.cache.cost_model import CostModel
from engine.core.plan import StepPlan
from engine.core.tier_table import CPU
from engine.simulator.devices import Device, ModelShape


class StepWork(NamedTuple):
    """What a step computes and copies, as far as it takes time.

    num_decodes, decode_context_len: segments of one token, and the tokens that these attend to, all together.
    num_prompt_tokens, num_prompt_pairs: tokens of other segments, and the pairs (token, token that it attends to).
    num_swap_ins, num_evictions, num_swap_outs: blocks; evictions come before anything else of the step.
    prompt_context_len: tokens in front of the segments of prompts, all together. num_starts: requests that begin.
    """

    num_decodes: int = 0
    decode_context_len: int = 0
    num_prompt_tokens: int = 0
    num_prompt_pairs: int = 0
    num_swap_ins: int = 0
    num_evictions: int = 0
    num_swap_outs: int = 0
    prompt_context_len: int = 0
    num_starts: int = 0

    @classmethod
    def of(cls, plan: StepPlan) -> StepWork:
        num_decodes = decode_context_len = num_tokens = num_pairs = prompt_context_len = 0
        for segment in plan.segments:
            if segment.token_ids is None:
                num_decodes += 1
                decode_context_len += segment.start + 1
            else:
                num = len(segment.token_ids)
                num_tokens += num
                num_pairs += num * segment.start + num * (num + 1) // 2
                prompt_context_len += segment.start
        return cls(
            num_decodes,
            decode_context_len,
            num_tokens,
            num_pairs,
            len(plan.swap_ins),
            len(plan.evictions),
            len(plan.swap_outs),
            prompt_context_len,
            len(plan.starts),
        )


class StepCost(Protocol):
    """How long steps take on one device, with one model."""

    def step_time(self, work: StepWork) -> float:
        """In seconds."""
        ...

    def cost_model(self, chunk_size: int) -> CostModel:
        """The same for eviction and loading: seconds of one chunk, if steps are full."""
        ...


class Roofline:
    """The larger of what arithmetic and what memory takes, from the shape of a model and the figures of a device.

    Matrix products take the longer of reading all weights and computing all tokens; attention of prompts computes, that of
    decodes reads KV; devices that share a model sum up their activations in a ring; a constant goes with each step, and one
    with each request that decodes. Swap-ins go beside the computation layer by layer, so the step takes the longer of the
    two, and one layer more; swap-outs ahead of time go beside all of it; evictions come first.

    token_s: of one more token in a large batch, without attention. sum_s: of summing up its activations. pair_s: of one pair
    of tokens in the attention of prompts. weights_s: to read all weights once. context_token_s: of one token of context in a
    decode. load_s, store_s: of one block.
    """

    def __init__(self, model: ModelShape, device: Device, bytes_per_block: float) -> None:
        num = device.num_devices
        attention_rate = device.attention_flops_per_s or device.flops_per_s * device.matmul_efficiency
        self.token_s = model.flops_per_token / (num * device.flops_per_s * device.matmul_efficiency)
        self.pair_s = model.flops_per_pair / (num * attention_rate)
        self.weights_s = model.weight_bytes / (num * device.hbm_bytes_per_s * device.hbm_efficiency)
        self.context_token_s = model.kv_bytes_per_token / (num * device.hbm_bytes_per_s * device.kv_efficiency)
        # In a ring, each device sends all but 1/n of the bytes twice: once to sum up, once to spread the sums.
        ring_bytes = model.summed_bytes_per_token * 2 * (num - 1) / num
        self.sum_s = ring_bytes / device.interconnect_bytes_per_s if device.interconnect_bytes_per_s else 0.0
        self.load_s = bytes_per_block / (num * device.host_to_device)
        self.store_s = bytes_per_block / (num * device.device_to_host)
        self.overhead_s = device.step_overhead_s
        self.decode_overhead_s = device.decode_overhead_s
        self._layer_share = 1 / model.num_layers

    def compute_time(self, work: StepWork) -> float:
        """Of what a step computes, in seconds, without the constant that goes with each step."""
        compute_s = work.num_prompt_pairs * self.pair_s + work.decode_context_len * self.context_token_s
        num_tokens = work.num_decodes + work.num_prompt_tokens
        if num_tokens:
            compute_s += max(self.weights_s, num_tokens * self.token_s) + num_tokens * self.sum_s
        return compute_s

    def step_time(self, work: StepWork) -> float:
        compute_s = self.compute_time(work)
        overhead_s = self.overhead_s + work.num_decodes * self.decode_overhead_s
        num_swap_ins, num_evictions, num_swap_outs = work.num_swap_ins, work.num_evictions, work.num_swap_outs
        if not (num_swap_ins or num_evictions or num_swap_outs):
            return compute_s + overhead_s
        if num_swap_ins:
            compute_s = max(compute_s, num_swap_ins * self.load_s + compute_s * self._layer_share)
        beside_s = max(compute_s, num_swap_outs * self.store_s)
        return num_evictions * self.store_s + beside_s + overhead_s

    def cost_model(self, chunk_size: int) -> CostModel:
        return CostModel(
            constant=(self.token_s + self.sum_s) * chunk_size,
            per_context_token=self.pair_s * chunk_size,
            chunk_size=chunk_size,
            load_costs={CPU: self.load_s},
            is_in_seconds=True,
        )


class SeparateBatches:
    """Prompts and decodes are never in one batch: a step with both is two, which read all weights twice.

    The scheduler is the same, and so is which tokens a step computes. It is the paper's baseline of Figure 13; no engine here
    serves so.

    cost: of a step of one kind, which has what is copied, too, if it has prompts.
    """

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost

    def step_time(self, work: StepWork) -> float:
        if not (work.num_decodes and work.num_prompt_tokens):
            return self._cost.step_time(work)
        prompts = work._replace(num_decodes=0, decode_context_len=0)
        decodes = StepWork(work.num_decodes, work.decode_context_len)
        return self._cost.step_time(prompts) + self._cost.step_time(decodes)

    def cost_model(self, chunk_size: int) -> CostModel:
        return self._cost.cost_model(chunk_size)

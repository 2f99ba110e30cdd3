"""The step times of DistServe's simulator for OPT-13B on one A100: measured by others, as a check of ours.

From github.com/LLMServe/DistServe, simdistserve/estimators (82831f1): get_prefill_time and get_decode_time, with the
coefficients "facebook/opt-13b", 1 GPU, of profile_data/profiler-a100-80g.distserve.json.
"""

from __future__ import annotations

from engine.simulator.devices import DEVICES, MODELS
from engine.simulator.step_cost import Roofline, StepWork

# Milliseconds: of a step, of a token, and of the square of a prompt's length.
PREFILL_MS = (18.10254647486372, 0.1019122572698738, 7.122264314252114e-06)
# Milliseconds: of a step, of a token of context, and of a request; for fewer requests than the threshold, and for more.
DECODE_SMALL_MS = (19.934702624895458, 0.0006269356524350583, 0.03850697740828398)
DECODE_LARGE_MS = (7.1661889468253595, 0.0005798000403396046, 0.15831096191764046)
LARGE_BATCH = 95


class DistServe(Roofline):
    """Linear in tokens, squares of lengths, requests and context, as fitted to measured steps.

    Theirs either prefills or decodes, in one tier. A step of ours that does both takes the two together, without the constant
    of the decodes; copies are those of the roofline of an A100.
    """

    def __init__(self, bytes_per_block: float) -> None:
        super().__init__(MODELS["opt-13b"], DEVICES["a100-80gb"], bytes_per_block)
        _, token_ms, square_ms = PREFILL_MS
        self.token_s = token_ms / 1e3
        self.pair_s = 2 * square_ms / 1e3  # a prompt has half as many pairs as its length has squared
        self.overhead_s = 0.0  # is in what is computed

    def compute_time(self, work: StepWork) -> float:
        if not work.num_prompt_tokens:
            return self._decode_s(work, with_constant=True)
        prefill_s = work.num_prompt_tokens * self.token_s + work.num_prompt_pairs * self.pair_s
        return PREFILL_MS[0] / 1e3 + prefill_s + self._decode_s(work, with_constant=False)

    def _decode_s(self, work: StepWork, *, with_constant: bool) -> float:
        num_decodes = work.num_decodes
        if not num_decodes:
            return 0.0
        constant, context_token, request = DECODE_SMALL_MS if num_decodes < LARGE_BATCH else DECODE_LARGE_MS
        total = work.decode_context_len * context_token + num_decodes * request
        return (total + constant if with_constant else total) / 1e3

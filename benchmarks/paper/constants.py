"""All constants of the paper's figures, written down before the figures are simulated, each with its source.

The paper: Yu, Lin, Li, "Stateful Large Language Model Serving with Pensieve", EuroSys 2025. What was fitted was fitted on
one curve: that of Pensieve in Figure 10a. All other systems, models and data sets are simulated with it as they are
("unchanged"), and once more with at most one published constant for a model and one for a data set ("one constant").
"""

from __future__ import annotations

# The figures of the A100: engine/simulator/devices.py, "a100-80gb", from the paper's Figures 3 and 4.
DEVICE = "a100-80gb"

# Section 5: 40 GB a GPU for KV in every system, up to 220 GB of host memory a GPU; chunks of 32 tokens, the watermark at
# 25 %, 10 % of blocks reserved; contexts up to 16,384 tokens.
GPU_BYTES, HOST_BYTES = 40e9, 220e9
CHUNK_SIZE, WATERMARK, RESERVE, WINDOW = 32, 0.25, 0.10, 16_384
# Section 5: an exponential think time with a mean of 60 s.
THINK_S = 60.0
# vLLM 0.2.0 keeps 1 % of its blocks free when it admits a request (vllm/core/block_manager.py, watermark).
VLLM_RESERVE = 0.01

# Fitted on Pensieve's curve of 10a: the time of a step that is neither arithmetic nor memory; what each request that decodes
# adds to it (sampling, tables, detokenising); and the spread of the numbers of turns (lognormal). vLLM has the same.
STEP_OVERHEAD_S, DECODE_OVERHEAD_S = 0.007, 0.00025
TURN_SIGMA = 0.6
# TensorRT-LLM's runtime is in C++: what Figure 3 leaves of a step of 32 decodes, which is 20.9 ms at zero context, after the
# 15.7 ms of the weights. Not fitted.
NATIVE_OVERHEAD_S = 0.0052
# Not fitted: the spread of the lengths of requests and answers, which the paper does not give.
LENGTH_SIGMA = 1.0
# Not in the paper: limits of a step. Prompts join a batch "while its token count is under a threshold" (section 4.2).
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 256, 2048
# The latency that is compared: the text says mean, and 90th percentile. Of Pensieve's curve in 10a, the mean is 11 to 39 %
# below the points with the same fit.
METRIC = "s_per_token_p90"

# One published constant for a model, besides.
# Kernels of that time read KV once for each query head: "paged attention kernel also does not leverage the benefits of
# MQA/GQA" (github.com/vllm-project/vllm/issues/1880, of December 2023); Pensieve's was built on CUTLASS's, of which the same
# holds. TensorRT-LLM 0.12 has kernels for groups of query heads. So decodes read KV at this share of the bandwidth:
KV_SHARE = {"llama-2-13b-gqa": 10 / 40, "llama-2-70b": 8 / 64}
# Azure's NC A100 v4 has PCIe cards, and pairs of them with NVLink: a ring over four passes PCIe 4.0 x16, as copies reach it.
INTERCONNECT_BYTES_PER_S = 25e9
# Which of the two counts as the one constant of a model that both concern: what all models on four GPUs share.
ONE_CONSTANT = {
    "opt-13b": (),
    "llama-2-13b-gqa": ("kv_share",),
    "opt-66b": ("interconnect",),
    "llama-2-70b": ("interconnect",),
}
# And one for a data set. UltraChat's authors had 3 to 7 rounds generated about questions, 2 to 4 otherwise (Ding et al. 2023,
# github.com/thunlp/UltraChat). Evenly within each, with the paper's mean of 3.86, this is a standard deviation of 1.49: as
# lognormal, 0.37. ShareGPT's is the fitted one.
ULTRACHAT_TURN_SIGMA = 0.37
# Tried after 10c and 10d had been seen, to say what dominates their errors; nothing else uses it: lengths of one model's
# answers spread less than those of ShareGPT's many.
ULTRACHAT_LENGTH_SIGMA = 0.5

# Simulated: seconds, and of them those that do not count. Chunks of 32 tokens as in the paper for OPT-13B; larger ones for
# models with small KV, whose contexts have many chunks.
DURATION_S, WARM_UP_S = 900.0, 300.0
COARSE_CHUNK_SIZE = 64
# Shares of the rate at which the paper's curve passes its latency: these rates are simulated besides those of the search.
FRACTIONS = {
    "10a": (0.2, 0.4, 0.6, 0.75, 0.9, 0.95, 1.05),
    "10b": (0.3, 0.6, 0.8),
}
# Latencies at which digitised curves are compared, in seconds a token, and the one below which a curve is flat.
LEVELS = (0.05, 0.08, 0.12, 0.18)
BEND_S = 0.08
# Figure 14: rates offered, seeds, and sizes of the CPU tier as shares of the paper's.
EVICTION_RATES, EVICTION_SEEDS, EVICTION_HOST_SHARES = (3.4, 3.8), (0, 1, 2), (1.0, 0.5)
# Figure 15: mean think times. The paper's reach from 30 to 600 s; runs are as long as 20 of them, with half to warm up.
THINK_TIMES_S = (30.0, 60.0, 120.0, 300.0, 600.0)
FIGURE_15_CHUNK_SIZE = 128

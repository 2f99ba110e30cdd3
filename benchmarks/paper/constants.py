"""All constants of the paper's figures, written down before they are simulated, each with its source.

The paper: Yu, Lin, Li, "Stateful Large Language Model Serving with Pensieve", EuroSys 2025. What is fitted was fitted on
Figure 10a by an earlier prototype with another cost model for the same device, and not again since; no other panel was
looked at: 10b is simulated with the same constants, as a prediction.
"""

from __future__ import annotations

# The figures of the A100: engine/simulator/devices.py, "a100-80gb", from the paper's Figures 3 and 4.
DEVICE = "a100-80gb"

# Section 5: 40 GB a GPU for KV in every system, up to 220 GB of host memory a GPU; chunks of 32 tokens, the watermark at
# 25 %, 10 % of blocks reserved; contexts up to 16,384 tokens.
GPU_BYTES, HOST_BYTES = 40e9, 220e9
CHUNK_SIZE, WATERMARK, RESERVE, WINDOW = 32, 0.25, 0.10, 16_384
# Section 5: an exponential think time with a mean of 60 s. (The default of sharegpt-like and ultrachat-like.)
THINK_S = 60.0

# Fitted on 10a: the spread of the numbers of turns (lognormal), and the time of a step that is neither arithmetic nor memory,
# in seconds. vLLM 0.2.0 scheduled and prepared its inputs in Python on the critical path.
TURN_SIGMA = 0.6
OVERHEAD_S = {"vllm-0.2.0": 0.010, "pensieve-gpu-only": 0.008, "pensieve": 0.008}
# Not fitted: the spread of the lengths of requests and answers, which the paper does not give.
LENGTH_SIGMA = 1.0

# Not in the paper: limits of a step. Prompts join a batch "while its token count is under a threshold" (section 4.2).
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 256, 2048
# The latency that is compared: the text says mean, and 90th percentile. The prototype's mean was 15 to 48 % below the points.
METRIC = "s_per_token_p90"

# Requests a second that are offered, by figure. The points are at the rate that is achieved, as the paper's move left when a
# system is saturated.
RATES = {
    "10a": (0.5, 1.0, 1.5, 2.0, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0),
    "10b": (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0),
}
# The highest rate that is worth simulating.
SATURATED = {
    "10a": {"vllm-0.2.0": 3.25, "pensieve-gpu-only": 3.25, "pensieve": 4.0},
    "10b": {"vllm-0.2.0": 7.0, "pensieve-gpu-only": 7.0, "pensieve": 10.0},
}
# Latencies at which rates are compared, in seconds a token.
LEVELS = {"10a": (0.05, 0.08, 0.12, 0.18), "10b": (0.05, 0.08, 0.12, 0.18)}
DURATION_S, WARM_UP_S = 1800.0, 600.0

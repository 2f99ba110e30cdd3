"""From logits to the next tokens, for a batch of requests with different parameters. Owns no model and no batch state; each
request brings its SamplingState.

Randomness is one uniform number per (seed, position) and inverse transform sampling, so that a resumed request, or the
same one in another batch, draws the same tokens.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch

from engine.core.plan import Logprobs
from engine.core.request import SamplingParams

# Tokens that are sorted at first where a filter is on.
MIN_CANDIDATES = 64
# Of what is more than 0, and of what is finite, in the float32 that is sampled in.
SMALLEST = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(torch.float32).max


class SamplingState:
    """What sampling has to remember of a request. token counts: of the answer, for the penalties; prompt_ids: distinct
    ids of the prompt."""

    def __init__(
        self,
        params: SamplingParams,
        num_tokens: int,
        num_prompt_tokens: int,
        stop_token_ids: Sequence[int],
        token_ids: Sequence[int] = (),
    ) -> None:
        """token_ids: all `num_tokens` of the context; needed where there are penalties."""
        self.params = params
        self.num_tokens = num_tokens
        self.num_prompt_tokens = num_prompt_tokens
        self.stop_token_ids = list(stop_token_ids)
        self.prompt_ids: set[int] = set()
        self.output_counts: Counter[int] = Counter()
        if params.has_penalties:
            self.prompt_ids = set(token_ids[:num_prompt_tokens])
            self.output_counts = Counter(token_ids[num_prompt_tokens:])

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    def append(self, token_id: int) -> None:
        self.num_tokens += 1
        if self.params.has_penalties:
            self.output_counts[token_id] += 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def sample(
    logits: torch.Tensor, states: Sequence[SamplingState]
) -> tuple[tuple[int, ...], tuple[Logprobs | None, ...]]:
    """The next token of each request, appended to its state, and their log-probabilities as StepResult has them: the model's
    own, before penalties and temperature. logits: [len(states), vocabulary], any float dtype, not kept."""
    if not states:
        return (), ()
    logits = logits.float()
    wants_logprobs = [row for row, state in enumerate(states) if state.params.logprobs is not None]
    raw_logprobs = logits[wants_logprobs].log_softmax(-1) if wants_logprobs else None
    if any(_changes_logits(state) for state in states):
        logits = logits.clone()
        for row, state in enumerate(states):
            _apply_penalties(logits[row], state)
    token_ids = logits.argmax(-1)
    drawn = [row for row, state in enumerate(states) if not state.params.is_greedy]
    if drawn:
        token_ids[drawn] = _draw(logits[drawn], [states[row] for row in drawn])
    chosen = tuple(token_ids.tolist())
    for state, token_id in zip(states, chosen, strict=True):
        state.append(token_id)
    if raw_logprobs is None:
        return chosen, ()
    logprobs: list[Logprobs | None] = [None] * len(states)
    for row, values in zip(wants_logprobs, raw_logprobs, strict=True):
        top_values, top_ids = values.topk(min(states[row].params.logprobs or 0, values.numel()))
        top = tuple(zip(top_ids.tolist(), top_values.tolist(), strict=True))
        logprobs[row] = Logprobs(values[chosen[row]].item(), top)
    return chosen, tuple(logprobs)


def _changes_logits(state: SamplingState) -> bool:
    return state.params.has_penalties or state.num_output_tokens < state.params.min_tokens


def _apply_penalties(logits: torch.Tensor, state: SamplingState) -> None:
    """In place, on one row. Repetition counts prompt and answer; presence and frequency the answer alone."""
    params = state.params
    if state.num_output_tokens < params.min_tokens and state.stop_token_ids:
        logits[state.stop_token_ids] = float("-inf")
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(state.prompt_ids | state.output_counts.keys()), device=logits.device)
        values = logits[seen]
        # In float32 the smallest penalties would be 0, and a logit divided by one is infinite, which is not to be drawn from.
        penalty = max(params.repetition_penalty, SMALLEST)
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty).clamp(max=LARGEST)
    if state.output_counts and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(list(state.output_counts), device=logits.device)
        counts = torch.tensor(list(state.output_counts.values()), dtype=logits.dtype, device=logits.device)
        logits[ids] -= params.frequency_penalty * counts + params.presence_penalty


def _draw(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Token ids [rows]. Each row goes the same way whatever its neighbours want, or its draw would depend on them."""
    device = logits.device
    # In float32 the smallest temperatures would be 0, and 0 / 0 is no number.
    temperature = torch.tensor([max(state.params.temperature, SMALLEST) for state in states], device=device)
    uniforms = torch.tensor(
        [uniform(state.params.seed or 0, state.num_tokens) for state in states],
        dtype=torch.float64,
        device=device,
    )
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    scaled = (logits - logits.max(-1, keepdim=True).values) / temperature[:, None]
    out = torch.empty(len(states), dtype=torch.long, device=device)
    plain = [row for row, state in enumerate(states) if not _is_filtered(state.params)]
    if plain:
        out[plain] = _invert_cdf(scaled[plain].softmax(-1), uniforms[plain])
    filtered = [row for row, state in enumerate(states) if _is_filtered(state.params)]
    if filtered:
        probs, ids = _filter(scaled[filtered], [states[row].params for row in filtered])
        chosen = _invert_cdf(probs, uniforms[filtered])
        out[filtered] = ids.gather(-1, chosen[:, None])[:, 0]
    return out


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _filter(scaled: torch.Tensor, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k, then top-p, then min-p, for each row of `scaled` [rows, vocabulary], whose maximum is 0. Returns probabilities
    (not normalised, 0 for what is left out, at least one above) and token ids, both [rows, candidates], most probable
    first, equal ones by id.

    All three keep a beginning of the sorted vocabulary, and nearly always a short one: so only some candidates are
    sorted, and more where a row turns out to keep them all. What a row keeps does not depend on their number, and so not
    on its neighbours.
    """
    device, vocabulary = scaled.device, scaled.shape[-1]
    top_k = torch.tensor([min(p.top_k or vocabulary, vocabulary) for p in params], device=device)[:, None]
    # Not 0, which would leave nothing of a row.
    top_p = torch.tensor([max(p.top_p, SMALLEST) if p.top_p < 1.0 else float("inf") for p in params], device=device)[
        :, None
    ]
    min_p = torch.tensor([p.min_p for p in params], device=device)[:, None]
    whole = scaled.exp().sum(-1, keepdim=True)
    num_candidates = max([MIN_CANDIDATES, *(2 * p.top_k for p in params)])
    while True:
        num_candidates = min(num_candidates, vocabulary)
        values, ids = _sorted_candidates(scaled, num_candidates)
        ranks = torch.arange(num_candidates, device=device)
        weights = values.exp() * (ranks < top_k)
        probs = weights / torch.where(top_k < vocabulary, weights.sum(-1, keepdim=True), whole)
        kept = (ranks < top_k) & (probs.cumsum(-1) - probs < top_p) & (probs >= min_p * probs[:, :1])
        smallest_kept = values.masked_fill(~kept, float("inf")).amin(-1)
        # Strictly below: of equal values around the end, all have to be seen for the ids to decide.
        if num_candidates == vocabulary or bool((values[:, -1] < smallest_kept).all()):
            return probs * kept, ids
        num_candidates *= 8


def _sorted_candidates(scaled: torch.Tensor, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest values of each row and their ids, descending, equal values by id."""
    ids = scaled.topk(num_candidates, sorted=False).indices.sort(dim=-1).values
    values, order = scaled.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _invert_cdf(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Index of each row [rows, n] at which its cumulative probability passes uniform * total; probability 0 never wins."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # uniform * total may round up to total itself, which nothing passes.
    targets = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]

"""From logits to the next tokens, for a batch of requests with different parameters.

Owns no model and no batch state; each request brings its SamplingState. Randomness is one uniform number per (seed,
position) and inverse transform sampling, so that a resumed request, or the same one in another batch, draws the same
tokens.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cache
from typing import Any

import numpy as np
import torch

from engine.core.plan import Logprobs
from engine.core.request import SamplingParams
from engine.grammar.interface import Matcher, MatcherBehind

# Tokens that are sorted at first if a filter is on; and if more would be sorted only when the step is over.
MIN_CANDIDATES = 64
MIN_CANDIDATES_UNSEEN = 1024
# Of what is more than 0, and of what is finite, in the float32 that is sampled in.
SMALLEST = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(torch.float32).max
# Rows whose masks are spread out at the same time: as float32 over the vocabulary they take 32 times their room.
MASKED_ROWS = 16


class SamplingState:
    """What sampling has to remember of a request.

    num_tokens: of its context, including those that are being sampled.
    output_counts: how often each of the answer's known tokens occurs, for the penalties.
    prompt_ids: distinct ids of the prompt.
    chosen_behind: what was chosen behind guesses, in order, until it is known how much of that the answer goes on with.
    matcher: which tokens the request's grammar allows behind the known ones; None = it has no grammar.
    """

    def __init__(
        self,
        params: SamplingParams,
        num_tokens: int,
        num_prompt_tokens: int,
        stop_token_ids: Sequence[int],
        token_ids: Sequence[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        """Start with a context.

        token_ids: all `num_tokens` of the context; needed only for penalties.
        matcher: one that has accepted those of the answer; needed only for a grammar.
        """
        self.params = params
        self.matcher = matcher
        self.num_tokens = num_tokens
        self.num_prompt_tokens = num_prompt_tokens
        self.stop_token_ids = list(stop_token_ids)
        self.chosen_behind: Sequence[int] = ()
        # Nothing to know of the request but its logits.
        self.takes_maximum = (
            params.is_greedy
            and not params.needs_token_ids
            and params.min_tokens == 0
            and params.logprobs is None
            and not params.logit_bias
            and matcher is None
        )
        self.prompt_ids: set[int] = set()
        self.output_counts: Counter[int] = Counter()
        if params.has_penalties:
            self.prompt_ids = set(token_ids[:num_prompt_tokens])
            self.output_counts = Counter(token_ids[num_prompt_tokens:])

    def behind(self, guesses: Sequence[int]) -> list[SamplingState]:
        """Copies of this one, for the tokens behind each of the guesses if it and those in front of it are true."""
        copies: list[SamplingState] = []
        ahead = None if self.matcher is None else self.matcher.copy()
        for guess in guesses:
            state = copy(copies[-1] if copies else self)
            state.num_tokens += 1
            if self.params.has_penalties:
                state.output_counts = state.output_counts.copy()
                state.output_counts[guess] += 1
            if ahead is not None:
                state.matcher = MatcherBehind(ahead, guess)
            copies.append(state)
        return copies

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    def expect_token(self) -> None:
        """Note that the next token is being sampled."""
        self.num_tokens += 1

    def note_token(self, token_id: int) -> None:
        """Note which token was sampled."""
        if self.params.has_penalties:
            self.output_counts[token_id] += 1
        if self.matcher is not None:
            self.matcher.accept(token_id)

    def go_on_from(self, num_tokens: int) -> None:
        """Note as many of the tokens behind guesses as a context of `num_tokens` has; the others were never said."""
        for token_id in self.chosen_behind[: num_tokens - self.num_tokens]:
            self.expect_token()
            self.note_token(token_id)
        self.chosen_behind = ()


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def sample(
    logits: torch.Tensor, states: Sequence[SamplingState]
) -> tuple[tuple[int, ...], tuple[Logprobs | None, ...]]:
    """The next token of each request, appended to its state, and log-probabilities as StepResult has them.

    Log-probabilities are the model's own, before penalties and temperature.

    logits: [len(states), vocabulary], any float dtype, not kept.
    """
    batch = SamplingBatch(states, logits.shape[-1])
    for state in states:
        state.expect_token()
    arrays = {**batch.arrays, **batch.make_masks()}
    return batch.draw(logits, {name: torch.from_numpy(array) for name, array in arrays.items()}).finish()


class SamplingBatch:
    """What sampling has to know of the requests of a step, as arrays, made before the logits are there.

    On a GPU they travel with the step's other arrays, and nothing waits. There are only those arrays that these requests
    need.

    *_rows: rows of the logits.
    biased, barred, seen, said: places in the flattened logits; bias, seen_penalty and said_amount belong to them.
    temperature, uniform: of the rows that are drawn, first those without a filter (`plain_rows`), then the others
        (`filtered_rows`, with top_k, top_p and min_p).
    Masks of grammars are made apart, because they can be made while the logits are computed.
    """

    def __init__(self, states: Sequence[SamplingState], vocab_size: int) -> None:
        self.states = tuple(states)
        self._vocab_size = vocab_size
        self.arrays: dict[str, np.ndarray] = {}
        self.filtered_params: list[SamplingParams] = []
        self.logprob_rows: list[int] = []
        if all(state.takes_maximum for state in states):
            return
        self._add_penalties(vocab_size)
        drawn = [row for row, state in enumerate(states) if not state.params.is_greedy]
        plain = [row for row in drawn if not _is_filtered(states[row].params)]
        filtered = [row for row in drawn if _is_filtered(states[row].params)]
        self.filtered_params = [states[row].params for row in filtered]
        if drawn:
            ordered = [states[row] for row in (*plain, *filtered)]
            # In float32 the smallest temperatures would be 0, and 0 / 0 is no number.
            self._add("temperature", [max(state.params.temperature, SMALLEST) for state in ordered], np.float32)
            uniforms = [uniform(state.params.seed or 0, state.num_tokens) for state in ordered]
            self._add("uniform", uniforms, np.float64)
        self._add("plain_rows", plain, np.int64)
        self._add("filtered_rows", filtered, np.int64)
        if filtered:
            for name, array in zip(
                ("top_k", "top_p", "min_p"), _filters(self.filtered_params, vocab_size), strict=True
            ):
                self.arrays[name] = array
        self.logprob_rows = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        self._add("logprob_rows", self.logprob_rows, np.int64)

    @property
    def has_masks(self) -> bool:
        """Whether grammars say which tokens may be chosen."""
        return any(state.matcher is not None for state in self.states)

    def make_masks(self) -> dict[str, np.ndarray]:
        """The masks of grammars, as arrays; none without grammars.

        masked_rows: rows of the logits.
        masks: uint8 [masked_rows, bytes], a bit a token, the lowest first: those that grammars allow.
        """
        rows = [(row, state.matcher) for row, state in enumerate(self.states) if state.matcher is not None]
        if not rows:
            return {}
        masks = np.empty((len(rows), 4 * -(-self._vocab_size // 32)), np.uint8)
        for mask, (_, matcher) in zip(masks, rows, strict=True):
            matcher.fill(mask)
        return {"masked_rows": np.array([row for row, _ in rows], np.int64), "masks": masks}

    def draw(
        self, logits: torch.Tensor, arrays: Mapping[str, torch.Tensor], *, looks_later: bool | None = None
    ) -> Draw:
        """Start to choose the next tokens; waits for nothing.

        arrays: `self.arrays` and the masks as tensors on the device of the logits.
        looks_later: sort a fixed number of candidates, and verify with the result that they were enough, instead of
            waiting for the device now. None: on GPUs only. The tokens are the same.
        """
        if looks_later is None:
            looks_later = logits.device.type != "cpu"
        # The largest of half-precision logits needs no float32 copy of them, which takes a GPU as long as the search. A CPU
        # is faster with it.
        takes_maxima = not self.arrays and not self.has_masks and looks_later
        return Draw(self, logits if takes_maxima else logits.float(), arrays, looks_later)

    def _add(self, name: str, values: Sequence[Any], dtype: type) -> None:
        if len(values) > 0:
            self.arrays[name] = np.array(values, dtype)

    def _add_penalties(self, vocab_size: int) -> None:
        """With biases. Repetition counts prompt and answer; presence and frequency the answer alone."""
        biased: list[int] = []
        bias: list[float] = []
        barred: list[int] = []
        seen: list[int] = []
        said: list[int] = []
        seen_penalty: list[float] = []
        said_amount: list[np.float32] = []
        for row, state in enumerate(self.states):
            params, start = state.params, row * vocab_size
            in_vocabulary = [pair for pair in params.logit_bias if pair[0] < vocab_size]
            biased += [start + i for i, _ in in_vocabulary]
            bias += [amount for _, amount in in_vocabulary]
            if state.num_output_tokens < params.min_tokens:
                barred += [start + i for i in state.stop_token_ids if i < vocab_size]
            if params.repetition_penalty != 1.0:
                ids = state.prompt_ids | state.output_counts.keys()
                seen += [start + i for i in ids]
                # In float32 the smallest penalties would be 0, and a logit divided by one is infinite, which is not to be
                # drawn from.
                seen_penalty += [max(params.repetition_penalty, SMALLEST)] * len(ids)
            if params.presence_penalty or params.frequency_penalty:
                frequency, presence = np.float32(params.frequency_penalty), np.float32(params.presence_penalty)
                said += [start + i for i in state.output_counts]
                said_amount += [frequency * np.float32(n) + presence for n in state.output_counts.values()]
        self._add("biased", biased, np.int64)
        self._add("bias", bias, np.float32)
        self._add("barred", barred, np.int64)
        self._add("seen", seen, np.int64)
        self._add("seen_penalty", seen_penalty, np.float32)
        self._add("said", said, np.int64)
        self._add("said_amount", said_amount, np.float32)


class Draw:
    """The tokens of one step, on their way to host memory.

    token_ids: int64 [rows], on the device.
    was_corrected: the first choice of tokens turned out to be wrong in `finish`.
    """

    def __init__(
        self, batch: SamplingBatch, logits: torch.Tensor, arrays: Mapping[str, torch.Tensor], looks_later: bool
    ) -> None:
        self._batch = batch
        self._arrays = arrays
        self._logprobs = logits[arrays["logprob_rows"]].log_softmax(-1) if batch.logprob_rows else None
        self._is_sure: torch.Tensor | None = None
        self.was_corrected = False
        logits = _penalised(logits, arrays)
        self.token_ids = logits.argmax(-1)
        num_plain = len(arrays.get("plain_rows", ()))
        if num_plain > 0:
            scaled = self._scaled(logits, arrays["plain_rows"], slice(num_plain))
            self.token_ids[arrays["plain_rows"]] = _invert_cdf(scaled.softmax(-1), arrays["uniform"][:num_plain])
        if "filtered_rows" in arrays:
            # Kept for a second look.
            self._filtered = self._scaled(logits, arrays["filtered_rows"], slice(num_plain, None))
            if looks_later:
                filters = [arrays[name][:, None] for name in ("top_k", "top_p", "min_p")]
                num_candidates = _num_candidates(batch.filtered_params, MIN_CANDIDATES_UNSEEN)
                probs, ids, is_sure = _filter_candidates(self._filtered, filters, num_candidates)
                self._is_sure = is_sure
            else:
                probs, ids = _filter(self._filtered, batch.filtered_params)
            self._draw_filtered(probs, ids)
        self._copy = HostCopy(self._pack())

    def finish(self) -> tuple[tuple[int, ...], tuple[Logprobs | None, ...]]:
        """Wait for the tokens and note them in the states of the requests. Returns what `sample` returns.

        Does not wait for what the device was given behind them. Call it once.
        """
        states = self._batch.states
        if not states:
            return (), ()
        is_sure, chosen, logprobs = self._unpack(self._copy.wait())
        if not is_sure:
            # What was sent to the device may have been overwritten by the step behind.
            device = self.token_ids.device
            self._arrays = {name: torch.from_numpy(array).to(device) for name, array in self._batch.arrays.items()}
            self._draw_filtered(*_filter(self._filtered, self._batch.filtered_params))
            self._is_sure, self.was_corrected = None, True
            _, chosen, logprobs = self._unpack(HostCopy(self._pack()).wait())
        for state, token_id in zip(states, chosen, strict=True):
            state.note_token(token_id)
        return chosen, logprobs

    def _scaled(self, logits: torch.Tensor, rows: torch.Tensor, drawn: slice) -> torch.Tensor:
        """Those rows, over their temperatures.

        Subtracting the maximum first keeps a tiny temperature from overflowing.
        """
        chosen = logits[rows]
        return (chosen - chosen.max(-1, keepdim=True).values) / self._arrays["temperature"][drawn, None]

    def _draw_filtered(self, probs: torch.Tensor, ids: torch.Tensor) -> None:
        uniforms = self._arrays["uniform"][-len(self._filtered) :]
        chosen = _invert_cdf(probs, uniforms)
        self.token_ids[self._arrays["filtered_rows"]] = ids.gather(-1, chosen[:, None])[:, 0]

    def _pack(self) -> torch.Tensor:
        """Token ids, whether enough candidates were sorted, and log-probabilities, in one tensor of int64."""
        parts = [self.token_ids]
        if self._is_sure is not None:
            parts.append(self._is_sure.all()[None].long())
        if self._logprobs is not None:
            chosen_ids = self.token_ids[self._arrays["logprob_rows"]]
            values, ids = self._logprobs.topk(self._num_top)
            values = torch.cat([self._logprobs.gather(-1, chosen_ids[:, None]), values], -1)
            parts += [values.double().view(torch.int64).flatten(), ids.flatten()]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _unpack(self, numbers: np.ndarray) -> tuple[bool, tuple[int, ...], tuple[Logprobs | None, ...]]:
        """(whether enough candidates were sorted, token ids, log-probabilities) of what `_pack` packed."""
        states, rows = self._batch.states, self._batch.logprob_rows
        chosen = tuple(numbers[: len(states)].tolist())
        numbers = numbers[len(states) :]
        is_sure = True
        if self._is_sure is not None:
            is_sure, numbers = bool(numbers[0]), numbers[1:]
        if self._logprobs is None:
            return is_sure, chosen, ()
        floats = numbers[: len(rows) * (1 + self._num_top)].view(np.float64).reshape(len(rows), 1 + self._num_top)
        tops = numbers[floats.size :].reshape(len(rows), self._num_top)
        logprobs: list[Logprobs | None] = [None] * len(states)
        for row, values_of_row, ids_of_row in zip(rows, floats.tolist(), tops.tolist(), strict=True):
            k = states[row].params.logprobs or 0
            top = tuple(zip(ids_of_row[:k], values_of_row[1 : 1 + k], strict=True))
            logprobs[row] = Logprobs(values_of_row[0], top)
        return is_sure, chosen, tuple(logprobs)

    @property
    def _num_top(self) -> int:
        """Log-probabilities of a row, besides the chosen token's."""
        assert self._logprobs is not None
        most = max(self._batch.states[row].params.logprobs or 0 for row in self._batch.logprob_rows)
        return min(most, int(self._logprobs.shape[-1]))


class HostCopy:
    """A tensor on its way to host memory, behind what the current stream was given until now."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._on_host = tensor.to("cpu", non_blocking=True)  # pinned memory, if it comes from a GPU
        self._arrival = None
        if tensor.device.type == "cuda":
            self._arrival = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> np.ndarray:
        """Wait for the copy, but not for what the stream was given since."""
        if self._arrival is not None:
            self._arrival.synchronize()
        array: np.ndarray = self._on_host.numpy()
        return array


def _penalised(logits: torch.Tensor, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits with biases, bars and penalties applied; the same tensor if there are none."""
    if not arrays.keys() & {"biased", "barred", "seen", "said", "masks"}:
        return logits
    logits = logits.clone(memory_format=torch.contiguous_format)
    flat = logits.view(-1)
    if "biased" in arrays:
        flat[arrays["biased"]] += arrays["bias"]
    if "barred" in arrays:
        flat.index_fill_(0, arrays["barred"], float("-inf"))
    if "seen" in arrays:
        values, penalty = flat[arrays["seen"]], arrays["seen_penalty"]
        flat[arrays["seen"]] = torch.where(values > 0, values / penalty, values * penalty).clamp(max=LARGEST)
    if "said" in arrays:
        flat[arrays["said"]] -= arrays["said_amount"]
    if "masks" in arrays:
        table = _bits_to_add(logits.device)
        for rows, masks in zip(
            arrays["masked_rows"].split(MASKED_ROWS), arrays["masks"].split(MASKED_ROWS), strict=True
        ):
            amounts = table.index_select(0, masks.flatten().int()).view(len(rows), -1)
            logits.index_add_(0, rows, amounts[:, : logits.shape[-1]])
    return logits


@cache
def _bits_to_add(device: torch.device) -> torch.Tensor:
    """For each byte of a mask, what is added to its eight logits: 0 where a bit is set, else minus infinity; [256, 8]."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(np.where(bits, np.float32(0), np.float32("-inf"))).to(device)


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _filters(params: Sequence[SamplingParams], vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(top_k, top_p, min_p) of each row, as arrays [rows]; a filter that is off keeps all."""
    top_k = np.array([min(p.top_k or vocab_size, vocab_size) for p in params], np.int64)
    # Not 0, which would leave nothing of a row.
    top_p = np.array([max(p.top_p, SMALLEST) if p.top_p < 1.0 else float("inf") for p in params], np.float32)
    return top_k, top_p, np.array([p.min_p for p in params], np.float32)


def _num_candidates(params: Sequence[SamplingParams], at_least: int) -> int:
    return max([at_least, *(2 * p.top_k for p in params)])


def _filter(scaled: torch.Tensor, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k, then top-p, then min-p, for each row of `scaled` [rows, vocabulary], whose maximum is 0.

    Returns probabilities (not normalised, 0 for what is left out, at least one above) and token ids, both [rows,
    candidates], most probable first, equal ones by id. Waits for the device.

    All three keep a beginning of the sorted vocabulary, and nearly always a short one: so only some candidates are
    sorted, and more if a row turns out to keep them all. What a row keeps does not depend on their number, and so not on
    its neighbours.
    """
    filters = [torch.from_numpy(array).to(scaled.device)[:, None] for array in _filters(params, scaled.shape[-1])]
    num_candidates = _num_candidates(params, MIN_CANDIDATES)
    while True:
        probs, ids, is_sure = _filter_candidates(scaled, filters, num_candidates)
        if bool(is_sure.all()):
            return probs, ids
        num_candidates *= 8


def _filter_candidates(
    scaled: torch.Tensor, filters: Sequence[torch.Tensor], num_candidates: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_filter` with so many candidates, and for each row whether it needs no more.

    filters: top_k, top_p and min_p, all [rows, 1].
    """
    top_k, top_p, min_p = filters
    vocabulary = scaled.shape[-1]
    num_candidates = min(num_candidates, vocabulary)
    values, ids = _sorted_candidates(scaled, num_candidates)
    ranks = torch.arange(num_candidates, device=scaled.device)
    weights = values.exp() * (ranks < top_k)
    whole = scaled.exp().sum(-1, keepdim=True)
    probs = weights / torch.where(top_k < vocabulary, weights.sum(-1, keepdim=True), whole)
    # What has no probability is not kept: of a row with few tokens that may be chosen, the rest need not be sorted.
    kept = (weights > 0) & (probs.cumsum(-1) - probs < top_p) & (probs >= min_p * probs[:, :1])
    smallest_kept = values.masked_fill(~kept, float("inf")).amin(-1)
    # Strictly below: of equal values around the end, all have to be seen for the ids to decide.
    is_sure = (values[:, -1] < smallest_kept) | (num_candidates == vocabulary)
    return probs * kept, ids, is_sure


def _sorted_candidates(scaled: torch.Tensor, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest values of each row and their ids, descending, equal values by id."""
    ids = scaled.topk(num_candidates, sorted=False).indices.sort(dim=-1).values
    values, order = scaled.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _invert_cdf(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The index in each row [rows, n] where its cumulative probability passes uniform * total.

    Probability 0 never wins.
    """
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # uniform * total may round up to total itself, which nothing passes.
    targets = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]

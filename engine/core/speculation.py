"""Decides how many guessed tokens a step verifies, and of which requests.

A step that verifies guesses computes more rows. That pays if the tokens that are likely to come of them are worth the longer
step: both are learned, how often guesses come true by drafting.py, what rows cost from the times of steps, which the driver
tells. Without that much to gain, a step is what it would be without speculation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Self

from engine.core.drafting import Drafter, HitRates, RecentAnswers
from engine.core.plan import QuerySegment
from engine.core.request import Request
from engine.errors import ConfigError

METHODS = ("ngram",)
DEFAULT_NUM_TOKENS = 8
MAX_NUM_TOKENS = 32
# Steps are as they are without guesses unless their tokens are to come faster by this factor.
MIN_GAIN = 1.05
# What a further row is assumed to cost, as a part of a step without guesses, and the numbers of rows of which it is.
PRIOR_ROW_COST = 0.03
PRIOR_ROWS = (1, 8)
# Steps with guesses that count no more than half, once so many steps of the same requests have followed.
HALF_LIFE_STEPS = 256
# After so many steps with guesses in a row, one without is made to see what that takes now.
MAX_STEPS_IN_A_ROW = 128
# Steps that take longer than they do otherwise by this factor were held up, and count as if by this factor.
MAX_DELAY = 3.0
# Weight of a new time against those before; the first ones count the same.
TIME_WEIGHT = 1 / 8
# What it takes to look for one request's guess, in seconds, and once more for any at all, and the part of a step that all of
# it may take together; if it takes more, requests of which nothing is worth to be verified rest, for so many tokens at most.
LOOK_S = 30e-6
MAX_LOOK_PART = 0.01
MAX_REST = 32
# A new request counts the unused guesses of the one that ended last as its own, up to this number: if its first guess is not
# used either, the second one is made at most 16 tokens later.
MAX_INHERITED_UNUSED = 4
# Tenants whose recent answers are kept.
MAX_TENANTS = 64
# Tokens of contexts that are indexed in one step, which waits for it: one to two milliseconds. And in all: of about
# 130 bytes each. Requests whose contexts do not fit have no guesses.
MAX_INDEXED_AT_ONCE = 4096
MAX_INDEXED_TOKENS = 1 << 22


@dataclass(frozen=True, slots=True)
class SpeculativeOptions:
    """The option `speculative`, checked.

    num_tokens: most guessed tokens of a request in a step.
    """

    method: str
    num_tokens: int = DEFAULT_NUM_TOKENS

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> Self:
        """From what a client or a file says. Raises ConfigError, which says what is wrong and what would be right."""
        method, num_tokens = mapping.get("method"), mapping.get("num_tokens", DEFAULT_NUM_TOKENS)
        if isinstance(num_tokens, str) and num_tokens.isdecimal():  # from a command line
            num_tokens = int(num_tokens)
        is_number = isinstance(num_tokens, int) and not isinstance(num_tokens, bool)
        if (
            mapping.keys() - {"method", "num_tokens"}
            or method not in METHODS
            or not is_number
            or not 1 <= num_tokens <= MAX_NUM_TOKENS
        ):
            raise ConfigError(
                f"speculative must be a mapping of method to {' or '.join(METHODS)} (no model drafts) and of num_tokens to "
                f"an integer from 1 to {MAX_NUM_TOKENS}, got {dict(mapping)!r}",
                param="speculative",
            )
        return cls(method, num_tokens)


class StepCost:
    """What guesses add to the time of steps of so many requests: a part for any, and one for each, by least squares.

    base_s: seconds of a step without guesses; None until two were seen, the first of which may have been made ready in.
    """

    def __init__(self) -> None:
        self.base_s: float | None = None
        self._mean_s = 0.0
        self._num_plain = 0
        self._num_in_a_row = 0
        # Sums over the steps with guesses, old ones fading: of weights, of guesses x, x * x, added time y, and x * y.
        self._sums = [0.0] * 5
        self._num_since = 0  # steps since the last with guesses, by which the sums have yet to fade

    @property
    def needs_plain_step(self) -> bool:
        """Whether a step without guesses is due, to compare others with."""
        return self.base_s is None or self._num_in_a_row >= MAX_STEPS_IN_A_ROW

    def note(self, num_guesses: int, seconds: float) -> None:
        """A step was computed."""
        if not num_guesses:
            self._num_in_a_row = 0
            self._num_since += 1
            self._note_plain(seconds)
        elif self.base_s:
            self._num_in_a_row += 1
            added = min(seconds / self.base_s, MAX_DELAY) - 1
            x = float(num_guesses)
            news = (1.0, x, x * x, added, x * added)
            fading = 0.5 ** ((self._num_since + 1) / HALF_LIFE_STEPS)
            self._sums = [old * fading + new for old, new in zip(self._sums, news, strict=True)]
            self._num_since = 0

    def note_rest(self, num_steps: int) -> None:
        """So many steps without guesses follow, of which the times are not told."""
        self._num_since += num_steps

    def _note_plain(self, seconds: float) -> None:
        self._num_plain += 1
        if self._num_plain == 1 or seconds * MAX_DELAY < self._mean_s:
            self._mean_s = seconds
        else:
            weight = max(TIME_WEIGHT, 1 / self._num_plain)
            self._mean_s += weight * (min(seconds, MAX_DELAY * self._mean_s) - self._mean_s)
        if self._num_plain > 1:
            self.base_s = self._mean_s

    def _fit(self) -> tuple[float, float]:
        """(Added time of any guesses, of each guess) as parts of a step without."""
        fading = 0.5 ** (self._num_since / HALF_LIFE_STEPS)
        n, sx, sxx, sy, sxy = (old * fading for old in self._sums)
        for rows in PRIOR_ROWS:
            added = PRIOR_ROW_COST * rows
            n, sx, sxx, sy, sxy = n + 1, sx + rows, sxx + rows * rows, sy + added, sxy + rows * added
        slope = max(0.0, (n * sxy - sx * sy) / (n * sxx - sx * sx))
        return max(0.0, (sy - slope * sx) / n), slope

    def choose(self, num_requests: int, chances: Sequence[float]) -> int:
        """How many of these guesses a step is to verify, for the most tokens in a second; 0 = it is not worth it.

        chances: that they come true, the best first.
        """
        best, best_rate = 0, num_requests * MIN_GAIN
        jump, slope = self._fit()
        num_tokens, seconds = float(num_requests), 1.0 + jump
        for number, chance in enumerate(chances, 1):
            num_tokens += chance
            seconds += slope
            if num_tokens > best_rate * seconds:
                best, best_rate = number, num_tokens / seconds
        return best


class Speculation:
    """Guesses for the decodes of steps."""

    def __init__(self, options: SpeculativeOptions, max_rows: int, *, keeps_answers: bool) -> None:
        """Nothing is known yet.

        max_rows: whose logits a step may have, unless one request alone has guesses.
        keeps_answers: guesses are looked for in the recent answers of the same tenant, too.
        """
        self._num_tokens = options.num_tokens
        self._max_rows = max(max_rows, 1 + options.num_tokens)
        self._keeps_answers = keeps_answers
        self._drafters: dict[Request, Drafter] = {}
        self._num_indexed = 0  # tokens of them all
        self._answers: dict[str, RecentAnswers] = {}  # by tenant, the one that was answered last at the end
        self._rates = HitRates()
        self._num_unused = 0  # of the request that ended last: others begin with what was learned of it
        self._num_calls_to_rest = 0  # of `guess`, because all requests rest
        self._costs: dict[int, StepCost] = {}  # by the number of requests

    def guess(self, requests: Sequence[Request], budget: int) -> dict[Request, tuple[int, ...]]:
        """What is worth to be verified in the next step, in which exactly these requests decode.

        budget: tokens that the step may have besides.
        """
        if self._num_calls_to_rest:
            self._num_calls_to_rest -= 1
            return {}
        cost = self._cost(len(requests))
        if cost.needs_plain_step or cost.base_s is None:
            return {}
        followed = self._take_in(requests)
        if not followed:
            num_to_rest = min(self._drafters[request].num_tokens_to_rest for request in requests)
            self._num_calls_to_rest = max(0, num_to_rest - 1)  # the next step has one token more
            cost.note_rest(self._num_calls_to_rest)
            return {}
        guesses: dict[Request, list[int]] = {}
        chances: list[tuple[float, Request]] = []
        for request in followed:
            # The step gives one token more than what it verifies, and may not give more than are wanted.
            num_tokens = min(self._num_tokens, request.max_total_tokens - request.num_tokens - 1)
            drafter = self._drafters[request]
            if num_tokens > 0 and (guess := drafter.guess(num_tokens)):
                guesses[request] = guess
                chances += [(chance, request) for chance in drafter.chances(len(guess))]
        chances.sort(key=itemgetter(0), reverse=True)  # of one request, those of its first tokens stay in front
        del chances[max(0, min(budget, self._max_rows - len(requests))) :]
        num = cost.choose(len(requests), [chance for chance, _ in chances])
        counts = Counter(request for _, request in chances[:num])
        most_s = MAX_LOOK_PART * max(cost.base_s, 1e-6)  # there are clocks that stand still
        max_rest = min(MAX_REST, math.ceil(LOOK_S * (1 + len(requests)) / most_s))
        for request in followed:
            self._drafters[request].note_use(request in counts, max_rest)
        return {request: tuple(guesses[request][:count]) for request, count in counts.items()}

    def take_in_prompts(self, requests: Iterable[Request]) -> None:
        """Index prompts that are not indexed yet, within limits; what decodes say is taken in at their next look."""
        self._num_calls_to_rest = 0  # others decode from now on
        self._take_in(request for request in requests if self._drafter(request).num_indexed < request.num_prompt_tokens)

    def _take_in(self, requests: Iterable[Request]) -> list[Request]:
        """Index what is new in the contexts of requests, within limits. Returns those of which a guess may be made now."""
        followed = []
        left = MAX_INDEXED_AT_ONCE
        for request in requests:
            drafter = self._drafter(request)
            if not drafter.num_tokens_to_rest:
                num_taken = drafter.catch_up(min(left, MAX_INDEXED_TOKENS - self._num_indexed))
                left -= num_taken
                self._num_indexed += num_taken
                if drafter.num_indexed == request.num_tokens:
                    followed.append(request)
        return followed

    def _drafter(self, request: Request) -> Drafter:
        drafter = self._drafters.get(request)
        if drafter is None:
            answers = self._answers.get(request.tenant)
            drafter = Drafter(request.token_ids, request.num_prompt_tokens, answers, self._rates, self._num_unused)
            self._drafters[request] = drafter
        return drafter

    def note_step(self, segments: Sequence[QuerySegment], seconds: float) -> None:
        """A step was computed; what it took says what rows cost, if it only decoded."""
        if self._num_calls_to_rest:
            return
        num_guesses = 0
        for segment in segments:
            if not segment.samples or segment.query_len != 1 + segment.num_guesses:
                return
            num_guesses += segment.num_guesses
        if segments:
            self._cost(len(segments)).note(num_guesses, seconds)

    def _cost(self, num_requests: int) -> StepCost:
        cost = self._costs.get(num_requests)
        if cost is None:
            cost = self._costs[num_requests] = StepCost()
        return cost

    def end(self, request: Request) -> None:
        """A request has ended; its answer may be quoted by others of its tenant."""
        drafter = self._drafters.pop(request, None)
        if drafter is not None:
            self._num_indexed -= drafter.num_indexed
            self._num_unused = min(drafter.num_unused, MAX_INHERITED_UNUSED)
        answer = request.token_ids[request.num_prompt_tokens :]
        if not self._keeps_answers or not answer:
            return
        answers = self._answers.pop(request.tenant, None) or RecentAnswers()
        self._answers[request.tenant] = answers
        answers.add(answer)
        if len(self._answers) > MAX_TENANTS:
            del self._answers[next(iter(self._answers))]

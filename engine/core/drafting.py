"""Guesses how an answer goes on, from where its latest tokens have been before. No model: token ids alone.

An answer that quotes (an edit of a file, the arguments of a call, a name out of a tool's result) says what its context, or a
recent answer, has said. Whenever its last tokens have been there before, what followed them then is the guess. How often such
guesses come true is counted by the length of what matched, for each request, whether its guesses are computed or not: so
guessing costs no step, and a request that stops quoting, or begins to, is noticed at once.

    context   ... "city": "Austin", "zip": "78750" ...    answer so far   ... the zip of Austin", "z|
                          ^ what matches  ^ the guess                                ^ the same again
"""

from __future__ import annotations

from collections.abc import Sequence

# Earlier places that are looked at, the latest first, and how far back they are compared.
MAX_PLACES = 8
MAX_MATCH = 64
# From so many matching tokens on, no other place is looked for.
SURE_MATCH = 16
# Of more new tokens at once, such as a prompt, only the first is compared with what would have been guessed.
MAX_JUDGED_AT_ONCE = 64
# Of recent answers: of the older ones, and of the newer ones.
MAX_RECENT_TOKENS = 8192
# Bits for the second token of a pair's key. Pairs of larger ids may share a key; tokens are compared anyway.
_TOKEN_BITS = 20
# Behind an answer, so that none goes on into the next one.
_END = -1


class TokenIndex:
    """Where each pair of tokens has been: hash chains, as in LZ77. Grows with its tokens, O(1) for each.

    One token alone is looked for only if the last two have been nowhere before: it may be anywhere, so its latest place is
    the guess.

    token_ids: what is indexed, the caller's list, to which it only appends.
    num_indexed: of these, the first so many.
    """

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids
        self._latest: dict[int, int] = {}  # key -> behind where it was last
        self._previous: list[int] = []  # by position: behind where the key that ends there was before
        self._key = self._last = 0  # of the last pair, and its second token
        self._latest_of_token: dict[int, int] = {}  # token -> behind where it was last
        self._before_last = 0  # behind where the last token was before

    @property
    def num_indexed(self) -> int:
        return len(self._previous)

    def extend(self, num_tokens: int) -> None:
        """Index the first `num_tokens` of the list."""
        latest, previous, latest_of_token = self._latest, self._previous, self._latest_of_token
        start, last = len(previous), self._last
        news = self.token_ids[start:num_tokens]
        for position, token_id in enumerate(news, start + 1):
            key = last << _TOKEN_BITS | token_id
            previous.append(latest.get(key, 0))
            latest[key] = position
            last = token_id
        if news:
            self._key, self._last = key, last
            latest_of_token.update(zip(news[:-1], range(start + 1, num_tokens), strict=True))
            self._before_last = latest_of_token.get(last, 0)
            latest_of_token[last] = num_tokens

    def find_own_end(self) -> tuple[int, int]:
        """Where the end of what is indexed has been before; as `find`."""
        position = self._previous[-1] if self._previous else 0
        return self._longest(position, self._before_last, self.token_ids, self.num_indexed)

    def find(self, other: TokenIndex) -> tuple[int, int]:
        """Where the end of what `other` has indexed is here.

        Returns (position behind it, how many tokens match), the longest match, of equal ones the latest; (0, 0) = nowhere.
        """
        end_ids, end = other.token_ids, other.num_indexed
        of_token = self._latest_of_token.get(end_ids[end - 1], 0) if end else 0
        return self._longest(self._latest.get(other._key, 0), of_token, end_ids, end)

    def _longest(self, position: int, of_token: int, end_ids: Sequence[int], end: int) -> tuple[int, int]:
        token_ids, previous = self.token_ids, self._previous
        best = best_len = 0
        for _ in range(MAX_PLACES):
            if not position:
                break
            length, most = 0, min(position, end, MAX_MATCH)
            while length < most and token_ids[position - 1 - length] == end_ids[end - 1 - length]:
                length += 1
            if length > best_len:
                best, best_len = position, length
                if length == most:
                    break
            position = previous[position - 1]
        if best_len > 1:
            return best, best_len
        return (of_token, 1) if of_token else (0, 0)


class RecentAnswers:
    """What a tenant's requests were answered last, in two indexes; when the newer one is full it becomes the older one."""

    def __init__(self) -> None:
        self.indexes: list[TokenIndex] = [TokenIndex([])]

    def add(self, token_ids: Sequence[int]) -> None:
        """Another answer; of a long one its end."""
        if self.indexes[0].num_indexed >= MAX_RECENT_TOKENS:
            self.indexes = [TokenIndex([]), self.indexes[0]]
        index = self.indexes[0]
        index.token_ids += [*token_ids[-MAX_RECENT_TOKENS:], _END]
        index.extend(len(index.token_ids))


# -- how often guesses come true ---------------------------------------------------------------------------------------

# The lengths of matches are counted together from one of these to the next.
_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64)
_CLASS_OF = tuple(max(0, sum(length >= least for least in _LENGTHS) - 1) for length in range(MAX_MATCH + 1))
# Weight of a new observation; the first ones count more, unless there is something to go by.
_FIRST_WEIGHT = 1 / 2
_WEIGHT = 1 / 16
# No guess that comes true so seldom is worth to be verified.
_MIN_CHANCE = 1 / 64
# What is assumed before anything is observed.
_PRIOR = 0.6


class HitRates:
    """How often the next token was as guessed, by the length of the match; recent guesses count most."""

    def __init__(self, prior: HitRates | None = None) -> None:
        """prior: what is assumed at first; later observations take its place."""
        self._rates: list[float] = [_PRIOR] * len(_LENGTHS) if prior is None else prior._rates[:]
        self._weights = [_FIRST_WEIGHT if prior is None else _WEIGHT] * len(_LENGTHS)

    def note(self, match_len: int, is_hit: bool) -> None:
        """A guess behind so long a match came true, or did not."""
        number = _CLASS_OF[match_len]
        weight = self._weights[number]
        self._rates[number] += weight * (is_hit - self._rates[number])
        if weight > _WEIGHT:
            self._weights[number] = weight / (1 + weight)

    def chances(self, match_len: int, num_tokens: int) -> list[float]:
        """For each of the next tokens, how likely it and all in front of it are as guessed; never rises.

        Ends in front of the first that is too unlikely to be worth a row of a step.
        """
        chances, chance = [], 1.0
        for length in range(match_len, match_len + num_tokens):
            chance *= self._rates[_CLASS_OF[min(length, MAX_MATCH)]]
            if chance < _MIN_CHANCE:
                break
            chances.append(chance)
        return chances


class Drafter:
    """Follows one request's context, and guesses what comes next in it."""

    def __init__(
        self,
        token_ids: list[int],
        num_prompt_tokens: int,
        recent: RecentAnswers | None,
        rates: HitRates,
        num_unused: int = 0,
    ) -> None:
        """Indexes nothing yet.

        token_ids: prompt and answer, which grows.
        recent: answers to look in, too; None = there are none.
        rates: of all requests; told what comes of this one's guesses.
        num_unused: looks in a row of which no guess was verified; at first, those of a request before this one.
        """
        self._own = TokenIndex(token_ids)
        self._num_prompt_tokens = num_prompt_tokens
        self._recent = recent
        self._all_rates = rates
        self._rates = HitRates(rates)
        self._source: TokenIndex = self._own
        self._position = self._match_len = 0
        self.num_unused = num_unused
        self._rests_until = 0

    @property
    def num_indexed(self) -> int:
        return self._own.num_indexed

    @property
    def num_tokens_to_rest(self) -> int:
        """How many tokens are to come before the next look; 0 = it is time for one."""
        return max(0, self._rests_until - len(self._own.token_ids))

    def note_use(self, is_used: bool, max_rest: int) -> None:
        """A guess is verified, or none is: the more often none was in a row, the later comes the next look.

        max_rest: tokens to the next look, at most; with 1 it never rests.
        """
        self.num_unused = 0 if is_used or max_rest == 1 else self.num_unused + 1
        if self.num_unused:
            self._rests_until = len(self._own.token_ids) + min(1 << min(self.num_unused - 1, 10), max_rest)

    def catch_up(self, max_tokens: int) -> int:
        """Take in what the context has got since the last call; at most so many tokens. Returns how many."""
        own = self._own
        start, num_tokens = own.num_indexed, len(own.token_ids)
        end = min(num_tokens, start + max_tokens)
        max_judged = MAX_JUDGED_AT_ONCE if self.num_unused < 2 else 1
        if start < self._num_prompt_tokens or end - start > max_judged:
            if start < end:
                self._judge(own.token_ids[start])
            own.extend(end)
            self._match_len = 0
            if end == num_tokens:
                self._look()
        while own.num_indexed < end:
            self._judge(own.token_ids[own.num_indexed])
            own.extend(own.num_indexed + 1)
            if self._match_len < SURE_MATCH:
                self._look()
        return end - start

    def _judge(self, token_id: int) -> None:
        if not self._match_len:
            return
        is_hit = self._source.token_ids[self._position] == token_id
        self._rates.note(self._match_len, is_hit)
        self._all_rates.note(self._match_len, is_hit)
        if is_hit:
            self._position += 1
            self._match_len = min(self._match_len + 1, MAX_MATCH)
        else:
            self._match_len = 0

    def _look(self) -> None:
        """Go on with the longest match, if it is longer than the one at hand."""
        self._note_match(self._own, *self._own.find_own_end())
        for index in () if self._recent is None else self._recent.indexes:
            self._note_match(index, *index.find(self._own))

    def _note_match(self, source: TokenIndex, position: int, match_len: int) -> None:
        if match_len > self._match_len:
            self._source, self._position, self._match_len = source, position, match_len

    def guess(self, num_tokens: int) -> list[int]:
        """The next tokens, at most so many.

        Empty if the end of the context has not been anywhere before, or is not taken in yet.
        """
        if not self._match_len or self.num_indexed < len(self._own.token_ids):
            return []
        source = self._source.token_ids
        guess = source[self._position : self._position + num_tokens]
        if self._source is self._own:
            while guess and len(guess) < num_tokens:  # it repeats itself: what is guessed is what follows
                guess += guess[: num_tokens - len(guess)]
        elif _END in guess:
            del guess[guess.index(_END) :]
        return guess

    def chances(self, num_tokens: int) -> list[float]:
        """See HitRates; of the first so many tokens of a guess, or of fewer."""
        return self._rates.chances(self._match_len, num_tokens)

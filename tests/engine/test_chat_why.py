"""`/why` of a chat: what an engine and a server say of an answer, in words."""

from __future__ import annotations

import contextlib

from engine.chat.partners import EnginePartner
from engine.chat.why import PHASES, RECOMPUTED, describe_why
from engine.config import EngineConfig
from engine.core.phases import Phase
from engine.core.request import SamplingParams
from engine.explanation import PREPARE
from engine.server import Server
from engine.text import turns


def test_why_leaves_out_what_a_server_says_in_another_form():
    odd = {"\x1b[2J": 1.0, "decode": "long", "queue": 10**400, "load": float("nan"), "route": True}
    told = {"seconds": {"prefill": 0.5, **odd}, "cached_tokens_by_tier": [3], "replica": "x"}
    assert describe_why(told) == "500.0 ms\n  prefill  500.0 ms  until the first token\n0 tokens of the prompt"


def test_why_has_words_for_all_that_an_engine_says():
    spans = {phase.value for phase in Phase}
    assert spans | {PREPARE, "lost", "route"} == set(PHASES)
    assert set(turns.REASONS) == set(RECOMPUTED)


def test_the_engine_of_a_chat_says_why():
    """Of a conversation whose history is changed, also that."""
    config = EngineConfig(num_threads=1, num_gpu_blocks=200, dtype="float32")
    with contextlib.closing(EnginePartner(config, Server)) as partner:
        sampling = SamplingParams(max_tokens=8, temperature=0.0)
        said = [("user", "my cat is called Mia")]
        first = partner.answer("s", said, sampling, lambda piece: None)
        said += [("assistant", first.text), ("user", "what is my cat called?")]
        second = partner.answer("s", said, sampling, lambda piece: None)
        said[1] = ("assistant", "your dog is called Mia.")
        edited = partner.answer("s", said, sampling, lambda piece: None)
    for turn in (first, second, edited):
        assert turn.explanation is not None
        assert turn.explanation["seconds"]["prefill"] > 0
        assert sum(turn.explanation["cached_tokens_by_tier"].values()) == turn.num_cached_tokens
        assert sum(turn.explanation["computed_tokens_by_reason"].values()) == turn.num_computed_tokens
    assert second.num_cached_tokens > 0
    assert "found in the GPU tier" in describe_why(second.explanation)
    assert "were said before: the history was changed" in describe_why(edited.explanation)

"""The blocking interface of the seed document."""

from __future__ import annotations

import pytest

from engine.core.request import SamplingParams
from engine.errors import ConfigError, ContextLengthError
from engine.server import create_server
from engine.text.prompt import TextPrompt

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def server():
    with create_server(mode="pensieve", model="embedded", dtype="float32", num_threads=1) as server:
        yield server


def test_a_session_remembers_and_computes_only_what_is_new(server):
    first = server.chat("ada", "my cat is called Mia", GREEDY)
    second = server.chat("ada", "what is my cat called?", GREEDY)

    assert "Mia" in second.text
    assert first.num_cached_tokens == 0
    num_new = second.num_prompt_tokens - first.num_prompt_tokens - len(first.token_ids)
    assert second.num_computed_tokens == num_new + 1  # the token that ended the first answer was never computed


def test_sessions_do_not_see_each_other_and_can_be_forgotten(server):
    server.process_request("bob", "my dog is called Rex")
    assert "Rex" not in server.process_request("eve", "what is my dog called?")
    server.forget_session("bob")
    assert "Rex" not in server.process_request("bob", "what is my dog called?")


def test_a_turn_that_fails_leaves_the_session_as_it_was(server):
    before = server.chat("long", "my cat is called Mia", GREEDY)
    with pytest.raises(ContextLengthError, match="context window is 4096"):
        server.chat("long", "cat " * 5000, GREEDY)
    after = server.chat("long", "what is my cat called?", GREEDY)
    assert "Mia" in after.text
    assert after.num_cached_tokens == before.num_prompt_tokens + len(before.token_ids) - 1


def test_text_arrives_in_pieces_that_make_the_answer(server):
    pieces: list[str] = []
    answer = server.complete(TextPrompt("<|user|>hello<|assistant|>"), GREEDY, on_text=pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == answer.text


def test_statistics_are_for_machines_and_for_people(server):
    stats = server.get_statistics()
    parts = ("gpu_cached", "cpu_cached", "not_loaded", "dropped", "new")
    assert stats["num_prompt_tokens"] == sum(stats[f"num_{part}_tokens"] for part in parts) > 0
    assert f"prompt tokens {stats['num_prompt_tokens']}" in server.get_statistics_str()


def test_options_are_checked(server):
    with pytest.raises(ConfigError, match="unknown option 'chunk_sise'"):
        create_server(chunk_sise=16)
    with pytest.raises(ConfigError, match="mode must be"):
        create_server(mode="forgetful")


def test_vllm_is_the_stateless_mode():
    with create_server(mode="vllm", dtype="float32", num_threads=1) as server:
        server.process_request("ada", "my cat is called Mia")
        assert "Mia" in server.process_request("ada", "what is my cat called?")
        stats = server.get_statistics()
        assert stats["mode"] == "stateless"
        assert stats["num_gpu_cached_tokens"] == 0
        assert stats["num_gpu_blocks_free"] == stats["num_gpu_blocks"]

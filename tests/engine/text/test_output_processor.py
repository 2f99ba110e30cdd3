"""From a step's tokens to what the client gets and what the conversation remembers; without an engine."""

import asyncio
import json
import math
from array import array
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.engine_core import RequestOutput
from engine.core.plan import Logprobs
from engine.core.request import FinishReason, Request, SamplingParams
from engine.embedded_model import embedded_model_path
from engine.text.output import OutputDelta, merge_deltas
from engine.text.output_processor import OutputProcessor, Stream
from engine.text.tokenizer import Tokenizer
from engine.text.transcript import ConversationTable, Transcript

END = 4  # <|end|>
PROMPT = Transcript(array("I", [3]), "<|assistant|>")


class Core:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.cache_config = SimpleNamespace(chunk_size=4)
        self.stopped: list[tuple[str, int | None]] = []
        self.aborted: list[str] = []

    def stop(
        self,
        request_id: str,
        now: float,
        *,
        num_output_tokens: int | None = None,
        num_kept_output_tokens: int | None = None,
    ) -> None:
        self.stopped.append((request_id, num_kept_output_tokens))

    def abort(self, request_id: str, now: float) -> None:
        self.aborted.append(request_id)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(str(embedded_model_path()))


@pytest.fixture(scope="module")
def id_of_byte(tokenizer: Tokenizer) -> dict[int, int]:
    """The tokens that are one byte each."""
    return {tokenizer.token_bytes[i][0]: i for i in reversed(range(1024)) if len(tokenizer.token_bytes[i]) == 1}


def answer(
    tokenizer: Tokenizer,
    token_ids: list[int],
    sampling: SamplingParams,
    *,
    reason: FinishReason = FinishReason.LENGTH,
    logprobs: Logprobs | None = None,
    is_left: bool = False,
) -> tuple[OutputDelta, Transcript | None, Core]:
    """The answer that consists of these tokens; the conversation's memory of it. is_left: the client leaves at its end."""

    async def run() -> tuple[OutputDelta, Transcript | None, Core]:
        core, conversations = Core(), ConversationTable(1 << 20, tokenizer.cut_tokens)
        outputs = OutputProcessor(core, tokenizer, conversations)  # type: ignore[arg-type]
        request = Request("r", PROMPT.token_ids, sampling, conversation_id="c", eos_token_ids=(END,))
        stream = Stream(request, PROMPT, tokenizer.detokenizer(sampling.stop), asyncio.get_running_loop())
        outputs.streams["r"] = stream
        for num_tokens, token_id in enumerate(token_ids, start=1):
            request.token_ids.append(token_id)
            is_last = num_tokens == len(token_ids) and not is_left
            outputs.add([RequestOutput("r", token_id, logprobs, num_tokens, 0, reason if is_last else None)])
            if "r" not in outputs.streams:
                break
        outputs.abandon(stream) if is_left else outputs.deliver()
        await asyncio.sleep(0)
        deltas = []
        while not stream.items.empty():
            item = stream.items.get_nowait()
            assert isinstance(item, OutputDelta)
            deltas.append(item)
        conversation = conversations._conversations.get("c")
        return merge_deltas(deltas), None if conversation is None else conversation.branches[0], core

    return asyncio.run(run())


@settings(deadline=None)
@given(data=st.data())
def test_what_is_remembered_is_the_beginning_of_what_the_client_got(tokenizer, id_of_byte, data):
    """Over random cuts: by length (also inside a character), at the end token, at a stop string, when a client leaves."""
    text = data.draw(st.text(alphabet="ab 日🎉é", max_size=6))
    token_ids = [id_of_byte[byte] for byte in text.encode()]
    token_ids += data.draw(st.lists(st.integers(5, 1023), max_size=4))
    cut = data.draw(st.integers(1, len(token_ids) + 1))
    token_ids = [*token_ids, 300][:cut]
    reason = data.draw(st.sampled_from(FinishReason))
    if reason is FinishReason.STOP:
        token_ids.append(END)
    stop = data.draw(st.lists(st.text(alphabet="ab 日é", min_size=1, max_size=3), max_size=2))
    sampling = SamplingParams(stop=tuple(stop))
    is_left = data.draw(st.booleans())
    given_delta, branch, core = answer(tokenizer, token_ids, sampling, reason=reason, is_left=is_left)
    assert branch is not None
    ids, remembered = branch.token_ids[len(PROMPT.token_ids) :].tolist(), branch.text.removeprefix(PROMPT.text)
    assert tokenizer.decode(ids) == remembered
    assert not any(string in given_delta.text for string in stop)
    if core.stopped:
        assert core.stopped == [("r", len(ids))]
    ended = ids[-1:] == [END]
    assert ids[: len(ids) - ended] == token_ids[: len(ids) - ended]
    said = remembered.removesuffix("<|end|>") if ended else remembered
    # Of what the client left behind, an end that could have become a stop string was not sent.
    assert given_delta.text.startswith(said) or (is_left and said.startswith(given_delta.text))


def test_an_answer_that_ends_inside_a_character_keeps_the_complete_ones(tokenizer, id_of_byte):
    token_ids = [id_of_byte[byte] for byte in "a 🎉".encode()][:-1]
    for reason, end in ((FinishReason.LENGTH, []), (FinishReason.STOP, [END])):
        delta, branch, _ = answer(tokenizer, token_ids + end, SamplingParams(), reason=reason)
        assert delta.text == "a "
        assert branch is not None
        assert branch.token_ids[1:].tolist() == token_ids[:2] + end
        assert branch.text == PROMPT.text + "a " + "<|end|>" * bool(end)


def test_special_tokens_inside_an_answer_are_remembered_with_their_names(tokenizer, id_of_byte):
    """With `ignore_eos`. They are no text for the client; what is remembered must say what the tokens say."""
    a = id_of_byte[ord("a")]
    delta, branch, _ = answer(tokenizer, [a, END, a, END], SamplingParams(ignore_eos=True))
    assert delta.text == "aa"
    assert branch is not None
    assert (branch.token_ids[1:].tolist(), branch.text) == ([a, END, a, END], PROMPT.text + "a<|end|>a<|end|>")


def test_a_stop_token_that_is_text_is_not_remembered(tokenizer, id_of_byte):
    """The client has not got it, and will not send it back."""
    a, b = id_of_byte[ord("a")], id_of_byte[ord("b")]
    delta, branch, _ = answer(tokenizer, [a, b], SamplingParams(stop_token_ids=(b,)), reason=FinishReason.STOP)
    assert delta.text == "a"
    assert delta.token_ids == (a, b)
    assert branch is not None
    assert (branch.token_ids[1:].tolist(), branch.text) == ([a], PROMPT.text + "a")


def test_logprobs_have_the_bytes_of_each_token_and_where_it_begins(tokenizer, id_of_byte):
    token_ids = [id_of_byte[byte] for byte in "a🎉b".encode()]
    top = ((token_ids[1], -0.5), (END, -1.0), (id_of_byte[0xF1], -math.inf))
    sampling = SamplingParams(logprobs=3)
    delta, _, _ = answer(tokenizer, [*token_ids, END], sampling, reason=FinishReason.STOP, logprobs=Logprobs(-2.0, top))
    assert delta.text == "a🎉b"
    *chosen, last = delta.logprobs
    assert b"".join(logprob.token_bytes or b"" for logprob in delta.logprobs).decode() == delta.text
    assert [logprob.text for logprob in chosen] == ["a", r"\xf0", r"\x9f", r"\x8e", r"\x89", "b"]
    assert [logprob.text_offset for logprob in delta.logprobs] == [0, 1, 1, 1, 1, 2, 3]
    assert (last.text, last.token_bytes) == ("<|end|>", None)
    first, end, impossible = chosen[0].top
    assert (first.text, first.token_bytes, first.logprob) == (r"\xf0", b"\xf0", -0.5)
    assert (end.text, end.token_bytes) == ("<|end|>", None)
    assert json.loads(json.dumps(impossible.logprob, allow_nan=False)) == -9999.0


def test_the_tokens_of_a_stop_string_are_reported_and_lie_behind_the_text(tokenizer, id_of_byte):
    """One entry for each generated token, as vLLM has them; so they go with `token_ids` and the usage."""
    token_ids = [id_of_byte[byte] for byte in b"abcd"]
    sampling = SamplingParams(logprobs=0, stop=("cd",))
    delta, branch, core = answer(tokenizer, token_ids, sampling, logprobs=Logprobs(-2.0, ()))
    assert (delta.text, delta.token_ids) == ("ab", tuple(token_ids))
    assert [logprob.text_offset for logprob in delta.logprobs] == [0, 1, 2, 3]
    assert branch is not None
    assert branch.token_ids[1:].tolist() == token_ids[:2]
    assert core.stopped == []  # it ended by length in the same step

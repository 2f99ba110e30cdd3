"""Every attention backend, including the one that is the oracle of the others.

They are compared with attention by its formula, and, in whole models, with a plain transformers forward. Storage that
was never written holds NaN, so that reading it shows.
"""

import random
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.attention.choice import choose_backend
from engine.attention.protocol import AttentionMetadata, AttentionParams
from engine.config import EngineConfig
from engine.core.plan import BlockAppend, QuerySegment, RequestStart, StepPlan
from engine.core.request import SamplingParams
from engine.executor.model_loader import load_model
from engine.executor.model_runner import ModelRunner
from engine.executor.tiers.kv_store import KVStore
from engine.executor.tiers.swapper import ThreadSwapper
from tests.copies import local_copy

SERVED_FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gpt2", "opt", "mixtral"]
BACKENDS = ["reference", "cpu"]
# In its interpreter: a few families have to do.
if find_spec("triton") is not None and not torch.cuda.is_available():
    BACKENDS.append("triton")
SERVED = [
    *product(["reference", "cpu"], SERVED_FAMILIES),
    *(("triton", family) for family in ("llama", "gemma2") if "triton" in BACKENDS),
]
PARAMS = [
    AttentionParams(0.25),
    AttentionParams(0.25, sliding_window=1),
    AttentionParams(0.25, sliding_window=5),
    AttentionParams(0.25, softcap=2.0),
    AttentionParams(0.25, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    AttentionParams(0.1, sliding_window=6, softcap=1.5, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return choose_backend(request.param, torch.device("cpu"), torch.float32)


def attention_by_formula(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, head: int, params: AttentionParams
) -> torch.Tensor:
    """One row of one head, over keys and values [tokens, dim] of positions 0..position, in float64."""
    first = 0 if params.sliding_window is None else max(0, position - params.sliding_window + 1)
    logits = keys[first : position + 1].double() @ query.double() * params.scaling
    if params.softcap is not None:
        logits = params.softcap * torch.tanh(logits / params.softcap)
    weights = logits.exp()
    total = weights.sum()
    if params.sinks is not None:
        total = total + params.sinks[head].double().exp()
    return (weights / total) @ values[first : position + 1].double()


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize(("num_kv_heads", "k_dim", "v_dim"), [(4, 8, 8), (2, 8, 6), (1, 4, 12)])
def test_paged_attention_equals_the_formula(backend, params, num_kv_heads, k_dim, v_dim):
    """A ragged batch of decodes, prefills and continued prefills over shuffled block tables."""
    chunk_size, num_heads = 4, 4
    random_ = random.Random(k_dim)
    generator = torch.Generator().manual_seed(num_kv_heads)
    lengths = [(1, 1), (1, 13), (5, 5), (3, 11), (8, 8), (1, 4), (6, 17)]  # query_len, context_len
    block_ids = list(range(40))
    random_.shuffle(block_ids)
    k_pool = torch.full((40, num_kv_heads, chunk_size, k_dim), float("nan"))
    v_pool = torch.full((40, num_kv_heads, chunk_size, v_dim), float("nan"))
    block_tables = torch.full((len(lengths), 5), -1, dtype=torch.int32)
    contexts, segments, slots, new_keys, new_values = [], [], [], [], []
    row = 0
    for query_len, context_len in lengths:
        table = [block_ids.pop() for _ in range(-(-context_len // chunk_size))]
        keys = torch.randn(context_len, num_kv_heads, k_dim, generator=generator)
        values = torch.randn(context_len, num_kv_heads, v_dim, generator=generator)
        for position in range(context_len):
            block_id, offset = table[position // chunk_size], position % chunk_size
            if position < context_len - query_len:
                k_pool[block_id, :, offset], v_pool[block_id, :, offset] = keys[position], values[position]
            else:
                slots.append(block_id * chunk_size + offset)
                new_keys.append(keys[position])
                new_values.append(values[position])
        block_tables[len(segments), : len(table)] = torch.tensor(table)
        segments.append((row, query_len, context_len, len(segments)))
        contexts.append((keys, values))
        row += query_len
    descriptors = torch.tensor(segments, dtype=torch.int32)
    metadata = AttentionMetadata(torch.tensor(slots), descriptors, block_tables, chunk_size)
    query = torch.randn(num_heads, row, k_dim, generator=generator)

    backend.write_kv(
        k_pool, v_pool, torch.stack(new_keys).transpose(0, 1), torch.stack(new_values).transpose(0, 1), metadata
    )
    actual = backend.attend(query, k_pool, v_pool, metadata, params)

    assert actual.shape == (row, num_heads, v_dim)
    for (first_row, query_len, context_len, _), (keys, values) in zip(segments, contexts, strict=True):
        for index in range(query_len):
            position = context_len - query_len + index
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                q = query[head, first_row + index]
                expected = attention_by_formula(q, keys[:, kv_head], values[:, kv_head], position, head, params)
                torch.testing.assert_close(actual[first_row + index, head].double(), expected, atol=1e-5, rtol=1e-4)


def test_writing_touches_the_slots_of_the_step_and_no_others(backend):
    k_pool, v_pool = torch.zeros(3, 2, 4, 5), torch.zeros(3, 2, 4, 6)
    key, value = torch.randn(2, 3, 5), torch.randn(2, 3, 6)
    nothing = torch.zeros(0, 4, dtype=torch.int32)
    metadata = AttentionMetadata(torch.tensor([9, 2, 7]), nothing, nothing, 4)
    backend.write_kv(k_pool, v_pool, key, value, metadata)
    for pool, new in [(k_pool, key), (v_pool, value)]:
        for row, (block_id, offset) in enumerate([(2, 1), (0, 2), (1, 3)]):
            assert torch.equal(pool[block_id, :, offset], new[:, row])
            pool[block_id, :, offset] = 0
        assert not pool.any()


# -- whole models ------------------------------------------------------------------------------------------------------


class LogitsRunner(ModelRunner):
    """A model runner over NaN-filled blocks that keeps the logits of each step."""

    def _forward(self, *args):
        self.logits = super()._forward(*args)
        return self.logits


class Bench:
    """One family: its paged runner, and the plain transformers forward."""

    def __init__(self, folder, backend, chunk_size: int, num_blocks: int) -> None:
        loaded = load_model(EngineConfig(model=str(folder), dtype="float32"))
        self.chunk_size = chunk_size
        sizes = {"num_blocks": num_blocks, "chunk_size": chunk_size, "dtype": loaded.dtype, "device": loaded.device}
        store, cpu_store = KVStore(loaded.layers, **sizes), KVStore(loaded.layers, **sizes)
        for each in (store, cpu_store):
            each.storage.fill_(float("nan"))
        self.store = store
        self.runner = LogitsRunner(loaded, store, ThreadSwapper(store, cpu_store, verify=False), backend)
        self.plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        self.num_steps = 0

    @torch.inference_mode()
    def expected(self, token_ids: list[int]) -> torch.Tensor:
        """Logits after the last token."""
        return self.plain(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1]

    def step(self, *segments: QuerySegment, **parts: object) -> torch.Tensor:
        self.num_steps += 1
        self.runner.execute(StepPlan(self.num_steps, segments, **parts))  # type: ignore[arg-type]
        return self.runner.logits

    def assert_right(self, actual: torch.Tensor, *contexts: list[int]) -> None:
        assert len(actual) == len(contexts)
        for row, context in zip(actual, contexts, strict=True):
            expected = self.expected(context)
            scale = max(1.0, expected.abs().max().item())
            assert (row - expected).abs().max().item() < 1e-4 * scale


GREEDY = SamplingParams(temperature=0.0)


def start(request_id: str, token_ids: list[int], block_table: list[int]) -> RequestStart:
    return RequestStart(request_id, len(token_ids), len(token_ids), GREEDY, (), tuple(block_table))


def segment(request_id: str, context: list[int], first: int, end: int | None = None) -> QuerySegment:
    end = len(context) if end is None else end
    return QuerySegment(request_id, first, tuple(context[first:end]), end == len(context))


@pytest.fixture(params=SERVED, ids="-".join)
def bench(request, tiny_model) -> Bench:
    option, family = request.param
    backend = choose_backend(option, torch.device("cpu"), torch.float32)
    return Bench(tiny_model(family), backend, chunk_size=8, num_blocks=40)


@pytest.fixture
def contexts() -> list[list[int]]:
    random_ = random.Random(1)
    return [[random_.randrange(3, 250) for _ in range(length)] for length in (5, 61, 16, 33)]


def shuffled_tables(lengths: list[int]) -> list[list[int]]:
    block_ids = list(range(40))
    random.Random(2).shuffle(block_ids)
    return [[block_ids.pop() for _ in range(-(-length // 8))] for length in lengths]


def test_a_ragged_batch_equals_the_plain_forward(bench, contexts):
    """Longer than the window of the families that have one; lengths of one chunk, several, and parts."""
    tables = shuffled_tables([len(context) for context in contexts])
    starts = tuple(start(str(i), contexts[i], tables[i]) for i in range(4))
    logits = bench.step(*(segment(str(i), contexts[i], 0) for i in range(4)), starts=starts)
    bench.assert_right(logits, *contexts)


def test_prefills_in_parts_mixed_with_decodes_equal_the_plain_forward(bench, contexts):
    """Request 0 decodes while the others come in parts that do not respect chunks; a table grows on the way."""
    tables = shuffled_tables([5, 61, 16, 33, 16])
    a, b, c, d = contexts
    bench.assert_right(bench.step(segment("0", a, 0), starts=(start("0", a, tables[0]),)), a)
    answers = [40, 41, 42, 43]
    parts = [("1", b, 0, 13), ("1", b, 13, 30), ("1", b, 30, 61), ("2", c, 0, 16)]
    starts = {0: ("1", b, tables[1]), 3: ("2", c, tables[2])}
    for index, (request_id, context, first, end) in enumerate(parts):
        a = [*a, answers[index]]
        appends = (BlockAppend("0", tables[4][0]),) if len(a) == 9 else ()
        logits = bench.step(
            segment("0", a, len(a) - 1),
            segment(request_id, context, first, end),
            starts=(start(*starts[index]),) if index in starts else (),
            appends=appends,
        )
        bench.assert_right(logits, a, *([context] if end == len(context) else []))
    logits = bench.step(
        segment("0", [*a, 44], len(a)),
        segment("2", [*c, 7], 16),
        segment("3", d, 0),
        starts=(start("3", d, tables[3]),),
        appends=(BlockAppend("2", tables[4][1]),),
    )
    bench.assert_right(logits, [*a, 44], [*c, 7], d)


def test_a_decode_without_a_token_goes_on_from_what_was_sampled_last(bench, contexts):
    tables = shuffled_tables([24, 80])
    rows = [contexts[2], contexts[1]]
    starts = tuple(start(str(i), rows[i], tables[i]) for i in range(2))
    logits = bench.step(*(segment(str(i), rows[i], 0) for i in range(2)), starts=starts)
    for _ in range(4):
        rows = [[*row, int(values.argmax())] for row, values in zip(rows, logits, strict=True)]
        logits = bench.step(*(QuerySegment(str(i), len(rows[i]) - 1, None, True) for i in range(2)))
        bench.assert_right(logits, *rows)


@pytest.mark.parametrize("holes", [[(0, 8)], [(8, 24)], [(0, 8), (16, 24), (40, 48)], [(0, 56)]], ids=str)
def test_holes_are_recomputed_with_what_follows_them(bench, contexts, holes):
    """The chunks of the holes lie in new blocks that hold NaN; all other KV is what an earlier request left."""
    context = contexts[1]
    table = shuffled_tables([61])[0]
    bench.step(segment("old", context, 0), starts=(start("old", context, table),))
    unused = [block_id for block_id in range(40) if block_id not in table]
    for first, end in holes:
        for chunk in range(first // 8, end // 8):
            table[chunk] = unused.pop()
    logits = bench.step(
        *(segment("new", context, first, end) for first, end in holes),
        segment("new", context, 60),
        starts=(start("new", context, table),),
        ended=("old",),
    )
    bench.assert_right(logits, context)


def test_a_copied_tail_serves_another_request_and_leaves_its_source(bench, contexts):
    context = contexts[3]  # 33 tokens: the fifth block holds one
    tables = shuffled_tables([33, 40])
    bench.step(segment("old", context, 0), starts=(start("old", context, tables[0]),))
    fork = [*context, 9, 10, 11]
    new_block = tables[1][0]
    logits = bench.step(
        segment("fork", fork, 33),
        segment("old", [*context, 77], 33),
        starts=(start("fork", fork, [*tables[0][:4], new_block]),),
        local_copies=(local_copy(tables[0][4], new_block),),
    )
    bench.assert_right(logits, fork, [*context, 77])

"""First prompts that torch's contiguous attention serves, among segments that the backend serves, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention import reference, whole_prompts
from engine.attention.protocol import AttentionMetadata, AttentionParams
from tests.engine.attention.test_cpu import expected_output, make_batch

LEAST = 6


class Backend:
    """The reference, as far as the host's segments go; notes them."""

    CAN_REPLAY_DECODES = True

    def __init__(self, *, skips: bool = True) -> None:
        self.SKIPS_EMPTY_SEGMENTS = skips
        self.query_lens: list[list[int]] = []

    def attend(self, query, k_pool, v_pool, metadata, params):
        self.query_lens.append(metadata.host_segments[:, 1].tolist())
        host = torch.from_numpy(metadata.host_segments)
        return reference.attend(query, k_pool, v_pool, replace(metadata, segments=host[host[:, 1] > 0]), params)


@pytest.fixture(autouse=True)
def short_prompts_count():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_prompts, "MIN_PROMPT_LEN", LEAST)
        yield


def own_rows(pool: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
    """[num_kv_heads, num_tokens, dim]: K or V of the step's rows, as the layer made them."""
    parts = []
    for _, query_len, context_len, table in metadata.segments.tolist():
        positions = torch.arange(context_len - query_len, context_len)
        blocks = metadata.block_tables[table, positions // metadata.chunk_size].long()
        parts.append(pool[blocks, :, positions % metadata.chunk_size].transpose(0, 1))
    return torch.cat(parts, 1)


def attend(backend, segments, heads=(4, 2), dtype=torch.float16, params=None, dims=(8, 8), seed=0, **changes):
    """(actual, expected) output of a random batch."""
    params = params or AttentionParams(0.3)
    query, k_pool, v_pool, metadata = make_batch(seed, segments, heads, *dims, 4, dtype)
    expected = expected_output(query, k_pool, v_pool, metadata, params)
    key, value = own_rows(k_pool, metadata), own_rows(v_pool, metadata)
    metadata = replace(metadata, **({"host_segments": metadata.segments.numpy()} | changes))
    return whole_prompts.attend(backend, query, key, value, (k_pool, v_pool), metadata, params).float(), expected


@given(
    seed=st.integers(0, 2**16),
    segments=st.lists(
        st.one_of(
            st.integers(1, 20).map(lambda n: (n, n)),
            st.tuples(st.integers(1, 9), st.integers(0, 30)).map(lambda t: (t[0], t[0] + t[1])),
        ),
        min_size=1,
        max_size=5,
    ),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2)]),
    window=st.sampled_from([None, 3, 12]),
)
@settings(deadline=None, max_examples=60)
def test_random_batches_equal_the_reference(seed, segments, heads, window):
    """And the backend gets exactly those rows that are not of a whole prompt."""
    backend = Backend()
    params = AttentionParams(0.3, sliding_window=window)
    actual, expected = attend(backend, segments, heads, params=params, seed=seed)
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)
    is_whole = [query == context >= LEAST and (window is None or query <= window) for query, context in segments]
    left = [0 if whole else query for (query, _), whole in zip(segments, is_whole, strict=True)]
    assert backend.query_lens == ([left] if any(left) else [])


@pytest.mark.parametrize(
    "case",
    [
        {"dtype": torch.float32},
        {"params": AttentionParams(0.3, softcap=5.0)},
        {"params": AttentionParams(0.3, sinks=torch.ones(4))},
        {"dims": (8, 4)},
        {"backend": Backend(skips=False)},
    ],
    ids=lambda case: next(iter(case)),
)
def test_what_torch_does_not_compute_alike_stays_with_the_backend(case):
    backend = case.pop("backend", None) or Backend()
    actual, expected = attend(backend, [(20, 20), (1, 9)], **case)
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)
    assert backend.query_lens == [[20, 1]]


def test_layers_of_a_step_share_what_is_split():
    backend = Backend()
    derived: dict = {}
    for _ in range(3):
        attend(backend, [(20, 20), (1, 9)], derived=derived)
    assert len(derived) == 1
    assert backend.query_lens == [[0, 1]] * 3


def test_a_recorded_batch_of_decodes_is_never_split():
    """What it launches must not depend on what is in it now."""
    query, k_pool, v_pool, metadata = make_batch(0, [(1, 9)], (4, 2), 8, 8, 4, torch.float16)
    recorded = replace(metadata, is_decode_batch=True, host_segments=metadata.segments.numpy())
    key, value = own_rows(k_pool, metadata), own_rows(v_pool, metadata)
    backend = Backend()
    whole_prompts.attend(backend, query, key, value, (k_pool, v_pool), recorded, AttentionParams(0.3))
    assert backend.query_lens == [[1]]
    assert recorded.derived == {}

"""The C++ kernel against the torch reference over random ragged batches.

Guard blocks, what the segments do not cover, and fresh memory hold NaN, so that reading too much or writing too little
shows.
"""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import kernel_build
from engine.attention import cpu, reference
from engine.attention.choice import choose_backend
from engine.attention.protocol import AttentionCall, AttentionMetadata, AttentionParams, LayerShape
from engine.attention.self_check import find_fault
from engine.errors import ConfigError, KernelBuildError
from engine.operator_build import build_operators

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# (query heads, KV heads): one to one, grouped, and more query heads than fit a tile of the kernel.
HEADS = [(1, 1), (4, 4), (6, 2), (8, 1), (60, 1), (118, 2)]
NUM_GUARD_BLOCKS = 3


@pytest.fixture(scope="module", autouse=True)
def kernel():
    cpu.load_kernel()


@pytest.fixture(autouse=True)
def fresh_memory_holds_nan():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)


def make_batch(seed: int, segments, heads, k_dim, v_dim, chunk_size, dtype):
    """(query, K pool, V pool, metadata): pools of NaN but for the contexts of `segments` [(query_len, context_len)]."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    num_blocks = [-(-context_len // chunk_size) for _, context_len in segments]
    ids = random.Random(seed).sample(range(sum(num_blocks) + NUM_GUARD_BLOCKS), sum(num_blocks))
    k_pool = torch.full(
        (sum(num_blocks) + NUM_GUARD_BLOCKS, num_kv_heads, chunk_size, k_dim), float("nan"), dtype=dtype
    )
    v_pool = torch.full((*k_pool.shape[:3], v_dim), float("nan"), dtype=dtype)
    tables = torch.full((len(segments) + 2, max(num_blocks) + 1), 2**31 - 1, dtype=torch.int32)
    descriptors, row = [], 0
    for index, (query_len, context_len) in enumerate(segments):
        table = [ids.pop() for _ in range(num_blocks[index])]
        tables[len(segments) - index, : len(table)] = torch.tensor(table)
        for number, block_id in enumerate(table):
            length = min(chunk_size, context_len - number * chunk_size)
            for pool in (k_pool, v_pool):
                shape = (num_kv_heads, length, pool.shape[3])
                pool[block_id, :, :length] = torch.randn(shape, generator=generator).to(dtype)
        descriptors.append((row, query_len, context_len, len(segments) - index))
        row += query_len
    # As the models hand it over: a transposed view.
    query = torch.randn(row, num_heads, k_dim, generator=generator).to(dtype).transpose(0, 1)
    metadata = AttentionMetadata(
        torch.zeros(row, dtype=torch.long), torch.tensor(descriptors, dtype=torch.int32), tables, chunk_size
    )
    return query, k_pool, v_pool, metadata


def expected_output(query, k_pool, v_pool, metadata, params):
    """The reference in float32: what the kernel computes in, whatever the pools hold."""
    return reference.attend(query.float(), k_pool.float(), v_pool.float(), metadata, params)


def assert_right(seed, segments, heads, k_dim, v_dim, chunk_size, dtype, params) -> None:
    query, k_pool, v_pool, metadata = make_batch(seed, segments, heads, k_dim, v_dim, chunk_size, dtype)
    actual = cpu.attend(query, k_pool, v_pool, metadata, params)
    assert actual.dtype == dtype
    expected = expected_output(query, k_pool, v_pool, metadata, params)
    torch.testing.assert_close(actual.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


segments_strategy = st.lists(
    st.tuples(st.one_of(st.integers(1, 9), st.integers(1, 130)), st.integers(0, 300)).map(
        lambda t: (t[0], t[0] + t[1])
    ),
    min_size=1,
    max_size=6,
)


@given(
    seed=st.integers(0, 2**16),
    segments=segments_strategy,
    heads=st.sampled_from(HEADS),
    k_dim=st.sampled_from([4, 8, 20, 32, 64]),
    v_dim=st.sampled_from([4, 12, 16, 64]),
    chunk_size=st.sampled_from([1, 4, 5, 16, 32, 100]),
    dtype=st.sampled_from(list(TOLERANCE)),
    window=st.sampled_from([None, 1, 7, 64, 100]),
    softcap=st.sampled_from([None, 2.0]),
    has_sinks=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_random_ragged_batches_equal_the_reference(
    seed, segments, heads, k_dim, v_dim, chunk_size, dtype, window, softcap, has_sinks
):
    sinks = torch.randn(heads[0], generator=torch.Generator().manual_seed(seed)) if has_sinks else None
    params = AttentionParams(k_dim**-0.5, window, softcap, sinks)
    assert_right(seed, segments, heads, k_dim, v_dim, chunk_size, dtype, params)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_segments_without_rows_are_passed_over(dtype):
    """They pad a batch of decodes."""
    assert_right(4, [(1, 40), (0, 7), (40, 90), (0, 0)], (4, 2), 16, 16, 32, dtype, AttentionParams(0.25))


@pytest.mark.parametrize("heads", [(53, 1), (118, 2), (202, 2)], ids=str)
def test_more_query_heads_of_a_kv_head_than_fit_a_tile(heads):
    """And no divisor of their number that does: each is a head with the same K and V as its neighbours."""
    assert_right(5, [(1, 40), (1, 7), (1, 130), (3, 60)], heads, 16, 16, 32, torch.float32, AttentionParams(0.25))


@pytest.mark.parametrize("num_threads", [1, 3, 16])
@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("segments", [[(1, 3000)], [(9, 2500)], [(1, 700), (60, 2000)], [(300, 2001)]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contexts_split_over_threads_equal_the_reference(num_threads, window, segments, dtype):
    """Few jobs and long contexts: the kernel cuts the context and combines the parts."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        sinks = torch.tensor([0.5, -1.0])
        assert_right(3, segments, (2, 1), 16, 16, 32, dtype, AttentionParams(0.25, window, None, sinks))
    finally:
        torch.set_num_threads(before)


@given(
    seed=st.integers(0, 2**16),
    num_tokens=st.integers(1, 200),
    num_heads=st.integers(1, 3),
    dims=st.sampled_from([(4, 4), (8, 3), (5, 16)]),
    chunk_size=st.sampled_from([1, 3, 32]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
@settings(deadline=None, max_examples=50)
def test_writes_equal_the_reference(seed, num_tokens, num_heads, dims, chunk_size, dtype):
    """The same slots, and no others."""
    num_blocks = -(-num_tokens // chunk_size) + NUM_GUARD_BLOCKS
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(num_blocks * chunk_size, generator=generator)[:num_tokens]
    nothing = torch.zeros(0, 4, dtype=torch.int32)
    metadata = AttentionMetadata(slots, nothing, nothing, chunk_size)
    key, value = (torch.randn(num_tokens, num_heads, d, generator=generator).to(dtype).transpose(0, 1) for d in dims)
    pools = [[torch.zeros(num_blocks, num_heads, chunk_size, dim, dtype=dtype) for dim in dims] for _ in range(2)]
    cpu.write_kv(*pools[0], key, value, metadata)
    reference.write_kv(*pools[1], key, value, metadata)
    for actual, expected in zip(*pools, strict=True):
        assert torch.equal(actual, expected)


def test_pools_may_be_views_of_blocks_that_hold_all_layers():
    """As KVStore lays them out: the stride between blocks is that of all layers together."""
    query, k_pool, v_pool, metadata = make_batch(1, [(1, 50), (20, 70)], (4, 2), 8, 8, 16, torch.float32)
    storage = torch.full((len(k_pool), 3 * k_pool[0].numel()), float("nan"))
    views = [storage[:, i * k_pool[0].numel() : (i + 1) * k_pool[0].numel()].view(k_pool.shape) for i in (1, 2)]
    for view, pool in zip(views, (k_pool, v_pool), strict=True):
        view.copy_(pool)
    params = AttentionParams(0.3)
    assert torch.equal(cpu.attend(query, *views, metadata, params), cpu.attend(query, k_pool, v_pool, metadata, params))


def test_wrong_tensors_are_refused():
    query, k_pool, v_pool, metadata = make_batch(1, [(1, 50)], (4, 2), 8, 8, 16, torch.float32)
    params = AttentionParams(0.3)
    with pytest.raises(RuntimeError, match="same dtype"):
        cpu.attend(query.bfloat16(), k_pool, v_pool, metadata, params)
    with pytest.raises(RuntimeError, match="multiple of num_kv_heads"):
        cpu.attend(query[:3], k_pool, v_pool, metadata, params)
    with pytest.raises(RuntimeError, match="k_dim"):
        cpu.attend(query[..., :4], k_pool, v_pool, metadata, params)


# -- the kernel on a processor that it was not tested on ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_matrix_kernel_that_takes_another_layout_is_told_apart(dtype):
    """As torch's is for float16 on processors with AVX512-FP16 that lack AMX-FP16: there the kernel does without it."""
    assert torch.ops.pensieve.brgemm_takes_pairs(dtype, "pairs")
    assert not torch.ops.pensieve.brgemm_takes_pairs(dtype, "rows")
    assert isinstance(torch.ops.pensieve.brgemm_takes_pairs(dtype, "torch"), bool)
    with pytest.raises(RuntimeError, match="not columns"):
        torch.ops.pensieve.brgemm_takes_pairs(dtype, "columns")


SINKS = torch.linspace(-2, 2, 8)
CALLS = (
    AttentionCall(LayerShape(2, 16, 16), 8, AttentionParams(0.25)),
    AttentionCall(LayerShape(4, 32, 12), 8, AttentionParams(0.2, 4096, 50.0)),
    AttentionCall(LayerShape(8, 20, 20), 8, AttentionParams(1.0, 1, None, SINKS)),
)


def choose(option: str, dtype: torch.dtype, chunk_size: int = 16):
    return choose_backend(option, torch.device("cpu"), dtype, CALLS, chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 5, 32, 256])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_kernel_passes_its_check_in_every_dtype(dtype, chunk_size, caplog):
    assert find_fault(cpu, torch.device("cpu"), dtype, CALLS, chunk_size) is None
    assert choose("cpu", dtype, chunk_size) is choose("auto", dtype, chunk_size) is cpu
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def pairs_of_rows_swapped(attend):
    """What a matrix kernel makes of V in another layout, with many rows only."""

    def wrong(query, k_pool, v_pool, metadata, params):
        if metadata.segments[:, 1].max() > 8:
            v_pool = v_pool[:, :, torch.arange(v_pool.shape[2]) ^ 1]
        return attend(query, k_pool, v_pool, metadata, params)

    return wrong


def with_params(**changes):
    def mutate(attend):
        def wrong(query, k_pool, v_pool, metadata, params):
            values = {name: getattr(params, name) for name in ("scaling", "sliding_window", "softcap", "sinks")}
            for name, change in changes.items():
                values[name] = None if values[name] is None else change(values[name])
            return attend(query, k_pool, v_pool, metadata, AttentionParams(**values))

        return wrong

    return mutate


def last_row_is_nan(attend):
    def wrong(*args):
        out = attend(*args)
        out[-1] = float("nan")
        return out

    return wrong


def raises(_):
    def wrong(*_: object):
        raise RuntimeError("illegal instruction")

    return wrong


WRONG = {
    "pairs": pairs_of_rows_swapped,
    "scaling": with_params(scaling=lambda x: 1.2 * x),
    "window": with_params(sliding_window=lambda _: None),
    "window + 1": with_params(sliding_window=lambda x: x + 1),
    "softcap": with_params(softcap=lambda x: 0.02 * x),
    "sinks": with_params(sinks=lambda _: None),
    "nan": last_row_is_nan,
    "raises": raises,
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("how", list(WRONG))
def test_a_kernel_that_is_wrong_on_this_machine_is_not_used(how, dtype, monkeypatch, caplog):
    monkeypatch.setattr(cpu, "attend", WRONG[how](cpu.attend))
    assert choose("auto", dtype) is reference
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("attention: torch's operations (reference), much slower than a kernel; C++ kernel (cpu)")
    assert "is wrong here for this model" in line
    with pytest.raises(ConfigError, match="is wrong here") as error:
        choose("cpu", dtype)
    assert error.value.param == "attention_backend"


def test_a_kernel_that_writes_to_wrong_slots_is_not_used(monkeypatch):
    write_kv = cpu.write_kv

    def wrong(k_pool, v_pool, key, value, metadata):
        write_kv(k_pool, v_pool, key, value.flip(1), metadata)

    monkeypatch.setattr(cpu, "write_kv", wrong)
    assert choose("auto", torch.float32) is reference


def test_an_engine_with_a_wrong_kernel_gives_right_answers(monkeypatch, tiny_model, make_driver):
    prompt = list(range(10, 40))
    options = {"num_gpu_blocks": 16, "chunk_size": 8, "max_model_len": 100}
    expected = make_driver(tiny_model("llama"), attention_backend="reference", **options).generate("a", prompt)
    monkeypatch.setattr(cpu, "attend", pairs_of_rows_swapped(cpu.attend))
    assert make_driver(tiny_model("llama"), **options).generate("a", prompt) == expected


# -- choosing and building ---------------------------------------------------------------------------------------------


def test_auto_is_the_kernel_on_a_cpu_and_says_so(caplog):
    caplog.set_level("INFO")
    assert choose_backend("auto", torch.device("cpu"), torch.float32) is cpu
    assert "attention: C++ kernel" in caplog.text
    assert choose_backend("reference", torch.device("cpu"), torch.float32) is reference
    with pytest.raises(ConfigError, match="use 'auto'"):
        choose_backend("cpu", torch.device("meta"), torch.float32)


def test_without_a_compiler_auto_falls_back_and_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cpu, "load_kernel", lambda: build("AVX2"))
    assert choose_backend("auto", torch.device("cpu"), torch.float32) is reference
    assert "no C++ compiler" in caplog.text
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        choose_backend("cpu", torch.device("cpu"), torch.float32)


def test_a_compiler_that_fails_is_an_error_with_its_words(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", f"{sys.executable} -c \"import sys; sys.exit('out of luck')\"")
    with pytest.raises(KernelBuildError, match="out of luck"):
        build("AVX2")
    assert not list(tmp_path.rglob("*.so"))


def test_a_compiler_that_failed_is_not_asked_again(monkeypatch, tmp_path):
    """A model has a weight for each of its layers, and each of them would wait for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    script, asked = tmp_path / "compiler.py", tmp_path / "asked"
    script.write_text(
        "import sys\n"
        "if '--version' not in sys.argv:\n"
        f"    open({str(asked)!r}, 'a').write('once ')\n"
        "    sys.exit('out of luck')\n"
    )
    monkeypatch.setenv("CXX", f"{sys.executable} {script}")
    for _ in range(3):
        with pytest.raises(KernelBuildError, match="out of luck"):
            build("AVX2")
    assert asked.read_text() == "once "


def test_a_cache_folder_that_cannot_be_used_is_no_reason_to_stop(tmp_path):
    (tmp_path / "pensieve").write_text("a file where the folder would be")
    process = subprocess.run(
        [sys.executable, "-m", "engine.attention.cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        check=True,
    )
    assert "torch's operations will be used" in process.stderr


def build(capability: str) -> Path:
    return build_operators(cpu.SOURCE, "attention", capability)


class Compiler:
    """Stands for g++: notes what it is asked for."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.version = "g++ 14.2"
        self.num_builds = 0
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.setattr(kernel_build, "_find_compiler", self.find)
        monkeypatch.setattr(kernel_build, "_compile", self.compile)

    def find(self) -> tuple[list[str], str]:
        if not self.version:
            raise KernelBuildError("no C++ compiler")
        return ["g++"], self.version

    def compile(self, command: list[str]) -> None:
        self.num_builds += 1
        Path(command[-1]).write_text(" ".join(command))


def test_a_kernel_is_built_again_for_another_torch_compiler_or_processor(tmp_path, monkeypatch):
    compiler = Compiler(tmp_path, monkeypatch)
    library = build("AVX512")
    assert build("AVX512") == library
    assert compiler.num_builds == 1
    others = {build("AVX2")}
    for owner, name, value in [
        (compiler, "version", "g++ 15.1"),
        (torch, "__version__", "2.99.0"),
        (torch.version, "git_version", "another"),
        (kernel_build.platform, "machine", lambda: "aarch64"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            others.add(build("AVX512"))
    assert len(others - {library}) == compiler.num_builds - 1 == 5
    assert build("AVX512") == library
    assert compiler.num_builds == 6


def test_without_a_compiler_what_another_one_built_is_used(tmp_path, monkeypatch):
    compiler = Compiler(tmp_path, monkeypatch)
    library = build("AVX512")
    compiler.version = ""
    assert build("AVX512") == library
    with pytest.raises(KernelBuildError):
        build("AVX2")


def test_nobody_else_can_put_a_kernel_into_the_cache(tmp_path, monkeypatch):
    compiler = Compiler(tmp_path, monkeypatch)
    folder = tmp_path / "pensieve" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    library = build("AVX512")
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert compiler.num_builds == 1
    assert library.parent == folder


def test_a_built_kernel_is_found_without_a_compiler(tmp_path):
    """In a fresh process: the build of this machine is used as it is."""
    built = subprocess.run(
        [sys.executable, "-m", "engine.attention.cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": str(tmp_path / "nothing")},
        check=True,
    )
    assert "ready" in built.stdout

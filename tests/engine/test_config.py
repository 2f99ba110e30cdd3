"""One frozen value of options, checked once; a message names the option and the remedy."""

import dataclasses
import re

import pytest

from engine.config import GROUPS, EngineConfig
from engine.core.config import CacheConfig, SchedulingConfig
from engine.errors import ConfigError
from engine.options import options_of

# option, values that are just inside, values that are just outside or of the wrong kind
BOUNDS = [
    ("model", ["embedded", "a/b"], ["", None, 3]),
    ("served_model_name", [None, "a name"], [3]),
    ("mode", ["pensieve", "stateless", "vllm"], ["stateful", "", None, ["vllm"], {}]),
    ("dtype", ["auto", "float32", "bfloat16", "float16"], ["float64", "fp16", None]),
    (
        "device",
        ["auto", "cpu", "cuda", "cuda:0", "cuda:12"],
        ["gpu", "cuda:", "cuda:a", "cuda:-1", "cuda:0 ", "", 0, None],
    ),
    (
        "adapters",
        [{}, {"pirate": "/adapters/pirate"}, {"a/b:c.d-e_f": "x"}, None],
        [[], "pirate=x", {"": "x"}, {"a b": "x"}, {"a": ""}, {"a": 1}, {1: "x"}, {str(i): "x" for i in range(9)}],
    ),
    ("adapter_folder", ["/adapters", None], ["", 1, True]),
    ("max_adapters", [1, 100], [0, -1, None, 2.0, "4"]),
    ("max_lora_rank", [1, 64, 1024], [0, 1025, None, 8.0]),
    ("quantization", ["none", "int8", "int4", "auto"], ["int2", "", None, 8]),
    ("max_model_len", [1, None, 4096], [0, -1, 1.5, "512", True]),
    ("chunk_size", [1, 32], [0, -4, None, 2.0, "32", True]),
    ("num_gpu_blocks", [1, None], [0, -1, 3.0, "4", False]),
    ("num_cpu_blocks", [0, 1, None], [-1, 1.0, "0"]),
    ("gpu_memory_gib", [0.001, 2, None], [0, 0.0, -1, "2", float("nan"), True]),
    ("gpu_memory_utilization", [0.01, 1, 1.0], [0, 1.01, -0.5, None, "0.9", float("nan"), True]),
    ("kv_offloading_size", [0, 0.5], [-1, -0.5, None, float("nan")]),
    (
        "eviction_policy",
        ["retention_value", "lru", "trailing_lru", "tail_optimised_lru", "my.policies:Mine"],
        ["fifo", "", None, "my:", "a b:c"],
    ),
    ("max_num_seqs", [1, 512], [0, 513, 1.0, None]),
    ("max_num_batched_tokens", [64, 10**6], [0, 63, None, 512.0]),
    ("prefill_batch_tokens", [1, 10**6, None], [0, -1, 2.0, "4"]),
    ("max_num_queued_reqs", [1, 10**6], [0, -1, None, 2.0]),
    ("max_num_queued_tokens", [1, None], [0, -1, 2.0, "4"]),
    (
        "speculative",
        [{"method": "ngram", "num_tokens": 1}, {"method": "ngram", "num_tokens": 32}, None],
        [{}, {"method": "eagle"}, {"method": "ngram", "num_tokens": 0}, {"method": "ngram", "k": 3}, "ngram", True],
    ),
    ("decode_reserve", [0, 0.0, 0.999], [1, 1.0, -0.01, None, float("nan")]),
    ("swap_out_watermark", [0, 0.5], [1, -0.01, None]),
    ("max_swap_outs", [1, 64, None], [0, -1, 2.0]),
    ("write_through", [True, False], [0, 1, None, "yes"]),
    ("kv_disk_path", ["/var/cache/kv", None], ["", 3, True]),
    ("kv_disk_size", [0.001, 1000], [0, -1, None, "16", float("nan")]),
    ("kv_handover", ["auto", "on", "off"], ["yes", "", None, 1]),
    ("kv_hints", ["off", "client", "learned"], ["on", "", None, 1, True]),
    ("kv_retention_share", [0.01, 0.5, 1], [0, 1.1, -1, None, float("nan")]),
    ("kv_transfer_rate", [0, 0.5, 10000, None], [-1, "200", float("nan")]),
    ("verify_swaps", [True, False], [0, 1, None, "no"]),
    ("profile", ["profile.json", None], [3, True]),
    ("num_threads", [1, None], [0, -1, 1.0]),
    ("attention_backend", ["auto", "triton", "flashinfer", "cpu", "reference"], ["cuda", "", None]),
    ("load_format", ["auto", "dummy"], ["random", "", None]),
    ("tool_call_parser", ["auto", "none", "hermes", "llama3_json", "mistral", "kimi_k2"], ["json", "", None]),
    ("reasoning_parser", ["auto", "none", "qwen3", "deepseek_r1", "glm45", "magistral"], ["think", "", None]),
    ("preserve_reasoning", ["auto", "never"], ["always", "", True, None]),
    ("enforce_eager", [True, False], [0, 1, None, "yes"]),
    ("kv_cold_dtype", ["same", "fp8", "int8", "int4"], ["q8_0", "", None]),
    ("pack_weights", [True, False], [0, 1, None, "yes"]),
    ("compile_layers", [True, False, None], [0, 1, "yes"]),
    ("async_scheduling", [True, False, None], [0, 1, "yes"]),
    ("tensor_parallel_size", [1, 8], [0, -1, None, 2.0, "2", True]),
    ("record_trace", ["/tmp/traces", None], ["", 1, True]),
    ("kv_events_endpoint", ["tcp://*:5557", None], ["", "5557", 5557]),
    ("kv_events_topic", ["kv", ""], [None, 1]),
]


def cases(index: int) -> list[tuple[str, object]]:
    return [(bound[0], value) for bound in BOUNDS for value in bound[index]]


def test_every_option_has_its_bounds_tested():
    assert sorted(bound[0] for bound in BOUNDS) == sorted(field.name for field in dataclasses.fields(EngineConfig))


@pytest.mark.parametrize(("name", "value"), cases(1))
def test_values_inside_the_bounds_are_taken(name, value):
    taken = getattr(EngineConfig.from_options({name: value}), name)
    assert taken == (value if value != "vllm" else "stateless")


@pytest.mark.parametrize(("name", "value"), cases(2))
def test_values_outside_the_bounds_are_refused_by_name(name, value):
    with pytest.raises(ConfigError) as error:
        EngineConfig.from_options({name: value})
    named = {"max_num_batched_tokens": {"max_num_batched_tokens", "max_num_seqs"}}.get(name, {name})
    assert error.value.param in named
    assert str(error.value).startswith(f"{error.value.param} must be ")


def test_random_weights_are_not_cut_for_ranks():
    with pytest.raises(ConfigError, match="load_format must be auto if tensor_parallel_size"):
        EngineConfig(load_format="dummy", tensor_parallel_size=2)


def test_kv_is_handed_over_unless_there_is_none():
    assert EngineConfig().may_hand_over
    assert EngineConfig(tensor_parallel_size=2).may_hand_over
    assert not EngineConfig(kv_handover="off").may_hand_over
    assert not EngineConfig(mode="stateless").may_hand_over
    with pytest.raises(ConfigError, match="kv_handover must be auto or off if"):
        EngineConfig(kv_handover="on", mode="stateless")


@pytest.mark.parametrize(("value", "meant"), [(True, "on"), (False, "off")])
def test_on_and_off_are_meant_as_yaml_reads_them(value, meant):
    assert EngineConfig.from_options({"kv_handover": value}).kv_handover == meant


def test_integers_stand_for_floats_as_yaml_gives_them():
    config = EngineConfig.from_options({"gpu_memory_gib": 2, "decode_reserve": 0})
    assert (type(config.gpu_memory_gib), type(config.decode_reserve)) == (float, float)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("chunksize", "did you mean 'chunk_size'?"),
        ("max-num-seqs", "did you mean 'max_num_seqs'?"),
        ("colour", "known are adapter_folder, adapters, .*, write_through"),
        ("block_size", "it is called 'chunk_size' here"),
        ("n_ctx", "it is called 'max_model_len' here"),
        ("ctx-size", "it is called 'max_model_len' here"),
        ("swap_space", "it is called 'kv_offloading_size' here"),
        ("num_gpu_blocks_override", "it is called 'num_gpu_blocks' here"),
        ("n_gpu_layers", "a model is on one device as a whole; set device"),
        ("cpu_offload_gb", "weights are not offloaded; for KV in host memory, set kv_offloading_size"),
        ("enable_prefix_caching", "prefixes are always cached in mode pensieve"),
    ],
)
def test_an_unknown_option_is_refused_with_the_one_that_was_meant(name, remedy):
    with pytest.raises(ConfigError) as error:
        EngineConfig.from_options({"model": "embedded", name: 16})
    assert re.match(f"unknown option {name!r}; {remedy}".replace("?", "[?]"), error.value.message)
    assert error.value.param == name


def test_the_groups_have_each_option_once():
    grouped = [option.name for _, group in GROUPS for option in options_of(group)]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {field.name for field in dataclasses.fields(EngineConfig)}


@pytest.mark.parametrize("entry", options_of(EngineConfig), ids=lambda entry: entry.name)
def test_an_option_says_what_it_means(entry):
    """In a first sentence that fits a line, with what a default of None stands for."""
    assert entry.option.help.endswith(".")
    assert len(entry.option.help) <= 120
    assert entry.default is not None or entry.option.default


def test_the_core_gets_every_option_of_its_groups():
    """By name, so that an option cannot be forgotten on the way."""
    config = EngineConfig(chunk_size=8, eviction_policy="lru", write_through=True, max_num_seqs=3, decode_reserve=0.5)
    cache = CacheConfig.of(config, num_gpu_blocks=4, keep=False)
    assert cache == CacheConfig(
        chunk_size=8, eviction_policy="lru", write_through=True, num_gpu_blocks=4, num_cpu_blocks=0, keep=False
    )
    assert SchedulingConfig.of(config, max_model_len=9, prefill_batch_tokens=2) == SchedulingConfig(
        max_num_seqs=3, decode_reserve=0.5, max_model_len=9, prefill_batch_tokens=2
    )


def test_an_alias_is_the_same_configuration():
    assert EngineConfig(mode="vllm") == EngineConfig(mode="stateless")
    assert EngineConfig(tool_call_parser="qwen3_xml") == EngineConfig(tool_call_parser="qwen3_coder")


def test_speculative_is_read_once_and_whole():
    told = EngineConfig(speculative={"method": "ngram", "num_tokens": "4"}).speculative
    assert told == {"method": "ngram", "num_tokens": 4}
    assert EngineConfig(speculative={"method": "ngram"}).speculative == {"method": "ngram", "num_tokens": 8}


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().mode = "stateless"  # type: ignore[misc]


def test_off_is_what_yaml_makes_of_it():
    assert EngineConfig(kv_hints=False).kv_hints == "off"
    with pytest.raises(ConfigError, match="kv_hints must be one of off, client, learned, got 'on'"):
        EngineConfig(kv_hints=True)

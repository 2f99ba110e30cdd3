"""Several adapters and the model alone in one batch: each answers as if its weights were merged into the model's."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.core.request import SamplingParams
from engine.errors import AdapterError, ExecutorError
from engine.executor.lora.peft_files import LinearShape, read_adapter
from engine.step_loop import LookAhead
from tests.engine.test_equivalence import assert_same_tokens
from tests.lora import linear_layers, merge_adapter, save_adapter

OPTIONS = {"chunk_size": 8, "max_num_batched_tokens": 48, "max_num_seqs": 5, "max_model_len": 200}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, logprobs=2, ignore_eos=True)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Targets of two adapters: some layers of the first one, and all.
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen3": ATTENTION,
    "gemma2": r"model\.layers\.\d+\.mlp\.(gate|up)_proj",
    "phi3": ["qkv_proj", "down_proj"],
    "gpt2": ["c_attn"],
    "opt": ["fc1", "fc2", "v_proj"],
    "mixtral": ATTENTION,
}


# In these, adapters are added by torch's operations, as if there were no compiler.
WITHOUT_KERNEL = ("opt",)


@pytest.mark.parametrize("family", TARGETS)
def test_mixed_batches_equal_merged_weights(family, tiny_model, tmp_path, make_driver, monkeypatch):
    """Three conversations of each of two adapters and of the model alone, with evictions, against one merged model each."""
    if family in WITHOUT_KERNEL:
        monkeypatch.setattr("engine.executor.lora.adapters.load_kernel", lambda device, dtype: None)
    model = tiny_model(family)
    folders = {
        "some": save_adapter(model, tmp_path / "some", 1, TARGETS[family]),
        "all": save_adapter(model, tmp_path / "all", 2, "all-linear", use_rslora=True),
    }
    models = {
        "": model,
        "some": merge_adapter(model, folders["some"], tmp_path / "merged some", 2.0),
        "all": merge_adapter(model, folders["all"], tmp_path / "merged all", 4.0),
    }
    adapters = {name: str(folder) for name, folder in folders.items()}
    mixed = make_driver(model, num_gpu_blocks=32, num_cpu_blocks=12, adapters=adapters, **OPTIONS)
    identities = {"": "", **{name: mixed.executor.load_adapter(folder) for name, folder in adapters.items()}}
    rng = random.Random(family)
    system_prompt = rng.choices(range(3, 250), k=19)  # the same for all: nothing of it may be shared between adapters
    histories = {
        (name, i): system_prompt + rng.choices(range(3, 250), k=5 + 7 * i) for i in range(3) for name in models
    }
    prompts = {}
    for turn in range(2):
        for (name, i), history in histories.items():
            prompts[f"{name} {i} {turn}"] = list(history)
            mixed.add(f"{name} {i} {turn}", list(history), f"{name} {i}", GREEDY, adapter=identities[name])
        mixed.run()
        mixed.core.check_integrity()
        for (name, i), history in histories.items():
            history += [*mixed.tokens(f"{name} {i} {turn}"), *rng.choices(range(3, 250), k=3)]

    num_ties, answers = 0, []
    for name, merged in models.items():
        alone = make_driver(merged, num_gpu_blocks=60, mode="stateless", **OPTIONS)
        for request_id, prompt in prompts.items():
            if request_id.split(" ")[0] == name:
                alone.generate(request_id, prompt, sampling=GREEDY)
                num_ties += assert_same_tokens(mixed, alone, request_id)
                compare_logprobs(mixed.outputs[request_id], alone.outputs[request_id])
        answers.append(alone.tokens(f"{name} 0 0"))
    assert num_ties <= 1
    assert answers[0] != answers[1] != answers[2], "the adapters change nothing"
    in_steps = [{segment.request_id.split(" ")[0] for segment in plan.segments} for plan in mixed.plans]
    assert max(map(len, in_steps)) == 3, "no step had them all"
    assert mixed.core.get_statistics()["num_gpu_cached_tokens"] > 0


def compare_logprobs(ours, theirs):
    for mine, other in zip(ours, theirs, strict=False):
        if mine.token_id != other.token_id:
            return
        assert mine.logprobs.chosen == pytest.approx(other.logprobs.chosen, abs=2e-4)


@pytest.mark.parametrize("look_ahead", [LookAhead.DRAFT, LookAhead.LAUNCH])
def test_answers_are_the_same_with_and_without_cache(look_ahead, tiny_model, tmp_path, make_driver):
    """Interleaved conversations over few blocks: evictions, swaps, suspensions, and forks across adapters."""
    model, rng = tiny_model("llama"), random.Random(7)
    sampling = replace(GREEDY, max_tokens=12)
    folders = [str(save_adapter(model, tmp_path / str(seed), seed, "all-linear")) for seed in range(2)]
    options = {**OPTIONS, "adapters": {f"a{i}": folder for i, folder in enumerate(folders)}}
    kept = make_driver(model, num_gpu_blocks=25, num_cpu_blocks=60, decode_reserve=0.03, **options)
    fresh = make_driver(model, num_gpu_blocks=100, mode="stateless", **options)
    kept.loop.look_ahead = look_ahead
    identities = ["", *map(kept.executor.load_adapter, folders)]
    assert identities[1:] == [fresh.executor.load_adapter(folder) for folder in folders]
    histories = {f"c{i}": rng.choices(range(3, 250), k=20) for i in range(14)}
    prompts, running, turns_left = {}, {}, dict.fromkeys(histories, 4)
    while any(turns_left.values()) or running or kept.loop.in_flight:
        idle = [name for name in histories if turns_left[name] and name not in running.values()]
        if idle and rng.random() < 0.8:
            name = rng.choice(idle)
            request_id = f"r{len(prompts)}"
            if rng.random() < 0.3:  # the same tokens as another conversation has, perhaps with another adapter
                histories[name] = histories[rng.choice(list(histories))][:100]
            histories[name] = histories[name] + rng.choices(range(3, 250), k=rng.randint(1, 20))
            adapter = identities[rng.randrange(3)]  # a conversation changes it
            prompts[request_id] = histories[name][:], adapter
            kept.add(request_id, prompts[request_id][0], name, sampling, adapter=adapter)
            turns_left[name] -= 1
            running[request_id] = name
        for output in kept.step():
            if output.finish_reason is not None:
                histories[running.pop(output.request_id)] += kept.tokens(output.request_id)
        kept.core.check_integrity()
    num_ties = 0
    for request_id, (prompt, adapter) in prompts.items():
        fresh.generate(request_id, prompt, sampling=sampling, adapter=adapter)
        num_ties += assert_same_tokens(kept, fresh, request_id)
    assert num_ties <= 1
    stats = kept.core.get_statistics()
    assert stats["num_suspensions"] > 0
    assert stats["num_swap_ins"] > 0
    assert stats["num_gpu_cached_tokens"] > 0


def test_kv_of_another_adapter_is_never_found(tiny_model, tmp_path, make_driver):
    model = tiny_model("llama")
    folder = save_adapter(model, tmp_path / "a", 1, ["q_proj"])
    driver = make_driver(model, num_gpu_blocks=32, adapters={"a": str(folder)}, **OPTIONS)
    identity, prompt = driver.executor.load_adapter(str(folder)), list(range(10, 60))
    driver.generate("base", prompt)
    driver.generate("adapted", prompt, adapter=identity)
    driver.generate("base again", prompt)
    driver.generate("adapted again", prompt, adapter=identity)
    assert [driver.cached[each] for each in ("base", "adapted", "base again", "adapted again")] == [0, 0, 48, 48]
    # Another adapter of the same name, in the same folder, is another one.
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    save_adapter(model, folder, 2, ["q_proj"])
    other = driver.executor.load_adapter(str(folder))
    assert other != identity
    driver.generate("other", prompt, adapter=other)
    assert driver.cached["other"] == 0


def test_a_running_request_keeps_an_adapter_that_is_unloaded(tiny_model, tmp_path, make_driver):
    model = tiny_model("llama")
    folder = save_adapter(model, tmp_path / "a", 1, "all-linear")
    driver = make_driver(model, num_gpu_blocks=32, adapters={"a": str(folder)}, **OPTIONS)
    identity = driver.executor.load_adapter(str(folder))
    expected = driver.generate("before", list(range(20)), adapter=identity)
    driver.add("running", list(range(20)), adapter=identity)
    driver.step()
    driver.executor.unload_adapter(identity)
    driver.run()
    assert driver.tokens("running") == expected
    with pytest.raises(ExecutorError, match="not loaded"):
        driver.generate("after", [1, 2, 3], adapter=identity)


def test_steps_without_adapters_are_those_of_the_model_alone(tiny_model, tmp_path, make_driver):
    """Bit for bit, and so are the rows of the model alone in a step with adapters, as far as rounding allows."""
    model = tiny_model("llama")
    folder = save_adapter(model, tmp_path / "a", 1, "all-linear")
    plain = make_driver(model, num_gpu_blocks=32, **OPTIONS)
    driver = make_driver(model, num_gpu_blocks=32, adapters={"a": str(folder)}, **OPTIONS)
    driver.executor.load_adapter(str(folder))
    seen: dict[str, list[torch.Tensor]] = {"plain": [], "adapted": []}
    for name, each in (("plain", plain), ("adapted", driver)):
        each.executor.runner.see_logits = lambda logits, kept=seen[name]: kept.append(logits.clone())
        each.generate("r", list(range(30)))
    assert all(torch.equal(*pair) for pair in zip(*seen.values(), strict=True))


@pytest.mark.parametrize(("family", "size"), [("gpt2", 2), ("llama", 4)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with GPUs each rank takes one")
def test_ranks_of_a_group_add_their_parts(family, size, tiny_model, tmp_path, make_driver):
    model = tiny_model(family)
    folder = str(save_adapter(model, tmp_path / "a", 1, "all-linear"))
    answers = []
    for ranks in (1, size):
        driver = make_driver(model, num_gpu_blocks=60, tensor_parallel_size=ranks, adapters={"a": folder}, **OPTIONS)
        identity = driver.executor.load_adapter(folder)
        for number in range(4):
            driver.add(
                f"r{number}", list(range(number, 40 + number)), sampling=GREEDY, adapter=identity if number % 2 else ""
            )
        driver.run()
        answers.append(driver)
    for number in range(4):
        assert assert_same_tokens(answers[1], answers[0], f"r{number}") == 0
        compare_logprobs(answers[1].outputs[f"r{number}"], answers[0].outputs[f"r{number}"])
    (Path(folder) / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(AdapterError, match="cannot be read"):  # and the group goes on
        driver.executor.load_adapter(folder)
    driver.executor.unload_adapter(identity)
    driver.generate("after", [1, 2, 3])


CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 0}, "r in adapter_config.json"),
        ({"r": 128, "target_modules": ["q_proj"]}, "max_lora_rank is 64"),
        ({"r": 8}, "has the shape"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"r": 10**400}, "r in adapter_config.json"),
        ({"target_modules": ["embed_tokens"]}, "none of the model's linear layers"),
        ({"target_modules": ["lm_head"]}, "none of the model's linear layers"),
        ({"target_modules": "("}, "target_modules"),
        ({"target_modules": "q_proj{99999999999}"}, "target_modules"),
        ({"layers_to_transform": [0], "layers_pattern": "(layers)"}, "target_modules"),
        (
            {"target_modules": ["q_proj", "v_proj"]},
            "lacks base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight",
        ),
        ({"layers_to_transform": [0]}, "has 4 tensors that are none of a linear layer that is targeted"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(fields, message, tiny_model, tmp_path):
    """An adapter of all layers' q_proj, of which the configuration says something else."""
    shapes = {name: LinearShape(*shape) for name, shape in linear_layers(make_model(tiny_model)).items()}
    folder = save_adapter(tiny_model("llama"), tmp_path / "a", 1, ["q_proj"])
    assert len(read_adapter(folder, shapes, 64).layers) == 3
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **fields}))
    with pytest.raises(AdapterError, match=re.escape(message)):
        read_adapter(folder, shapes, 64)


def test_a_loaded_adapter_does_not_depend_on_its_file(tiny_model, tmp_path, make_driver):
    """Which may be written anew, in place, while the adapter serves."""
    model = tiny_model("llama")
    folder = save_adapter(model, tmp_path / "a", 1, "all-linear")
    driver = make_driver(model, num_gpu_blocks=32, adapters={"a": str(folder)}, mode="stateless", **OPTIONS)
    identity = driver.executor.load_adapter(str(folder))
    expected = driver.generate("before", list(range(20)), adapter=identity)
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-(1 << 14), 2)
        file.write(bytes(1 << 14))
    assert driver.generate("after", list(range(20)), adapter=identity) == expected
    assert driver.executor.load_adapter(str(folder)) != identity


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_weights_of_any_dtype_are_read_or_refused(dtype, tiny_model, tmp_path):
    shapes = {name: LinearShape(*shape) for name, shape in linear_layers(make_model(tiny_model)).items()}
    folder = save_adapter(tiny_model("llama"), tmp_path / "a", 1, ["q_proj"])
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    if dtype.is_floating_point:
        assert len(read_adapter(folder, shapes, 64).layers) == 3
    else:
        with pytest.raises(AdapterError, match="not all finite numbers"):
            read_adapter(folder, shapes, 64)


def test_patterns_choose_layers_ranks_and_scales(tiny_model, tmp_path):
    """As peft does it."""
    shapes = {name: LinearShape(*shape) for name, shape in linear_layers(make_model(tiny_model)).items()}
    folder = save_adapter(
        tiny_model("llama"),
        tmp_path / "a",
        1,
        ["q_proj", "down_proj"],
        layers_to_transform=[0, 2],
        layers_pattern="layers",
        rank_pattern={"down_proj": 2, r"layers\.2\.self_attn\.q_proj": 16},
        alpha_pattern={"self_attn.q_proj": 32},
        exclude_modules=["layers.0.mlp.down_proj"],
    )
    found = {name: (layer.a.shape[0], layer.scale) for name, layer in read_adapter(folder, shapes, 64).layers.items()}
    assert found == {
        "model.layers.0.self_attn.q_proj": (4, 8.0),
        "model.layers.2.self_attn.q_proj": (16, 2.0),
        "model.layers.2.mlp.down_proj": (2, 4.0),
    }


def make_model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model("llama"))

"""How fast SmolLM2 computes with quantised weights, beside the weights as they are.

    python benchmarks/quantized_speed.py ../shared/data/oasst/trees.jsonl

For each number of rows, in turn for all settings and several times over: all linear layers but the head, on the inputs that
a text gives them, and a whole forward of so many tokens without a cache, with the head for the last one. Milliseconds, the
least of all rounds. Writes benchmarks/results/quantized_speed.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import write_result
from quantization import read_conversations

from engine.attention.transformers_door import ShapeProbe, attention_handled_by
from engine.config import EngineConfig
from engine.executor.compiled_layers import find_layers
from engine.executor.fused_layers import separate
from engine.executor.model_loader import load_model
from engine.executor.packed_linear import PackedLinear
from engine.model_files import model_location
from engine.text.tokenizer import Tokenizer

SETTINGS = (("none", "float32"), ("none", "bfloat16"), ("int8", "bfloat16"), ("int4", "bfloat16"))
NUMS_OF_ROWS = (1, 4, 8, 16, 128, 512)


def read_ids(path: Path, num_tokens: int) -> torch.Tensor:
    """[1, num_tokens] of conversations, one after the other."""
    tokenizer = Tokenizer(model_location("smollm2"))
    ids: list[int] = []
    for messages in read_conversations(path, 20):
        text = tokenizer.render_chat([(message["role"], message["content"]) for message in messages])
        ids += tokenizer._encode(text).ids
    return torch.tensor([ids[:num_tokens]])


class Timed:
    """A model with one setting, and what its linear layers are given."""

    def __init__(self, quantization: str, dtype: str, ids: torch.Tensor) -> None:
        loaded = load_model(EngineConfig(model="smollm2", quantization=quantization, dtype=dtype, device="cpu"))
        self.model, self.ids = loaded.model, ids
        self.layers: list[tuple[PackedLinear, torch.Tensor]] = []
        decoder_layers = find_layers(self.model, self.model.config.num_hidden_layers)
        fused = [layer.forward for layer in decoder_layers]
        separate(decoder_layers)  # fused, they do not call their modules
        hooks = [
            module.register_forward_pre_hook(lambda layer, args: self.layers.append((layer, args[0][0])))
            for module in self.model.modules()
            if isinstance(module, PackedLinear)
        ]
        self.run_forward(ids.shape[1])
        for hook in hooks:
            hook.remove()
        self.layers.pop()  # the head
        for layer, forward in zip(decoder_layers, fused, strict=True):
            layer.forward = forward

    def run_layers(self, num_rows: int) -> None:
        for layer, x in self.layers:
            layer(x[:num_rows])

    def run_forward(self, num_rows: int) -> Any:
        with attention_handled_by(ShapeProbe()):  # whole contexts, no cache
            return self.model(input_ids=self.ids[:, :num_rows], use_cache=False, logits_to_keep=1).logits


def seconds(call: Callable[[int], Any], num_rows: int) -> float:
    start_s = time.perf_counter()
    call(num_rows)
    return time.perf_counter() - start_s


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", type=Path, help="conversation trees of Open-Assistant, one a line")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of rows")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ids = read_ids(arguments.trees, max(NUMS_OF_ROWS))
    settings = {f"{quantization} {dtype}": Timed(quantization, dtype, ids) for quantization, dtype in SETTINGS}
    rows = []
    for num_rows in NUMS_OF_ROWS:
        layers_s, forward_s = dict.fromkeys(settings, float("inf")), dict.fromkeys(settings, float("inf"))
        start_s, num_rounds = time.perf_counter(), 0
        while num_rounds < 3 or time.perf_counter() - start_s < arguments.seconds:
            for name, timed in settings.items():
                layers_s[name] = min(layers_s[name], seconds(timed.run_layers, num_rows))
                forward_s[name] = min(forward_s[name], seconds(timed.run_forward, num_rows))
            num_rounds += 1
        for name in settings:
            rows.append(
                {
                    "rows": num_rows,
                    "weights": name,
                    "layers_ms": round(layers_s[name] * 1e3, 3),
                    "forward_ms": round(forward_s[name] * 1e3, 3),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    write_result("quantized_speed", {"threads": arguments.threads, "rows": rows})


if __name__ == "__main__":
    main()

"""What quantised weights cost: logits and perplexity of SmolLM2 on conversations, against the weights as they are.

    python benchmarks/quantization.py ../shared/data/oasst/trees.jsonl
    python benchmarks/quantization.py ../shared/data/oasst/trees.jsonl --checkpoints FOLDER ...    quantised ones of it

Scores the first NUM conversations, one for each tree, in the model's chat template. Perplexity is over all of their tokens;
the error of a token's logits is their largest difference, in relation to the largest logit of the conversation. Writes
benchmarks/results/quantization.json, or quantized_checkpoints.json, which keeps what other checkpoints had before.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from machine import RESULTS, write_result

from engine.attention.transformers_door import ShapeProbe, attention_handled_by
from engine.config import EngineConfig
from engine.executor.model_loader import load_model
from engine.model_files import model_location
from engine.text.tokenizer import Tokenizer

SETTINGS = tuple(
    (quantization, dtype) for quantization in ("none", "int8", "int4") for dtype in ("float32", "bfloat16")
)


def read_conversations(path: Path, num: int) -> list[list[dict[str, str]]]:
    """The first path through each tree that has an answer."""
    conversations = []
    with path.open() as lines:
        for line in lines:
            node, messages = json.loads(line)["prompt"], []
            while node is not None:
                role = "user" if node["role"] == "prompter" else "assistant"
                messages.append({"role": role, "content": node["text"]})
                node = next(iter(node.get("replies", ())), None)
            if len(messages) > 1:
                conversations.append(messages)
            if len(conversations) == num:
                break
    return conversations


@torch.inference_mode()
def score(
    model: str, quantization: str, dtype: str, contexts: list[list[int]]
) -> tuple[list[torch.Tensor], float, int]:
    """Logits [len, vocabulary] of each context, the perplexity of all tokens but the first of each, and bytes of weights."""
    loaded = load_model(EngineConfig(model=model, quantization=quantization, dtype=dtype, device="cpu"))
    rows, loss, num_tokens = [], 0.0, 0
    for context in contexts:
        ids = torch.tensor([context])
        with attention_handled_by(ShapeProbe()):  # whole contexts, no cache
            logits = loaded.model(input_ids=ids, use_cache=False).logits[0].float()
        loss += float(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum"))
        num_tokens += len(context) - 1
        rows.append(logits)
    return rows, math.exp(loss / num_tokens), loaded.num_weight_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", type=Path, help="conversation trees of Open-Assistant, one a line")
    parser.add_argument("--num", type=int, default=20)
    parser.add_argument("--max-len", type=int, default=512, help="tokens of a conversation that are scored")
    parser.add_argument("--checkpoints", type=Path, nargs="+", default=[], help="folders of quantised ones of SmolLM2")
    arguments = parser.parse_args()
    tokenizer = Tokenizer(model_location("smollm2"))
    texts = [
        tokenizer.render_chat([(message["role"], message["content"]) for message in messages])
        for messages in read_conversations(arguments.trees, arguments.num)
    ]
    contexts = [tokenizer._encode(text).ids[: arguments.max_len] for text in texts]
    rows, exact = [], None
    settings = [("smollm2", *setting) for setting in SETTINGS]
    if arguments.checkpoints:
        settings = settings[:1] + [(str(folder), "none", "float32") for folder in arguments.checkpoints]
    for model, quantization, dtype in settings:
        logits, perplexity, num_bytes = score(model, quantization, dtype, contexts)
        exact = exact or logits
        pairs = list(zip(logits, exact, strict=True))
        errors = torch.cat([(mine - true).abs().amax(-1) / true.abs().max() for mine, true in pairs])
        same = torch.cat([mine.argmax(-1) == true.argmax(-1) for mine, true in pairs])
        rows.append(
            {
                "model": Path(model).name,
                "quantization": quantization,
                "dtype": dtype,
                "perplexity": perplexity,
                "median_logit_error": float(errors.median()),
                "p99_logit_error": float(errors.quantile(0.99)),
                "same_best_token": float(same.float().mean()),
                "weights_mib": num_bytes / 2**20,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    num_tokens = sum(map(len, contexts))
    name = "quantized_checkpoints" if arguments.checkpoints else "quantization"
    before = RESULTS / f"{name}.json"
    if arguments.checkpoints and before.exists():
        measured = {row["model"] for row in rows}
        rows += [row for row in json.loads(before.read_text())["rows"] if row["model"] not in measured]
    write_result(name, {"num_conversations": len(contexts), "num_tokens": num_tokens, "rows": rows})


if __name__ == "__main__":
    main()

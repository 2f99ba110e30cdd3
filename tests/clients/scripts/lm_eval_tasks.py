"""The `lm-eval` package: multiple choice, perplexity and generation, alone and in batches."""

import json
import math
import os
from importlib.metadata import version
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

MODEL = os.environ["MODEL"]
QUESTIONS = [
    {"text": "The capital of France is", "choices": ["Paris", "a cup of tea", "seven"], "label": 0},
    {"text": "Two and two are", "choices": ["green", "four"], "label": 1},
    {"text": "A week has seven", "choices": ["days", "elephants", "moons", "hats"], "label": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{text}}}}"
doc_to_target: {target}
{more}
"""
folder = Path("tasks").absolute()
folder.mkdir()
(folder / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))


def add_task(name, output_type, target, more):
    text = TASK.format(name=name, data=folder / "data.jsonl", output_type=output_type, target=target, more=more)
    (folder / f"{name}.yaml").write_text(text)
    return name


tasks = [
    add_task("choices", "multiple_choice", "label", "doc_to_choice: choices\nmetric_list:\n  - metric: acc\n"),
    add_task("rolling", "loglikelihood_rolling", "text", "metric_list:\n  - metric: word_perplexity\n"),
    add_task(
        "generated", "generate_until", '"{{choices[label]}}"', "generation_kwargs:\n  until: ['\\n']\n  max_gen_toks: 12\n"
        "metric_list:\n  - metric: exact_match\n",
    ),
]  # fmt: skip
told = []
for batch_size, num_concurrent in ((1, 1), (4, 1), (1, 4)):
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": MODEL,
            "base_url": f"{os.environ['OPENAI_BASE_URL']}/completions",
            "tokenizer": os.environ["TOKENIZER"],
            "num_concurrent": num_concurrent,
            "max_retries": 1,
            "max_length": 1024,
        },
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=batch_size,
        log_samples=True,
    )
    samples = results["samples"]
    # Of each choice: its log-likelihood, and whether it is what greedy decoding gives.
    choices = [tuple(response[0]) for sample in samples["choices"] for response in sample["resps"]]
    assert len(choices) == sum(len(question["choices"]) for question in QUESTIONS)
    assert all(math.isfinite(float(log)) and float(log) < 0 for log, _ in choices), choices
    texts = [sample["resps"][0][0] for sample in samples["generated"]]
    told.append((choices, texts, results["results"]))
for choices, texts, results in told[1:]:
    assert texts == told[0][1], (texts, told[0][1])
    for (log, is_greedy), (first_log, first_is_greedy) in zip(choices, told[0][0], strict=True):
        assert is_greedy == first_is_greedy and math.isclose(float(log), float(first_log), abs_tol=0.01), (
            choices,
            told[0][0],
        )
    assert results["choices"]["acc,none"] == told[0][2]["choices"]["acc,none"]
print("lm-eval", version("lm-eval"), told[0][2])

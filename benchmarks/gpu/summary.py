"""The figures that decide, from the files of a run.

Each beside its target and what was predicted for an H100 before anything of this ran on one. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Of a decode step over 2048 tokens of context, by batch: how often the least time of reading weights and KV goes into the
# step in turn, and into the device's part of it.
PREDICTED_DECODE = {1: (1.45, 1.39), 8: (1.44, 1.37), 32: (1.40, 1.33), 64: (1.36, 1.30)}
# (figure, from which section, what gives it, predicted, target).
Figure = tuple[str, str, Callable[[Any], float | None], str, str]


def figures() -> Iterator[Figure]:
    for batch, (in_turn, device) in PREDICTED_DECODE.items():
        for key, name, predicted in (("over_floor", "in turn", in_turn), ("device_over_floor", "device", device)):
            yield (
                f"decode of {batch}, {name}, over the floor",
                "llama",
                lambda of, batch=batch, key=key: _row(of["decode"], batch=batch)[key],
                f"{predicted:.2f}",
                "<= 1.25",
            )
    yield "prompt of 8192: share of the matrix rate", "llama", _prefill, "0.69 to 0.75", ">= 0.50"
    yield "OPT-13B, prompt: share of the matrix rate", "opt", _prefill, "0.63 to 0.70", ">= 0.50"
    for way, predicted in (("in", "0.96"), ("out", "0.96"), ("both", "0.86 to 0.92")):
        yield (
            f"swaps {way}, copy engines: share of a pinned copy",
            "llama",
            lambda of, way=way: _row(of["swaps"], by="dma", way=way)["share_of_pinned_copy"],
            predicted,
            ">= 0.85",
        )
    for by, new, predicted in (
        ("dma", 64, "0.75 to 0.90 (one by one: 0.00 to 0.05)"),
        ("dma", 2048, "0.85 to 0.95 (one by one: 0.75)"),
    ):
        yield (
            f"2048 tokens swapped in beside {new} new, {by}: hidden",
            "llama",
            lambda of, by=by, new=new: _row(of["hidden"], by=by, context_len=2048, num_new_tokens=new)["share_hidden"],
            predicted,
            ">= 0.90",
        )
    yield "64 decoding: ms outside the model, ahead", "llama", _outside("outside_the_model_ms"), "0.10 to 0.20", "< 0.3"
    yield (
        "64 decoding: ms outside the model, in turn",
        "llama",
        _outside("outside_the_model_in_turn_ms"),
        "1.2 to 1.8",
        "",
    )
    for batch, query, context, predicted in (
        (1, 1, 2048, "0.85 to 1.1"),
        (64, 1, 8192, "0.85 to 1.1"),
        (1, 512, 8192, "1.4 to 1.8"),
        (8, 64, 4096, "1.2 to 1.5"),
        (1, 8192, 8192, "1.6 to 2.8"),
    ):
        yield (
            f"attention, {batch} x {query} over {context}: over the best contiguous",
            "attention",
            lambda of, batch=batch, query=query, context=context: _row(
                of, batch=batch, query_len=query, context_len=context
            )["paged_over_contiguous"],
            predicted,
            "<= 1.1",
        )
    for other, predicted, target in (("stateless", "2.7 to 3.1", ">= 3"), ("GPU only", "2.2 to 2.9", ">= 1.5")):
        yield (
            f"conversations: two tiers over {other}, turns/s at one p90",
            "conversations",
            lambda of, other=other: of["two_tiers_over"][other],
            predicted,
            target,
        )
    yield (
        "conversations: two tiers over transformers, turns/s",
        "peer",
        lambda of: of["two_tiers_over"]["transformers"],
        "",
        "> 1",
    )
    for section, model, decodes in (
        ("steps_opt", "OPT-13B", "0.86 to 0.95"),
        ("steps_llama", "Llama-8B", "0.80 to 0.84"),
    ):
        for kind, predicted in (("decodes", decodes), ("prompts", "1.0 to 1.1"), ("mixed", "0.95 to 1.0")):
            yield (
                f"steps of {model}, {kind}: median over the simulator's",
                section,
                lambda of, kind=kind: of["median_over_roofline"][kind],
                predicted,
                "",
            )
        yield (
            f"steps of {model}: median over the table that was measured",
            section,
            lambda of: of["median_over_table"]["all"],
            "0.9 to 1.1",
            "",
        )
    yield (
        "mean error of bf16 over transformers' own",
        "accuracy",
        lambda of: of["ours_over_transformers"],
        "1.0",
        "<= 1.1",
    )


def summarize(folder: Path) -> list[str]:
    """A line for each figure that was measured."""
    sections: dict[str, Any] = {}
    for path in folder.glob("gpu_*.json"):
        sections[path.stem.removeprefix("gpu_")] = json.loads(path.read_text()).get("figures")
    lines = []
    for name, section, find, predicted, target in figures():
        try:
            value = find(sections[section])
        except (KeyError, StopIteration, TypeError):  # that part was not measured
            continue
        if value is not None:
            lines.append(f"{name:68} {value:8.2f}   predicted {predicted or '-':42} target {target or '-'}")
    return lines


def _row(rows: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
    return next(row for row in rows if all(row[name] == value for name, value in values.items()))


def _prefill(of: dict[str, Any]) -> float:
    return float(of["prefill"]["share_of_matrix_rate"])


def _outside(key: str) -> Callable[[Any], float | None]:
    return lambda of: of["overhead"][key]

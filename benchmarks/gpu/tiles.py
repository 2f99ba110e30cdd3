"""A sweep of the attention kernel's tiles.

Keys, warps, stages and programs of decodes, and rows of prompts, too. Figures to choose the constants of
engine/attention/triton_paged.py by; it changes none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from kernels import Batch
from setting import Setting
from timing import measure
from tqdm import tqdm

from engine.attention import triton_paged
from engine.attention.device_health import check_device


def measure_tiles(setting: Setting) -> Iterator[list[dict[str, Any]]]:
    """All rows so far, after each variant: the first variant of each kind is the engine's own.

    A variant that cannot be compiled, or is wrong, has a `failure` and no time.
    """
    rows: list[dict[str, Any]] = []
    shape = next(iter(setting.models.values()))
    for kind, variants, cases in (
        ("decode", decode_variants(setting), setting.tiles_decode),
        ("prompt", prompt_variants(setting), setting.tiles_prompt),
    ):
        batches = [Batch(setting, shape, *case) for case in cases]
        for variant in tqdm(variants, desc=f"tiles, {kind}", unit="variant"):
            rows.append({"kind": kind, **variant})
            try:
                with tile(**variant):
                    calls = [batch.decoded() if kind == "decode" else batch.paged() for batch in batches]
                    rows[-1]["largest_error"] = batches[0].check(calls[0])
                    rows[-1]["ms"] = _measure(setting, batches, calls)
            except Exception as failure:  # whatever triton, the compilers behind it and the driver raise
                check_device(setting.device)
                rows[-1]["failure"] = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
            yield rows


def _measure(setting: Setting, batches: list[Batch], calls: list[Callable[[], torch.Tensor]]) -> dict[str, float]:
    named: dict[str, Callable[[], object]] = {
        f"{batch.batch} x {batch.query_len} over {batch.context_len}": call
        for batch, call in zip(batches, calls, strict=True)
    }
    return {name: seconds * 1e3 for name, seconds in measure(named, setting.device, min(3, setting.repeats)).items()}


def decode_variants(setting: Setting) -> list[dict[str, Any]]:
    """Numbers of programs with the engine's own tile; then all tiles with the engine's number of programs."""
    tiles = [
        {"keys": keys, "warps": warps, "stages": stages}
        for keys, warps, stages in product(setting.decode_keys, setting.decode_warps, setting.stages)
    ]
    return [{}, {"plain_loop": True}, *({"programs": number} for number in setting.decode_programs), *tiles]


def prompt_variants(setting: Setting) -> list[dict[str, Any]]:
    return [
        {},
        {"plain_loop": False},
        *({"programs": number} for number in setting.prompt_programs),
        *(
            {"rows": rows, "keys": keys, "warps": warps, "stages": stages}
            for (rows, keys, warps), stages in product(setting.prompt_tiles, setting.stages)
        ),
    ]


def tile(
    *,
    rows: int | None = None,
    keys: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
    programs: int | None = None,
    plain_loop: bool | None = None,
) -> AbstractContextManager[Any]:
    """What the kernel is launched with inside; None = as the engine does it.

    rows: of a tile. keys: that a program reads in a turn. programs: that fill a processor. plain_loop: of keys
    that all rows see, without masks.
    """
    values: dict[str, Any] = {}
    if rows is not None:
        values["_rows_of_a_tile"] = lambda *_: rows
    if keys is not None:
        values["_keys_of_a_tile"] = lambda *_: keys
    if warps is not None:
        values["_warps_of_a_tile"] = lambda *_: warps
    if stages is not None:
        values["_NUM_STAGES"] = stages
    if plain_loop is not None:
        values["_PLAIN_LOOP_ROWS"] = 16 if plain_loop else 1 << 30
    if programs is not None:
        values["_FEW_ROWS"] = (programs, triton_paged._FEW_ROWS[1])
        values["_MANY_ROWS"] = (programs, triton_paged._MANY_ROWS[1])
    return patch.multiple(triton_paged, **values) if values else nullcontext()

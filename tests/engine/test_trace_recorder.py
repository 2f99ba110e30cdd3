"""A trace of what an engine was asked has lengths, times and hashes, and no more; readers of Mooncake's traces read it."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import trace_recorder
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.errors import ConfigError
from engine.generation import Generation
from engine.text.prompt import TokenPrompt
from engine.trace_recorder import TraceRecorder
from engine.workloads.mooncake import read_mooncake, read_rows


def rows_of(folder: Path, number: int = 0) -> list[dict]:
    return [json.loads(line) for line in (folder / f"trace-{number}.jsonl").read_text().splitlines()]


def test_equal_prefixes_of_a_tenant_have_equal_hashes(tmp_path: Path) -> None:
    recorder = TraceRecorder(tmp_path / "trace", 3)
    prompt = list(range(1300))
    recorder.record("acme", "ada", prompt, 7, begin_s=100.0)
    recorder.record("acme", "bob", [*prompt[:1024], 9], 1, begin_s=101.5)
    recorder.record("other", "ada", prompt, 1, begin_s=102.0)
    recorder.record("acme", None, prompt[:5], 2, begin_s=103.0)
    recorder.record("acme", "ada", prompt, 0, begin_s=104.0)  # nothing was answered
    recorder.close()
    ada, bob, other, nameless = rows_of(tmp_path / "trace", 3)
    assert (ada["timestamp"], ada["input_length"], ada["output_length"]) == (100_000, 1300, 7)
    assert len(ada["hash_ids"]) == len(bob["hash_ids"]) == 3
    assert ada["hash_ids"][:2] == bob["hash_ids"][:2]
    assert ada["hash_ids"][2] != bob["hash_ids"][2]
    assert not set(ada["hash_ids"]) & set(other["hash_ids"])
    assert ada["session_id"] not in (bob["session_id"], other["session_id"])
    assert "session_id" not in nameless
    assert len(list(read_rows(tmp_path / "trace" / "trace-3.jsonl"))) == 4


def test_neither_names_nor_tokens_are_written_and_only_the_owner_reads(tmp_path: Path) -> None:
    recorder = TraceRecorder(tmp_path / "trace", 0)
    recorder.record("acme", "secret-name", [77_777_777] * 600, 1, begin_s=1.0)
    recorder.close()
    text = (tmp_path / "trace" / "trace-0.jsonl").read_text()
    assert not any(part in text for part in ("acme", "secret-name", "77777777"))
    assert stat.S_IMODE((tmp_path / "trace").stat().st_mode) == 0o700


def test_engines_with_one_folder_have_one_secret_and_others_another(tmp_path: Path) -> None:
    for folder, number in (("one", 0), ("one", 1), ("two", 0)):
        recorder = TraceRecorder(tmp_path / folder, number)
        recorder.record("t", "s", list(range(600)), 1, begin_s=1.0)
        recorder.close()
    hashes = [
        rows_of(tmp_path / folder, number)[0]["hash_ids"] for folder, number in (("one", 0), ("one", 1), ("two", 0))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_pause_is_from_the_end_of_the_last_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter([110.0, 130.0])
    monkeypatch.setattr(trace_recorder.time, "time", lambda: next(ends))
    recorder = TraceRecorder(tmp_path, 0)
    recorder.record("t", "s", [1], 1, begin_s=100.0)
    recorder.record("t", "s", [1, 2], 1, begin_s=112.5)
    recorder.close()
    assert [row.get("delay") for row in rows_of(tmp_path)] == [None, 2500]


def test_a_recording_that_cannot_go_on_ends_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trace_recorder, "MAX_BYTES", 10)
    recorder = TraceRecorder(tmp_path, 0)
    recorder.record("t", "s", [1], 1, begin_s=100.0)
    recorder._thread.submit(lambda: None).result()
    recorder.record("t", "s", [1], 1, begin_s=101.0)
    recorder.close()
    assert len(rows_of(tmp_path)) == 1
    assert "record_trace: the trace has 0 MiB, and ends here" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"record_trace .*file/trace cannot be written: .*; name a folder"):
        TraceRecorder(tmp_path / "file" / "trace", 0)


def test_an_engine_records_its_requests(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    options = {
        "model": str(tiny_model("llama")),
        "num_gpu_blocks": 64,
        "num_threads": 1,
        "record_trace": str(tmp_path / "t"),
    }

    async def ask(engine: AsyncEngine, name: str, prompt: tuple[int, ...]) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
        async for _ in engine.generate(Generation(f"{name}.{len(prompt)}", name, TokenPrompt(prompt), sampling)):
            pass

    async def run() -> None:
        engine = AsyncEngine(EngineConfig.from_options(options), number=2)
        await ask(engine, "a", tuple(range(10, 30)))
        await ask(engine, "b", tuple(range(10, 20)))
        await ask(engine, "a", tuple(range(10, 50)))
        await engine.shutdown()

    asyncio.run(run())
    a, b = read_mooncake(tmp_path / "t" / "trace-2.jsonl")
    assert [(turn.output_tokens, turn.keep_tokens) for turn in a.turns] == [(3, None), (3, 0)]
    assert (a.prompt_lens, b.prompt_lens) == ([20, 40], [10])
    assert a.turns[1].pause_s >= 0

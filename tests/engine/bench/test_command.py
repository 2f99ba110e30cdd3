"""`pensieve bench` as a whole, against a fake server; what is written, and mistakes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import tqdm

from engine import cli
from tests.engine.bench.fake_server import FakeServer

SMALL = [
    "--num-sessions",
    "3",
    "--turns",
    "2",
    "--new-tokens",
    "5",
    "--output-tokens",
    "3",
    "--think-s",
    "0",
    "--max-lag",
    "60",
]


def words_of(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"]


def test_a_sweep_over_two_servers(
    server: FakeServer, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "bench",
        f"a={url}",
        f"b={url}/",
        *SMALL,
        "--concurrency",
        "1,2",
        "--repeats",
        "2",
        "--limit",
        "ttft=60",
    ]
    arguments += [
        "--prefix-tokens",
        "4",
        "--api-key",
        "secret-key",
        "--processes",
        "2",
        "--output",
        str(tmp_path / "out"),
    ]
    assert cli.main(arguments) == 0
    summary = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(row["endpoint"], row["level"], row["num_repeats"]) for row in summary["rows"]] == [
        ("a", "1 sessions", 2),
        ("b", "1 sessions", 2),
        ("a", "2 sessions", 2),
        ("b", "2 sessions", 2),
    ]
    for row in summary["rows"]:
        assert (row["figures"]["turns"]["mean"], row["figures"]["errors"]["mean"]) == (6, 0)
        assert row["figures"]["goodput_share"] == {"mean": 1.0, "half_width": 0.0, "num_repeats": 2}
        assert [(each["key"], each["turns"]) for each in row["by_turn"]] == [(1, 6), (2, 6)]
        assert row["figures"]["cached_share_gpu"]["mean"] == row["figures"]["cached_share"]["mean"] > 0
    with (tmp_path / "out" / "turns.csv").open() as file:
        turns = list(csv.DictReader(file))
    assert len(turns) == len(server.asked) == 2 * 2 * 2 * 3 * 2
    assert {turn["cached_by"].partition("=")[0] for turn in turns} == {"gpu"}
    # Each of the eight runs has words of its own, which its sessions share.
    assert len({words_of(body) for body in server.asked}) == 8
    output = capsys.readouterr().out
    assert output.splitlines()[0].split()[:3] == ["endpoint", "load", "turns/s"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "secret-key" not in page + json.dumps(summary)
    assert page.count("data:image/png;base64,") == 4
    assert "http://" not in page.replace(url, "").replace("http-", "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("bench.json", "turns.csv", "report.html", "latency.png", "turns.png", "positions.png", "distribution.png")
    }


def test_what_failed_is_counted_and_told(
    server: FakeServer, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.failing = {3: 503}
    assert cli.main(["bench", f"<b>={url}", *SMALL, "--output", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert (row["figures"]["turns"]["mean"], row["errors"]) == (3, {"503: it is broken": 3})
    assert "<b>, 4 sessions: 3 times: 503: it is broken" in capsys.readouterr().out
    assert "&lt;b&gt;, 4 sessions: 3 times: 503" in (tmp_path / "report.html").read_text()


def test_a_client_that_is_too_slow_reports_no_figures(
    server: FakeServer, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", url, *SMALL, "--max-lag", "0", "--output", str(tmp_path)]) == 1
    summary = json.loads((tmp_path / "bench.json").read_text())
    assert summary["rows"][0]["figures"] == summary["cells"][0]["figures"] == {}
    assert summary["rows"][0]["by_turn"] == []
    assert "ms late (99th percentile; 0 ms are allowed)" in summary["cells"][0]["refusal"]
    assert "no figures of" in capsys.readouterr().out
    assert "No figures: " in (tmp_path / "report.html").read_text()
    assert "False" in (tmp_path / "turns.csv").read_text()  # the turns are there, as not measured


def test_the_same_words_if_they_are_wanted(server: FakeServer, url: str, tmp_path: Path) -> None:
    cli.main(["bench", url, *SMALL, "--same-words", "--concurrency", "1,2", "--output", str(tmp_path)])
    assert len({words_of(body) for body in server.asked}) == 3  # one for each session


def test_ctrl_c_writes_what_is_there(
    server: FakeServer, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tqdm.tqdm, "update", interrupt)
    arguments = [*SMALL, "--num-sessions", "2", "--think-s", "0.5", "--concurrency", "1,2", "--repeats", "3"]
    assert cli.main(["bench", url, *arguments, "--output", str(tmp_path)]) == 130
    summary = json.loads((tmp_path / "bench.json").read_text())
    assert summary["is_interrupted"]
    assert len(summary["cells"]) == 1
    assert summary["cells"][0]["figures"]["turns"] >= 1
    assert "Interrupted: 1 of 6 runs" in (tmp_path / "report.html").read_text()


def test_sessions_are_written_for_other_clients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    assert cli.main(["bench", *SMALL, "--write-workload", f"mooncake:{trace}"]) == 0
    assert len(trace.read_text().splitlines()) == 6
    assert "(3 sessions)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "name at least one server, such as http://127.0.0.1:8000"),
        (["localhost:8000"], "localhost:8000 is not a URL; give one such as http://127.0.0.1:8000"),
        (["http://a", "http://a/v1/"], None),
        (["a=http://a", "a=http://b"], "two servers are called a; name them"),
        (["http://127.0.0.1:9"], "no answer from http://127.0.0.1:9/v1"),
        (["http://a", "--rate", "fast"], "--rate fast: write numbers with commas"),
        (["http://a", "--rate", "1", "--concurrency", "2"], "give one of them"),
        (["http://a", "--limit", "ttft"], "--limit ttft: write NAME=SECONDS with a name of ttft, s_per_token"),
        (["http://a", "--limit", "speed=1"], "--limit speed=1: write NAME=SECONDS"),
        (["http://a", "--body", "[1]"], "--body is not JSON: it must be an object"),
        (["http://a", "--token-ids", "9:3"], "--token-ids 9:3: write FIRST:END"),
        (["http://a", "--repeats", "0"], "--repeats must be from 1 to 100"),
        (["http://a", "--max-s", "0"], "--max-s must be above 0"),
        (["http://a", "--processes", "0"], "--processes must be from 1 to 256"),
        (["http://a", "--workload", "mine"], "unknown workload 'mine'; give sharegpt-like"),
        (["http://a", "--turns", "many"], "unknown distribution 'many'"),
        (["http://a", "--tool-share", "2"], "the share of a tool must be from 0 to 1"),
        (["--write-workload", "vllm"], "write FORMAT:FILE"),
        (["--write-workload", "vllm:x.json"], "turns without their text"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(
    arguments: list[str],
    problem: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *arguments]) == 1
    message = capsys.readouterr().err
    assert message.startswith("pensieve: ")
    if problem is not None:
        assert problem in message
    assert not list(tmp_path.glob("*.json"))

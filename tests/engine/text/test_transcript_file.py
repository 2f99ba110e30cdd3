"""What conversations have said, in a file: the same in another process, and nothing if a single bit is wrong."""

from __future__ import annotations

import random
import sqlite3
import stat
import threading
from array import array
from pathlib import Path

import pytest

from engine.text import transcript_file
from engine.text.transcript import Transcript
from engine.text.transcript_file import FILE_NAME, TranscriptFile, decode_branches, encode_branches

BRANCHES = (
    Transcript(array("I", range(5)), "Zoë \ud800 <|im_end|>", ((1, 2), (4, 5)), "a tokenizer", (2, 3)),
    Transcript(array("I"), "", (), "", None),
    Transcript(array("I", [2**31]), "x" * 3000, ((1, 3000),), "f", None),
)


@pytest.fixture
def make_file(tmp_path, monkeypatch):
    monkeypatch.setattr(transcript_file, "WRITE_INTERVAL_S", 0.01)
    files: list[TranscriptFile] = []

    def make(max_bytes: int = 1 << 20, folder: Path | None = tmp_path) -> TranscriptFile:
        files.append(TranscriptFile(lambda: folder, max_bytes))
        return files[-1]

    yield make
    for file in files:
        file.close()


def answer_starts(branches: tuple[Transcript, ...]) -> list[tuple[int, int] | None]:
    return [branch.answer_start for branch in branches]


def test_another_process_finds_them(make_file, tmp_path):
    file = make_file()
    file.put("a \ud800 name", BRANCHES)
    assert file.find("a \ud800 name").result(10) == BRANCHES
    file.put("another", BRANCHES[:1])
    file.put("another", BRANCHES[1:])
    file.close()
    file = make_file()
    assert file.find("a \ud800 name").result(10) == BRANCHES
    assert answer_starts(file.find("a \ud800 name").result(10)) == answer_starts(BRANCHES)
    assert file.find("another").result(10) == BRANCHES[1:]
    assert file.find("a third").result(10) == ()
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_any_wrong_bit_is_nothing():
    content = encode_branches("name", BRANCHES[:2])
    assert decode_branches("name", content) == BRANCHES[:2]
    assert decode_branches("another", content) == ()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.Random(place).randrange(8)
        assert decode_branches("name", bytes(damaged)) == ()
        assert decode_branches("name", content[:place]) == ()


def test_the_least_recently_used_ones_go(make_file):
    file = make_file(max_bytes=20_000)
    for number in range(20):
        file.put(f"{number}", BRANCHES)
        file.close()
        file = make_file(max_bytes=20_000)
    kept = [bool(file.find(f"{number}").result(10)) for number in range(20)]
    assert kept == [False] * kept.index(True) + [True] * (20 - kept.index(True))
    assert 4 <= sum(kept) <= 6, "each has some 3.5 kB"


@pytest.mark.parametrize("damage", ["no database", "cut", "a page", "empty"])
def test_a_damaged_file_is_replaced(make_file, tmp_path, damage):
    file = make_file()
    for number in range(20):
        file.put(f"{number}", BRANCHES)
    file.close()
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    content = {
        "no database": b"x" * len(whole),
        "cut": whole[: len(whole) // 2],
        "a page": whole[:4096] + b"\xff" * 4096 + whole[8192:],
        "empty": b"",
    }[damage]
    path.write_bytes(content)
    file = make_file()
    for number in range(20):
        assert file.find(f"{number}").result(10) in ((), BRANCHES)
    file.put("new", BRANCHES)
    file.close()
    file = make_file()
    if not file.find("new").result(10):  # it was noticed only then
        file.put("new", BRANCHES)
        file.close()
        file = make_file()
    assert file.find("new").result(10) == BRANCHES


def test_a_file_that_cannot_be_used_is_nothing(make_file, tmp_path):
    for folder in (None, tmp_path / "not there"):
        file = make_file(folder=folder)
        file.put("a", BRANCHES)
        file.close()
        file = make_file(folder=folder)
        assert file.find("a").result(10) == ()


def test_no_call_waits_for_a_disk_that_hangs(make_file, monkeypatch):
    go = threading.Event()
    connect = sqlite3.connect

    def hang(*arguments, **options):
        assert go.wait(60)
        return connect(*arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", hang)
    monkeypatch.setattr(transcript_file, "CLOSE_TIMEOUT_S", 0.05)
    file = make_file()
    file.put("a", BRANCHES)
    assert file.find("a").result(0) == BRANCHES
    asked = [file.find(f"b{number}") for number in range(2 * transcript_file.MAX_WANTED)]
    assert sum(each.done() for each in asked) >= transcript_file.MAX_WANTED - 1, "not more than so many wait"
    file.close()
    go.set()
    assert asked[0].result(10) == ()

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
from engine.text.transcript import ConversationTable, Remembered, Transcript
from engine.text.transcript_file import FILE_NAME, TranscriptFile, decode, encode
from engine.text.turns import Turn

SAID = Remembered(
    (
        Transcript(array("I", range(5)), "Zoë \ud800 <|im_end|>", ((1, 2), (4, 5)), "a tokenizer", (2, 3)),
        Transcript(array("I"), "", (), "", None),
        Transcript(array("I", [2**31]), "x" * 3000, ((1, 3000),), "f", None),
    ),
    ((b"answer", Turn("a thought \ud800", b"hello", 17, b"tools", b"")), (b"", Turn("", b"", 0, b"", b"s"))),
)
ONE, OTHERS = (Remembered(part, SAID.turns[:1]) for part in (SAID.branches[:1], SAID.branches[1:]))


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


def answer_starts(said: Remembered) -> list[tuple[int, int] | None]:
    return [branch.answer_start for branch in said.branches]


def test_another_process_finds_them(make_file, tmp_path):
    file = make_file()
    file.put("a \ud800 name", SAID)
    assert file.find("a \ud800 name").result(10) == SAID
    file.put("another", ONE)
    file.put("another", OTHERS)
    file.close()
    file = make_file()
    assert file.find("a \ud800 name").result(10) == SAID
    assert answer_starts(file.find("a \ud800 name").result(10)) == answer_starts(SAID)
    assert file.find("another").result(10) == OTHERS
    assert file.find("a third").result(10) is None
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_any_wrong_bit_is_nothing():
    content = encode("name", ONE)
    assert decode("name", content) == ONE
    assert decode("another", content) is None
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.Random(place).randrange(8)
        assert decode("name", bytes(damaged)) is None
        assert decode("name", content[:place]) is None


def test_the_least_recently_used_ones_go(make_file):
    file = make_file(max_bytes=20_000)
    for number in range(20):
        file.put(f"{number}", SAID)
        file.close()
        file = make_file(max_bytes=20_000)
    kept = [bool(file.find(f"{number}").result(10)) for number in range(20)]
    assert kept == [False] * kept.index(True) + [True] * (20 - kept.index(True))
    assert 4 <= sum(kept) <= 6, "each has some 3.5 kB"


@pytest.mark.parametrize("damage", ["no database", "cut", "a page", "empty"])
def test_a_damaged_file_is_replaced(make_file, tmp_path, damage):
    file = make_file()
    for number in range(20):
        file.put(f"{number}", SAID)
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
        assert file.find(f"{number}").result(10) in (None, SAID)
    file.put("new", SAID)
    file.close()
    file = make_file()
    if not file.find("new").result(10):  # it was noticed only then
        file.put("new", SAID)
        file.close()
        file = make_file()
    assert file.find("new").result(10) == SAID


def test_a_file_that_cannot_be_used_is_nothing(make_file, tmp_path):
    for folder in (None, tmp_path / "not there"):
        file = make_file(folder=folder)
        file.put("a", SAID)
        file.close()
        file = make_file(folder=folder)
        assert file.find("a").result(10) is None


def test_no_call_waits_for_a_disk_that_hangs(make_file, monkeypatch):
    go = threading.Event()
    connect = sqlite3.connect

    def hang(*arguments, **options):
        assert go.wait(60)
        return connect(*arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", hang)
    monkeypatch.setattr(transcript_file, "CLOSE_TIMEOUT_S", 0.05)
    file = make_file()
    file.put("a", SAID)
    assert file.find("a").result(0) == SAID
    asked = [file.find(f"b{number}") for number in range(2 * transcript_file.MAX_WANTED)]
    assert sum(each.done() for each in asked) >= transcript_file.MAX_WANTED - 1, "not more than so many wait"
    file.close()
    go.set()
    assert asked[0].result(10) is None


def test_a_table_goes_on_from_what_another_process_has_kept(make_file):
    file = make_file()
    table = ConversationTable(1 << 20, {9: "<end>"}, file.put)
    prompt = Transcript(array("I", [1, 2]), "ask", (), "f")
    turn = Turn("a thought", b"hello", 4, b"", b"")
    first = table.record_turn("a", prompt, [3, 9], "answer<end>", (b"key", turn))
    file.close()
    file = make_file()
    table = ConversationTable(1 << 20, {9: "<end>"}, file.put)
    assert not table.knows("a")
    remembered = file.find("a").result(10)
    assert remembered is not None
    table.recall("a", remembered)
    assert table.knows("a")
    assert table.match_text("a", "askanswer<end>more", "f").token_ids == first.token_ids[:3]
    conversation = table.find("a")
    assert conversation is not None
    assert conversation.turns.find(b"key") == turn
    other = Transcript(array("I", [1, 5]), "ask other", (), "f")
    table.record_turn("a", other, [6, 9], "else<end>")
    kept = file.find("a").result(10)
    assert kept is not None
    assert [branch.token_ids for branch in kept.branches] == [first.token_ids, array("I", [1, 5, 6, 9])]
    assert kept.turns == ((b"key", turn),)

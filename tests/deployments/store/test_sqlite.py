"""The store's file in SQLite: who can read it, what is made of a full disk, of damage, and of files that are no store."""

from __future__ import annotations

import os
import resource
import sqlite3
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from deployments.http.errors import wire_of
from deployments.ingress import _default_store_url
from deployments.store import sqlite
from deployments.store.conversation_store import ConversationStore
from deployments.store.errors import (
    NotFoundError,
    StoreConfigError,
    StoreCorruptedError,
    StoreFullError,
    StoreUnavailableError,
)
from deployments.store.values import Status
from tests.deployments.store.stored_turns import (
    ME,
    NOW,
    assert_unavailable,
    message,
    new_response,
    outcome,
    transcript,
    turn,
)


@pytest.fixture
async def sqlite_store(tmp_path: Path) -> AsyncIterator[ConversationStore]:
    store = ConversationStore(f"sqlite:///{tmp_path / 'a %20b?#.db'}".replace("?", "%3F"), timeout_s=1.0)
    await store.open(NOW)
    await turn(store, "a")
    yield store
    await store.close()


def sqlite_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix != ".lock")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[ConversationStore]:
    """Not open yet."""
    store = ConversationStore(f"sqlite:///{path}", timeout_s=20.0)
    yield store
    await store.close()


# Who can read it


@pytest.fixture
def generous_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    return {path.name: f"{stat.S_IMODE(path.stat().st_mode):o}" for path in sorted(folder.iterdir())}


async def test_its_files_are_for_its_owner_alone(store: ConversationStore, path: Path, generous_umask: None) -> None:
    await store.open(NOW)
    await turn(store, "a")
    found = modes(path.parent)
    assert {"store.db", "store.db-wal", "store.db-shm"} <= set(found)
    assert set(found.values()) == {"600"}


async def test_files_of_an_older_version_are_closed_to_others(
    store: ConversationStore, path: Path, generous_umask: None, caplog: pytest.LogCaptureFixture
) -> None:
    await store.open(NOW)
    await turn(store, "a")
    for each in path.parent.iterdir():
        each.chmod(0o644)
    again = ConversationStore(f"sqlite:///{path}")
    await again.open(NOW)
    assert set(modes(path.parent).values()) == {"600"}
    assert f"{path} could be read by other users (mode 644)" in caplog.text
    await again.close()


async def test_a_file_of_another_user_is_used_and_complained_of(
    store: ConversationStore, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await store.open(NOW)
    path.chmod(0o664)

    def chmod(self: Path, mode: int) -> None:
        raise PermissionError(1, "not the owner")

    monkeypatch.setattr(Path, "chmod", chmod)
    await store.open(NOW)
    assert f"{path} can be read by other users (mode 664), and its owner alone can end that" in caplog.text


def test_the_default_store_is_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generous_umask: None
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert _default_store_url() == f"sqlite:///{tmp_path}/pensieve/conversations.db"
    assert modes(tmp_path) == {"pensieve": "700"}


# A file that is gone, damaged, or not ours


async def test_sqlite_file_taken_away_and_put_back(
    sqlite_store: ConversationStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The connections are still open on it; a turn must not go into a file that cannot be found any more."""
    away = tmp_path / "away"
    away.mkdir()
    files = [path for path in sqlite_files(tmp_path) if path != away]
    for path in files:
        path.rename(away / path.name)
    error = await assert_unavailable(sqlite_store)
    assert str(tmp_path) not in error.message
    assert f"(SQLite file {tmp_path}/" in caplog.text
    assert "fails: SQLITE_CANTOPEN: see that the file and its folder exist" in caplog.text
    assert [path for path in sqlite_files(tmp_path) if path != away] == []
    for path in files:
        (away / path.name).rename(path)
    await turn(sqlite_store, "b", previous_response_id="a")


async def test_sqlite_file_made_unusable(sqlite_store: ConversationStore, tmp_path: Path) -> None:
    await sqlite_store.close()  # which puts everything into the one file
    (path,) = sqlite_files(tmp_path)
    good = path.read_bytes()
    path.unlink()
    path.write_bytes(b"no database " * 1000)
    error = await assert_unavailable(sqlite_store, "store_corrupted")
    assert "waiting does not mend it" in error.message
    assert error.retry_after_s is None
    with pytest.raises(StoreCorruptedError):
        await sqlite_store.open(NOW)
    path.unlink()
    path.write_bytes(good)
    await turn(sqlite_store, "b", previous_response_id="a")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.touch(), StoreCorruptedError),
        (lambda path: path.write_bytes(b"no database " * 1000), StoreCorruptedError),
        (lambda path: sql(path, "CREATE TABLE theirs (x INTEGER)"), StoreConfigError),
        (lambda path: sql(path, "PRAGMA application_id=7", "CREATE TABLE theirs (x INTEGER)"), StoreConfigError),
    ],
    ids=["empty", "nothing of SQLite's", "another program's", "another program's, by its id"],
)
async def test_files_that_are_no_store_are_refused_and_left_alone(
    store: ConversationStore, path: Path, make: Callable[[Path], None], expected: type[Exception]
) -> None:
    make(path)
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(expected):
            await store.open(NOW)
    assert path.read_bytes() == before
    path.unlink()
    await store.open(NOW)
    await turn(store, "a")


async def test_a_store_that_was_emptied_is_not_taken_for_a_new_one(store: ConversationStore, path: Path) -> None:
    await store.open(NOW)
    await turn(store, "a")
    await store.close()
    os.truncate(path, 0)
    again = ConversationStore(f"sqlite:///{path}")
    with pytest.raises(StoreCorruptedError):
        await again.open(NOW)
    await again.close()


async def test_a_process_that_died_while_it_made_the_file(store: ConversationStore, path: Path) -> None:
    path.with_name("store.db.new").write_bytes(b"half")
    path.with_name("store.db.lock").touch()
    await store.open(NOW)
    await turn(store, "a")
    assert not path.with_name("store.db.new").exists()


def sql(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


async def test_damage_is_found_when_the_file_is_opened(
    store: ConversationStore, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await store.open(NOW)
    await store.conversations.create(ME, {}, [message("user", "x" * 1000)] * 50, NOW)
    await store.close()
    size = path.stat().st_size
    with open(path, "r+b") as file:
        for page in range(4, size // 4096, 3):
            file.seek(4096 * page)
            file.write(os.urandom(100))
    again = ConversationStore(f"sqlite:///{path}")
    with pytest.raises(StoreCorruptedError) as caught:
        await again.open(NOW)
    assert wire_of(caught.value).code == "store_corrupted"
    assert f"{path} is damaged" in caplog.text
    await again.close()


async def test_a_large_file_is_looked_at_for_a_bounded_time(
    store: ConversationStore, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ray.serve")
    await store.open(NOW)
    await store.conversations.create(ME, {}, [message("user", "x")] * 2000, NOW)
    monkeypatch.setattr(sqlite, "QUICK_CHECK_S", -1.0)
    again = ConversationStore(f"sqlite:///{path}")
    await again.open(NOW)
    assert "not to its end" in caplog.text
    await again.close()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE items SET body = CAST(x'7b22736563726574ff' AS TEXT)",  # not UTF-8
        "UPDATE items SET body = '{\"secret\": '",  # not JSON
        "UPDATE transcripts SET token_ids = x'010203'",
        "UPDATE responses SET status = 'secret'",
    ],
)
async def test_a_damaged_row_is_an_error_that_quotes_nothing(
    store: ConversationStore, path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    await store.open(NOW)
    await turn(store, "a", known=transcript("hiyes"))
    await turn(store, "b")
    sql(path, damage)
    reading = store.get_history if "transcripts" in damage else store.get_response
    key = {"previous_response_id": "a"} if "transcripts" in damage else {"response_id": "a", "now": NOW}
    with pytest.raises(StoreCorruptedError) as caught:
        await reading(ME, **key)
    for told in (caught.value.message, caplog.text):
        assert "secret" not in told
        assert "body" not in told
    assert str(path.parent) not in caught.value.message
    assert caught.value.__cause__ is None
    await store.ping()  # the others are served


# A file that cannot be written


async def test_ping_writes(sqlite_store: ConversationStore, tmp_path: Path) -> None:
    """A store that can be read only is not ready."""
    read_only = ConversationStore(f"sqlite:///{tmp_path / 'a %20b?#.db'}".replace("?", "%3F"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(StoreUnavailableError):
            await sqlite_store.ping()
        assert (await sqlite_store.get_response(ME, "a", NOW)).status is Status.COMPLETED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await sqlite_store.ping()
    await read_only.close()


async def test_sqlite_locked_for_too_long(
    sqlite_store: ConversationStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    connection = sqlite3.connect(sqlite_files(tmp_path)[0], isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailableError):
        await sqlite_store.begin_response(ME, new_response("b"), NOW)
    with pytest.raises(StoreUnavailableError):
        await sqlite_store.ping()
    assert caplog.text.count("SQLITE_BUSY: another process has held the file for too long") == 1
    assert (await sqlite_store.get_response(ME, "a", NOW)).status is Status.COMPLETED
    connection.execute("ROLLBACK")
    connection.close()
    await turn(sqlite_store, "b", previous_response_id="a")


async def test_sqlite_without_room(sqlite_store: ConversationStore) -> None:
    """A limit on the size of files stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    long = new_response("b", "x" * 2_000_000, previous_response_id="a")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(StoreUnavailableError):
            await sqlite_store.begin_response(ME, long, NOW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(NotFoundError):
        await sqlite_store.get_response(ME, "b", NOW)
    await sqlite_store.begin_response(ME, long, NOW)


async def test_sqlite_folder_that_does_not_exist(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ConversationStore(f"sqlite:///{tmp_path / 'none' / 'store.db'}")
    with pytest.raises(StoreUnavailableError):
        await store.open(NOW)
    assert "ENOENT: its folder does not exist" in caplog.text
    (tmp_path / "none").mkdir()
    await store.open(NOW)
    await store.ping()
    await store.close()


async def test_the_last_room_of_a_disk_is_not_for_new_turns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs comes to its end, what is stored is read and deleted, and what is deleted makes room in the file."""
    free = 10**9
    monkeypatch.setattr(sqlite, "bytes_outside", lambda path: free)
    store = ConversationStore(f"sqlite:///{path}", min_free_bytes=10**6)
    await store.open(NOW)
    await turn(store, "a", said="x" * 2_000_000)
    conversation = await store.conversations.create(ME, {}, [], NOW)
    await store.begin_response(ME, new_response("running"), NOW)
    free = 999_999
    for call in (
        store.begin_response(ME, new_response("b"), NOW),
        store.conversations.create(ME, {}, [], NOW),
        store.conversations.add_items(ME, conversation.id, [message("user", "x")], NOW),
    ):
        with pytest.raises(StoreFullError) as caught:
            await call
        assert wire_of(caught.value)[::2] == (503, "store_full")
    assert await store.complete_response(ME, "running", outcome("yes"))
    assert (await store.get_response(ME, "a", NOW)).status is Status.COMPLETED
    await store.delete_response(ME, "a", NOW)
    await turn(store, "b")
    await store.close()

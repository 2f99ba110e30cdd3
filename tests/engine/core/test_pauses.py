"""How long conversations pause, by tenant and tool."""

from engine.core import pauses
from engine.core.pauses import MAX_PAUSE_S, Pauses


def told(table: Pauses, tenant: str, tool: str, *lengths: float) -> float | None:
    """Pauses of these lengths, one after the other; what is expected of the next one."""
    for number, length in enumerate(lengths):
        table.note_end(f"{tenant} {number}", tenant, tool, 100.0)
        table.note_return(f"{tenant} {number}", 100.0 + length)
    return table.note_end(f"{tenant} next", tenant, tool, 200.0)


def test_the_median_is_expected_once_there_are_some():
    table = Pauses()
    assert told(table, "a", "search", 1.0, 2.0, 3.0) is None
    assert told(table, "a", "book", 1.0, 9.0, 2.0, 4.0) == 3.0
    assert told(table, "b", "search", 5.0) is None, "tenants learn nothing from each other"
    assert told(table, "a", "", 60.0, 60.0, 60.0, 60.0) == 60.0
    assert told(table, "a", "book", *[7.0] * 40) == 7.0, "the latest count"


def test_who_does_not_come_back_counts_as_a_long_pause():
    table = Pauses()
    for number in range(4):
        table.note_end(f"c{number}", "a", "", float(number))
    assert table.note_end("last", "a", "", 10.0 + MAX_PAUSE_S) == MAX_PAUSE_S
    table.note_return("nothing was known of it", 0.0)


def test_memory_is_bounded_whatever_tools_are_called(monkeypatch):
    monkeypatch.setattr(pauses, "MAX_TOOLS", 3)
    monkeypatch.setattr(pauses, "MAX_AWAITED", 5)
    table = Pauses()
    for number in range(50):
        table.note_end(f"c{number}", "a", f"tool {number}", float(number))
    assert len(table._awaited) == 5
    assert len(table._samples) == 3

"""The files of a bench: JSON, CSV, plots and a page, in one folder. And the table at the terminal."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.bench.summary import Json, table_of

JSON_FILE, TURNS_FILE, PAGE_FILE = "bench.json", "turns.csv", "report.html"


def write_files(folder: Path, summary: Json, turns: Sequence[Json], *, plots: bool) -> list[Path]:
    """All files; the folder exists. plots: needs matplotlib."""
    from engine.bench.page import make_page

    (folder / JSON_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    write_csv(folder / TURNS_FILE, turns)
    written = [folder / JSON_FILE, folder / TURNS_FILE]
    images: dict[str, Path] = {}
    if plots:
        from engine.bench.plots import write_plots

        images = write_plots(folder, summary, turns)
        written += images.values()
    (folder / PAGE_FILE).write_text(make_page(summary, images))
    return [*written, folder / PAGE_FILE]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def format_table(summary: Json) -> str:
    """The table of all rows as text."""
    titles, cells = table_of(summary)
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if number < 2 else text.rjust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (titles, *cells)
    ]
    return "\n".join(lines)

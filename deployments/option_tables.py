"""Writes the tables of options into docs/configuration.md, between markers, from the declarations of the options.

python -m deployments.option_tables docs/configuration.md
"""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from deployments import options as application
from deployments.tenants import TenantConfig
from engine import config as engine
from engine.options import KIND_NAMES, OptionField, options_of

MARKED = re.compile("(<!-- options: ([a-z ]+) -->\n).*?(<!-- end of options -->)", re.DOTALL)
# Attributes of pydantic's constraints, and how they are told.
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


class Row(NamedTuple):
    """One line of a table, in Markdown."""

    name: str
    values: str
    default: str
    meaning: str


def with_tables(text: str) -> str:
    """The document with its tables as they should be. Raises KeyError for a marker that names none."""
    return MARKED.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def _engine_tables() -> str:
    entries = [(title, entry) for title, group in engine.GROUPS for entry in options_of(group)]
    parts = []
    for title, _ in (*engine.GROUPS, ("tuning", None)):
        rows = [
            _engine_row(entry)
            for group, entry in entries
            if (title == "tuning" if entry.option.is_tuning else title == group)
        ]
        parts.append(f"### {title.capitalize()}\n\n{_table(rows)}")
    return "\n".join(parts)


def _engine_row(entry: OptionField) -> Row:
    option = entry.option
    if option.choices:
        values = ", ".join(f"`{choice}`" for choice in option.choices)
        values += "".join(f", `{alias}` (= `{choice}`)" for alias, choice in option.aliases)
        values += ", or `MODULE:NAME`" if option.or_import_path else ""
    else:
        values = ", ".join(filter(None, (KIND_NAMES[entry.kind], option.bounds)))
    default = option.default or f"`{entry.shown_default}`"
    return Row(entry.name, values, default, " ".join(filter(None, (option.help, option.detail))))


def _application_tables() -> str:
    return "\n".join(
        f"### {title[0].upper()}{title[1:]}\n\n{_table(_model_rows(group))}" for title, group in application.GROUPS
    )


def _model_rows(model: type[BaseModel]) -> Iterator[Row]:
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else _shown_value(name, field.default)
        yield Row(name, _shown_values(field), default, field.description or "")


def _shown_values(field: FieldInfo) -> str:
    """Type and range in words."""
    kind: Any = field.annotation
    if typing.get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    bounds = [
        f"{words} {getattr(constraint, name):g}"
        for constraint in field.metadata
        for name, words in BOUNDS.items()
        if hasattr(constraint, name)
    ]
    words = {tuple: "a list of texts", dict: "a mapping"}.get(typing.get_origin(kind)) or KIND_NAMES[kind]
    return ", ".join(filter(None, (words, " and ".join(bounds))))


def _shown_value(name: str, value: object) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, int) and name.rpartition("_bytes")[1]:
        unit, size = next(
            (unit, size) for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if value >= size
        )
        return f"`{value}` ({value // size} {unit})"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _table(rows: Iterable[Row]) -> str:
    lines = ["| option | values | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{row.name}` | {row.values} | {row.default} | {row.meaning} |" for row in rows]
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "engine": _engine_tables,
    "application": _application_tables,
    "tenant": lambda: _table(_model_rows(TenantConfig)),
}


def main(arguments: Sequence[str]) -> int:
    """0 = the files have their tables now, 2 = usage."""
    if not arguments:
        print("usage: python -m deployments.option_tables FILE.md ...", file=sys.stderr)
        return 2
    for name in arguments:
        path = Path(name)
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

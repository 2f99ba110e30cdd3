"""How an option is declared: once, as an annotation with its range and its help. Standard library only.

    chunk_size: Annotated[int, Option("Tokens of a chunk.", at_least=1)] = 32

The checks of the values, the command line and the tables of docs/configuration.md are made from it.
"""

from __future__ import annotations

import types
import typing
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Union

from engine.errors import ConfigError

KIND_NAMES = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "a mapping",
}


@dataclass(frozen=True, slots=True)
class Option:
    """What an option says of itself, beside its name, type and default.

    help: one or two sentences, for the command line and the documentation.
    detail: what the documentation adds.
    default: how the default is told if its value does not tell it; needed if it is None.
    choices: all values that a text may have.
    aliases: pairs of a further value and the choice that it stands for.
    or_import_path: MODULE:NAME is a value, too: something of a Python module.
    at_least, above, at_most, below: bounds of a number.
    is_tuning: few need it; listed apart from its group.
    """

    help: str
    detail: str = ""
    _: KW_ONLY
    default: str = ""
    choices: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    or_import_path: bool = False
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    is_tuning: bool = False

    @property
    def bounds(self) -> str:
        """The allowed values in words, such as "at least 0 and below 1"; empty if all are."""
        if self.choices:
            aliases = [f"{alias} for {choice}" for alias, choice in self.aliases]
            path = " or MODULE:NAME" if self.or_import_path else ""
            return "one of " + ", ".join(self.choices) + "".join(f" ({alias})" for alias in aliases) + path
        bounds = [("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below)]
        return " and ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None)

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type is within the bounds. Not a number (NaN) is never."""
        return (
            (not self.choices or value in self.choices or (self.or_import_path and is_import_path(value)))
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def is_import_path(value: str) -> bool:
    """Whether it is MODULE:NAME, such as mypackage.policies:Mine. Imports nothing."""
    module, colon, name = value.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), name))


@dataclass(frozen=True, slots=True)
class OptionField:
    """One option of a class: its declaration and its field."""

    name: str
    kind: type
    is_nullable: bool
    default: Any
    option: Option

    @property
    def shown_default(self) -> str:
        """The default in words."""
        if self.option.default:
            return self.option.default
        return str(self.default).lower() if self.kind is bool else f"{self.default}"

    @property
    def shown_kind(self) -> str:
        """The type in words, with what else it may be."""
        return KIND_NAMES[self.kind] + (" or null" if self.is_nullable else "")


def options_of(group: type) -> tuple[OptionField, ...]:
    """The options that a dataclass declares or inherits."""
    hints = typing.get_type_hints(group, include_extras=True)
    found = []
    for entry in fields(group):
        hint = hints[entry.name]
        option = next((item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Option)), None)
        if option is None:
            continue
        kind = typing.get_args(hint)[0]
        kinds = typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)
        (plain,) = (typing.get_origin(kind) or kind for kind in kinds if kind is not type(None))
        found.append(OptionField(entry.name, plain, len(kinds) > 1, entry.default, option))
    return tuple(found)


def check_values(config: Any) -> None:
    """Check each option of a frozen dataclass by itself; integers become floats, and aliases what they stand for.

    Raises ConfigError, which names the option, what it must be and what it is.
    """
    for entry in options_of(type(config)):
        value = getattr(config, entry.name)
        if value is None and entry.is_nullable:
            continue
        if entry.kind is float and type(value) is int:
            value = float(value)
        if isinstance(value, bool) and not {"on", "off"}.isdisjoint(entry.option.choices):  # how YAML reads on and off
            value = "on" if value else "off"
        if not isinstance(value, entry.kind) or (isinstance(value, bool) and entry.kind is not bool):
            raise ConfigError(f"{entry.name} must be {entry.shown_kind}, got {value!r}", param=entry.name)
        if isinstance(value, dict) and not all(isinstance(name, str) for name in value):
            raise ConfigError(f"{entry.name} must be {entry.shown_kind}, got {value!r}", param=entry.name)
        value = next((choice for alias, choice in entry.option.aliases if alias == value), value)
        if not entry.option.allows(value):
            raise ConfigError(f"{entry.name} must be {entry.option.bounds}, got {value!r}", param=entry.name)
        object.__setattr__(config, entry.name, value)

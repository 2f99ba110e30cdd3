"""docs/configuration.md says what the declarations of the options say."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments import option_tables
from deployments.option_tables import TABLES, main, with_tables
from deployments.options import GROUPS
from deployments.schema import AppArgs
from deployments.tenants import TenantConfig

CONFIGURATION = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_tables_of_the_documentation_are_those_of_the_declarations() -> None:
    text = CONFIGURATION.read_text()
    assert [match[2] for match in option_tables.MARKED.finditer(text)] == list(TABLES)
    assert text == with_tables(text), f"run python -m deployments.option_tables {CONFIGURATION.name}"


def test_every_option_of_the_application_is_in_one_group_and_says_what_it_means() -> None:
    grouped = [name for _, group in GROUPS for name in group.model_fields]
    assert sorted([*grouped, "engine"]) == sorted(AppArgs.model_fields)
    for model in (AppArgs, TenantConfig):
        for name, field in model.model_fields.items():
            assert (field.description or "").endswith("."), name


@pytest.mark.parametrize(
    "line",
    [
        "| `mode` | `pensieve`, `stateless`, `vllm` (= `stateless`) | `pensieve` | `pensieve` keeps ",
        "| `max_model_len` | an integer, at least 1 | the model's | Most tokens of one context",
        "| `decode_reserve` | a number, at least 0 and below 1 | `0.1` | Share of GPU blocks",
        "| `write_through` | true or false | `false` | Copy what a turn leaves",
        "| `placement_group_strategy` | `STRICT_PACK`, `PACK` | `STRICT_PACK` | Where",
        "| `max_surge_percent` | an integer, at least 0 and at most 100 | none | Percentage",
        "| `max_body_bytes` | an integer, at least 1 | `4194304` (4 MiB) | Largest body",
        "| `id` | text | required | The tenant's name",
        "| `api_keys_sha256` | a list of texts | required | SHA-256 hashes",
        "| `weight` | a number, above 0 and at most 1000 | `1.0` | Its share",
    ],
)
def test_a_row_has_type_range_default_and_help(line: str) -> None:
    assert "\n" + line in "".join(make() for make in TABLES.values())


def test_the_command_writes_between_the_markers_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "some.md"
    path.write_text("before\n<!-- options: tenant -->\nold\n<!-- end of options -->\nafter\n")
    assert main([str(path)]) == 0
    expected = f"before\n<!-- options: tenant -->\n{TABLES['tenant']()}<!-- end of options -->\nafter\n"
    assert path.read_text() == expected
    assert main([]) == 2

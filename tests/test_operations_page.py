"""docs/operations.md: what it prints can be used as it stands."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from ray.serve.config import AutoscalingConfig

from deployments.options import IngressOptions
from deployments.schema import AppArgs, check_serve_config
from engine import cli
from engine.config import EngineConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "operations.md"
TEXT = PAGE.read_text()
CODES = re.findall(r"^\| `(\w+)` \| ", TEXT.partition("When nothing answers")[2], re.MULTILINE)
# Of Ray Serve LLM.
RAY_OPTIONS = {"engine_kwargs", "placement_group_config"}


def commands() -> Iterator[list[str]]:
    """Lines that stand alone, and those that are told in the text."""
    for line in re.findall(r"^    (\S.*)$", TEXT, re.MULTILINE):
        if re.match(r"(pensieve|python|serve|curl|ray|kubectl) ", line):
            for part in line.split(" && "):
                yield shlex.split(part, comments=True)
    for told in re.findall(r"`((?:serve deploy|pensieve \w+) [^`]+)`", TEXT):
        yield shlex.split(told)


def test_the_blocks_of_yaml_are_of_a_right_config(tmp_path: Path) -> None:
    """Each is what stands under an application, or under a deployment of it."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert blocks
    for number, block in enumerate(blocks):
        part: Any = yaml.safe_load(block)
        if "deployments" not in part:
            part = {"deployments": [{"name": "LLMServer", **part}]}
        application = {"name": "app", "route_prefix": "/", "import_path": "deployments.app:build", "args": {}}
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump({"applications": [application | part]}))
        assert check_serve_config(path) == [], block


def test_its_commands_exist_and_take_what_they_are_given() -> None:
    found = list(commands())
    assert len(found) >= 3
    for command in found:
        match command:
            case ["serve", "deploy", file, *_]:
                assert check_serve_config(ROOT / file) == []
            case ["pensieve", "experiment", "run", file, *_]:
                assert (ROOT / file).exists()
            case ["pensieve", *arguments]:
                cli.build_parser()[0].parse_args(arguments)
            case ["python", "-m", module, *_]:
                assert callable(importlib.import_module(module).main)


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXT):
        assert (PAGE.parent / target).exists(), target


def test_the_codes_of_its_table_are_answered() -> None:
    source = "".join(path.read_text() for path in (ROOT / "deployments").rglob("*.py"))
    assert len(CODES) >= 7
    for code in CODES:
        assert f'"{code}"' in source, code


def test_its_options_exist() -> None:
    """Of those names that begin as ours do."""
    named = set(re.findall(r"`((?:kv|num|max|engine|graceful|store|tenants|placement)_\w+)`", TEXT))
    engine = {each.name for each in fields(EngineConfig)}
    own = {*AppArgs.model_fields, *IngressOptions.model_fields, *AutoscalingConfig.model_fields, *engine}
    assert named - own - RAY_OPTIONS - set(CODES) == set()

"""The Grafana dashboard and the table in the documentation name the metrics that are exported, all of them and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from deployments.metric_definitions import METRICS
from engine.core.stats import EngineStats
from engine.core.tier_table import PEER

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deployments" / "dashboards" / "pensieve.json").read_text())
LABELS_OF_RAY = {"application", "replica", "le"}


def exported_names() -> set[str]:
    """As Prometheus stores them, without a histogram's suffixes."""
    return {f"ray_{definition.name}" for definition in METRICS}


def charts() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in charts() for target in panel["targets"]]


def test_dashboard_shows_every_metric_and_no_other() -> None:
    used: set[str] = set()
    for expression in expressions():
        used |= set(re.findall(r"ray_pensieve_\w+", expression))
    assert {name.removesuffix("_bucket") for name in used} == exported_names()
    histograms = {f"ray_{definition.name}" for definition in METRICS if definition.kind == "histogram"}
    assert {name.removesuffix("_bucket") for name in used if name.endswith("_bucket")} == histograms
    for variable in DASHBOARD["templating"]["list"]:
        assert set(re.findall(r"ray_pensieve_\w+", str(variable["query"]))) <= exported_names()


def test_dashboard_knows_the_labels() -> None:
    by_name = {f"ray_{definition.name}": definition for definition in METRICS}
    for expression in expressions():
        grouped = re.findall(r"by \(([^)]*)\) \((?:rate\()?(ray_pensieve_\w+)\{([^}]*)\}", expression)
        for group, name, selector in grouped:
            labels = {label.strip() for label in group.split(",")} | set(re.findall(r"(\w+)!?=", selector))
            assert labels <= {*by_name[name.removesuffix("_bucket")].labels, *LABELS_OF_RAY}, expression
        assert len(grouped) == len(re.findall("ray_pensieve_", expression)), expression


def test_panels_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not taken & cells, panel["title"]
        taken |= cells


def test_documentation_has_every_metric_with_its_labels() -> None:
    text = (ROOT / "docs" / "observability.md").read_text()
    rows = re.findall(r"^\| `(pensieve_\w+)` \| (\w+) \| ([^|]*)\|", text, re.MULTILINE)
    documented = [(name, kind, tuple(re.findall(r"`(\w+)`:", labels))) for name, kind, labels in rows]
    assert documented == [(definition.name, definition.kind, definition.labels) for definition in METRICS]


def test_documentation_has_every_outcome_of_a_transfer() -> None:
    text = (ROOT / "docs" / "observability.md").read_text()
    (row,) = re.findall(r"^\| `pensieve_tier_transfers_total` .*$", text, re.MULTILINE)
    stats = EngineStats(["gpu", "cpu", "disk", PEER])
    counted = {*stats.slow_transfers, *(f"{what}_refused" for what in stats.slow_refusals)}
    outcomes = {name.split("_", 1)[1] for name in counted}
    assert {"stored", "sent", "load_gone", "send_refused"} <= outcomes
    assert outcomes <= set(re.findall(r"\w+", row))


def test_prometheus_example_is_yaml_that_scrapes_ray() -> None:
    config = yaml.safe_load((ROOT / "cluster_configs" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "ray"
    assert "file_sd_configs" in job

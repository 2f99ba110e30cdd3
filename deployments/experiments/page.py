"""The page of an experiment: one HTML file that needs no other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from engine.bench.page import STYLE
from engine.bench.summary import shown

Json = Mapping[str, Any]
# The figure, its title, its unit's factor and digits.
COLUMNS = (
    ("turns", "turns", 1.0, 0),
    ("errors", "errors", 1.0, 0),
    ("turns_per_s", "turns/s", 1.0, 2),
    ("output_tokens_per_s", "tokens/s", 1.0, 1),
    ("s_per_token_p50", "s/token p50, ms", 1e3, 1),
    ("s_per_token_p90", "p90", 1e3, 1),
    ("first_token_s_p50", "first token p50, ms", 1e3, 0),
    ("first_token_s_p90", "p90", 1e3, 0),
    ("hit_rate", "hit rate, %", 100.0, 1),
    ("cached_gpu", "of prompts: GPU tier, %", 100.0, 1),
    ("cached_cpu", "CPU tier", 100.0, 1),
    ("cached_disk", "disk", 100.0, 1),
    ("cached_peer", "other replicas", 100.0, 1),
    ("recomputed", "computed again", 100.0, 1),
    ("balance", "balance", 1.0, 2),
    ("moved", "moved turns, %", 100.0, 1),
    ("cold", "cold turns, %", 100.0, 1),
    ("cold_in_a_row", "of a session in a row", 1.0, 1),
    ("replica_s_per_turn", "replica-s / turn", 1.0, 2),
)


def make_page(summary: Json, images: Mapping[str, str]) -> str:
    """images: SVG by title."""
    title = escape(summary["title"])
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="lead"><code>{escape(summary["command"])}</code></p>',
        f"<p>{escape(_counted(summary))}</p>",
        *(f"<p>{escape(note)}</p>" for note in summary["notes"]),
        *_warnings(summary),
        "<h2>Figures</h2>",
        table(summary),
        "<p>Means over the seeds, with 95 % confidence intervals if there are several. Counted are turns that were sent "
        "after the warm-up and ended in time, and computed tokens and tiers over the whole run. s/token: the whole time of a "
        "turn over the tokens of its answer. Hit rate: of the tokens that a session had before, those found in a cache. "
        "Balance: tokens that the busiest replica computed, over the mean. Moved: turns that another replica answered "
        "than the one before. Cold: turns that found less than nine tenths of what their session had. Replica-seconds: of "
        "all replicas that took a place, ready or not.</p>",
        f'<div class="plots">{"".join(f"<figure>{image}</figure>" for image in images.values())}</div>',
        *_events(summary),
        "<h2>What was run</h2>",
        *_cases(summary),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>{STYLE}figure {{ display: inline-block; margin: .6rem .4rem }} "
        f"pre {{ white-space: pre-wrap; margin: 0 }}</style>\n<body>\n{body}\n</body>\n</html>\n"
    )


def table(summary: Json) -> str:
    """A row for each case, measured and simulated; columns that no row has are left out."""
    columns = [each for each in COLUMNS if any(each[0] in row["figures"] for row in summary["rows"])]
    head = "".join(f"<th>{escape(title)}</th>" for title in ("case", "", *(title for _, title, _, _ in columns)))
    body = "\n".join(
        f"<tr><td>{escape(row['case'] or 'all')}</td><td>{row['kind']}</td>"
        + "".join(f"<td>{_shown(row, name, factor, digits)}</td>" for name, _, factor, digits in columns)
        + "</tr>"
        for row in summary["rows"]
    )
    return f'<div class="wide"><table class="runs">\n<tr>{head}</tr>\n{body}\n</table></div>'


def text_table(summary: Json) -> str:
    """The main columns, for the terminal."""
    names = (
        "turns_per_s",
        "s_per_token_p90",
        "first_token_s_p90",
        "hit_rate",
        "balance",
        "moved",
        "replica_s_per_turn",
    )
    columns = [each for each in COLUMNS if each[0] in names]
    rows = [["case", "", *(title for _, title, _, _ in columns)]]
    rows[0][3:5] = ["s/token p90, ms", "first token p90, ms"]
    rows += [
        [row["case"] or "all", row["kind"], *(_shown(row, name, factor, digits) for name, _, factor, digits in columns)]
        for row in summary["rows"]
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if number < 2 else text.rjust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _shown(row: Json, name: str, factor: float, digits: int) -> str:
    return shown(name, row["figures"].get(name), factor, digits)


def _counted(summary: Json) -> str:
    return "; ".join(
        f"{counts['done']} of {counts['all']} cells {kind}"
        + (f", {counts['failed']} failed" if counts["failed"] else "")
        for kind, counts in summary["counts"].items()
        if counts["done"] or counts["failed"]
    )


def _warnings(summary: Json) -> list[str]:
    texts = []
    for cell in summary["cells"]:
        if cell.get("error"):
            texts.append(f"{cell['name']}, {cell['kind']}: failed: {cell['error']}")
        if cell.get("refusal"):
            texts.append(f"{cell['name']}: no figures: {cell['refusal']}")
        texts += [f"{cell['name']}: {count} times: {error}" for error, count in cell.get("errors", {}).items()]
    return [f'<div class="warning">{escape(text)}</div>' for text in texts]


def _events(summary: Json) -> list[str]:
    parts = [
        f"<tr><td>{escape(row['case'] or 'all')}, {row['kind']}</td><td>{escape('; '.join(row['events']))}</td></tr>"
        for row in summary["rows"]
        if row["events"]
    ]
    return ["<h2>What happened</h2>", f'<table class="facts">{"".join(parts)}</table>'] if parts else []


def _cases(summary: Json) -> Sequence[str]:
    measured = [cell for cell in summary["cells"] if cell["kind"] == "measured" and cell.get("about")]
    parts = []
    if measured:
        about, lags = measured[0]["about"], [cell["lag"] for cell in measured]
        late = max(max(lag["schedule_p99_s"], lag["loop_p99_s"]) for lag in lags) * 1e3
        nodes = ", ".join(f"{cpus:g}" for cpus in about["nodes"])
        parts.append(
            f"<p>Measured on {len(about['nodes'])} nodes with {nodes} CPUs by Ray's count, Ray {about['versions']['ray']}, "
            f"model {escape(about['model'])}; the load came from {about['num_drivers']} processes, at most {late:.0f} ms "
            "late (99th percentile). Deployed with "
            f"<code>{escape(json.dumps(summary['cluster']))}</code>.</p>"
        )
        before = ", ".join(f"{cell['about']['load_average'][0]:.1f}" for cell in measured)
        parts.append(
            "<p>The load average of the machine that ran the command, before each of its cells: "
            f"{before}. It is 0 on a machine without other work.</p>"
        )
    parts += [
        f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
        for name, text in summary["cases"]
    ]
    return parts

"""The page of a bench: one HTML file that needs no other."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from engine.bench.summary import Json, table_of

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
html { color: #1c2330; background: #fff }
h1 { font-size: 1.5rem; margin-bottom: .2rem }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d9dee7 }
p.lead { color: #5a6577; margin-top: 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #e7ebf1; white-space: nowrap }
th { background: #f4f6f9; font-weight: 600; white-space: normal; vertical-align: bottom }
td:first-child, th:first-child, table.runs td:nth-child(2), table.runs th:nth-child(2) { text-align: left }
table.facts td { text-align: left; white-space: normal } div.wide { overflow-x: auto }
img { max-width: 100%; height: auto; border: 1px solid #e7ebf1; border-radius: 4px; margin: .4rem 0 }
.warning { background: #fff4e0; border-left: 4px solid #e09f2d; padding: .5rem .9rem; margin: .8rem 0 }
code { background: #f4f6f9; padding: .1rem .3rem; border-radius: 3px; overflow-wrap: anywhere }
details { margin: .6rem 0 } summary { cursor: pointer; font-weight: 600 }
"""
_TURN_COLUMNS = (
    ("turns", "turns", 1.0, 0),
    ("prompt_tokens_mean", "prompt tokens", 1.0, 0),
    ("cached_share", "cached, %", 100.0, 1),
    ("ttft_p50", "first token p50, ms", 1e3, 1),
    ("ttft_p90", "first token p90", 1e3, 1),
    ("s_per_token_p50", "per token p50", 1e3, 2),
    ("normalised_p50", "normalised p50", 1e3, 1),
    ("normalised_p90", "normalised p90", 1e3, 1),
)


def make_page(summary: Json, images: Mapping[str, Path]) -> str:
    """images: PNG files by their titles."""
    titles, cells = table_of(summary)
    workload = summary["workload"]
    parts = [
        "<h1>pensieve bench</h1>",
        f'<p class="lead">{escape(summary.get("started", ""))} &middot; {escape(summary.get("source", ""))}: '
        f"{workload['num_sessions']} sessions, {workload['num_turns']} turns</p>",
        *_warnings(summary),
        "<h2>Figures</h2>",
        _table(titles, cells, "runs"),
        "<p>Times are in milliseconds: means over the repeats with 95 % confidence intervals (one repeat has none); "
        "quantiles are of single turns; normalised is the whole time of a turn over the tokens of its answer.</p>",
        *(_image(title, path) for title, path in images.items()),
        *_details(summary),
        "<h2>How it was measured</h2>",
        _facts(summary),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>pensieve bench</title>\n<style>{STYLE}</style>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _warnings(summary: Json) -> list[str]:
    texts = []
    if summary["is_interrupted"]:
        texts.append(
            f"Interrupted: {len(summary['cells'])} of {summary['num_cells']} runs were begun, the last one is not complete."
        )
    texts += [
        f"No figures: {cell['endpoint']}, {cell['level']}: {cell['refusal']}"
        for cell in summary["cells"]
        if cell["refusal"]
    ]
    for endpoint in summary["endpoints"]:
        texts += [f"{endpoint['name']} {note}." for note in endpoint["notes"]]
    for row in summary["rows"]:
        texts += [
            f"{row['endpoint']}, {row['level']}: {count} times: {error}" for error, count in row["errors"].items()
        ]
    return [f'<div class="warning">{escape(text)}</div>' for text in texts]


def _image(title: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<h2>{escape(title)}</h2>\n<img alt="{escape(title)}" src="data:image/png;base64,{data}">'


def _details(summary: Json) -> list[str]:
    """The tables by turn and by position of each row."""
    parts = ["<h2>By turn and by position</h2>"]
    for row in summary["rows"]:
        if not row["by_turn"]:
            continue
        tables = [
            _table([key, *(title for _, title, _, _ in columns)], _keyed(row[name], columns), "keyed")
            for name, key, columns in (
                ("by_turn", "turn", _present(row["by_turn"])),
                ("by_position", "prompt up to, tokens", _present(row["by_position"])),
            )
            if row[name]
        ]
        title = escape(f"{row['endpoint']}, {row['level']}")
        parts.append(f"<details><summary>{title}</summary>\n{'<br>'.join(tables)}\n</details>")
    return parts


def _present(rows: Sequence[Json]) -> list[tuple[str, str, float, int]]:
    return [column for column in _TURN_COLUMNS if any(column[0] in row for row in rows)]


def _keyed(rows: Sequence[Json], columns: Sequence[tuple[str, str, float, int]]) -> list[list[str]]:
    return [
        [
            f"{row['key']:,}",
            *(f"{row[name] * factor:.{digits}f}" if name in row else "" for name, _, factor, digits in columns),
        ]
        for row in rows
    ]


def _table(titles: Sequence[str], cells: Sequence[Sequence[str]], kind: str) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    return f'<div class="wide"><table class="{kind}">\n<tr>{head}</tr>\n{body}\n</table></div>'


def _facts(summary: Json) -> str:
    workload, cells = summary["workload"], summary["cells"]
    lags = [cell["lag"] for cell in cells]
    facts = {
        "command": f"<code>{escape(summary.get('command', ''))}</code>",
        "workload": escape(
            f"{workload['mean_turns']:.2f} turns a session; on average {workload['mean_new_tokens']:.0f} new tokens, prompts "
            f"of {workload['mean_prompt_tokens']:.0f}, answers of {workload['mean_output_tokens']:.0f}, pauses of "
            f"{workload['mean_pause_s']:.1f} s"
        ),
        "client": escape(
            f"at most {max((lag['schedule_p99_s'] for lag in lags), default=0) * 1e3:.1f} ms behind its schedule and "
            f"{max((lag['loop_p99_s'] for lag in lags), default=0) * 1e3:.1f} ms behind its clock (99th percentiles)"
        ),
    }
    for endpoint in summary["endpoints"]:
        fields = json.dumps(endpoint["fields"])
        facts[endpoint["name"]] = (
            f"<code>{escape(endpoint['url'])}</code> {escape(endpoint['api'])}, model {escape(endpoint['model'])}, "
            f"<code>{escape(fields)}</code>"
        )
    limits = {name: limit for name, limit in summary["limits"].items() if limit is not None}
    if limits:
        facts["good turns"] = escape(", ".join(f"{name} at most {limit:g} s" for name, limit in limits.items()))
    rows = "\n".join(f"<tr><td>{escape(name)}</td><td>{value}</td></tr>" for name, value in facts.items())
    return f'<table class="facts">\n{rows}\n</table>'

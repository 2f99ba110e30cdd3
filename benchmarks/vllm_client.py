"""`pensieve bench` beside vLLM's multi-turn client, in turns on the same conversations, against a server that runs.

    python benchmarks/vllm_client.py http://127.0.0.1:8000 --client vllm-0.33.0/benchmarks/multi_turn --tokenizer FOLDER

The client's folder is in vLLM's source distribution on PyPI; it runs unmodified, and needs pandas. Printed and written for
each run: means and quantiles of the time to first token and of the time per token, output tokens and errors. Each run's
conversations begin with a mark, because a server that keeps KV would find those of the run before; `pensieve bench` puts none
of its own in front (`--same-words`), so that prompts are equally long. vLLM's client sends no temperature and lets the model
end its answers, so both do.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from machine import RESULTS, write_result

from engine.bench.figures import intervals_of, spread_of
from engine.workloads.session import Span
from engine.workloads.tokens import random_words

# All that vLLM's client needs of vLLM.
STUB = "def redact_sensitive_namespace(arguments, *others):\n    return arguments\n"
SEED = 7


def conversations(options: argparse.Namespace, mark: str) -> list[dict[str, Any]]:
    """As vLLM's client reads them; the same for each mark but for that.

    Of the recorded answers only the length counts, for `pensieve bench`: both clients go on with what was answered.
    """
    rng = random.Random(SEED)
    told = []
    for number in range(options.sessions):
        messages = []
        for turn in range(options.turns):
            said = random_words(Span(number * options.turns + turn, rng.randint(60, 180)), SEED)
            text = said if turn else f"{mark} {said}"
            answer = random_words(Span(turn, 2 * options.output_tokens), SEED)
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        told.append({"id": f"c{number}", "messages": messages})
    return told


def run_vllm(options: argparse.Namespace, sessions: Path, folder: Path) -> list[dict[str, Any]]:
    """Rows of `turn`, `ttft_s`, `s_per_token`, `output_tokens`, one for each turn that was answered.

    From a first piece of several tokens it takes off the time of all but one; `first_tokens` says how many that were.
    """
    out = folder / "vllm.json"
    length = ["--limit-min-tokens", "1", "--limit-max-tokens", str(options.output_tokens)]
    command = [
        *(options.python, "benchmark_serving_multi_turn.py", "-i", str(sessions), "-m", options.tokenizer),
        *(
            "--served-model-name",
            options.model,
            "-u",
            options.url,
            "-p",
            str(options.at_once),
            "-k",
            str(options.at_once),
        ),
        *("--no-early-stop", *length, "--stats-json-output", str(out)),
    ]
    stubs = folder / "stubs" / "vllm" / "benchmarks" / "lib"
    stubs.mkdir(parents=True, exist_ok=True)
    (stubs / "utils.py").write_text(STUB)
    environment = os.environ | {"PYTHONPATH": str(folder / "stubs"), "HF_HUB_OFFLINE": "1"}
    said = _run(command, cwd=options.client, env=environment)
    print(
        "".join(f"{line}\n" for line in said.splitlines() if "WARNING" in line or "ERROR" in line),
        end="",
        file=sys.stderr,
    )
    return [
        {
            "ttft_s": row["ttft_ms"] / 1e3,
            "s_per_token": row["tpot_ms"] / 1e3 if row["output_num_tokens"] > 1 else None,
            "output_tokens": row["output_num_tokens"],
            "turn": (row["input_num_turns"] + 1) // 2,
            "first_tokens": row["output_num_first_chunk_tokens"],
        }
        for row in json.loads(out.read_text())
    ]


def run_bench(options: argparse.Namespace, sessions: Path, folder: Path) -> list[dict[str, Any]]:
    """The same of `pensieve bench`."""
    command = [
        *(sys.executable, "-m", "engine.cli", "bench", options.url, "--model", options.model),
        *("--workload", f"vllm:{sessions}", "--think-s", "0", "--max-output-tokens", str(options.output_tokens)),
        *("--concurrency", str(options.at_once), "--body", '{"temperature": 1, "ignore_eos": false}'),
        # How late a turn was sent is no part of its times, and vLLM's client does not say how late it was.
        *("--same-words", "--max-lag", "1", "--output", str(folder / "bench")),
    ]
    _run(command)
    with (folder / "bench" / "turns.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        {
            "ttft_s": float(row["ttft_s"]),
            "s_per_token": float(row["s_per_token"]) if row["s_per_token"] else None,
            "output_tokens": int(row["output_tokens"]),
            "turn": int(row["turn"]),
        }
        for row in rows
        if not row["error"]
    ]


def _run(command: list[str], **options: Any) -> str:
    """What it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def figures(rows: list[dict[str, Any]], num_turns: int) -> dict[str, float]:
    def values(name: str) -> Iterable[float | None]:
        return (row[name] for row in rows)

    return {
        "turns": len(rows),
        "errors": num_turns - len(rows),
        "output_tokens": sum(row["output_tokens"] for row in rows),
        **spread_of("ttft", values("ttft_s")),
        **spread_of("s_per_token", values("s_per_token")),
        **spread_of("first_tokens", (row.get("first_tokens") for row in rows)),
        **{
            f"ttft_mean_turn_{turn}": fmean(row["ttft_s"] for row in rows if row["turn"] == turn)
            for turn in sorted({row["turn"] for row in rows})
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("url")
    parser.add_argument("--client", required=True, help="vLLM's folder benchmarks/multi_turn")
    parser.add_argument("--python", default=sys.executable, help="which runs vLLM's client; needs pandas")
    parser.add_argument("--tokenizer", required=True, help="of the server's model, for vLLM's client")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as the server calls it")
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--output-tokens", type=int, default=24, help="at most")
    parser.add_argument("--at-once", type=int, default=2, help="sessions, and processes of vLLM's client")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="vllm_client", help="of the result file")
    options = parser.parse_args()
    num_turns = options.sessions * options.turns
    clients = {"vllm": run_vllm, "pensieve bench": run_bench}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in clients}
    settings = {name: value for name, value in vars(options).items() if name not in ("client", "python", "tokenizer")}
    for repeat in range(-1, options.repeats):
        for name in list(clients)[:: 1 if repeat % 2 else -1] if repeat >= 0 else ["pensieve bench"]:  # which warms up
            with tempfile.TemporaryDirectory() as folder:
                sessions = Path(folder) / "sessions.json"
                mark = f"[{random.getrandbits(60):015x}]"
                sessions.write_text(json.dumps(conversations(options, mark)))
                told = figures(clients[name](options, sessions, Path(folder)), num_turns)
            if repeat >= 0:
                runs[name].append(told)
            print(f"{name:15} {_line(told)}", flush=True)
        write_result(options.name, {"settings": settings, "runs": runs}, RESULTS / "bench")
    for name, repeats in runs.items():
        means = {figure: interval.mean for figure, interval in intervals_of(repeats).items()}
        print(f"{name:15} {_line(means)}, all runs")


def _line(told: dict[str, float]) -> str:
    spreads = []
    for name, title in (("ttft", "first token"), ("s_per_token", "per token")):
        values = (f"{1e3 * told[f'{name}_{which}']:.1f}" for which in ("mean", "p50", "p90"))
        spreads.append(f"{title} {' / '.join(values)} ms")
    return f"{', '.join(spreads)} (mean / p50 / p90), {told['output_tokens']:.0f} tokens, {told['errors']:.0f} errors"


if __name__ == "__main__":
    main()

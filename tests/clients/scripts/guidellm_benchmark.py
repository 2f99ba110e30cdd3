"""The `guidellm` package: conversations of several turns, with calls, and in the Responses API."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

NUM_CONVERSATIONS = 2
NUM_TURNS = 3
RUNS = {
    "chat": ({"request_format": "/v1/chat/completions"}, {"turns": NUM_TURNS}),
    # A turn with a call is followed by one with its result.
    "tools": ({"request_format": "/v1/chat/completions"}, {"turns": 1, "tool_call_turns": 1}),
    "completions": ({"request_format": "/v1/completions"}, {"turns": 1}),
    "responses": ({"request_format": "/v1/responses", "server_history": True}, {"turns": NUM_TURNS}),
}
TOKENS = {"prompt_tokens": 24, "output_tokens": 8}
for name, (backend, data) in RUNS.items():
    num_requests = NUM_CONVERSATIONS * (data["turns"] + data.get("tool_call_turns", 0))
    report = Path(f"{name}.json").absolute()
    backend |= {"kind": "openai_http", "target": os.environ["OPENAI_BASE_URL"], "model": os.environ["MODEL"]}
    if "tool_call_turns" in data:
        backend["max_tokens"] = 200
    spec = {
        "backend": backend,
        "profile": {"kind": "concurrent", "streams": [2]},
        "constraints": [{"kind": "max_requests", "count": num_requests}],
        "tokenizer": {"kind": "huggingface_auto", "model": os.environ["TOKENIZER"]},
        "data": [{"kind": "synthetic_text", **TOKENS, **data}],
        "outputs": [{"kind": "json", "path": str(report)}],
    }
    scenario = Path(f"{name}-scenario.json")
    scenario.write_text(json.dumps({"spec": spec}))
    program = str(Path(sys.executable).parent / "guidellm")
    command = [program, "run", "--config", str(scenario), "--disable-console"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert len(requests["successful"]) >= num_requests and not requests["errored"], (
        name,
        requests["errored"],
        ran.stderr,
    )
    print(name, len(requests["successful"]), "requests")
print("guidellm", version("guidellm"))

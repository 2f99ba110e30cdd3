"""The `aiperf` package: conversations of several turns by chat, completions, responses and messages."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

URL = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
NUM_CONVERSATIONS = 2
RUNS = {
    "chat": (2, []),
    "completions": (1, []),
    # With `store` the package sends new input only, behind the id of the response before.
    "responses": (2, ["--extra-inputs", "store:true"]),
    "messages": (2, []),
}
# Offline, the package takes no folder for a tokenizer.
environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
for endpoint, (num_turns, more) in RUNS.items():
    folder = Path(endpoint).absolute()
    command = [
        str(Path(sys.executable).parent / "aiperf"), "profile", "--model", os.environ["MODEL"], "--url", URL,
        "--endpoint-type", endpoint, "--streaming", "--use-server-token-count", "--tokenizer", os.environ["TOKENIZER"],
        "--concurrency", "2", "--conversation-num", str(NUM_CONVERSATIONS), "--conversation-turn-mean", str(num_turns),
        "--conversation-turn-stddev", "0", "--prompt-input-tokens-mean", "24", "--prompt-output-tokens-mean", "8",
        "--ui", "none", "--output-artifact-dir", str(folder), *more,
    ]  # fmt: skip
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = json.loads((folder / "profile_export_aiperf.json").read_text())
    assert told["request_count"]["avg"] == NUM_CONVERSATIONS * num_turns, (endpoint, told["error_summary"])
    assert not told["error_summary"], (endpoint, told["error_summary"])
    # A later turn finds the earlier ones in the cache. Of responses the package reads no usage if a length ended them.
    if endpoint in ("chat", "messages"):
        assert told["total_usage_prompt_cache_read_tokens"]["avg"] > 0, (endpoint, told)
    print(endpoint, told["request_count"])
print("aiperf", version("aiperf"))

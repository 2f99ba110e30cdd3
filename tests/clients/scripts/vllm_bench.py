"""The `vllm` package: `vllm bench serve` by chat, completions and responses."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

URL = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
NUM_PROMPTS = 3
ENDPOINTS = {
    "openai-chat": "/v1/chat/completions",
    "openai": "/v1/completions",
    "openai-responses": "/v1/responses",
}
for backend, endpoint in ENDPOINTS.items():
    result = Path(f"{backend}.json").absolute()
    command = [
        str(Path(sys.executable).parent / "vllm"), "bench", "serve", "--backend", backend, "--base-url", URL,
        "--endpoint", endpoint, "--model", os.environ["MODEL"], "--tokenizer", os.environ["TOKENIZER"],
        "--dataset-name", "random", "--random-input-len", "24", "--random-output-len", "8",
        "--num-prompts", str(NUM_PROMPTS), "--max-concurrency", "2", "--ignore-eos",
        "--save-result", "--result-filename", str(result),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = json.loads(result.read_text())
    assert (told["completed"], told["failed"]) == (NUM_PROMPTS, 0), (backend, ran.stdout)
    assert told["total_output_tokens"] == NUM_PROMPTS * 8, (backend, told)
    print(backend, told["completed"], "requests")
print("vllm", version("vllm"))

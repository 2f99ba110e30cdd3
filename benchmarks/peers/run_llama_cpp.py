"""The workload on llama.cpp's server, over HTTP: token ids in, token ids out.

Where all sessions are active at once, each has a slot of its own. Where more take turns, there is a slot for each active
one, and the rest of the memory is the server's prompt cache (--cache-ram), to which it saves what a slot loses.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from runner import Options, build_parser, read_options, run
from workload import Generate, Turn

# Its flash attention turns a cache in f32 into f16 at each step, which costs time and the third digit of the logits; without
# it, fp32 is fp32. Its fast kernels for 16 bits are those for f16.
KV_OPTIONS = {
    "float32": ("-fa", "off", "-ctk", "f32", "-ctv", "f32"),
    "bfloat16": ("-fa", "on", "-ctk", "f16", "-ctv", "f16"),
}
START_S = 120.0


@asynccontextmanager
async def serve(options: Options, server: Path, details: dict[str, Any]) -> AsyncIterator[Generate]:
    workload = options.workload
    is_pinned = workload.num_active == workload.num_sessions
    slot_len = -(-(workload.max_context_len + 1) // 256) * 256  # the server rounds up to this, too
    context_len = workload.num_active * slot_len
    other_tokens = 0 if is_pinned else options.first_tier_tokens + options.second_tier_tokens - context_len
    cache_mib = max(0, other_tokens * options.bytes_per_token >> 20)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    batch, threads = str(options.max_num_batched_tokens), str(options.num_threads)
    command = [str(server), "-m", str(options.model / "model.gguf"), "--host", "127.0.0.1", "--port", str(port)]
    tuning = ["-np", str(workload.num_active), "-c", str(context_len), "--no-kv-unified", "-cram", str(cache_mib)]
    tuning += ["-t", threads, "-tb", threads, "-b", batch, "-ub", batch, *KV_OPTIONS[options.dtype]]

    forbidden = [[token_id, False] for token_id in partial_characters(options.model / "tokenizer.json")]

    async def generate(turn: Turn) -> AsyncIterator[Sequence[int]]:
        body = {
            "prompt": turn.prompt,
            "n_predict": turn.output_len,
            "temperature": 0.0,
            "top_k": 1,
            "ignore_eos": True,
            "logit_bias": forbidden,
            "cache_prompt": True,
            "stream": True,
            "return_tokens": True,
            "id_slot": turn.session % workload.num_active if is_pinned else -1,
        }
        async for event in post_events(port, "/completion", body):
            yield event.get("tokens", ())

    # A file, since a pipe that is not read fills up.
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, *tuning], stdout=log, stderr=log)
        try:
            await wait_until_up(process, port)
            yield generate
        finally:
            process.terminate()
            process.wait()
            log.seek(0)
            print(log.read().decode(errors="replace"), file=sys.stderr)
        package = (server.parents[2] / "PKG-INFO").read_text().splitlines()  # what setup.sh unpacked
        details.update(
            source=[line for line in package if line.startswith(("Name:", "Version:"))],
            options=" ".join(tuning),
        )


def partial_characters(tokenizer: Path) -> list[int]:
    """Ids of the tokens whose bytes are no text by themselves, of a byte-level tokenizer.

    The server does not stream their ids, so that a client would know less than it has generated.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    bytes_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    partial = []
    for token, token_id in json.loads(tokenizer.read_text())["model"]["vocab"].items():
        try:
            bytes(bytes_of[character] for character in token).decode()
        except UnicodeDecodeError:
            partial.append(token_id)
    return partial


async def wait_until_up(process: subprocess.Popen, port: int) -> None:
    for _ in range(int(START_S / 0.2)):
        if process.poll() is not None:
            raise RuntimeError(f"llama-server ended with code {process.returncode} at its start")
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            status = await reader.readline()
            writer.close()
            if b" 200 " in status:
                return
        except OSError:
            pass
        await asyncio.sleep(0.2)
    raise RuntimeError(f"llama-server is not up after {START_S:.0f} s")


async def post_events(port: int, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """POST on a new connection and yield the server-sent events.

    Kept-alive connections occupy the server's threads.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    try:
        status = await reader.readline()
        headers = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status:
            raise RuntimeError(f"{status!r}: {await reader.read()!r}")
        if b"chunked" not in headers:
            raise RuntimeError(f"not the stream that was expected: {headers!r}")
        pending = b""
        while size := int(await reader.readline(), 16):
            pending += (await reader.readexactly(size + 2))[:-2]
            *events, pending = pending.split(b"\n\n")
            for event in events:
                if event.startswith(b"data: ") and event != b"data: [DONE]":
                    yield json.loads(event[len(b"data: ") :])
    finally:
        writer.close()


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--server", type=Path, required=True, help="the llama-server to run")
    arguments = parser.parse_args()
    options = read_options(arguments)
    details: dict[str, Any] = {}
    run(options, serve(options, arguments.server, details), packages=(), details=details)


if __name__ == "__main__":
    main()

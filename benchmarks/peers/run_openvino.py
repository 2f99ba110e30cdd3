"""The workload on OpenVINO GenAI's continuous batching pipeline, with its prefix cache on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino
import openvino_genai
from runner import Options, build_parser, read_options, run
from workload import Generate, Turn

BLOCK_SIZE = 32  # of the CPU plugin; `details` of the result say what it came to


def choose_precisions(dtype: str) -> dict[str, str]:
    """Both are said, since their defaults differ from each other and by processor.

    Without bf16 instructions the plugin computes in f32 whatever is hinted, and refuses a cache in bf16: f16 is then
    the cache of that size.
    """
    if dtype == "float32":
        return {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16" if has_bf16 else "f16"}


@dataclass(slots=True)
class _Stream:
    handle: openvino_genai.GenerationHandle
    tokens: asyncio.Queue[list[int]] = field(default_factory=asyncio.Queue)


@asynccontextmanager
async def serve(options: Options, details: dict[str, Any]) -> AsyncIterator[Generate]:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = True
    scheduler.dynamic_split_fuse = True
    scheduler.max_num_batched_tokens = options.max_num_batched_tokens
    scheduler.num_kv_blocks = options.num_blocks(BLOCK_SIZE)
    properties = {**choose_precisions(options.dtype), "INFERENCE_NUM_THREADS": options.num_threads}
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(options.model), scheduler, "CPU", properties)
    streams: list[_Stream] = []
    is_wanted = asyncio.Event()
    request_ids = iter(range(1 << 62))

    async def step_forever() -> None:
        # In the client's own thread: a token is seen the moment its step is over, with no other thread to wake.
        while True:
            if not streams:
                is_wanted.clear()
                await is_wanted.wait()
            pipeline.step()
            for stream in tuple(streams):
                while stream.handle.can_read():
                    for output in stream.handle.read().values():
                        stream.tokens.put_nowait(output.generated_ids)
                if stream.handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                    streams.remove(stream)
            await asyncio.sleep(0)  # the clients read, and send their next turns
            await asyncio.sleep(0)

    async def generate(turn: Turn) -> AsyncIterator[Sequence[int]]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = turn.output_len
        config.ignore_eos = True
        config.do_sample = False
        ids = openvino.Tensor(np.array([turn.prompt], dtype=np.int64))
        stream = _Stream(pipeline.add_request(next(request_ids), ids, config))
        streams.append(stream)
        is_wanted.set()
        num_tokens = 0
        while num_tokens < turn.output_len:
            new = await stream.tokens.get()
            num_tokens += len(new)
            yield new

    async with asyncio.TaskGroup() as group:  # a failing step ends the clients too
        stepping = group.create_task(step_forever())
        yield generate
        stepping.cancel()
    metrics = pipeline.get_metrics()
    details.update(
        kv_cache_bytes=metrics.kv_cache_size_in_bytes,
        block_size=metrics.kv_cache_size_in_bytes / options.bytes_per_token / scheduler.num_kv_blocks,
        max_cache_usage=metrics.max_cache_usage,
        scheduler=scheduler.to_string(),
        **describe_model(options, properties),
    )


def describe_model(options: Options, properties: dict[str, Any]) -> dict[str, Any]:
    """Say what the plugin makes of the precision hints on this processor.

    The pipeline does not tell, a compiled model does.
    """
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(options.model / "openvino_model.xml")), "CPU", properties)
    return {
        "capabilities": core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
        **{name: str(compiled.get_property(name)) for name in properties},
    }


def main() -> None:
    options = read_options(build_parser(__doc__).parse_args())
    details: dict[str, Any] = {}
    packages = ("openvino", "openvino-genai")
    run(options, serve(options, details), packages=packages, details=details)


if __name__ == "__main__":
    main()

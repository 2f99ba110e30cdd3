"""The workload on transformers' continuous batching, with its prefix sharing on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch
import transformers
from runner import Options, build_parser, read_options, run
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from workload import Generate, Turn

# The default of 256 would share whole multiples of it only; this is the block size of the other systems.
PAGE_SIZE = 32


@asynccontextmanager
async def serve(options: Options, details: dict[str, Any]) -> AsyncIterator[Generate]:
    torch.set_num_threads(options.num_threads)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
    )
    generation_config = GenerationConfig(do_sample=False, max_new_tokens=64, eos_token_id=-1)
    manager = model.init_continuous_batching(
        generation_config=generation_config,
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=options.num_blocks(PAGE_SIZE),
            max_batch_tokens=options.max_num_batched_tokens,
            allow_block_sharing=True,
            auto_switch_to_flash=False,  # needs a GPU
        ),
    )
    manager.start()

    async def generate(turn: Turn) -> AsyncIterator[Sequence[int]]:
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        manager.register_result_handler(turn.request_id, outputs.put_nowait)
        manager.add_request(
            list(turn.prompt), request_id=turn.request_id, max_new_tokens=turn.output_len, streaming=True
        )
        num_seen = 0
        while True:
            output = await outputs.get()
            if output.error is not None:
                raise RuntimeError(output.error)
            yield output.generated_tokens[num_seen:]
            num_seen = len(output.generated_tokens)
            if output.is_finished():
                return

    yield generate
    cache = manager.batch_processor.cache
    details.update(
        num_blocks=cache.num_blocks,
        page_size=PAGE_SIZE,
        prefix_sharing=cache.use_prefix_sharing,
        max_batch_tokens=cache.max_batch_tokens,
        attention=model.config._attn_implementation,
    )
    await asyncio.to_thread(manager.stop)


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    options = read_options(build_parser(__doc__).parse_args())
    details: dict[str, Any] = {}
    run(options, serve(options, details), packages=("torch", "transformers"), details=details)


if __name__ == "__main__":
    main()

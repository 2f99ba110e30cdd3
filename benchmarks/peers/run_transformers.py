"""The workload on transformers' continuous batching, with its prefix sharing on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
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
async def batching(
    model: Any,
    *,
    page_size: int,
    num_blocks: int,
    max_batch_tokens: int,
    cpu_offload_space: float = 0.0,
    timeout_s: float = 600.0,
) -> AsyncIterator[tuple[Generate, Any]]:
    """transformers' continuous batching of `model`, and its manager.

    cpu_offload_space: in GiB; needs a GPU.
    timeout_s: for each token, because a manager whose thread has died answers no more.
    """
    # Older releases call it block_size and know nothing of flash.
    known = {field.name for field in fields(ContinuousBatchingConfig)}
    page = {"page_size" if "page_size" in known else "block_size": page_size}
    flash = {"auto_switch_to_flash": False} if "auto_switch_to_flash" in known else {}  # would be downloaded
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=64, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=num_blocks,
            max_batch_tokens=max_batch_tokens,
            allow_block_sharing=True,
            cpu_offload_space=cpu_offload_space,
            **page,
            **flash,
        ),
    )
    manager.start()
    number = 0

    async def generate(turn: Turn) -> AsyncIterator[Sequence[int]]:
        nonlocal number
        number += 1
        request_id = f"{number}.{turn.request_id}"  # one workload may follow another
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        manager.register_result_handler(request_id, outputs.put_nowait)
        manager.add_request(list(turn.prompt), request_id=request_id, max_new_tokens=turn.output_len, streaming=True)
        num_seen = 0
        while True:
            output = await asyncio.wait_for(outputs.get(), timeout_s)
            if output.error is not None:
                raise RuntimeError(output.error)
            yield output.generated_tokens[num_seen:]
            num_seen = len(output.generated_tokens)
            if output.is_finished():
                return

    try:
        yield generate, manager
    finally:
        # At once: after an error, what is under way may never end.
        await asyncio.to_thread(manager.stop, hard_stop=True, timeout=30.0)


@asynccontextmanager
async def serve(options: Options, details: dict[str, Any]) -> AsyncIterator[Generate]:
    torch.set_num_threads(options.num_threads)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
    )
    num_blocks = options.num_blocks(PAGE_SIZE)
    async with batching(
        model, page_size=PAGE_SIZE, num_blocks=num_blocks, max_batch_tokens=options.max_num_batched_tokens
    ) as (generate, manager):
        yield generate
        cache = manager.batch_processor.cache
        details.update(
            num_blocks=cache.num_blocks,
            page_size=PAGE_SIZE,
            prefix_sharing=cache.use_prefix_sharing,
            max_batch_tokens=cache.max_batch_tokens,
            attention=model.config._attn_implementation,
        )


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    options = read_options(build_parser(__doc__).parse_args())
    details: dict[str, Any] = {}
    run(options, serve(options, details), packages=("torch", "transformers"), details=details)


if __name__ == "__main__":
    main()

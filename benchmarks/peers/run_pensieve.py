"""The workload on this project's engine, keeping contexts between turns (pensieve) or not (stateless)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from runner import Options, build_parser, read_options, run
from workload import Generate, Turn

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core.request import SamplingParams
from engine.generation import Generation
from engine.text.prompt import TokenPrompt

CHUNK_SIZE = 32


def create_engine(options: Options, mode: str, quantization: str) -> AsyncEngine:
    return AsyncEngine(
        EngineConfig(
            model=str(options.model),
            mode=mode,
            dtype=options.dtype,
            quantization=quantization,
            device="cpu",
            chunk_size=CHUNK_SIZE,
            num_gpu_blocks=options.num_blocks(CHUNK_SIZE),
            num_cpu_blocks=-(-options.second_tier_tokens // CHUNK_SIZE),
            max_num_batched_tokens=options.max_num_batched_tokens,
            num_threads=options.num_threads,
        )
    )


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--mode", default="pensieve")
    parser.add_argument("--quantization", default="none")
    arguments = parser.parse_args()
    options = read_options(arguments)
    details: dict[str, Any] = {}

    @asynccontextmanager
    async def serving() -> AsyncIterator[Generate]:
        engine = create_engine(options, arguments.mode, arguments.quantization)

        async def generate(turn: Turn) -> AsyncIterator[Sequence[int]]:
            sampling = SamplingParams(temperature=0.0, max_tokens=turn.output_len, ignore_eos=True)
            generation = Generation(turn.request_id, turn.session_id, TokenPrompt(turn.prompt), sampling)
            async for delta in engine.generate(generation):
                yield delta.token_ids

        yield generate
        details.update(engine.get_statistics())
        await engine.check_integrity()
        await engine.shutdown()

    run(options, serving(), packages=("torch", "transformers"), details=details)


if __name__ == "__main__":
    main()

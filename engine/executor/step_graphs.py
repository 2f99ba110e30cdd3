"""Steps recorded once for each of a few numbers of rows, and replayed.

A step launches many small kernels, and launching them one by one takes longer than they run: always if it only decodes, and
for prompts of up to some hundred tokens. Knows the sizes and the graphs; the runner says what is recorded.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from tqdm import tqdm

from engine.attention.device_health import check_device
from engine.errors import ConfigError

logger = logging.getLogger(__name__)


class Graph(Protocol):
    """Recorded work. output: what the recorded function returned; every replay writes it anew."""

    output: torch.Tensor

    def replay(self) -> None:
        """Do it again, over what its inputs hold now."""
        ...


class GraphMaker(Protocol):
    """Records work of a device."""

    def capture(self, run: Callable[[], torch.Tensor]) -> Graph:
        """Record what `run` does on the device.

        Tensors that it reads keep their places; replays read what is in them then. The graph keeps them alive. Raises
        RuntimeError if `run` does something that cannot be recorded, such as waiting for the device, and DeviceFailedError
        if the device is broken.
        """
        ...


class CudaGraph:
    """A CUDA graph, and all that it reads.

    run: the recorded function. CUDA knows addresses only: what `run` holds outside the graphs' pool (the tiling of the
        attention, the places of the inputs) has to live as long as the graph does.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, output: torch.Tensor, run: Callable[[], torch.Tensor]) -> None:
        self._graph = graph
        self.output = output
        self._run = run

    def replay(self) -> None:
        self._graph.replay()


class CudaGraphMaker:
    """Makes graphs that share their memory.

    No two are replayed at the same time, and what one leaves is used before the next replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, run: Callable[[], torch.Tensor]) -> Graph:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream(self._device)
            graph = torch.cuda.CUDAGraph()
            try:
                run()  # compiles kernels and makes what they keep, which cannot be recorded
                torch.cuda.synchronize(self._device)
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    output = run()
            except RuntimeError:
                check_device(self._device)
                self._pool = torch.cuda.graph_pool_handle()  # the recording that failed may have left the old one open
                raise
            finally:
                torch.cuda.set_stream(current)  # a recording that fails leaves its own
        return CudaGraph(graph, output, run)


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """The batch sizes to record: powers of two up to 16, then every 16th, and the largest.

    So padding stays little.
    """
    sizes = [size for size in (1, 2, 4, 8) if size < max_num_seqs]
    return (*sizes, *range(16, max_num_seqs, 16), max_num_seqs)


# The numbers of rows of steps with prompts that are recorded: close enough for padding to cost less than launching. With more
# rows the device is busy for longer than that.
PROMPT_SIZES = (32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)


def prompt_sizes(max_num_batched_tokens: int) -> tuple[int, ...]:
    """Those of PROMPT_SIZES that a step may have, and the largest step if that is smaller than some of them."""
    return tuple(sorted({min(size, max_num_batched_tokens) for size in PROMPT_SIZES}))


class StepGraphs:
    """One graph for each number of rows.

    sizes: the recorded ones, ascending.
    """

    def __init__(self) -> None:
        self._graphs: dict[int, Graph] = {}
        self.sizes: list[int] = []

    def capture(
        self, maker: GraphMaker, sizes: Iterable[int], make_run: Callable[[int], Callable[[], torch.Tensor]]
    ) -> None:
        """Record a graph for each size. Raises ConfigError if memory runs out.

        make_run: size -> the function to record.

        If the model does what cannot be recorded, the log says so and nothing is recorded: each operation of such steps is
        launched by itself.
        """
        # The largest first: the others fit into the memory that it took.
        progress = tqdm(sorted(sizes, reverse=True), desc="capturing CUDA graphs", unit="size", disable=None)
        try:
            for size in progress:
                self._graphs[size] = maker.capture(make_run(size))
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                "no memory is left on the device for the CUDA graphs of steps; lower gpu_memory_utilization (or "
                "num_gpu_blocks, gpu_memory_gib) or max_num_seqs, or set enforce_eager",
                param="gpu_memory_utilization",
            ) from error
        except RuntimeError as error:
            self._graphs.clear()
            logger.warning(
                "steps run without CUDA graphs, and slower: this model cannot be recorded (%s); enforce_eager: true "
                "skips the attempt",
                str(error).strip().splitlines()[0],
            )
        finally:
            progress.close()
        self.sizes = sorted(self._graphs)

    def size_for(self, num_rows: int) -> int | None:
        """The smallest recorded size that so many rows fit into; None if there is none."""
        index = bisect_left(self.sizes, num_rows)
        return self.sizes[index] if index < len(self.sizes) else None

    def replay(self, size: int) -> torch.Tensor:
        """What the recorded function returns over what its inputs hold now.

        Valid until the next replay of any size.
        """
        graph = self._graphs[size]
        graph.replay()
        return graph.output

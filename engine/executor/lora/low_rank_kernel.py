"""What adapters add to a few rows of a layer, by the C++ kernel of low_rank.cpp; on a CPU.

Each of torch's own small multiplications takes longer to begin than to compute, and there would be two of them for each
adapter and layer of a decode. Their oracle is layers.py.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from engine.errors import KernelBuildError
from engine.operator_build import build_operators

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("low_rank.cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of an adapter in a step, up to which it is faster.
MAX_ROWS = 64


def load_kernel(device: torch.device, dtype: torch.dtype) -> Any | None:
    """The operator, built if that has not been done; None, with a line in the log, if torch's own have to do."""
    if device.type != "cpu" or dtype not in DTYPES:
        return None
    if not hasattr(torch.ops.pensieve_lora, "add_low_rank"):
        capability: str = torch.backends.cpu.get_cpu_capability()
        try:
            torch.ops.load_library(str(build_operators(SOURCE, "adapters", capability)))
        except (KernelBuildError, OSError) as error:
            logger.warning("adapters are added by torch's operations, which is slow for decodes; %s", error)
            return None
    return torch.ops.pensieve_lora.add_low_rank

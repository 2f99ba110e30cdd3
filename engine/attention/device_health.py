"""Tells a device that is broken from a device that refused one operation."""

from __future__ import annotations

import torch

from engine.errors import DeviceFailedError


def check_device(device: torch.device) -> None:
    """Raise DeviceFailedError if an earlier operation has broken the device for this process.

    CUDA reports an illegal address or a failed assertion at whatever is called next, and at everything after that. A handler
    that goes on after an exception calls this first: else the exception is taken for "this cannot be done here", and every
    later result is wrong or fails for a reason that has nothing to do with it.

    device: any; only a CUDA device can be in such a state.
    """
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise DeviceFailedError(
            f"{device} failed and cannot be used by this process any more ({reason}); restart it, with "
            "CUDA_LAUNCH_BLOCKING=1 to see which operation it was"
        ) from error

"""The ranks of one tensor-parallel group as torch.distributed sees them. Knows no model and no plan."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.errors import ConfigError

# Ranks read their weights at their own pace, and the first collective waits for the slowest. Steps have their own deadline.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
LOOPBACK_INTERFACE = "lo"


@dataclass(frozen=True, slots=True)
class GroupMember:
    """One rank's way into its group; plain data, for the starter of that rank.

    rendezvous: torch.distributed's init_method. plan_address: where rank 0 listens for the others, a path (Unix socket)
    where all are on one machine, else (host, port). authkey: what both sides of that connection prove to know.
    """

    rank: int
    size: int
    rendezvous: str
    plan_address: str | tuple[str, int]
    authkey: bytes


class ProcessGroup:
    """This process's membership; torch.distributed keeps one per process. rank 0 schedules and samples."""

    def __init__(self, member: GroupMember, device: str, store: dist.TCPStore | None = None) -> None:
        """Join the group; blocks until all ranks have.

        device: the option.
        store: the one that `rendezvous` names, if this process holds it.
        """
        self.rank, self.size = member.rank, member.size
        self.device = _choose_device(device, member.rank)
        is_cuda = self.device.type == "cuda"
        if is_cuda:
            torch.cuda.set_device(self.device)
        # gloo listens on the address of this machine's name unless it is told an interface.
        is_local = isinstance(member.plan_address, str) and LOOPBACK_INTERFACE in dict(socket.if_nameindex()).values()
        interface = os.environ.get("GLOO_SOCKET_IFNAME") or (LOOPBACK_INTERFACE if is_local else None)
        with _variable("GLOO_SOCKET_IFNAME", interface):
            dist.init_process_group(
                "nccl" if is_cuda else "gloo",
                init_method=member.rendezvous if store is None else None,
                store=None if store is None else dist.PrefixStore("default_pg", store),  # as init_method does it
                rank=member.rank,
                world_size=member.size,
                timeout=COLLECTIVE_TIMEOUT,
                device_id=self.device if is_cuda else None,
            )

    def minimum(self, value: int) -> int:
        """The smallest `value` of all ranks; each has to call it."""
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def gather(self, text: str) -> list[str]:
        """The `text` of all ranks, in their order; each has to call it."""
        texts: list[str] = [""] * self.size
        dist.all_gather_object(texts, text)
        return texts

    @contextmanager
    def environment(self) -> Iterator[None]:
        """What transformers' loader reads of the environment."""
        with _variable("LOCAL_RANK", str(self.device.index or 0)):
            yield

    def abort(self) -> None:
        """End the collectives that wait for ranks which are gone; gloo ends its own with the connections."""
        if self.device.type == "cuda" and dist.group.WORLD is not None:
            dist.group.WORLD.abort()

    def close(self) -> None:
        """No collective follows, on any rank."""
        dist.destroy_process_group()


def serve_store(host: str) -> dist.TCPStore:
    """What the ranks of several machines meet in, held by this process.

    host: this machine's address; it listens there and nowhere else. Torch asks for no key there.
    """
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def check_no_group() -> None:
    """Raises ConfigError where this process cannot join a group."""
    if dist.is_initialized():
        raise ConfigError(
            "this process is a rank of another tensor-parallel group; shut that engine down first, or use another process",
            param="tensor_parallel_size",
        )


def _choose_device(option: str, rank: int) -> torch.device:
    """The CUDA device of this rank; raises ConfigError if the option `device` names another one."""
    num_devices = torch.cuda.device_count()
    if option.startswith("cuda:") or (option == "cpu" and num_devices) or (option == "cuda" and not num_devices):
        raise ConfigError(
            f"device is {option!r}, but each rank of a tensor-parallel group takes a CUDA device of its own if there are "
            f"any, and this process sees {num_devices}; use 'auto' (and CUDA_VISIBLE_DEVICES to choose among them)",
            param="device",
        )
    return torch.device("cuda", rank % num_devices) if num_devices else torch.device("cpu")


@contextmanager
def _variable(name: str, value: str | None) -> Iterator[None]:
    """An environment variable for a while; None = as it is."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        else:
            os.environ.pop(name, None)

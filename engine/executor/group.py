"""The executor for a model that is sharded over several devices: rank 0, in this process.

It sends the other ranks its plans.

A WorkerStarter starts the others: processes of this machine here, Ray actors in the deployments.

    engine thread         executor's thread              "workers" thread
    submit(plan) -------> plan and last tokens to all    heartbeats of all
                          step of rank 0 (collectives)   one is lost: break, kill the workers, which ends
           <-- result --  SwapsDone of all, if verified  the collectives of rank 0 as well
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

import engine
from engine.config import EngineConfig
from engine.core.executor_protocol import Executor, ExecutorFacts, Grammars, SamplingFailedError
from engine.core.plan import StepPlan, StepResult
from engine.errors import AdapterError, ConfigError, EngineError, EngineStoppedError
from engine.executor.host import available_cores
from engine.executor.local import LocalExecutor
from engine.executor.model_loader import check_can_be_sharded
from engine.executor.peers.blocks import make_rank_blocks
from engine.executor.plan_channel import AdapterLoaded, AdapterOrder, PlanSender
from engine.executor.process_group import GroupMember, ProcessGroup, check_no_group, serve_store
from engine.executor.tiers.disk_tier import DiskTier, make_rank_tier
from engine.executor.tiers.group_blocks import GroupBlocks
from engine.executor.tiers.group_channel import TierChannel, wants_tier_channel
from engine.executor.tiers.group_tier import GroupTier

logger = logging.getLogger(__name__)

# Seconds until all workers have connected: an interpreter starts and imports torch; a machine may have to start for actors.
CONNECT_TIMEOUT_S = 300.0
# A step that takes longer hangs, in seconds.
STEP_TIMEOUT_S = 300.0
# How many seconds the workers may take to free what they have when they are told to stop, or to report why a step failed.
LEAVE_TIMEOUT_S = 10.0
BLAME_TIMEOUT_S = 2.0
MAX_FOLDER_LEN = 80


class WorkerStarter(Protocol):
    """Starts ranks 1 to n-1, each with `run_worker(config, member)`.

    host: how they reach rank 0's machine over the network; None if all are on it.
    """

    host: str | None

    def start(self, config: EngineConfig, members: Sequence[GroupMember]) -> None:
        """Start them all; need not wait until they run. Called once."""
        ...

    def check(self) -> None:
        """Raise EngineError if a worker has ended. Called while rank 0 waits for the workers to connect."""
        ...

    def shutdown(self) -> None:
        """Kill the workers that have not ended by themselves. From any thread; may be called again."""
        ...


class ProcessWorkers:
    """Workers that are processes of this machine."""

    host: str | None = None

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, config: EngineConfig, members: Sequence[GroupMember]) -> None:
        num_devices = torch.cuda.device_count()
        if 0 < num_devices <= len(members):
            raise ConfigError(
                f"tensor_parallel_size is {len(members) + 1}, and each rank takes a CUDA device, but this process sees "
                f"{num_devices} of them",
                param="tensor_parallel_size",
            )
        folder = str(Path(engine.__file__).parents[1])
        python_path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        for member in members:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "engine.executor.worker"],  # -P: whatever lies in the current folder
                stdin=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": python_path},
            )
            self._processes.append(process)
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as stdin:  # `check` says that it has ended
                stdin.write(pickle.dumps((config, member)))

    def check(self) -> None:
        for rank, process in enumerate(self._processes, 1):
            if process.poll() is not None:
                raise EngineError(
                    f"the process of rank {rank} ended at its start (status {process.returncode}); see its log"
                )

    def shutdown(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


class GroupExecutor:
    """The executor of rank 0: computes its shard, and has the other ranks follow its plans.

    local: what computes rank 0's shard.
    placements: what each rank has, and on which device, by rank.
    broken: done, with the error, once the group cannot compute any more, whichever rank is to blame; cancelled by a regular
        shutdown. Its callbacks run in a thread of the group's, and must not wait for the group.
    """

    max_steps_in_flight = 1  # a step brings the other ranks what was sampled in the one before

    def __init__(self, config: EngineConfig, starter: WorkerStarter | None = None) -> None:
        """Start the ranks and wait until all have loaded. Raises what any of them raised.

        starter: None = processes of this machine, which share its cores.
        """
        check_no_group()
        check_can_be_sharded(config)
        self.broken: Future[EngineStoppedError] = Future()
        # Of the last step: what `submit` gave, and the call in the executor's thread.
        self._outcome: Future[StepResult] = Future()
        self._step: Future[None] = Future()
        self._step.set_result(None)
        self._sampled: tuple[int, ...] = ()
        self._last_step = -1
        self._tiers: TierChannel | None = None
        self._group: ProcessGroup | None = None
        self._verifies = config.verify_swaps
        self._size = config.tensor_parallel_size
        self._loading = threading.Lock()  # one adapter at a time
        self._adapters: set[str] = set()  # those that all ranks have, by identity
        if starter is None:
            starter = ProcessWorkers()
            config = replace(config, num_threads=config.num_threads or max(1, available_cores() // self._size))
        self._starter = starter
        self._folder = _make_folder()
        self._channel = PlanSender(
            self._size,
            host=starter.host,
            path=f"{self._folder}/plans",
            on_lost=lambda rank, why: self._break(rank, why),
            has_tiers=wants_tier_channel(config),
        )
        try:
            store, rendezvous = None, f"file://{self._folder}/store"
            if starter.host is not None:
                store = serve_store(starter.host)
                rendezvous = f"tcp://{starter.host}:{store.port}"
            members = [
                GroupMember(rank, self._size, rendezvous, self._channel.address, self._channel.authkey)
                for rank in range(self._size)
            ]
            starter.start(config, members[1:])
            self._channel.accept(starter.check, CONNECT_TIMEOUT_S)
            self._tiers = TierChannel(self._channel.tier_connections, lambda: self._last_step)
            self.local = self._load(config, members[0], store)
            self.placements = (self.local.placement, *self._channel.wait_until_ready())
            self.check_health()
            if self.facts.is_on_cpu:
                # All have met; killed from now on, rank 0 leaves nothing behind. (NCCL's watchdog reads the store in there as
                # long as the group lives, and would wait half an hour for a file that is gone.)
                shutil.rmtree(self._folder, ignore_errors=True)
        except BaseException as error:
            blamed = self._find_blamed(error)
            self._end()
            if blamed is error:
                raise
            raise blamed from error
        for placement in self.placements:
            logger.info("%s", placement)

    def _load(self, config: EngineConfig, member: GroupMember, store: dist.TCPStore | None) -> LocalExecutor:
        """Join the group and load rank 0's shard.

        That is done in a thread, because joining blocks for ever if a rank died while joining.
        """
        loaded: Future[LocalExecutor] = Future()

        def load() -> None:
            try:
                self._group = ProcessGroup(member, config.device, store)
                loaded.set_result(LocalExecutor(config, self._group))
            except BaseException as error:
                loaded.set_exception(error)

        threading.Thread(target=load, name="load", daemon=True).start()
        if not self._has_ended(loaded):
            raise self.broken.result()
        return loaded.result()

    @property
    def facts(self) -> ExecutorFacts:
        """What the group has; see ExecutorFacts."""
        return self.local.facts

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step on all ranks."""
        return self.submit(plan).result()

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Begin one step on all ranks. If it hangs, the future has an error as its result."""
        outcome: Future[StepResult] = Future()
        self._outcome = outcome
        if self.broken.done():
            _settle(outcome, self.broken.result())
        else:
            self._step = self.local.steps_thread.submit(self._run, plan, outcome)
        return outcome

    def load_adapter(self, folder: str) -> str:
        """On all ranks; the files that each of them finds have to be the same. From any thread."""
        with self._loading:
            self.local.steps_thread.submit(self._channel.send_order, AdapterOrder(folder=folder)).result()
            try:
                own = AdapterLoaded(self.local.load_adapter(folder))
            except AdapterError as error:
                own = AdapterLoaded(error=error)
            loaded = (own, *self._channel.take_adapters_loaded())
        self.check_health()
        identities = {each.identity for each in loaded}
        if len(identities) == 1 and own.identity:
            self._adapters.add(own.identity)
            return own.identity
        for identity in identities - self._adapters - {""}:
            self.unload_adapter(identity)
        raise next(
            (each.error for each in loaded if each.error is not None),
            AdapterError(f"the files in {folder} are not the same on all machines of the group", param="adapters"),
        )

    def unload_adapter(self, identity: str) -> None:
        """See Executor."""
        self._adapters.discard(identity)
        self.local.steps_thread.submit(self._channel.send_order, AdapterOrder(identity=identity))
        self.local.unload_adapter(identity)

    def use_grammars(self, grammars: Grammars) -> None:
        """Tell rank 0, which samples for all, where the grammars of requests are found."""
        self.local.use_grammars(grammars)

    def make_disk_tier(self, config: EngineConfig, number: int) -> GroupTier | None:
        """The disk tier of all ranks; see the function of that name."""
        own = make_rank_tier(config, self.local, number)
        assert self._tiers is not None
        return None if own is None else GroupTier(own, self._tiers)

    def make_blocks(self) -> GroupBlocks:
        """The CPU tier of all ranks, for peers; called once."""
        assert self._tiers is not None
        return GroupBlocks(make_rank_blocks(self.local), self._tiers)

    def check_health(self) -> None:
        """Raise EngineStoppedError, which names the rank, if the group is broken."""
        if self.is_broken:
            raise self.broken.result()

    @property
    def is_broken(self) -> bool:
        """Whether no step can be computed any more; False after a regular shutdown."""
        return self.broken.done() and not self.broken.cancelled()

    def shutdown(self) -> None:
        """Free the model and the KV stores of all ranks, after the step that runs."""
        has_ended = self._has_ended(self._step)
        self.broken.cancel()
        self._end()
        if has_ended:
            self.local.shutdown()
        else:
            logger.error("a collective does not return; what rank 0 has is freed with the process")

    def _run(self, plan: StepPlan, outcome: Future[StepResult]) -> None:
        """Compute one step, in the local executor's thread."""
        try:
            self._channel.send(self._sampled, plan, STEP_TIMEOUT_S)
            self._sampled = ()
            try:
                result = self.local.execute(plan)
            finally:
                self._last_step = plan.step_id
            self._sampled = result.token_ids
            if self._verifies and plan.swap_ins:
                failed = {*result.failed_swap_ins, *self._channel.take_failed_swap_ins()}
                result = replace(result, failed_swap_ins=tuple(sorted(failed)))
        except SamplingFailedError as error:
            _settle(outcome, error)  # after the last collective: the ranks agree still
        except BaseException as error:
            _settle(outcome, self._find_blamed(error))
        else:
            with suppress(InvalidStateError):
                outcome.set_result(result)
        finally:
            self._channel.end_step()

    def _has_ended(self, work: Future[Any]) -> bool:
        """Wait for work with collectives in it; False if it does not end soon after the group broke."""
        futures: list[Future[Any]] = [work, self.broken]
        wait(futures, return_when=FIRST_COMPLETED)
        wait([work], LEAVE_TIMEOUT_S)
        return work.done()

    def _find_blamed(self, error: BaseException) -> BaseException:
        """What broke the group, if rank 0 got `error`: another rank's failure shows here as a lost connection."""
        try:
            blamed: BaseException = self.broken.result(BLAME_TIMEOUT_S)
        except TimeoutError:
            self._break(0, repr(error))
            blamed = error
        failure = self._channel.failure
        return failure.error if failure is not None and failure.error is not None else blamed

    def _break(self, rank: int, why: str) -> None:
        """Compute no further step, and end the workers. From any thread."""
        error = EngineStoppedError(f"the tensor-parallel group is broken: rank {rank} of {self._size}: {why}")
        try:
            self.broken.set_result(error)
        except InvalidStateError:
            return  # it was broken before, or is shut down
        logger.error("%s", error)
        _settle(self._outcome, error)
        self._starter.shutdown()
        if self._group is not None:
            self._group.abort()

    def _end(self) -> None:
        """Give back workers, connections and files."""
        if self._tiers is not None:
            self._tiers.close()
        self._channel.close(0.0 if self.is_broken else LEAVE_TIMEOUT_S)
        self._starter.shutdown()
        if self._group is not None:
            self._group.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _make_folder() -> str:
    """Make a folder for the socket, whose path must be short, and for torch.distributed's rendezvous."""
    is_long = len(tempfile.gettempdir()) > MAX_FOLDER_LEN and os.path.isdir("/tmp")
    return tempfile.mkdtemp(prefix="pensieve-", dir="/tmp" if is_long else None)


def _settle(outcome: Future[StepResult], error: BaseException) -> None:
    """End a step with an error, unless another thread has ended it."""
    with suppress(InvalidStateError):
        outcome.set_exception(error)


def make_executor(config: EngineConfig) -> LocalExecutor | GroupExecutor:
    """The executor of as many ranks as the config wants, all on this machine.

    Raises ModelLoadError or ConfigError.
    """
    return LocalExecutor(config) if config.tensor_parallel_size == 1 else GroupExecutor(config)


def make_disk_tier(config: EngineConfig, executor: Executor, number: int) -> DiskTier | GroupTier | None:
    """The disk tier of all ranks of an executor, if the options ask for one; called once.

    number: of this engine among those that share the path.

    Raises ConfigError if its size holds no chunk, or there is no CPU tier.
    """
    if isinstance(executor, LocalExecutor):
        return make_rank_tier(config, executor, number)
    return executor.make_disk_tier(config, number) if isinstance(executor, GroupExecutor) else None

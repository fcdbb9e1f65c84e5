"""Processes and groups. The only module that reads Megatron's global process groups.

Ranks are laid out as Megatron does: neighbouring ranks form a tensor-parallel group, so that its
traffic stays inside a node; ranks with the same place in those groups form a data-parallel group.
"""

import atexit
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from inrank_megatron.distributed.platform import device
from inrank_megatron.distributed.rendezvous import Meeting, meet, network_interface
from inrank_megatron.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Parallel:
    """The groups of this process. Sizes and ranks follow from them."""

    tp_group: ProcessGroup
    dp_group: ProcessGroup

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def tp_rank(self) -> int:
        return self.tp_group.rank()

    @property
    def tp_size(self) -> int:
        return self.tp_group.size()

    @property
    def dp_rank(self) -> int:
        return self.dp_group.rank()

    @property
    def dp_size(self) -> int:
        return self.dp_group.size()

    def broadcast_from_rank_0(self, compute: Callable[[], T]) -> T:
        """Run ``compute`` on rank 0 only and give its result to every rank.

        Decisions pass through here, so that no two ranks can disagree. A UserError on rank 0 is raised on
        every rank; what else fails on rank 0 is raised there, and is a UserError that points to it on the
        others.
        """
        box: list = [None, None]
        failure = None
        if self.rank == 0:
            try:
                box[0] = compute()
            except Exception as error:
                failure = error
                box[1] = error if isinstance(error, UserError) else _pointer(error)
        dist.broadcast_object_list(box, src=0)
        if failure or box[1]:
            raise failure or box[1]
        return box[0]

    def broadcast_from_rank_0_when_ready(self, compute: Callable[[], T], meeting: Meeting, what: str) -> T:
        """As :meth:`broadcast_from_rank_0` for what may take longer than a collective waits, such as reading
        every byte of a checkpoint; the other ranks say now and then that rank 0 is without ``what``.
        """
        computed: Future[T] = Future()
        if self.rank == 0:
            try:
                computed.set_result(compute())
            except Exception as error:
                computed.set_exception(error)
        meeting.wait_for_all(what)
        return self.broadcast_from_rank_0(computed.result)

    def call_or_raise_on_all_ranks(self, compute: Callable[[], T]) -> T:
        """Run ``compute`` on every rank; a UserError on any of them is raised on all. Collective.

        ``compute`` may use collectives of groups on all of whose ranks it fails or succeeds alike.
        """
        result, failure = None, None
        try:
            result = compute()
        except UserError as error:
            failure = str(error)
        for message in self.gather_from_all_ranks(failure):
            if message is not None:
                raise UserError(message)
        return result

    def gather_from_all_ranks(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank."""
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather_from_all_ranks(None)

    def seed_random(self, *, seed: int, step: int) -> None:
        """Seed torch and Megatron's random-state tracker for one optimizer step.

        Dropout then depends on (seed, step, data-parallel rank, tensor-parallel rank) alone, so a resumed
        run draws the same masks and no random state needs saving.
        """
        stream = (seed * 1_000_003 + step * 8_191 + self.dp_rank) % 2**31
        torch.manual_seed(stream)
        model_parallel_cuda_manual_seed(stream, tp_rank=self.tp_rank, force_reset_rng=True)

    def any_rank(self, flag: bool, device: torch.device) -> bool:
        """True on every rank if ``flag`` is true on at least one."""
        return bool(self.largest(int(flag), device))

    def largest(self, value: int, device: torch.device) -> int:
        """The largest of all ranks' values, on every rank."""
        values = torch.tensor([value], device=device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return int(values.item())


def initialise(
    *,
    backend: str,
    tensor_model_parallel_size: int,
    timeout_minutes: float = 10,
    meeting: Meeting | None = None,
) -> Parallel:
    """Join the job and build its groups.

    Args:
        timeout_minutes: how long a collective waits for a lost rank.
        meeting: of the job's processes; None: they meet here.
    """
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it, also without a launcher
        meeting = meeting or meet(timeout_minutes=timeout_minutes, settings={})
        _join(backend, meeting, timeout=timedelta(minutes=timeout_minutes))
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
        create_gloo_process_groups=False,  # for Megatron's own distributed optimizer: DeepSpeed's is used
    )
    return Parallel(
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
    )


def without_tensor_parallelism(*, backend: str) -> Parallel:
    """The groups of a job without tensor parallelism: those that exist, else new ones.

    For who computes with one model after another in one process: Megatron forgets its groups without ending
    them, and each set of them holds dozens of threads.
    """
    if dist.is_initialized() and parallel_state.is_initialized():
        groups = Parallel(
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_group=parallel_state.get_data_parallel_group(),
        )
        if groups.tp_size == 1 and _exist(groups):
            return groups
    return initialise(backend=backend, tensor_model_parallel_size=1)


def _exist(groups: Parallel) -> bool:
    """Whether the groups are of the present job, not of one that has been ended since."""
    try:
        return bool(
            dist.get_process_group_ranks(groups.tp_group) and dist.get_process_group_ranks(groups.dp_group)
        )
    except KeyError:
        return False


def _join(backend: str, meeting: Meeting, *, timeout: timedelta) -> None:
    rank, world_size = meeting.ranks.rank, meeting.ranks.world_size
    if world_size == 1:
        # A tool may end without `shutdown`, and a group that outlives the interpreter can abort the process.
        atexit.register(shutdown)
    if interface := network_interface(meeting):
        # Gloo, which the threads that save use under NCCL too, takes the address of the host: it may be
        # another machine's, none, or for several hosts one of the loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # What the meeting had left when this rank came: NCCL asks the store at each group's first use.
    meeting.store.set_timeout(timeout)
    store = dist.PrefixStore("group", meeting.store)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        if backend != "gloo":
            _connect()
    except (dist.DistError, RuntimeError, ValueError) as error:
        why = "" if backend == "gloo" else "; NCCL_DEBUG=INFO says more, and in a container see /dev/shm"
        raise UserError(
            f"{world_size} ranks cannot connect ({str(error).splitlines()[0]}); where hosts have several "
            f"networks, name the one to use with {backend.upper()}_SOCKET_IFNAME{why}"
        ) from error


def _connect() -> None:
    """A first collective, and its end: NCCL connects at that, not when its group is made."""
    value = torch.zeros(1, device=device())
    dist.all_reduce(value)
    value.item()


def pipeline_group() -> ProcessGroup:
    """The group of this process's pipeline, which it is alone in."""
    return parallel_state.get_pipeline_model_parallel_group()


def shutdown() -> None:
    """Leave the groups in order, so that no rank warns of a leaked process group."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _pointer(error: Exception) -> UserError:
    """What the other ranks say of a failure of rank 0, which alone has the traceback."""
    return UserError(f"rank 0 has failed ({type(error).__name__}); its own message says why")

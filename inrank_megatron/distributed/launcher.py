"""Which process of how many this is: what a launcher says through its environment.

``torchrun`` and ``deepspeed`` set torch's own variables, which always win. What ``srun`` and ``mpirun`` set
is read where those are absent, and written under torch's names for the libraries. Imports nothing heavy.
"""

import os
import sys
import zlib
from collections.abc import MutableMapping
from dataclasses import dataclass, replace

from inrank_megatron.distributed.mpi import DEFAULT_PORT, MPI, Scheme
from inrank_megatron.distributed.slurm import Environment, first_host, is_task, local_tasks
from inrank_megatron.errors import UserError

LARGEST_PORT = 65535
_OWN = "RANK WORLD_SIZE LOCAL_RANK"  # what makes a process one of several
_PORTS = range(15000, 25000)  # below those that outgoing connections are given


@dataclass(frozen=True)
class Ranks:
    """The place of a process in its job.

    Attributes:
        rank, world_size: of the job; local_rank, local_world_size: of its processes on this machine.
        master_addr, master_port: where rank 0 listens; None for one process, which meets nobody.
        launcher: who started it, in words.
        alone: the command prefix that starts one process by the same launcher.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str | None = None
    master_port: int | None = None
    launcher: str = ""
    alone: str = ""


def launcher_ranks() -> tuple[int, int]:
    """``(rank, world_size)`` of this process; 0 and 1 without a launcher. Raises as :func:`read_ranks`."""
    ranks = read_ranks(os.environ)
    return ranks.rank, ranks.world_size


def adopt_ranks(env: MutableMapping[str, str] = os.environ) -> Ranks:
    """Read this process's place and write it under torch's names, which torch, Megatron and DeepSpeed read.

    Raises:
        UserError: as :func:`read_ranks`.
    """
    ranks = read_ranks(env)
    if ranks.world_size > 1:
        for name in ("rank", "world_size", "local_rank", "local_world_size", "master_addr", "master_port"):
            env[name.upper()] = str(getattr(ranks, name))
    return ranks


def read_ranks(env: Environment) -> Ranks:
    """The place of the process with this environment.

    Raises:
        UserError: variables that contradict each other, are no numbers, or lack what the others need.
    """
    return _own(env) or _theirs(env)


def refuse_ranks(program: str, env: Environment = os.environ) -> None:
    """Refuse, on every rank, a program for one process that was started several times."""
    ranks = read_ranks(env)
    if ranks.world_size > 1:
        raise UserError(
            f"{program} works in one process, and this is rank {ranks.rank} of {ranks.world_size} "
            f"({ranks.launcher}): each process would do the same work and write the same files; start it "
            f"as `{ranks.alone} {sys.argv[0]} ...`"
        )


def unused_tasks(env: Environment = os.environ) -> str | None:
    """What to say of a process in an allocation for several, in which no launcher has started it."""
    tasks = env.get("SLURM_NTASKS", "1")
    if tasks == "1" or is_task(env) or any(name in env for name in ("RANK", *(s.rank for s in MPI))):
        return None
    return (
        f"note: one process in a Slurm allocation of {tasks} tasks; for a process a task start it as "
        f"`srun python {sys.argv[0]} ...`"
    )


def _own(env: Environment) -> Ranks | None:
    """The place by torch's own variables; None where they are absent."""
    rank, world_size = _number(env, "RANK"), _number(env, "WORLD_SIZE", least=1)
    local_rank = _number(env, "LOCAL_RANK")
    # DeepSpeed's launcher sets LOCAL_SIZE, torchrun the other.
    local_world_size = _number(env, "LOCAL_WORLD_SIZE", least=1) or _number(env, "LOCAL_SIZE", least=1)
    if rank is None and (world_size or 1) == 1 and not local_rank:
        return None
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
        if value is None:
            given = ", ".join(f"{n} = {env[n]}" for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if n in env)
            raise UserError(f"{given} without {name}: {_start()}")
    if rank >= world_size:
        raise UserError(f"RANK = {rank}: must be below WORLD_SIZE = {world_size}; {_start(world_size)}")
    ranks = Ranks(rank, world_size, launcher="by RANK and WORLD_SIZE", alone=_alone(env))
    theirs = _matching(env, ranks)
    if local_rank is None:
        ranks = replace(ranks, local_rank=theirs.local_rank, local_world_size=theirs.local_world_size)
    else:
        # Without the size it may be any that has room for this rank.
        ranks = replace(ranks, local_rank=local_rank, local_world_size=local_world_size or local_rank + 1)
    if not ranks.local_rank < ranks.local_world_size <= world_size:
        raise UserError(
            f"LOCAL_RANK = {ranks.local_rank}: must be below LOCAL_WORLD_SIZE = {ranks.local_world_size}, "
            f"and that at most WORLD_SIZE = {world_size}; {_start(world_size)}"
        )
    return _meeting(env, ranks, address=theirs.master_addr, port=theirs.master_port)


def _matching(env: Environment, own: Ranks) -> Ranks:
    """What another launcher says of the same process, as where its variables were exported under torch's
    names; else nothing but the defaults.
    """
    try:
        theirs = _theirs(env)
    except UserError:
        return Ranks()
    return theirs if (theirs.rank, theirs.world_size) == (own.rank, own.world_size) else Ranks()


def _theirs(env: Environment) -> Ranks:
    """The place by another launcher's variables; that of one process where there are none."""
    for scheme in MPI:
        # MPI comes first: under Slurm its launcher is itself started by srun, once a machine. But srun can
        # set PMI_RANK too, with nothing of the machine.
        if scheme.rank in env and (scheme.local_rank in env or not is_task(env)):
            return _by_mpi(env, scheme)
    if is_task(env):
        return _by_slurm(env)
    if "PMIX_RANK" in env and "SLURM_JOB_ID" not in env:
        raise UserError(
            f"PMIX_RANK = {env['PMIX_RANK']}: says which process this is, but not how many there are; "
            f"{_start(unset='PMIX_RANK')}"
        )
    return Ranks()


def _by_mpi(env: Environment, scheme: Scheme) -> Ranks:
    ranks = _counted(env, scheme.rank, scheme.world_size, launcher=f"by {scheme.launcher}", alone="python")
    local_world_size = _number(env, scheme.local_world_size, least=1) or 1
    ranks = replace(ranks, local_rank=_number(env, scheme.local_rank) or 0, local_world_size=local_world_size)
    address = "127.0.0.1" if local_world_size == ranks.world_size else first_host(env, "SLURM_JOB_NODELIST")
    port = _port(env, "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID")
    remedy = f"start it as `{scheme.address} python {sys.argv[0]} ...`"
    return _meeting(env, ranks, address=address, port=port, remedy=remedy)


def _by_slurm(env: Environment) -> Ranks:
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    ranks = _counted(env, "SLURM_PROCID", tasks, launcher="by srun", alone="srun -n 1 python")
    local = _number(env, "SLURM_LOCALID") or 0
    ranks = replace(ranks, local_rank=local, local_world_size=local_tasks(env, least=local + 1))
    address = first_host(env, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    return _meeting(env, ranks, address=address, port=_port(env, "SLURM_JOB_ID", "SLURM_STEP_ID"))


def _counted(env: Environment, rank: str, world_size: str, *, launcher: str, alone: str) -> Ranks:
    """Rank and world size by the variables of these names."""
    number, size = _number(env, rank), _number(env, world_size, least=1)
    if number is None or size is None or number >= size:
        given = f"{rank} = {number}, {world_size} = {env.get(world_size, 'not set')}"
        remedy = _start(unset=f"{rank} {world_size}")
        raise UserError(f"{given}: the rank must be below the number of processes; {remedy}")
    return Ranks(number, size, launcher=launcher, alone=alone)


def _meeting(
    env: Environment, ranks: Ranks, *, address: str | None, port: int | None, remedy: str | None = None
) -> Ranks:
    """The same with the place where rank 0 listens: the user's, else the one given; none for one process."""
    if ranks.world_size == 1:
        return ranks
    address = env.get("MASTER_ADDR") or address
    if not address:
        start = _start(ranks.world_size)
        raise UserError(
            f"WORLD_SIZE = {ranks.world_size} ({ranks.launcher}) without MASTER_ADDR: the ranks meet at the "
            f"host of rank 0; {remedy or f'set MASTER_ADDR to it on all of them, or {start}'}"
        )
    port = _number(env, "MASTER_PORT", least=1) or port or DEFAULT_PORT
    if port > LARGEST_PORT:
        raise UserError(f"MASTER_PORT = {port}: a port is at most {LARGEST_PORT}; give another one")
    return replace(ranks, master_addr=address, master_port=port)


def _port(env: Environment, *names: str) -> int | None:
    """A port that other jobs on a machine hardly choose, from what names the job on all ranks alike."""
    job = ".".join(env[name] for name in names if name in env)
    return _PORTS[zlib.crc32(job.encode()) % len(_PORTS)] if job else None


def _number(env: Environment, name: str, *, least: int = 0) -> int | None:
    text = env.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        remedy = _start(unset=_OWN if name in _OWN.split() else name)
        raise UserError(f"{name} = {text!r}: must be a whole number of at least {least}; {remedy}")
    return int(text)


def _start(processes: int | None = None, *, unset: str = _OWN) -> str:
    """The remedy for variables that cannot be right."""
    number = "N" if processes is None else processes
    return (
        f"start it as `torchrun --nproc-per-node {number} {sys.argv[0]} ...`, or in one process after `unset "
        f"{unset}`"
    )


def _alone(env: Environment) -> str:
    launched = "TORCHELASTIC_RUN_ID" in env or "LOCAL_SIZE" in env
    return "python" if launched else "env -u RANK -u WORLD_SIZE -u LOCAL_RANK python"

"""What Slurm's variables say of a task: whether it is one, its machine's tasks, the first machine."""

import re
from collections.abc import Mapping

Environment = Mapping[str, str]

# From here up Slurm numbers steps of its own: the batch script's, an interactive shell's and the like.
_FIRST_SPECIAL_STEP = 2**32 - 16


def is_task(env: Environment) -> bool:
    """Whether ``srun`` has started this process, alone or with others.

    A batch script and the shell of an allocation have most of the same variables, SLURM_PROCID = 0 too, and
    are no tasks of a step: to wait for others there would be to wait for ever.
    """
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", ""))
    return "SLURM_PROCID" in env and step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def local_tasks(env: Environment, *, least: int) -> int:
    """How many tasks of the step this machine has, from e.g. ``4(x2),3`` and the machine's number."""
    pattern = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", ""))
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", pattern):
        counts += [int(count)] * int(times or 1)
    node = int(env.get("SLURM_NODEID", "0")) if env.get("SLURM_NODEID", "0").isdecimal() else 0
    return max(least, counts[node]) if node < len(counts) else least


def first_host(env: Environment, *names: str) -> str | None:
    """The first host, where rank 0 is, of the first of the lists with these names; None if there is none."""
    for name in names:
        if hosts := env.get(name):
            # `node-[03-05,11]-ib,login`: the first of the list, with the first number of each bracket.
            first = re.split(r",(?![^\[]*\])", hosts)[0]
            return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)
    return None

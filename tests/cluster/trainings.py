"""The recipes of ``launch/cluster`` as tests start them, all with one small training, and what they leave."""

import hashlib
import itertools
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.hosts import Cluster, end_group
from tests.cluster.services import SLOTS
from tests.distributed.launches import ADAMW, TINY, course, data_flags
from tests.harness import ROOT

RECIPES = ROOT / "launch" / "cluster"
STEPS = 16
SECONDS = 240  # for a training, on a machine that does other work too
# Both phases of InRank, tensor parallelism inside a host and data parallelism across.
SETTINGS = [
    *("--config", str(ROOT / "configs" / "quickstart.yaml"), *TINY, *ADAMW, "--global-batch-size", "8"),
    *("--tensor-model-parallel-size", str(SLOTS), "--switch-iters", "8", "--eval-interval", "8"),
    *("--save-interval", "8", "--train-iters", str(STEPS)),
]
# Run on every host; the others are run once.
ON_EVERY_HOST = {"deepspeed_no_ssh.sh", "torchrun_static.sh", "torchrun_elastic.sh"}
NUMBERED = {"deepspeed_no_ssh.sh", "torchrun_static.sh"}
_PORTS = itertools.count(29500)


def flags(folder: Path, *more: str) -> list[str]:
    """Of a training into ``folder``; the corpus lies next to it."""
    return [*SETTINGS, *data_flags(folder.parent / "data"), "--save", str(folder), *more]


def environment(cluster: Cluster, hosts: int, slots: int) -> dict[str, str]:
    """What a user of the recipes has set. A port for each launch: none waits for the end of another's."""
    hostfile = cluster.folder / f"hostfile-{hosts}"
    hostfile.write_text("".join(f"{host.name} slots={slots}\n" for host in cluster.hosts[:hosts]))
    own = {"HOSTFILE": str(hostfile), "NODES": str(hosts), "GPUS": str(slots), "MASTER_ADDR": "node-1"}
    own |= {"MASTER_PORT": str(next(_PORTS)), "JOB": str(next(_PORTS))}
    own |= {f"OMPI_ALLOW_RUN_AS_ROOT{end}": "1" for end in ("", "_CONFIRM")}
    return os.environ | own


@dataclass
class Started:
    """A launch: the commands that were started, one for each host or one for all, and their output."""

    commands: list[subprocess.Popen]
    output: list[Path]

    def wait(self) -> list[int]:
        return [command.wait(timeout=SECONDS) for command in self.commands]

    def text(self) -> str:
        return "\n".join(path.read_text() for path in self.output if path.exists())


@contextmanager
def started(
    cluster: Cluster,
    recipe: str,
    words: Sequence[str],
    *,
    hosts: int = 2,
    slots: int = SLOTS,
    sbatch: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[Started]:
    """Start a recipe as its first lines say; what still runs at the end is killed.

    Args:
        slots: ranks on each of the first ``hosts`` hosts.
        sbatch: options in place of those in the script.
        env: what the user has set besides.
    """
    env = environment(cluster, hosts, slots) | (env or {})
    places = cluster.hosts[:hosts] if recipe in ON_EVERY_HOST else cluster.hosts[:1]
    launch = Started([], [])
    try:
        for number, host in enumerate(places):
            output = cluster.folder / f"{recipe}-{env['MASTER_PORT']}-{number}.txt"
            command = [*_start(recipe, number, hosts, [*sbatch, f"--output={output}"]), *words]
            launch.output.append(output)
            with output.open("w") as file:
                launch.commands.append(
                    subprocess.Popen(
                        host.command(command),
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL if recipe.startswith("slurm") else file,
                        stderr=subprocess.STDOUT,
                        env=env,
                        start_new_session=True,
                    )
                )
        yield launch
    finally:
        for command in launch.commands:
            end_group(command)


def _start(recipe: str, number: int, hosts: int, sbatch: list[str]) -> list[str]:
    script = str(RECIPES / recipe)
    if not recipe.startswith("slurm"):
        return ["bash", script, *([str(number)] if recipe in NUMBERED else [])]
    tasks = SLOTS if "gpu" in recipe else 1
    sizes = [f"--nodes={hosts}", f"--ntasks-per-node={tasks}", f"--gpus-per-node={SLOTS}"]
    return ["sbatch", "--wait", *sbatch, *sizes, script]


def run(cluster: Cluster, recipe: str, folder: Path, *more: str, **options: Any) -> str:
    """Run a recipe to its successful end; its output. ``options``: of :func:`started`."""
    with started(cluster, recipe, flags(folder, *more), **options) as launch:
        status = launch.wait()
        assert not any(status), f"{status}\n{launch.text()}"
        return launch.text()


def result(folder: Path) -> dict:
    """All that two trainings of one layout must have alike: figures, bits of the newest checkpoint."""
    newest = max((folder / "checkpoints").iterdir())
    tensors = sorted(newest.rglob("*.safetensors"))
    return course(folder) | {"tensors": [hashlib.sha256(file.read_bytes()).hexdigest() for file in tensors]}

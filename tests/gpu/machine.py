"""What this machine is. ``python -m tests.gpu.machine`` prints what torch says of its GPUs, as JSON, in a
process of its own: the one that starts the cases has no context on a device.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import psutil

from tests.gpu.pool import ROOT

COUNTS = (8, 4, 2, 1)
"""GPUs that the cases can be shared among."""
SECONDS = 60
"""What a program may take to say something."""
PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers", "triton", "numpy")


def look(*, hidden: bool) -> dict:
    """The facts, those of the GPUs from a process that sees them; ``hidden``: without them."""
    asked = {"gpus": [], "fault": None, "cuda": None, "nccl": None}
    if not hidden:
        command = [sys.executable, "-m", "tests.gpu.machine"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        asked = json.loads(done.stdout.splitlines()[-1])
    return asked | {
        "driver": _says("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "links": _says("nvidia-smi", "topo", "-m"),
        "compiler": _says("nvcc", "--version"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "processor": platform.machine(),
        "system": platform.release(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def usable(count: int) -> int:
    """How many of ``count`` GPUs are used."""
    return next((n for n in COUNTS if n <= count), 0)


def main() -> None:
    import torch

    from inrank_megatron.distributed.platform import cuda_fault

    there = torch.cuda.is_available()
    gpus = [
        _gpu(torch.cuda.get_device_properties(index)) for index in range(torch.cuda.device_count() * there)
    ]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if there else None
    fault = None if there else cuda_fault()
    print(json.dumps({"gpus": gpus, "fault": fault, "cuda": torch.version.cuda, "nccl": nccl}))


def _gpu(properties) -> dict:
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _says(program: str, *arguments: str) -> str | None:
    """The standard output of a program that may be missing, fail (nvidia-smi then prints why, as if it were
    the answer) or hang, as nvidia-smi does on a GPU that has fallen off its bus.
    """
    if shutil.which(program) is None:
        return None
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    main()

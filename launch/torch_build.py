"""Install the build of torch that serves this machine, and see that it computes here.

    .venv/bin/python -m launch.torch_build install [--torch-index URL]
    .venv/bin/python -m launch.torch_build device     cuda or cpu: what a run uses

The standard library alone; torch is looked at in a process of its own.
"""

import argparse
import importlib.util
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.builds import BUILDS, LEAVE_THEM, Refusal
from launch.machine import Machine, look, mig_is_on
from launch.torch_probe import Torch, installed

PYTORCH = "https://download.pytorch.org/whl"
# What the package index has under the plain version.
PLAIN = "cu130"
CONSTRAINTS = Path(__file__).resolve().parent / "constraints.txt"
# Faults of a build that another one may not have; what else is wrong, no build cures.
_WITHOUT = "is a build without CUDA"
_OF_THE_BUILD = f"{_WITHOUT}|too old|no kernel image|unsupported toolchain|cannot be imported"
# The second where a constraint of pip's configuration names torch.
_NOT_FOUND = "No matching distribution found for torch|Cannot install torch.* conflicting dependencies"


@dataclass(frozen=True)
class Source:
    """A requirement for pip, an index besides those that pip is set to, the CUDA of the build if known."""

    requirement: str
    index: str = ""
    cuda: str = ""


def install(machine: Machine, index: str = "") -> None:
    """Leave a torch in this environment that works on this machine; the one that is there stays if it does.

    Raises:
        Refusal: no build does, or none can be had.
    """
    version, verified = wanted_version(), Path(sys.prefix) / "torch-for"
    torch, failed = installed(), set[str | None]()
    works = torch.version.split("+")[0] == version and not _fault_of_build(torch, machine, failed)
    if index or not works:
        verified.unlink(missing_ok=True)
        if not torch.version and importlib.util.find_spec("torch"):
            pip("uninstall", "-y", "torch")  # a broken one satisfies pip
        torch = _replace(machine, version, index, failed)
    if machine.cards:
        print(f"torch {torch.version} computes on {torch.cards} x {machine.cards[0].name}.")
    with verified.open("a", encoding="utf-8") as file:
        file.write(f"{machine}\n")


def device(machine: Machine) -> str:
    """What a run on this machine uses, ``cuda`` or ``cpu``.

    Raises:
        Refusal: GPUs that the installed torch cannot use.
    """
    if machine.cards and (reason := fault(installed(), machine)):
        raise Refusal(_unusable(reason, machine))
    return "cuda" if machine.cards else "cpu"


def fault(torch: Torch, machine: Machine) -> str:
    """What is wrong with the installed torch for this machine; empty if nothing is."""
    if torch.version and not machine.cards:
        return ""
    if torch.version and torch.cuda is None:
        return f"torch {torch.version} {_WITHOUT}"
    return torch.fault


def sources(machine: Machine, version: str, index: str) -> Iterator[Source]:
    """Where to look for torch, best first."""
    torch = f"torch=={version}"
    if index:
        label = re.search(r"/(cpu|cu\d+)/?$", index)
        labels = [label[1]] if label else [build.label for build in machine.builds]
        yield from (Source(f"{torch}+{label}", index) for label in labels)
        if not label:
            yield Source(f"{torch},!={version}+cpu" if machine.cards else torch, index)
    elif not machine.cards:
        # The CPU build saves gigabytes. First where pip is set to look: quick, and the right place behind a
        # mirror. Any build works.
        yield Source(f"{torch}+cpu")
        yield Source(f"{torch}+cpu", f"{PYTORCH}/cpu")
        yield Source(torch)
    else:
        for build in machine.builds:
            yield Source(f"{torch}+{build.label}", cuda=build.cuda)
            if build.label == PLAIN:
                others = ["cpu", *(other.label for other in BUILDS if other.label != PLAIN)]
                yield Source(",".join([torch, *(f"!={version}+{o}" for o in others)]), cuda=build.cuda)
        for build in machine.builds:
            yield Source(f"{torch}+{build.label}", f"{PYTORCH}/{build.label}", build.cuda)


def _replace(machine: Machine, version: str, index: str, failed: set[str | None]) -> Torch:
    """Try the sources in turn until one gives a torch that works here."""
    away, reason = [], ""
    for source in sources(machine, version, index):
        if source.cuda in failed:
            continue
        if source.index.startswith(PYTORCH) and not reachable(f"{source.index}/torch/"):
            away.append(source.index)
        elif _fetch(source):
            torch = installed()
            reason = _fault_of_build(torch, machine, failed)
            if not reason:
                return torch
    if reason and not reason.endswith(_WITHOUT):
        raise Refusal(_unusable(reason, machine))
    raise Refusal(_missing(machine, version, index, away))


def _fault_of_build(torch: Torch, machine: Machine, failed: set[str | None]) -> str:
    """As :func:`fault`; the CUDA of a build that does not work is added to ``failed``.

    Raises:
        Refusal: a fault that another build would have too.
    """
    reason = fault(torch, machine)
    if reason and not re.search(_OF_THE_BUILD, reason):
        raise Refusal(_unusable(reason, machine))
    if reason:
        failed.add(torch.cuda)
    return reason


def _fetch(source: Source) -> bool:
    """Whether pip finds and installs it."""
    extra = ["--extra-index-url", source.index] if source.index else []
    problem = pip("install", "--retries", "2", *extra, source.requirement)
    if problem and not re.match(_NOT_FOUND, problem):
        raise Refusal(f"pip cannot install {source.requirement}: {problem}")
    return not problem


def _missing(machine: Machine, version: str, index: str, away: list[str]) -> str:
    builds = " or ".join(f"{version}+{build.label}" for build in machine.builds) or version
    places = "where pip is set to look (`pip config list`)"
    if index:
        places = f"at {index}"
    else:
        places += f" and at {PYTORCH}"
    gone = " (not reachable from here)" if away else ""
    return (
        f"torch {builds}: not found {places}{gone}; connect this machine to a package index that has it, or "
        "name one: bash launch/setup_env.sh --torch-index URL"
    )


def _unusable(reason: str, machine: Machine) -> str:
    if not machine.cards:
        return f"{reason}; remove .venv and install again"
    mig = "MIG is on: make an instance if there is none (`nvidia-smi mig -cgi`), " if mig_is_on() else ""
    return f"{reason} ({machine.cards[0]}, driver {machine.driver}); {mig}see `nvidia-smi`, {LEAVE_THEM}"


def wanted_version() -> str:
    """The version of the constraints."""
    return re.search(r"^torch==(\S+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)[1]


def pip(*args: str) -> str:
    """Run pip; empty if it succeeds, else its last word."""
    command = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line[7:] for line in lines if line.startswith("ERROR: ") and "ResolutionImpossible" not in line]
    return (errors or lines or [f"exit status {done.returncode}"])[-1] if done.returncode else ""


def reachable(url: str) -> bool:
    """Whether the address answers within 5 seconds, with a refusal or a certificate that pip may know too."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("install", "device"))
    parser.add_argument("--torch-index", metavar="URL", default="")
    args = parser.parse_args()
    try:
        if args.action == "install":
            install(look(), args.torch_index)
        else:
            print(device(look()))
    except Refusal as refusal:
        sys.exit(f"error: {refusal}")


if __name__ == "__main__":
    main()

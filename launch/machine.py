"""What NVIDIA GPUs this machine has, and which builds of torch support them.

    python -m launch.machine      one line: all that the choice of a build depends on

Runs before anything is installed: the standard library alone.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.builds import LEAVE_THEM, Build, Capability, Card, Refusal, fitting

# How CUDA_VISIBLE_DEVICES says that no GPU shall be used; batch systems write the last.
HIDDEN = ("", "-1", "NoDevFiles")
_SECONDS = 60

# Where the driver does not give the compute capability; the first match counts.
_CAPABILITIES = (
    (r"B[123]00", (10, 0)),
    (r"RTX PRO|RTX 50", (12, 0)),
    (r"H[128]00|H20\b", (9, 0)),
    (r"\bL\d|RTX 40|Ada", (8, 9)),
    (r"A[18]00|A30\b", (8, 0)),
    (r"\bA\d|RTX A|RTX 30", (8, 6)),
    (r"\bT4|RTX|GTX 16", (7, 5)),
    (r"V100|TITAN V", (7, 0)),
    (r"P100", (6, 0)),
    (r"\bP\d|GTX 10", (6, 1)),
    (r"\bK\d", (3, 7)),
)


@dataclass(frozen=True)
class Machine:
    """The GPUs that are to be used, with the builds that serve all of them; without any, both are empty.

    Args:
        note: what to say of GPUs that are left alone.
    """

    cards: tuple[Card, ...] = ()
    driver: str = ""
    builds: tuple[Build, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        if not self.cards:
            return f"cpu {platform.machine()}"
        words = [build.label for build in self.builds] + [platform.machine(), "driver", self.driver]
        return " ".join(words + sorted(card.level for card in self.cards))


def look(
    system: Path = Path("/"), env: Mapping[str, str] = os.environ, processor: str = platform.machine()
) -> Machine:
    """The machine as its NVIDIA driver describes it.

    Args:
        system: the root of the file system.

    Raises:
        Refusal: there are GPUs, and no build of torch can use them.
    """
    visible = [name.strip() for name in env.get("CUDA_VISIBLE_DEVICES", "all").split(",")]
    if visible[0] in HIDDEN:
        return Machine()
    devices = sorted(path.name for path in (system / "dev").glob("nvidia[0-9]*"))
    if program := _nvidia_smi(system, env):
        driver, cards, fault = ask(program)
        if fault:
            return _without_answer(fault, devices, system)
    elif devices:
        driver, cards = _from_kernel(system, devices)
    else:
        return Machine(note=_left_alone(system))
    if all(name.startswith("GPU-") for name in visible):
        cards = tuple(card for card in cards if card.uuid.startswith(tuple(visible)))
        if not cards:
            raise Refusal(
                f"CUDA_VISIBLE_DEVICES={','.join(visible)} names no GPU of this machine: correct it, "
                f"{LEAVE_THEM}"
            )
    return Machine(cards, driver, fitting(cards, driver, processor))


def ask(program: str) -> tuple[str, tuple[Card, ...], str]:
    """The driver's version and the cards by ``nvidia-smi``, or what it says instead."""
    fields: tuple[str, ...] = ("driver_version", "compute_cap", "uuid", "name")
    status, answer = _query(program, fields)
    if status and "compute_cap" in answer:  # a driver of before 2022
        fields = ("driver_version", "uuid", "name")
        status, answer = _query(program, fields)
    lines = [line for line in answer.splitlines() if line.strip()]
    rows = [line.split(", ", len(fields) - 1) for line in lines]
    bad = [line for line, row in zip(lines, rows, strict=True) if not _is_card(row, fields)]
    if status or bad or not rows:
        return "", (), f"{(bad or lines or ['nothing'])[0].rstrip('.')} (exit status {status})"
    found = [dict(zip(fields, row, strict=True)) for row in rows]
    cards = tuple(
        Card(row["name"], _capability(row.get("compute_cap", ""), row["name"]), row["uuid"]) for row in found
    )
    return found[0]["driver_version"], cards, ""


def mig_is_on() -> bool:
    """Whether a GPU is in the mode in which only its slices compute, which somebody has to make."""
    program = _nvidia_smi(Path("/"), os.environ)
    return program is not None and "Enabled" in _query(program, ("mig.mode.current",))[1]


def _query(program: str, fields: tuple[str, ...]) -> tuple[int, str]:
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return 1, f"no answer in {_SECONDS} s"
    except OSError as error:
        return 1, str(error)
    return done.returncode, done.stdout.strip() or done.stderr.strip()


def _is_card(row: list[str], fields: tuple[str, ...]) -> bool:
    return len(row) == len(fields) and re.match(r"\d+\.\d", row[0]) is not None


def _capability(text: str, name: str) -> Capability | None:
    if match := re.fullmatch(r"(\d+)\.(\d+)", text.strip()):
        return int(match[1]), int(match[2])
    return next((known for pattern, known in _CAPABILITIES if re.search(pattern, name)), None)


def _nvidia_smi(system: Path, env: Mapping[str, str]) -> str | None:
    wsl = system / "usr/lib/wsl/lib/nvidia-smi"  # not on every user's PATH
    return shutil.which("nvidia-smi", path=env.get("PATH")) or (str(wsl) if wsl.is_file() else None)


def _without_answer(fault: str, devices: list[str], system: Path) -> Machine:
    """``nvidia-smi`` lists no card: wrong where the hardware is there, else a disk image with it."""
    there = [f"/dev/{name}" for name in devices]
    if (system / "dev/dxg").exists():  # WSL
        there.append("/dev/dxg")
    if not there and _on_the_bus(system):
        there = ["on the PCI bus"]
    if not there:
        return Machine(note=f"nvidia-smi says: {fault}; there is no NVIDIA GPU here, so the CPU is used")
    raise Refusal(
        f"nvidia-smi says: {fault}; there are NVIDIA GPUs ({', '.join(there)}), and the driver does not "
        f"offer them: load or reinstall it (after an update: reboot), ask the batch system for a GPU, "
        f"{LEAVE_THEM}"
    )


def _from_kernel(system: Path, devices: list[str]) -> tuple[str, tuple[Card, ...]]:
    """As :func:`ask`, from what the driver's kernel module shows: some containers lack ``nvidia-smi``."""
    folder = system / "proc/driver/nvidia"
    version, cards = None, []
    if (folder / "version").is_file():
        version = re.search(r"\s(\d{3,}(?:\.\d+)+)\s", (folder / "version").read_text(encoding="utf-8"))
    for file in sorted(folder.glob("gpus/*/information")):
        lines = (line.partition(":") for line in file.read_text(encoding="utf-8").splitlines())
        facts = {key.strip(): value.strip() for key, _, value in lines}
        if f"nvidia{facts.get('Device Minor')}" in devices:
            name = facts.get("Model", "NVIDIA GPU")
            cards.append(Card(name, _capability("", name), facts.get("GPU UUID", "")))
    if version and cards:
        return version[1], tuple(cards)
    raise Refusal(
        f"/dev/{devices[0]}: a GPU, and neither nvidia-smi nor /proc/driver/nvidia shows its driver; "
        "install NVIDIA's utilities (containers: NVIDIA_DRIVER_CAPABILITIES=compute,utility), "
        f"{LEAVE_THEM}"
    )


def _left_alone(system: Path) -> str:
    if (system / "dev/kfd").exists():
        return "AMD's GPUs (ROCm) are not supported, so the CPU is used"
    if _on_the_bus(system):
        return (
            "there is an NVIDIA GPU that is not offered here (no nvidia-smi, no /dev/nvidia0), so the CPU is "
            "used; to use it install its driver, or start the container with GPUs (docker: --gpus all)"
        )
    return ""


def _on_the_bus(system: Path) -> bool:
    """Whether a PCI device is a display or compute adapter of NVIDIA."""
    for device in (system / "sys/bus/pci/devices").glob("*"):
        files = [device / name for name in ("vendor", "class")]
        if all(file.is_file() for file in files):
            vendor, kind = (file.read_text(encoding="ascii").strip() for file in files)
            if vendor == "0x10de" and kind.startswith("0x03"):
                return True
    return False


def main() -> None:
    try:
        machine = look()
    except Refusal as refusal:
        sys.exit(f"error: {refusal}")
    if machine.note:
        print(f"note: {machine.note}", file=sys.stderr)
    print(machine)


if __name__ == "__main__":
    main()

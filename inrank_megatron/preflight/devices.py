"""The health of the GPUs, as ``nvidia-smi`` tells it; nothing where there is none."""

import csv
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

from inrank_megatron.distributed.platform import device_count
from inrank_megatron.preflight.findings import ERROR, WARNING, Finding, HostFacts
from inrank_megatron.preflight.place import Place

GPUS = "GPUs"
QUERY_SECONDS = 10
BUSY_SHARE = 0.1  # of a GPU's memory; a context of each rank takes less
UNCORRECTED, RETIRED = "ecc.errors.uncorrected.volatile.total", "retired_pages.pending"
SLOWDOWNS = {
    "clocks_throttle_reasons.hw_thermal_slowdown": "heat",
    "clocks_throttle_reasons.sw_thermal_slowdown": "heat",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "the power supply",
}
FIELDS = ("index", "name", "memory.used", "memory.total", UNCORRECTED, RETIRED, *SLOWDOWNS)


class Devices:
    """Memory in use, errors and throttling of every GPU of the host, before the model is there."""

    on_one_host = False

    def gather(self, place: Place) -> dict[str, Any]:
        if device_count() == 0 or shutil.which("nvidia-smi") is None:
            return {}
        command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
        try:
            asked = subprocess.run(
                command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return {GPUS: f"nvidia-smi gives no answer in {QUERY_SECONDS} s"}
        if asked.returncode != 0:
            return {GPUS: f"nvidia-smi fails: {' '.join(asked.stdout.split())}"}
        rows = csv.reader(asked.stdout.splitlines(), skipinitialspace=True)
        return {GPUS: [dict(zip(FIELDS, row, strict=True)) for row in rows]}

    def judge(self, hosts: Sequence[HostFacts]) -> Iterator[Finding]:
        for host in hosts:
            gpus = host.facts.get(GPUS, [])
            if isinstance(gpus, str):
                remedy = "run nvidia-smi there; a driver that does not answer needs a restart of the host"
                yield Finding(WARNING, GPUS, host.host, gpus, "their health is not known", remedy)
                continue
            for gpu in gpus:
                yield from _of_gpu(host.host, gpu)

    def shown(self, row: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        names = [gpu["name"] for gpu in value]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _of_gpu(host: str, gpu: dict[str, str]) -> Iterator[Finding]:
    """What is wrong with one; a value that it does not have (``[N/A]``) is no fault."""

    def found(level: str, value: str, rule: str, remedy: str) -> Finding:
        return Finding(level, GPUS, host, f"GPU {gpu['index']}: {value}", rule, remedy)

    if _number(gpu[UNCORRECTED]) > 0:
        yield found(
            ERROR,
            f"{gpu[UNCORRECTED]} uncorrected memory errors",
            "its results cannot be trusted",
            "reset the GPU (nvidia-smi --gpu-reset) or leave the host out",
        )
    if gpu[RETIRED] == "Yes":
        yield found(
            WARNING, "pages of its memory wait to be retired", "its memory has failed", "restart the host"
        )
    for reason in dict.fromkeys(why for name, why in SLOWDOWNS.items() if gpu[name] == "Active"):
        yield found(
            WARNING, f"slowed down by {reason}", "all ranks wait for it", "see to its cooling and power"
        )
    used, total = _number(gpu["memory.used"]), _number(gpu["memory.total"])
    if used > BUSY_SHARE * total:
        yield found(
            WARNING,
            f"{used / 1024:.1f} of {total / 1024:.1f} GiB of its memory are in use",
            "before the model is there it should be free",
            "end what runs there (nvidia-smi lists the processes)",
        )


def _number(text: str) -> float:
    """0 where there is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0

"""Clusters to plan for: ``8xA100-80GB``, ``4x8xH100``, ``2xcpu``: nodes, devices a node, the device."""

import re
from dataclasses import dataclass

from inrank_megatron.errors import UserError

# Device -> GiB of memory as torch reports it; None: the host's. The names are those of `costs.PEAK_FLOPS`.
MEMORY_GIB: dict[str, float | None] = {
    "V100-32GB": 31.7,
    "A100-40GB": 39.4,
    "A100-80GB": 79.2,
    "H100": 79.1,
    "H200": 139.8,
    "cpu": None,
}


@dataclass(frozen=True)
class Cluster:
    """``nodes`` machines with ``devices`` each; ``device``: a name of ``MEMORY_GIB``."""

    nodes: int
    devices: int
    device: str

    @property
    def world_size(self) -> int:
        return self.nodes * self.devices

    @property
    def memory(self) -> int | None:
        """Bytes of one device."""
        gib = MEMORY_GIB[self.device]
        return None if gib is None else int(gib * 2**30)


def parse_cluster(text: str) -> Cluster:
    """The cluster that ``[[NODES x] DEVICES x] DEVICE`` describes; a number left out is 1.

    Raises:
        UserError: it is none, or of an unknown device.
    """
    names = {name.lower(): name for name in MEMORY_GIB}
    match = re.fullmatch(r"(?:(?:([1-9]\d{0,5})x)?([1-9]\d{0,5})x)?(.+)", text.strip(), re.IGNORECASE)
    device = names.get(match[3].lower()) if match else None
    if match is None or device is None:
        raise UserError(
            f"cluster = {text!r}: must be [[NODESx]Nx]DEVICE, the device {', '.join(MEMORY_GIB)}; give "
            "--cluster 8xA100-80GB, for example"
        )
    return Cluster(int(match[1] or 1), int(match[2] or 1), device)

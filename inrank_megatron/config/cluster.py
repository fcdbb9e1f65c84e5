"""Clusters to plan for: a file, or ``4x8xH100``, ``2xcpu``: nodes, devices a node, the device."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from inrank_megatron.config.cluster_file import read_cluster, with_entries
from inrank_megatron.config.devices import DEVICES, Device
from inrank_megatron.errors import UserError


@dataclass(frozen=True)
class Cluster:
    """``nodes`` machines with ``devices`` each, all of one kind.

    ``device_hour``: the price of one device for an hour, in whatever currency; None: unknown.
    """

    nodes: int
    devices: int
    kind: Device
    device_hour: float | None = None

    @property
    def device(self) -> str:
        """Its name."""
        return self.kind.name

    @property
    def world_size(self) -> int:
        return self.nodes * self.devices

    @property
    def memory(self) -> int | None:
        """Bytes of one device."""
        return self.kind.memory


def parse_cluster(text: str) -> Cluster:
    """The cluster that ``[[NODES x] DEVICES x] DEVICE`` describes, where a number left out is 1, or a YAML
    file (``cluster_file.py``).

    Raises:
        UserError: it is none, or of an unknown device.
    """
    if Path(text).suffix in (".yaml", ".yml"):
        content = read_cluster(text)
        return Cluster(content.nodes, content.devices, content.kind, content.device_hour)
    names = {name.lower(): name for name in DEVICES}
    match = re.fullmatch(r"(?:(?:([1-9]\d{0,5})x)?([1-9]\d{0,5})x)?(.+)", text.strip(), re.IGNORECASE)
    device = names.get(match[3].lower()) if match else None
    if match is None or device is None:
        raise UserError(
            f"cluster = {text!r}: must be [[NODESx]Nx]DEVICE, the device {', '.join(DEVICES)}, or a YAML "
            "file; give --cluster 8xA100-80GB, for example"
        )
    return Cluster(int(match[1] or 1), int(match[2] or 1), DEVICES[device])


def with_rates(cluster: Cluster, rates: Mapping[str, float]) -> Cluster:
    """The cluster with ``rates`` in place of its own: entries of its file, ``attained_tflops.bf16`` and the
    like for one precision."""
    return replace(cluster, kind=with_entries(cluster.kind, rates))

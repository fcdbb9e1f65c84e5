"""A cluster of one's own to plan for, as a YAML file: what differs from a device that is known.

nodes: 2
devices: 4
device: H100                # a known one, whose figures hold where the file gives none; or any name
memory_gib: 93.1
attained_tflops: {bf16: 350}
network_gb_s: 12
price_per_device_hour: 2.5
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from inrank_megatron.config.devices import DEVICES, GB, Device, attained_flops, peak_flops
from inrank_megatron.config.loading import nearest
from inrank_megatron.config.yaml_file import read_yaml
from inrank_megatron.errors import UserError
from inrank_megatron.fields import Positive, Section

Rate = Annotated[Positive, Field(ge=1e-6, le=1e9)]
Number = Annotated[int, Field(ge=1, lt=10**6)]
Rates = dict[Literal["fp32", "fp16", "bf16"], Rate]
BANDWIDTHS = {
    "memory_gb_s": "memory_bandwidth",
    "link_gb_s": "link",
    "network_gb_s": "network",
    "host_link_gb_s": "host_link",
    "host_memory_gb_s": "host_memory_bandwidth",
}
LATENCIES = {"operator_us": "operator", "collective_us": "collective", "zero3_layer_us": "zero3_layer"}
NEEDED = ("memory_gib", "peak_tflops", *BANDWIDTHS)
"""Of a device that is not known."""


class _File(Section):
    """Bandwidths in GB/s (10^9 bytes), per device and direction, as attained; rates in TFLOP/s; `_us` in
    microseconds."""

    device: str
    nodes: Number = 1
    devices: Number = 1
    memory_gib: Rate | None = None
    peak_tflops: Rates = Field(default_factory=dict)
    attained_tflops: Rates = Field(default_factory=dict)
    memory_gb_s: Rate | None = None
    link_gb_s: Rate | None = None
    network_gb_s: Rate | None = None
    host_link_gb_s: Rate | None = None
    host_memory_gb_s: Rate | None = None
    operator_us: Rate | None = None
    collective_us: Rate | None = None
    zero3_layer_us: Rate | None = None
    watts: Rate | None = None
    price_per_device_hour: Rate | None = None


@dataclass(frozen=True)
class ClusterFile:
    """What the file says: ``nodes`` of ``devices`` each; ``device_hour``: price of one device for an hour."""

    nodes: int
    devices: int
    kind: Device
    device_hour: float | None


def read_cluster(path: str) -> ClusterFile:
    """The cluster in a YAML file.

    Raises:
        UserError: it is no such file, has unknown or wrong entries, or lacks what an unknown device needs.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no `name: value` lines; give device, nodes, devices, one a line")
    try:
        file = _File.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None
    return ClusterFile(file.nodes, file.devices, _device(path, file), file.price_per_device_hour)


def _explain(error: ValidationError) -> str:
    """The first finding: the entry and its value, the rule, the remedy."""
    found = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in found["loc"] if part != "[key]")[:80]
    entries = f"a cluster has {', '.join(_File.model_fields)}"
    if found["type"] == "extra_forbidden":
        return f"{name}: no such entry{nearest(name, _File.model_fields)}; {entries}"
    if found["type"] == "missing":
        return f"{name}: is required; {entries}"
    rule = found["msg"].replace("Input should be", "must be")
    return f"{name} = {repr(found['input'])[:80]}: {rule}; correct it, or leave it out"


def _device(path: str, file: _File) -> Device:
    known = {name.lower(): device for name, device in DEVICES.items()}.get(file.device.lower())
    missing = [name for name in NEEDED if not getattr(file, name)]
    if known is None and missing:
        raise UserError(
            f"{path}: device {file.device} is not known; give {', '.join(missing)}, or one of "
            f"{', '.join(DEVICES)}"
        )
    given: dict[str, Any] = {
        field: getattr(file, name) * GB for name, field in BANDWIDTHS.items() if getattr(file, name)
    }
    given |= {field: getattr(file, name) / 1e6 for name, field in LATENCIES.items() if getattr(file, name)}
    if file.memory_gib is not None:
        given["memory"] = int(file.memory_gib * 2**30)
    if file.watts is not None:
        given["watts"] = file.watts
    given["peak"] = {precision: rate * 1e12 for precision, rate in file.peak_tflops.items()}
    attained: dict[str, float] = {precision: rate * 1e12 for precision, rate in file.attained_tflops.items()}
    if known is not None:
        device = replace(known, attained={**known.attained, **attained}, **given)
    else:
        device = Device(name=file.device, attained=attained, **given)
        if attained_flops(device, "fp32") is None:
            raise UserError(
                f"{path}: peak_tflops: has no fp32, in which updates are computed; give its rate too"
            )
    for precision, rate in attained.items():
        peak = peak_flops(device, precision)
        if peak and rate > peak:
            raise UserError(
                f"{path}: attained_tflops.{precision} = {rate / 1e12:g}: is above the peak of "
                f"{peak / 1e12:g}; correct it, or give peak_tflops too"
            )
    return device


def with_entries(device: Device, entries: Mapping[str, float]) -> Device:
    """A device with other rates, by the names and in the units of a file."""
    given: dict[str, Any] = {"attained": dict(device.attained)}
    for name, value in entries.items():
        if name in LATENCIES:
            given[LATENCIES[name]] = value / 1e6
        elif name in BANDWIDTHS:
            given[BANDWIDTHS[name]] = value * GB
        else:
            given["attained"][name.removeprefix("attained_tflops.")] = value * 1e12
    return replace(device, **given)

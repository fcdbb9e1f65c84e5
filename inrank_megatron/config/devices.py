"""Devices to plan for: memory, rates and links of each, and how much of them a training is assumed to attain.

Memory is what torch reports. Bandwidths and power are from the vendors' data sheets of the SXM modules and of
the DGX machines with them, per device and direction. None of the shares attained was measured on a GPU.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

GB = 10**9
ATTAINED_HALF, ATTAINED_FP32 = 0.4, 0.8
"""Assumed share of the peak in a training: 125 TFLOP/s of an A100, 400 of an H100 in BF16."""
ATTAINED_LINK, ATTAINED_MEMORY = 0.7, 0.8
"""Assumed share of a link's and of a memory's bandwidth."""
ZERO3_LAYER = 0.0055
"""Seconds of a core of Zen 4, by `tools/bench.py rates`; assumed for the hosts of GPUs too, as the work
is DeepSpeed's Python."""

# Dense peak operations per second, without sparsity, from the vendors' data sheets; the first match counts.
# BF16 and FP16 are tensor-core rates; FP32 is true FP32, since torch leaves TF32 off unless asked for it.
# The sheets of H20 and A10G were not at hand: theirs are as others quote them. A800 and H800 differ from A100
# and H100 in links and FP64 alone.
PEAK_FLOPS = (
    (r"GB200", {"bf16": 2.5e15, "fp16": 2.5e15, "fp32": 80e12}),
    (r"B200", {"bf16": 2.25e15, "fp16": 2.25e15, "fp32": 75e12}),
    (r"H200 NVL|H100 NVL", {"bf16": 835e12, "fp16": 835e12, "fp32": 60e12}),
    (r"H[18]00 PCIe", {"bf16": 756e12, "fp16": 756e12, "fp32": 51e12}),
    (r"H200|H[18]00", {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}),
    (r"\bH20\b", {"bf16": 148e12, "fp16": 148e12, "fp32": 44e12}),
    (r"\bA[18]00\b", {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12}),
    (r"L40S", {"bf16": 362e12, "fp16": 362e12, "fp32": 91.6e12}),
    (r"L4\b", {"bf16": 121e12, "fp16": 121e12, "fp32": 30.3e12}),
    (r"A10G\b", {"bf16": 70e12, "fp16": 70e12, "fp32": 31.5e12}),
    (r"A10\b", {"bf16": 125e12, "fp16": 125e12, "fp32": 31.2e12}),
    (r"V100-PCIE", {"fp16": 112e12, "fp32": 14e12}),
    (r"V100", {"fp16": 125e12, "fp32": 15.7e12}),
    (r"\bT4\b", {"fp16": 65e12, "fp32": 8.1e12}),
)


@dataclass(frozen=True)
class Device:
    """One device of a cluster; bandwidths in bytes per second, as attained.

    Args:
        memory: bytes; None: the host's.
        attained: operations per second in a training, by precision. A precision that is left out has
            ``ATTAINED_HALF`` or ``ATTAINED_FP32`` of its peak, and if there is no peak it is not there.
        peak: operations per second, by precision, of a device that ``PEAK_FLOPS`` does not know.
        memory_bandwidth: of the device's own memory. host_memory_bandwidth: of the host's, its share.
        link: to the other devices of a node. network: to those of other nodes. host_link: to the host.
        operator: seconds in which the host launches one operator. collective: of one collective, beyond those
            of its bytes. zero3_layer: of the host's for gathering and releasing one layer in one micro-batch
            under ZeRO 3, beyond its collectives.
        watts: while it trains, cooling and the rest of the node not included; None: unknown.
    """

    name: str
    memory: int | None
    memory_bandwidth: float
    link: float
    network: float
    host_link: float
    host_memory_bandwidth: float
    operator: float = 5e-6
    collective: float = 2e-5
    zero3_layer: float = ZERO3_LAYER
    watts: float | None = None
    attained: Mapping[str, float] = field(default_factory=dict)
    peak: Mapping[str, float] = field(default_factory=dict)


def _gpu(
    name: str, gib: float, memory: float, link: float, network: float, host: float, host_memory: float, watts
) -> Device:
    """From data sheets, bandwidths in GB/s."""
    return Device(
        name=name,
        memory=int(gib * 2**30),
        memory_bandwidth=memory * ATTAINED_MEMORY * GB,
        link=link * ATTAINED_LINK * GB,
        network=network * ATTAINED_LINK * GB,
        host_link=host * ATTAINED_LINK * GB,
        host_memory_bandwidth=host_memory * ATTAINED_MEMORY * GB,
        watts=watts,
    )


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # GiB; GB/s of memory, NVLink, network, PCIe, host's memory; watts.
        _gpu("V100-32GB", 31.7, 900, 150, 6.25, 16, 30, 300),
        _gpu("A100-40GB", 39.4, 1555, 300, 25, 32, 50, 400),
        _gpu("A100-80GB", 79.2, 2039, 300, 25, 32, 50, 400),
        _gpu("H100", 79.1, 3350, 450, 50, 64, 75, 700),
        _gpu("H200", 139.8, 4800, 450, 50, 64, 75, 700),
        # One core of a server with AVX-512. Two of them were measured (lowrank/layers/factorised.py): 150
        # GFLOP/s together, and 0.06 to 0.18 billion FP32 numbers a second over Gloo. `tools/bench.py
        # rates` gave the times of operators and collectives. The rest is assumed.
        Device(
            name="cpu",
            memory=None,
            memory_bandwidth=5 * GB,
            link=0.4 * GB,
            network=0.4 * GB,
            host_link=5 * GB,
            host_memory_bandwidth=5 * GB,
            operator=30e-6,
            collective=300e-6,
            attained=dict.fromkeys(("fp32", "bf16", "fp16"), 75e9),
        ),
    )
}


def device_peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak dense operations per second of a GPU in `dtype` ("bf16", "fp16", "fp32").

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.

    Returns:
        None where the device (a CPU, say) or its rate is not known.
    """
    for pattern, peaks in PEAK_FLOPS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return peaks.get(dtype)
    return None


def peak_flops(device: Device, dtype: str) -> float | None:
    """Peak operations per second in `dtype` of a device to plan for; None: not known."""
    return device.peak.get(dtype) or device_peak_flops(device.name, dtype)


def attained_flops(device: Device, dtype: str) -> float | None:
    """Operations per second in a training in `dtype`; None where the device cannot compute in it."""
    peak = peak_flops(device, dtype)
    assumed = peak and peak * (ATTAINED_FP32 if dtype == "fp32" else ATTAINED_HALF)
    return device.attained.get(dtype) or assumed

"""Clusters by name and by file."""

import pytest
import yaml

from inrank_megatron.config.cluster import parse_cluster, with_rates
from inrank_megatron.config.devices import DEVICES, attained_flops, peak_flops
from inrank_megatron.errors import UserError

OWN = {
    "device": "Own-1",
    "nodes": 2,
    "devices": 4,
    "memory_gib": 24,
    "peak_tflops": {"bf16": 100, "fp32": 10},
    "attained_tflops": {"bf16": 60},
    "memory_gb_s": 600,
    "link_gb_s": 20,
    "network_gb_s": 3,
    "host_link_gb_s": 12,
    "host_memory_gb_s": 30,
    "price_per_device_hour": 0.5,
}


def written(tmp_path, content):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_file_describes_a_device_of_its_own(tmp_path):
    cluster = parse_cluster(written(tmp_path, OWN))
    assert (cluster.world_size, cluster.device, cluster.device_hour) == (8, "Own-1", 0.5)
    kind = cluster.kind
    assert (cluster.memory, kind.link, kind.network) == (24 * 2**30, 20e9, 3e9)
    assert attained_flops(kind, "bf16") == 60e12 and attained_flops(kind, "fp32") == 8e12
    assert peak_flops(kind, "fp16") is attained_flops(kind, "fp16") is None


def test_a_file_gives_what_differs_from_a_known_device(tmp_path):
    content = {"device": "h100", "devices": 4, "attained_tflops": {"bf16": "3e2"}, "network_gb_s": 12}
    cluster = parse_cluster(written(tmp_path, content))
    known = DEVICES["H100"]
    assert cluster.device == "H100" and (cluster.kind.network, cluster.kind.link) == (12e9, known.link)
    assert attained_flops(cluster.kind, "bf16") == 300e12
    assert attained_flops(cluster.kind, "fp32") == attained_flops(known, "fp32")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (OWN | {"link": 3}, "link: no such entry; a cluster has device, nodes"),
        (OWN | {"devises": 3}, "devises: no such entry, did you mean devices or device?; a cluster has"),
        (OWN | {"devices": 0}, "devices = 0: must be greater than or equal to 1; correct it"),
        (OWN | {"devices": True}, "devices = True: must be a valid integer; correct it"),
        (OWN | {"devices": "8"}, "devices = '8': must be a valid integer; correct it"),
        (OWN | {"nodes": 1.5}, "nodes = 1.5: must be a valid integer"),
        (OWN | {"link_gb_s": True}, "link_gb_s = True: must be a valid number"),
        (OWN | {"link_gb_s": "fast"}, "link_gb_s = 'fast': must be a valid number"),
        (OWN | {"link_gb_s": float("nan")}, "link_gb_s = nan: must be a finite number"),
        (OWN | {"price_per_device_hour": -2}, "price_per_device_hour = -2: must be greater than"),
        (OWN | {"memory_gib": 1e300}, "memory_gib = 1e+300: must be less than or equal to"),
        (OWN | {"attained_tflops": {"tf32": 3}}, "attained_tflops.tf32 = 'tf32': must be 'fp32', 'fp16' or"),
        (OWN | {"attained_tflops": {"bf16": 101}}, "attained_tflops.bf16 = 101: is above the peak of 100"),
        ({"device": "H100", "attained_tflops": {"bf16": 4e5}}, "is above the peak of 989; correct it"),
        ({"device": "Own-1", "memory_gib": 3}, "give peak_tflops, memory_gb_s, link_gb_s"),
        (OWN | {"peak_tflops": {"bf16": 100}}, "peak_tflops: has no fp32"),
        ({"nodes": 3}, "device: is required; a cluster has"),
        ([1], "holds no `name: value` lines"),
    ],
)
def test_faulty_files_are_refused(tmp_path, content, words):
    with pytest.raises(UserError) as error:
        parse_cluster(written(tmp_path, content))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_older_gpu_has_no_bfloat16():
    assert attained_flops(DEVICES["V100-32GB"], "bf16") is None
    assert all(
        attained_flops(device, "fp32") and attained_flops(device, "fp16") for device in DEVICES.values()
    )


def test_a_file_has_the_fixed_costs_of_operators_and_collectives(tmp_path):
    content = {"device": "H100", "operator_us": 7, "collective_us": 40}
    kind = parse_cluster(written(tmp_path, content)).kind
    assert (kind.operator, kind.collective) == (pytest.approx(7e-6), pytest.approx(40e-6))


def test_measured_rates_go_by_the_names_of_a_file():
    own = parse_cluster("2xH100")
    rates = {"attained_tflops.bf16": 300.0, "memory_gb_s": 2000.0, "operator_us": 9.0}
    kind = with_rates(own, rates).kind
    assert attained_flops(kind, "bf16") == 300e12 and attained_flops(kind, "fp32") == 0.8 * 67e12
    assert (kind.memory_bandwidth, kind.operator, kind.link) == (2e12, pytest.approx(9e-6), own.kind.link)

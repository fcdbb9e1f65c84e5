"""What the recorder writes down, when, and what it refuses."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from inrank_megatron.errors import UserError
from inrank_megatron.spectra.recorder import SpectrumRecorder


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.LayerNorm(24), nn.Linear(24, 5))


def train(model: nn.Module, length: int, **options) -> SpectrumRecorder:
    recorder = SpectrumRecorder(model, **options).attach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(length):
        model(torch.randn(8, 2, 4, 4)).square().sum().backward()
        optimizer.step()
    recorder.detach()
    optimizer.step()  # not seen any more
    return recorder


def values(update: Tensor) -> np.ndarray:
    return np.linalg.svd(update.detach().double().flatten(1).numpy(), compute_uv=False)


def test_rows_have_the_spectra_of_the_updates_at_the_chosen_steps(tmp_path):
    net = model()
    first = {name: p.detach().clone() for name, p in net.named_parameters()}
    recorder = train(net, 5, steps={2, 5}, file=tmp_path / "rows.jsonl")
    # The step after detach() has moved the weights, so they are recorded once more to compare with.
    recorder.record(6)
    assert [(row["step"], row["layer"]) for row in recorder.rows] == [
        (step, layer) for step in (2, 5, 6) for layer in ("0.weight", "3.weight")
    ]
    for row in recorder.rows[-2:]:
        weight = net.get_parameter(row["layer"])
        assert row["values"] == pytest.approx(values(weight - first[row["layer"]]), rel=1e-9)
    assert recorder.rows[0]["values"][0] > 0 and recorder.rows[0]["values"] != recorder.rows[2]["values"]
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").open()] == recorder.rows


def test_steps_are_counted_from_those_taken_before():
    rows = train(model(), 4, every=3, start_step=4, match="^3").rows
    assert [row["step"] for row in rows] == [6]


def test_another_model_s_optimizer_is_not_counted():
    recorder = SpectrumRecorder(model(), every=1).attach()
    train(model(), 2, every=1)
    recorder.detach()
    assert recorder.rows == []


def test_a_large_matrix_is_decomposed_by_its_leading_values():
    net = nn.Linear(90, 70, bias=False)
    recorder = SpectrumRecorder(net, exact_up_to=69, leading=4)
    left, right = torch.randn(70, 3), torch.randn(3, 90)
    with torch.no_grad():
        net.weight += left @ right
    [row] = recorder.record(1)
    assert len(row["values"]) == 4
    assert row["values"][:3] == pytest.approx(values(left @ right)[:3], rel=1e-5)


def test_a_weight_that_is_not_finite_has_no_values():
    net = model()
    recorder = SpectrumRecorder(net)
    with torch.no_grad():
        net[3].weight[0, 0] = float("nan")
    assert [bool(row["values"]) for row in recorder.record(1)] == [True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"match": "nothing"}, "match='nothing'"), ({"every": 0}, "every=0"), ({"leading": 0}, "leading=0")],
)
def test_what_records_nothing_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        SpectrumRecorder(model(), **options)


def test_shards_without_a_group_and_empty_shares_are_refused():
    net = nn.Linear(4, 4)
    net.weight.tensor_model_parallel, net.weight.partition_dim = True, 0
    with pytest.raises(
        UserError, match="weight is a shard of tensor parallelism; give tensor_parallel_group"
    ):
        SpectrumRecorder(net)
    net.weight = nn.Parameter(torch.empty(0, 4))
    with pytest.raises(UserError, match=r"weight: this process holds none of it .* stage 2 or lower"):
        SpectrumRecorder(net)


def test_a_dtensor_is_taken_whole_or_cut_once_along_its_first_axis(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = nn.Linear(4, 3)
        weight, mesh = net.weight.detach(), init_device_mesh("cpu", (1, 1))
        for placements in ((Replicate(), Shard(0)), (Replicate(), Replicate())):
            net.weight = nn.Parameter(distribute_tensor(weight, mesh, placements))
            recorder = SpectrumRecorder(net)
            net.weight.data += 1
            assert recorder.record(1)[0]["values"] == pytest.approx([12**0.5, 0, 0], abs=1e-6)
        for placements in ((Replicate(), Shard(1)), (Shard(0), Shard(0))):
            net.weight = nn.Parameter(distribute_tensor(weight, mesh, placements))
            with pytest.raises(UserError, match=r"^weight is a DTensor with placements .* \(FSDP2\)$"):
                SpectrumRecorder(net)
    finally:
        dist.destroy_process_group()

"""The spectrum recorder on Megatron's own GPT and under FSDP2: every rank has the values of whole weights."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from inrank_megatron.model.gpt import GPTFactory
from inrank_megatron.spectra.recorder import SpectrumRecorder
from tests.distributed.gpt_parity import PADDED, VOCABULARY, configuration, weights
from tests.groups import join
from tests.harness import run_ranks


def recorded(rank: int, world_size: int) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Rows after a random change of all weights, and the spectra of the gathered differences."""
    parallel = join(world_size)
    model = GPTFactory(
        configuration(world_size), parallel, vocab_size=VOCABULARY, padded_vocab_size=PADDED
    ).build({})
    recorder = SpectrumRecorder(model, tensor_parallel_group=parallel.tp_group)
    first = weights(model, parallel)
    torch.manual_seed(rank)
    with torch.no_grad():
        for parameter in model.parameters():
            if getattr(parameter, "tensor_model_parallel", False):
                parameter += torch.randn_like(parameter)
    rows, last = recorder.record(1), weights(model, parallel)
    return rows, {
        row["layer"]: np.linalg.svd((last[row["layer"]] - first[row["layer"]]).double(), compute_uv=False)
        for row in rows
    }


def test_every_rank_records_the_spectra_of_the_whole_weights():
    found = run_ranks(recorded, 2)
    assert found[0][0] == found[1][0]
    rows, expected = found[0]
    assert len(rows) == 10 and len({row["layer"] for row in rows}) == 10
    for row in rows:
        assert row["values"] == pytest.approx(expected[row["layer"]], rel=1e-6, abs=1e-9), row["layer"]
    assert sum(row["values"][0] > 1 for row in rows) == 9  # all but the replicated embedding of positions


def trained_under_fsdp2(rank: int, world_size: int, shards: bool) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Rows of two steps on a batch that all ranks have, and the spectra of what they added."""
    torch.manual_seed(0)
    # Of 5 rows the ranks hold 3 and 2, of 1 one and none.
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(20, 7), nn.Linear(7, 1))
    if shards:
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    first = {name: whole(p) for name, p in model.named_parameters()}
    recorder = SpectrumRecorder(model, steps={2}, exact_up_to=4, leading=5).attach()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    images = torch.randn(8, 2, 4, 4)
    for _ in range(2):
        model(images).square().sum().backward()
        optimizer.step()
    recorder.detach()
    return recorder.rows, {
        row["layer"]: np.linalg.svd(
            (whole(model.get_parameter(row["layer"])) - first[row["layer"]]).flatten(1), compute_uv=False
        )
        for row in recorder.rows
    }


def whole(parameter: torch.Tensor) -> torch.Tensor:
    full = getattr(parameter, "full_tensor", lambda: parameter)()
    return full.detach().double().clone()


def test_shards_of_fsdp2_have_the_spectra_of_the_whole_weights():
    sharded = run_ranks(trained_under_fsdp2, 2, True)
    assert sharded[0][0] == sharded[1][0]
    rows, expected = sharded[0]
    assert [row["layer"] for row in rows] == ["0.weight", "2.weight", "3.weight"]
    for row in rows:
        assert row["values"] == pytest.approx(expected[row["layer"]][:5], rel=1e-4, abs=1e-6), row["layer"]
    alone, _ = run_ranks(trained_under_fsdp2, 2, False)[0]
    for row, own in zip(rows, alone, strict=True):
        assert row["values"] == pytest.approx(own["values"], rel=1e-4, abs=1e-6)

"""The spectrum recorder on Megatron's own GPT, sharded: every rank has the values of the whole weights."""

import numpy as np
import pytest
import torch

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

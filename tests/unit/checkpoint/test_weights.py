"""Weights alone are a checkpoint like any other; what does not fit its structure is not written."""

import pytest
import torch

from inrank_megatron.checkpoint.folder import Checkpoint, published
from inrank_megatron.checkpoint.weights import is_weights_only, write_weights
from inrank_megatron.lowrank.layers.spec import FactorSpec

SPEC = FactorSpec(capacity=3, active_columns=3, rank=3, frozen_base=False, final=True)
TENSORS = {"norm.weight": torch.ones(5), "a.U": torch.randn(8, 3), "a.V": torch.randn(3, 5)}


def test_round_trip_is_exact(tmp_path):
    folder = write_weights(tmp_path, step=0, factors={"a": SPEC}, tensors=TENSORS.items())
    checkpoint = Checkpoint(folder)
    assert folder.name == "step_00000000" and is_weights_only(checkpoint.state)
    assert checkpoint.state["identity"] == {} and checkpoint.state["step"] == 0
    assert FactorSpec.from_record(checkpoint.state["engine"]["factors"]["a"]) == SPEC
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in checkpoint.tensors(TENSORS))
    assert not is_weights_only({"step": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a.U": torch.zeros(8, 4)}, "a.U: 4 columns are given, its spec has 3"),
        ({"a.V": torch.zeros(2, 5)}, "a.V: 2 columns are given, its spec has 3"),
        ({"a.weight": torch.zeros(8, 5)}, r"given, its spec calls for \['U', 'V'\]"),
        ({"a.U0": torch.zeros(8, 3)}, r"given, its spec calls for \['U', 'V'\]"),
    ],
)
def test_inconsistent_weights_are_not_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_weights(tmp_path, step=0, factors={"a": SPEC}, tensors=(TENSORS | changes).items())
    assert published(tmp_path) == []

"""A run goes on from weights alone: the same function, an optimizer that begins afresh."""

from pathlib import Path

import pytest
import torch

from inrank_megatron.checkpoint.folder import Checkpoint
from inrank_megatron.checkpoint.weights import write_weights
from inrank_megatron.engine.state import engine_record, recorded_structure
from inrank_megatron.errors import UserError
from inrank_megatron.training.resuming import fill, structure_of
from inrank_megatron.training.run_folder import RunFolder
from tests.contract.cases import CHECK, METHODS
from tests.contract.layouts import LAYOUTS, Layout
from tests.contract.probes import snapshot
from tests.contract.sessions import build
from tests.harness import run_ranks

MOMENTS = (".exp_avg", ".exp_avg_sq")


def leave(
    rank: int, world_size: int, name: str, layout: Layout, root: Path, *, initial: bool = True
) -> float:
    """Train, and write the weights as a conversion tool does; the loss on the fixed batch."""
    session = build(name, layout, switch=CHECK + 2).start().train(CHECK + 1)
    kept = {k: t for k, t in snapshot(session).items() if not k.endswith(MOMENTS)}
    if rank == 0:
        factors = recorded_structure(engine_record(session.engine))
        write_weights(root, step=CHECK + 1, factors=factors, tensors=kept.items())
    return session.fixed_loss()


def go_on(rank: int, world_size: int, name: str, layout: Layout, folder: Path, settings: dict) -> dict:
    checkpoint = Checkpoint(folder)
    wanted = build(name, layout, **settings).engine.factor_specs()
    record = {"factors": {n: vars(s) for n, s in structure_of(checkpoint, wanted).items()}}
    session = build(name, layout, switch=CHECK + 2, record=record, **settings)
    session.step = CHECK + 1
    fill(session.engine, RunFolder(folder, opened=checkpoint))
    tensors, fixed = snapshot(session), session.fixed_loss()
    steps, scaling = session.engine.master_weights.steps(), engine_record(session.engine)["loss_scaling"]
    session.train(2)
    return {"tensors": tensors, "fixed": fixed, "steps": steps, "scaling": scaling, "losses": session.losses}


@pytest.mark.parametrize("settings", [{}, {"zero_stage": 3, "offload_optimizer": True}], ids=str)
@pytest.mark.parametrize("name", ["dense", "fixed-rank", "inrank-efficient"])
def test_training_resumes_from_weights_only(tmp_path, name, settings):
    left, *_ = run_ranks(leave, 2, name, LAYOUTS["TP2 SP"], tmp_path)
    folder = tmp_path / f"step_{CHECK + 1:08d}"
    checkpoint = Checkpoint(folder)
    assert not [n for n in checkpoint.names if n.endswith(MOMENTS)]
    for result in run_ranks(go_on, 2, name, LAYOUTS["DP2"], folder, settings):
        assert result["fixed"] == pytest.approx(left, rel=1e-6)
        assert not any(result["steps"].values())
        for key, tensor in checkpoint.tensors(checkpoint.names):
            assert torch.equal(result["tensors"][key], tensor), key
        moments = [key for key in result["tensors"] if key.endswith(MOMENTS)]
        assert moments and not any(result["tensors"][key].any() for key in moments)
        assert result["losses"][-1] < left + 0.5


def test_loss_scale_is_reset(tmp_path):
    run_ranks(leave, 1, "dense", LAYOUTS["TP1 DP1"], tmp_path)
    [folder] = tmp_path.iterdir()
    [result] = run_ranks(go_on, 1, "dense", LAYOUTS["TP1 DP1"], folder, {"fp16": True})
    assert result["scaling"]["state"]["cur_scale"] == 65536.0 and result["scaling"]["skipped"] == 0


def refusal(rank: int, world_size: int, name: str, folder: Path) -> str:
    try:
        go_on(rank, world_size, name, LAYOUTS["TP1 DP1"], folder, {})
    except UserError as error:
        return str(error)
    return "accepted"


def test_incompatible_method_or_missing_tensor_is_refused(tmp_path):
    """Factors that still grow go on in a method that grows; a tensor too few is told as elsewhere."""
    run_ranks(leave, 1, "inrank", LAYOUTS["TP1 DP1"], tmp_path)
    [folder] = tmp_path.iterdir()
    message = run_ranks(refusal, 1, "dense", folder)[0]
    assert "begins with no factors; give that run's method" in message
    checkpoint = Checkpoint(folder)
    tensors = [(n, t) for n, t in checkpoint.tensors(checkpoint.names) if "layernorm" not in n]
    fewer = write_weights(
        tmp_path / "b",
        step=CHECK + 1,
        factors=recorded_structure(checkpoint.state["engine"]),
        tensors=tensors,
    )
    assert "layernorm.weight is absent there, [64] here" in run_ranks(refusal, 1, "inrank", fewer)[0]


def test_missing_initial_factors_are_the_loaded_ones(tmp_path):
    """The spectrum of the update then is that of what is learned from here on."""
    run_ranks(leave, 1, "inrank", LAYOUTS["TP1 DP1"], tmp_path)
    checkpoint = Checkpoint(tmp_path / f"step_{CHECK + 1:08d}")
    factors = {
        n: vars(s) | {"tracked": False} for n, s in recorded_structure(checkpoint.state["engine"]).items()
    }
    factors = recorded_structure({"factors": factors})
    tensors = [(n, t) for n, t in checkpoint.tensors(checkpoint.names) if not n.endswith(("U0", "V0"))]
    folder = write_weights(tmp_path / "b", step=CHECK + 1, factors=factors, tensors=tensors)
    assert METHODS["inrank"].get("rank_criterion", "update") == "update"
    [result] = run_ranks(go_on, 1, "inrank", LAYOUTS["TP1 DP1"], folder, {})
    starts = [key for key in result["tensors"] if key.endswith(("U0", "V0"))]
    assert starts
    for key in starts:
        assert torch.equal(result["tensors"][key], result["tensors"][key.removesuffix("0")])

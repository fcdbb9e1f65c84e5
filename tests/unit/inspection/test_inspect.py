"""``tools/inspect_ranks.py``: what it reads from checkpoints, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inrank_megatron import costs
from inrank_megatron.checkpoint.folder import CheckpointWriter
from inrank_megatron.config import Config, from_flat, to_yaml
from inrank_megatron.conversion.formats import writable
from inrank_megatron.conversion.options import Options
from inrank_megatron.conversion.run import open_weights
from inrank_megatron.conversion.weights import weight_shapes
from inrank_megatron.errors import UserError
from inrank_megatron.inspection import layers
from inrank_megatron.inspection.command import print_model, print_untrained
from inrank_megatron.inspection.layers import Inspection
from inrank_megatron.inspection.untrained import untrained_table
from inrank_megatron.layers.spec import FactorSpec
from inrank_megatron.linalg import oracle
from inrank_megatron.rank.criteria import update_ratio
from inrank_megatron.shapes import linear_shapes

TOOL = Path(__file__).resolve().parents[3] / "tools" / "inspect_ranks.py"
SIZES = {
    "num_layers": 1,
    "hidden_size": 48,
    "num_attention_heads": 2,
    "seq_length": 16,
    "train_iters": 9,
    "buffer": 6,
}
FC1, FC2 = "decoder.layers.0.mlp.linear_fc1", "decoder.layers.0.mlp.linear_fc2"
RANK, COLUMNS, CAPACITY, VOCABULARY = 3, 9, 24, 300


def inspect(path: Path) -> Inspection:
    return layers.inspect(path, Options())


def configuration(method: str = "inrank") -> Config:
    return from_flat(SIZES | {"method": method})


def layer_tensors(name: str, *, tracked: bool) -> dict[str, torch.Tensor]:
    o, i = linear_shapes(configuration())[name]
    generator = torch.Generator().manual_seed(o)
    u, v = torch.zeros(o, CAPACITY), torch.zeros(CAPACITY, i)
    u[:, :COLUMNS] = torch.randn(o, COLUMNS, generator=generator)
    v[:COLUMNS] = torch.randn(COLUMNS, i, generator=generator)
    moved = 0.1 * torch.randn(o, CAPACITY, generator=generator)
    moved[:, COLUMNS:] = 0
    return {"U": u + moved, "V": v} | ({"U0": u, "V0": v} if tracked else {})


def save(root: Path, step: int, *, factorised: bool = True, tracked: bool = True) -> Path:
    """A checkpoint as a run would have written it, with both linears factorised or none."""
    writer = CheckpointWriter(root / "checkpoints", step)
    spec = {"columns": CAPACITY, "active": COLUMNS, "rank": RANK, "base": tracked, "tracked": tracked}
    names = (FC1, FC2) if factorised else ()
    factors = {
        f"{name}.{leaf}": tensor
        for name in names
        for leaf, tensor in layer_tensors(name, tracked=tracked).items()
    }
    shapes = weight_shapes(configuration(), VOCABULARY, {name: FactorSpec(**spec) for name in names})
    for name, shape in shapes.items():
        writer.add(name, factors.pop(name, torch.zeros(shape)))
    for name, tensor in factors.items():
        writer.add(name, tensor)
    return writer.publish({"step": step, "engine": {"factors": {name: spec for name in names}}})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(to_yaml(configuration()))
    save(tmp_path, 4)
    return tmp_path


@pytest.mark.parametrize("tracked", [True, False])
def test_ratio_and_spectrum_are_those_of_the_dense_matrices(run, tracked):
    save(run, 5, tracked=tracked)
    found = inspect(run)
    assert (found.step, [row.layer for row in found.layers]) == (5, [FC1, FC2])
    for row in found.layers:
        t = layer_tensors(row.layer, tracked=tracked)
        parts = (t["U"], t["V"], t["U0"], t["V0"]) if tracked else (t["U"], t["V"])
        dense = (oracle.update_singular_values if tracked else oracle.singular_values)(*parts).numpy()
        own = torch.tensor(row.singular_values).double()
        torch.testing.assert_close(own, torch.from_numpy(dense)[: len(own)], rtol=1e-6, atol=1e-6)
        assert row.explained_ratio == pytest.approx(update_ratio(dense, RANK, length=48), rel=1e-6)
        assert (row.rank, row.columns) == (RANK, COLUMNS)


def test_cost_is_that_of_the_plan(run):
    found, config = inspect(run), configuration()
    columns = {FC1: COLUMNS, FC2: COLUMNS}
    whole = costs.parameters(config, VOCABULARY, ranks=columns, frozen_base=True).total
    dense = costs.parameters(config, VOCABULARY).total
    assert (found.parameters, found.dense_parameters) == (whole, dense)
    linears = [row.parameters + row.frozen_parameters - row.dense_parameters for row in found.layers]
    assert sum(linears) == whole - dense
    flops = [row.flops_per_token - row.dense_flops_per_token for row in found.layers]
    assert sum(flops) == found.flops_per_token - found.dense_flops_per_token


def test_untrained_fixed_point_is_not_the_data_s(run):
    """It depends on the shape and the settings; the checkpoint's values have no part in it."""
    before = [row.untrained_rank for row in inspect(run).layers]
    save(run, 6, tracked=False)
    assert [row.untrained_rank for row in inspect(run).layers] == before
    assert all(RANK < rank < 24 for rank in before)


def test_a_checkpoint_by_its_own_name(run):
    save(run, 5)
    assert inspect(run / "checkpoints" / "step_00000004").step == 4


def test_newer_damaged_checkpoint_is_passed_over_and_named(run):
    newer = save(run, 5)
    (newer / "tensors_00000.safetensors").write_bytes(b"damaged")
    found = inspect(run)
    assert found.step == 4 and "step_00000005" in found.notes[0]
    with pytest.raises(UserError, match="missing, truncated or altered"):
        inspect(newer)


def test_what_cannot_be_inspected(tmp_path):
    with pytest.raises(UserError, match="there is nothing"):
        inspect(tmp_path / "absent")
    with pytest.raises(UserError, match="is in no format that is known here"):
        inspect(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(configuration("dense")))
    with pytest.raises(UserError, match="it has no checkpoint yet"):
        inspect(tmp_path)
    save(tmp_path, 4, factorised=False)
    with pytest.raises(UserError, match="a run of method dense has no factorised linears"):
        inspect(tmp_path)


def tool(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOL), *args], capture_output=True, text=True, check=False)


def test_the_tool_prints_draws_and_refuses(run, tmp_path):
    done = tool(str(run), "--json", "--png", str(tmp_path / "ranks.png"))
    assert done.returncode == 0, done.stderr
    assert [row["rank"] for row in json.loads(done.stdout)["layers"]] == [RANK, RANK]
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    refused = tool(str(run / "absent"))
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)


def test_tables(run, capsys):
    print_model(run, Options(), leading=3, as_json=False, png=None)
    table = capsys.readouterr().out
    assert "0 linear_fc1" in table and "1 linear_fc2" not in table
    assert "untrained" in table and "spectra of U V - U0 V0" in table
    print_untrained([48], [0.9], as_json=True)
    assert json.loads(capsys.readouterr().out) == untrained_table([48], [0.9])


@pytest.mark.parametrize("tracked", [True, False])
def test_an_export_with_factors_has_the_ranks_of_its_run(run, tmp_path, tracked, capsys):
    """Without the first values of the factors the spectrum is that of U V."""
    save(run, 5, tracked=tracked)
    writer = writable()["hf-factorised"]
    (folder := tmp_path / "export").mkdir()
    writer.write(open_weights(run, Options()), folder, Options())
    found = inspect(folder)
    assert (found.format, found.own_settings) == ("hf-factorised", False)
    for row, own in zip(found.layers, inspect(run).layers, strict=True):
        t = layer_tensors(row.layer, tracked=tracked)
        dense = oracle.singular_values(t["U"], t["V"])[:COLUMNS]
        torch.testing.assert_close(torch.tensor(row.singular_values).double(), dense, rtol=1e-6, atol=1e-6)
        assert (row.layer, row.columns, row.parameters) == (own.layer, own.columns, own.parameters)
        assert row.spectrum_of == "product"
    print_model(folder, Options(), leading=3, as_json=False, png=None)
    assert "an export keeps no run's settings" in capsys.readouterr().out


def test_a_dense_export_has_no_ranks(run, tmp_path):
    (folder := tmp_path / "export").mkdir()
    writable()["hf-dense"].write(open_weights(run, Options()), folder, Options())
    with pytest.raises(UserError, match=r"has no factorised linears.*name the run that it was made from"):
        inspect(folder)

"""``tools/inspect_ranks.py``: what it reads from checkpoints, and what it refuses."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inrank_megatron.checkpoint.writing import CheckpointWriter
from inrank_megatron.config import costs
from inrank_megatron.config.loading import from_flat, to_yaml
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.errors import UserError
from inrank_megatron.inspection import layers
from inrank_megatron.inspection.command import print_model, print_untrained
from inrank_megatron.inspection.layers import Inspection
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.run import open_weights
from inrank_megatron.interop.core.weights import weight_shapes
from inrank_megatron.interop.formats import writable
from inrank_megatron.lowrank.criteria.explained_ratio import update_ratio
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.linalg import oracle
from inrank_megatron.reporting.untrained import untrained_table
from tests.forked import run_forked
from tests.runs import random_weights, write_run

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


def save(root: Path, step: int, *, tracked: bool = True, loss: float | None = None) -> Path:
    """A checkpoint as a run would have written it."""
    writer = CheckpointWriter(root / "checkpoints", step)
    spec = {"columns": CAPACITY, "active": COLUMNS, "rank": RANK, "base": tracked, "tracked": tracked}
    names = (FC1, FC2)
    factors = {
        f"{name}.{leaf}": tensor
        for name in names
        for leaf, tensor in layer_tensors(name, tracked=tracked).items()
    }
    shapes = weight_shapes(
        configuration(), VOCABULARY, {name: FactorSpec.from_record(spec) for name in names}
    )
    for name, shape in shapes.items():
        writer.add(name, factors.pop(name, torch.zeros(shape)))
    for name, tensor in factors.items():
        writer.add(name, tensor)
    state = {"step": step, "engine": {"factors": {name: spec for name in names}}, "validation_loss": loss}
    return writer.publish(state)


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
    total = costs.parameters(config, VOCABULARY, ranks=columns, frozen_base=True).total
    dense = costs.parameters(config, VOCABULARY).total
    assert (found.parameters, found.dense_parameters) == (total, dense)
    linears = [row.parameters + row.frozen_parameters - row.dense_parameters for row in found.layers]
    assert sum(linears) == total - dense
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
    with pytest.raises(UserError, match="does not exist"):
        inspect(tmp_path / "absent")
    with pytest.raises(UserError, match="is in none of the formats that can be read"):
        inspect(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(configuration()))
    with pytest.raises(UserError, match="it has no checkpoint yet"):
        inspect(tmp_path)


def test_of_a_run_the_best_checkpoint_is_read_and_named(run, capsys):
    save(run, 5, loss=3.0)
    best = save(run, 6, loss=2.0)
    save(run, 7, loss=2.5)
    assert inspect(run).step == 6
    print_model(run, Options(), leading=3, as_json=False, png=None)
    assert f"{best}: inrank, step 6" in capsys.readouterr().out
    (best / "tensors_00000.safetensors").write_bytes(b"damaged")
    found = inspect(run)
    assert found.step == 7 and "step_00000006" in found.notes[0]


def test_the_tool_prints_draws_and_refuses(run, tmp_path):
    command = [sys.executable, str(TOOL), str(run), "--json", "--png", str(tmp_path / "ranks.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["rank"] for row in json.loads(done.stdout)["layers"]] == [RANK, RANK]
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    refused = run_forked(TOOL, run / "absent")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)


def test_a_picture_takes_the_place_of_a_picture_alone(run, tmp_path):
    (mine := tmp_path / "mine.txt").write_text("precious")
    for png, words in (
        (mine, "exists and is no PNG file"),
        (tmp_path, "is a folder"),
        (tmp_path / "absent" / "a.png", "its folder does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            print_model(run / "absent", Options(), leading=3, as_json=False, png=png)
    assert mine.read_text() == "precious"
    for _ in range(2):
        print_model(run, Options(), leading=3, as_json=False, png=tmp_path / "a.png")


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


LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@pytest.mark.parametrize("settings", [{}, {"model_type": "llama"}], ids=["gpt2", "llama"])
def test_a_dense_model_has_the_rank_of_every_spectrum(tmp_path, settings):
    weights = random_weights(vocab_size=VOCABULARY, tokenizer=None, ranks=None, settings=settings)
    found = inspect(write_run(tmp_path / "run", weights))
    assert (found.method, found.threshold) == ("dense", 0.9)
    assert [row.layer for row in found.layers] == [f"decoder.layers.{i}.{n}" for i in (0, 1) for n in LINEARS]
    for row in found.layers:
        dense = torch.linalg.svdvals(weights.read(f"{row.layer}.weight").double()).numpy()
        ratios = [update_ratio(dense, r, length=48) for r in range(1, 49)]
        assert row.rank == 1 + next(i for i, ratio in enumerate(ratios) if ratio >= 0.9)
        assert row.singular_values == pytest.approx(dense, rel=1e-9)
        assert (row.columns, row.explained_ratio) == (48, pytest.approx(ratios[row.rank - 1], rel=1e-9))
        assert (row.untrained_rank, row.spectrum_of) == (None, "weight")
        assert row.parameters == row.dense_parameters == math.prod(weights.shapes[f"{row.layer}.weight"])
    assert (found.parameters, found.flops_per_token) == (found.dense_parameters, found.dense_flops_per_token)

    (folder := tmp_path / "export").mkdir()
    writable()["hf-dense"].write(weights, folder, Options())
    exported = inspect(folder)
    assert (exported.format, exported.own_settings) == ("hf-dense", False)
    for row, own in zip(exported.layers, found.layers, strict=True):
        assert (row.layer, row.rank) == (own.layer, own.rank)


def test_a_dense_model_is_printed_and_drawn(tmp_path, capsys):
    run = write_run(tmp_path / "run", random_weights(vocab_size=VOCABULARY, tokenizer=None, ranks=None))
    print_model(run, Options(), leading=3, as_json=False, png=tmp_path / "ranks.png")
    table = capsys.readouterr().out
    assert "1 linear_qkv" in table and "spectra of W\n" in table and "whose ratio reaches 0.9" in table
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_weights_that_are_not_finite(tmp_path):
    weights = random_weights(vocab_size=VOCABULARY, tokenizer=None, ranks=None)
    run = write_run(tmp_path / "run", replace(weights, read=lambda name: weights.read(name) / 0))
    with pytest.raises(UserError, match="linear_qkv at step 0 holds NaN or Inf"):
        inspect(run)


@pytest.mark.parametrize("ranks", [None, 6])
def test_a_megatron_folder(tmp_path, ranks):
    weights = random_weights(vocab_size=VOCABULARY, tokenizer=None, ranks=ranks)
    (folder := tmp_path / "megatron").mkdir()
    writable()["megatron"].write(weights, folder, Options())
    found, own = inspect(folder), inspect(write_run(tmp_path / "run", weights))
    assert (found.format, found.layers) == ("megatron", own.layers)


def test_an_adapter_is_read_with_its_base(tmp_path):
    weights = random_weights(vocab_size=VOCABULARY, tokenizer=None, ranks=6)
    (folder := tmp_path / "adapter").mkdir()
    writable()["peft"].write(weights, folder, Options())
    assert (inspect(folder).format, inspect(folder / "base").format) == ("peft", "hf-dense")

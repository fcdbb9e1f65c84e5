"""What lies between two models: singular values of W_B - W_A, whatever formats hold the two."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inrank_megatron.config.loading import to_yaml
from inrank_megatron.config.shapes import QKV, qkv_layout
from inrank_megatron.errors import UserError
from inrank_megatron.inspection import updates
from inrank_megatron.inspection.command import print_comparison
from inrank_megatron.inspection.updates import Comparison, compare, rank_at
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.weights import Weights
from inrank_megatron.interop.formats import writable
from inrank_megatron.lowrank.criteria.explained_ratio import update_ratio
from tests.runs import random_weights, write_run

VOCABULARY = 300
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
SEPARATE = {"factorised_linears": "mlp-attention", "qkv_factors": "separate"}


def weights_of(*, ranks: int | None, scale: float = 1.0, **options) -> Weights:
    weights = random_weights(vocab_size=VOCABULARY, tokenizer=None, ranks=ranks, **options)
    return replace(weights, read=lambda name: scale * weights.read(name))


def exported(weights: Weights, folder: Path, format_name: str) -> Path:
    if format_name == "run":
        return write_run(folder, weights)
    folder.mkdir()
    writable()[format_name].write(weights, folder, Options())
    return folder


def dense(weights: Weights, layer: str) -> np.ndarray:
    """W of a linear, by NumPy in FP64."""
    u, v, w = (
        weights.read(f"{layer}.{leaf}").double().numpy() if f"{layer}.{leaf}" in weights.shapes else None
        for leaf in ("U", "V", "weight")
    )
    return w if u is None else u @ v + (0 if w is None else w)


def check_against_numpy(found: Comparison, a: Weights, b: Weights) -> None:
    assert [row.layer for row in found.layers] == [f"decoder.layers.{i}.{n}" for i in (0, 1) for n in LINEARS]
    moved, whole = 0.0, 0.0
    for row in found.layers:
        old, new = dense(a, row.layer), dense(b, row.layer)
        values = np.linalg.svd(new - old, compute_uv=False)
        # Exports and checkpoints keep FP32.
        assert row.singular_values == pytest.approx(values, rel=1e-5, abs=1e-5)
        ratios = [update_ratio(values, r, length=48) for r in range(1, 49)]
        assert row.rank == 1 + next(i for i, ratio in enumerate(ratios) if ratio >= 0.9)
        assert (row.shape, row.exact) == (old.shape, True)
        assert row.norm == pytest.approx(np.linalg.norm(new - old), rel=1e-5)
        assert row.relative_norm == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(old), rel=1e-5)
        moved, whole = moved + np.sum((new - old) ** 2), whole + np.sum(old**2)
    assert found.relative_norm == pytest.approx(np.sqrt(moved / whole), rel=1e-5)


FORMATS = ["run", "hf-dense", "hf-factorised", "megatron", "peft"]


@pytest.mark.parametrize("format_b", FORMATS)
def test_a_dense_run_and_a_factorised_model_in_any_format(tmp_path, format_b):
    """The second has W0 + U V; merged, in factors, or as an adapter on its base."""
    a, b = weights_of(ranks=None), weights_of(ranks=6, scale=1.1)
    found = compare(write_run(tmp_path / "a", a), exported(b, tmp_path / "b", format_b), Options())
    assert (found.a.format, found.b.format, found.threshold) == ("run", format_b, 0.9)
    check_against_numpy(found, a, b)


@pytest.mark.parametrize("format_a", ["hf-dense", "megatron"])
def test_factors_without_w0_in_an_export_of_llama(tmp_path, format_a):
    llama = {"settings": {"model_type": "llama"}}
    a, b = weights_of(ranks=None, **llama), weights_of(ranks=6, scale=1.1, frozen_base=False, **llama)
    found = compare(
        exported(a, tmp_path / "a", format_a), exported(b, tmp_path / "b", "hf-factorised"), Options()
    )
    check_against_numpy(found, a, b)


def test_an_adapter_and_its_base_differ_by_the_adapter(tmp_path):
    folder = exported(weights_of(ranks=6), tmp_path / "adapter", "peft")
    found = compare(folder / "base", folder, Options())
    for row in found.layers:
        factorised = "linear_fc" in row.layer
        assert np.count_nonzero(np.array(row.singular_values) > 1e-4) == (6 if factorised else 0)
        assert (0 < row.rank <= 6) if factorised else (row.rank, row.norm) == (0, 0)


def test_query_key_and_value_are_compared_one_by_one_where_one_model_has_them_so(tmp_path):
    a, b = weights_of(ranks=None), weights_of(ranks=6, settings=SEPARATE)
    folders = write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)
    for found, sign in ((compare(*folders, Options()), 1), (compare(*folders[::-1], Options()), -1)):
        layers = {row.layer: row for row in found.layers}
        assert len(layers) == 2 * 6
        for block in (0, 1):
            name = f"decoder.layers.{block}.self_attention.linear_qkv"
            fused = a.read(f"{name}.weight").double()
            for part in QKV:
                rows = qkv_layout(a.config).view(fused, part).flatten(0, 2).numpy()
                values = np.linalg.svd(sign * (dense(b, f"{name}.{part}") - rows), compute_uv=False)
                assert layers[f"{name}.{part}"].singular_values == pytest.approx(values, rel=1e-5, abs=1e-5)


def test_larger_linears_have_leading_values_and_ranks_that_are_certain(tmp_path, monkeypatch):
    """With an update of rank 6 all its values are among the leading ones; one of full rank has no certain
    rank. A flat spectrum is the worst case of the randomised method.
    """
    a, b = weights_of(ranks=None), weights_of(ranks=None, scale=1.5)
    full = write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)
    thin = exported(weights_of(ranks=6), tmp_path / "adapter", "peft")
    exact = {folders: compare(*folders, Options()) for folders in (full, (thin / "base", thin))}
    monkeypatch.setattr(updates, "EXACT_UP_TO", 16)
    monkeypatch.setattr(updates, "LEADING", 12)
    for folders, found in exact.items():
        for row, own in zip(compare(*folders, Options()).layers, found.layers, strict=True):
            assert (len(row.singular_values), row.exact) == (12, False)
            assert row.singular_values == pytest.approx(own.singular_values[:12], rel=0.05, abs=1e-9)
            assert row.rank == (None if folders == full else own.rank)


def test_a_rank_from_leading_values_is_never_below_the_true_one():
    found = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        s = np.sort(generator.pareto(0.3 + seed / 20, 64) + 1e-3)[::-1]
        true = rank_at(s.tolist(), 0.9, length=64, square_sum=float(s @ s))
        certain = rank_at(s[:24].tolist(), 0.9, length=64, square_sum=float(s @ s))
        assert certain is None or certain >= true
        found += certain is not None
    assert 5 < found < 40


def test_the_rank_of_nothing_is_0():
    assert rank_at([0.0] * 8, 0.9, length=8, square_sum=0.0) == 0


def _same(tmp_path: Path, run: Path) -> tuple[Path, Path]:
    return run, run / "checkpoints" / "step_00000000"


def _other_sizes(tmp_path: Path, run: Path) -> tuple[Path, Path]:
    settings = {"num_layers": 1, "num_attention_heads": 2}
    return run, write_run(tmp_path / "b", weights_of(ranks=None, settings=settings))


def _other_type(tmp_path: Path, run: Path) -> tuple[Path, Path]:
    return run, write_run(tmp_path / "b", weights_of(ranks=None, settings={"model_type": "llama"}))


def _absent(tmp_path: Path, run: Path) -> tuple[Path, Path]:
    return run, tmp_path / "absent"


def _unfinished(tmp_path: Path, run: Path) -> tuple[Path, Path]:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").write_text(to_yaml(weights_of(ranks=None).config))
    return tmp_path / "b", run


def _damaged(tmp_path: Path, run: Path) -> tuple[Path, Path]:
    other = write_run(tmp_path / "b", weights_of(ranks=6))
    (other / "checkpoints" / "step_00000000" / "tensors_00000.safetensors").write_bytes(b"damaged")
    return run, other


def _not_finite(tmp_path: Path, run: Path) -> tuple[Path, Path]:
    return run, write_run(tmp_path / "b", weights_of(ranks=6, scale=float("nan")))


REFUSED: list[tuple[Callable[[Path, Path], tuple[Path, Path]], str]] = [
    (_same, "step_00000000: is compared with itself"),
    (
        _other_sizes,
        "different architectures .num_layers 2 and 1, num_attention_heads 4 and 2",
    ),
    (_other_type, "different architectures .model_type gpt2 and llama"),
    (_absent, "absent: does not exist"),
    (_unfinished, "b: it has no checkpoint yet"),
    (_damaged, "missing, truncated or altered"),
    (_not_finite, r"decoder.layers.0.self_attention.linear_qkv of .* holds NaN or Inf"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED)
def test_what_cannot_be_compared(tmp_path, make, words):
    run = write_run(tmp_path / "a", weights_of(ranks=None))
    with pytest.raises(UserError, match=words):
        compare(*make(tmp_path, run), Options())


def test_a_comparison_is_printed_drawn_and_written_as_json(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", weights_of(ranks=None)), write_run(tmp_path / "b", weights_of(ranks=6))
    print_comparison(a, b, Options(), leading=2, as_json=False, png=tmp_path / "updates.png")
    table = capsys.readouterr().out
    assert f"A: {a}/checkpoints/step_00000000 (run)" in table and "1 linear_fc2" in table
    assert "192 x 48" in table and "reaches 0.9, by the criterion update" in table
    assert "randomised" not in table
    assert (tmp_path / "updates.png").read_bytes().startswith(b"\x89PNG")
    print_comparison(a, b, Options(), leading=2, as_json=True, png=None)
    found = json.loads(capsys.readouterr().out)
    assert found["b"] == {"folder": f"{b}/checkpoints/step_00000000", "format": "run", "step": 0}
    assert len(found["layers"]) == 8 and len(found["layers"][0]["singular_values"]) == 48


def test_ranks_that_are_not_certain_are_explained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(updates, "EXACT_UP_TO", 16)
    monkeypatch.setattr(updates, "LEADING", 12)
    a, b = write_run(tmp_path / "a", weights_of(ranks=None)), write_run(tmp_path / "b", weights_of(ranks=6))
    print_comparison(a, b, Options(), leading=2, as_json=False, png=None)
    assert "a rank that does not follow from them is -" in capsys.readouterr().out

"""Every method starts from the weights of a dense run: the function is that run's, to rounding."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from inrank_megatron.checkpoint.folder import Checkpoint
from inrank_megatron.checkpoint.writing import CheckpointWriter
from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.shapes import qkv_layout
from inrank_megatron.engine.state import engine_record, load_engine
from inrank_megatron.errors import UserError
from inrank_megatron.model.separate_qkv import rows_of
from inrank_megatron.model.vocabulary import OF_THE_VOCABULARY, WithoutSpareRows
from tests.contract.cases import SIZES
from tests.contract.gathered import write_checkpoint
from tests.contract.layouts import LAYOUTS, Layout
from tests.contract.probes import dense_gradients, snapshot
from tests.contract.sessions import build
from tests.harness import run_ranks

STEPS = 6
FULL_RANK = SIZES["hidden_size"]
HEADS = qkv_layout(from_flat(SIZES | {"train_iters": 1}))
LLAMA = {"model_type": "llama"}
SEPARATE = {"factorised_linears": "mlp-attention", "qkv_factors": "separate"}
STARTS = {
    "dense": ("dense", {}),
    "warm-start": ("warm-start", {}),
    "lora": ("lora", {}),
    "relora of attention too": ("relora", {"factorised_linears": "mlp-attention"}),
    "inrank": ("inrank", {}),
    "fixed-rank at full rank": ("fixed-rank", {"rank": FULL_RANK}),
}
TOLERANCES = {"fp32": 2e-6, "bf16": 2e-3}


def train_dense(rank: int, world_size: int, layout: Layout, settings: dict, root: Path) -> float:
    """Train, save as a run saves, and return the loss on the fixed batch."""
    session = build("dense", layout, **settings).start().train(STEPS)
    write_checkpoint(session.engine, root, STEPS)
    return session.fixed_loss()


def start(rank: int, world_size: int, name: str, layout: Layout, settings: dict, pretrained: Path) -> dict:
    """Loss, full tensors and step counts before the first step."""
    session = build(name, layout, pretrained=pretrained, **settings).start()
    loss, tensors = session.fixed_loss(), snapshot(session)
    steps = engine_record(session.engine)["optimizer_steps"]
    return {"loss": loss, "tensors": tensors, "steps": steps}


def gradient_start(rank: int, world_size: int, pretrained: Path) -> dict[str, tuple[Tensor, ...]]:
    """V at InRank's start, and the gradients at the weights that it starts from and at drawn ones."""
    elsewhere = dense_gradients(build("inrank", LAYOUTS["TP1 DP1"]))
    session = build("inrank", LAYOUTS["TP1 DP1"], pretrained=pretrained)
    gradients = dense_gradients(session)
    session.start()
    layers = session.engine.layers
    return {name: (layer.V.detach(), gradients[name], elsewhere[name]) for name, layer in layers.items()}


def refusal(rank: int, world_size: int, settings: dict, pretrained: Path) -> str:
    try:
        build("lora", LAYOUTS["TP1 DP1"], pretrained=pretrained, **settings)
    except UserError as error:
        return str(error)
    return "accepted"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """From layout, precision and settings to the loss, the checkpoint's folder and its tensors."""
    done = {}

    def trained(layout: str = "TP1 DP1", precision: str = "fp32", **settings) -> tuple[float, Path, dict]:
        key = (layout, precision, *settings.items())
        if key not in done:
            root, where = tmp_path_factory.mktemp("dense"), LAYOUTS[layout]
            flags = settings | ({precision: True} if precision != "fp32" else {})
            [loss, *others] = run_ranks(train_dense, where.world_size, where, flags, root)
            assert others == [loss] * len(others)
            folder = root / f"step_{STEPS:08d}"
            checkpoint = Checkpoint(folder)
            done[key] = loss, folder, dict(checkpoint.tensors(checkpoint.names))
        return done[key]

    return trained


def effective(tensors: dict[str, Tensor], layer: str) -> Tensor:
    """``W``, ``W0 + U V`` or ``U V`` of a linear, FP32."""
    product = tensors[f"{layer}.U"] @ tensors[f"{layer}.V"] if f"{layer}.U" in tensors else 0
    weight = tensors.get(f"{layer}.weight")
    return product if weight is None else weight.float() + product


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("layout", ["TP1 DP1", "TP2 SP DP2"])
@pytest.mark.parametrize("method", STARTS)
def test_initial_loss_matches_the_pretrained_dense_model(dense, method, layout, precision):
    loss, folder, there = dense(layout, precision)
    name, settings = STARTS[method]
    settings = settings | ({precision: True} if precision != "fp32" else {})
    where = LAYOUTS[layout]
    for result in run_ranks(start, where.world_size, name, where, settings, folder):
        assert result["loss"] == pytest.approx(loss, rel=TOLERANCES[precision])
        assert not any(result["steps"].values())
        here = result["tensors"]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    for key in [key for key in there if not key.endswith(("exp_avg", "exp_avg_sq"))]:
        layer = key.removesuffix(".weight")
        if f"{layer}.U" not in here or name in ("lora", "relora"):  # U = 0
            assert torch.equal(here[key].float(), there[key].to(dtype).float()), key
        else:
            atol = 1e-6 if precision == "fp32" else 2e-3
            torch.testing.assert_close(effective(here, layer), there[key], rtol=0, atol=atol)
    moments = [key for key in here if key.endswith(("exp_avg", "exp_avg_sq"))]
    assert moments and not any(here[key].any() for key in moments)


def test_pretrained_weights_load_on_another_layout(dense):
    loss, folder, _ = dense("TP1 DP1", "fp32")
    for result in run_ranks(start, 2, "relora", LAYOUTS["TP2 SP"], {}, folder):
        assert result["loss"] == pytest.approx(loss, rel=2e-6)


def test_fixed_rank_truncates_the_weights(dense):
    _, folder, there = dense("TP1 DP1", "fp32")
    here = run_ranks(start, 1, "fixed-rank", LAYOUTS["TP1 DP1"], {}, folder)[0]["tensors"]
    for layer in [key.removesuffix(".U") for key in here if key.endswith(".U")]:
        u, s, vt = torch.linalg.svd(there[f"{layer}.weight"].double(), full_matrices=False)
        best = (u[:, :15] * s[:15]) @ vt[:15]
        torch.testing.assert_close(effective(here, layer).double(), best, rtol=0, atol=1e-6)


def test_inrank_starts_from_the_gradient_at_these_weights(dense):
    _, folder, _ = dense("TP1 DP1", "fp32")
    others = []
    for name, (v, *gradients) in run_ranks(gradient_start, 1, folder)[0].items():
        leading = torch.stack([torch.linalg.svd(gradient).Vh[0].float() for gradient in gradients])
        here, elsewhere = torch.cosine_similarity(v[0], leading).abs().tolist()
        assert here > 0.99999, name
        others.append(elsewhere)
    assert min(others) < 0.99  # else a start at drawn weights would have passed


@pytest.mark.parametrize(("model", "source"), [("llama", "fused"), ("llama", "separate"), ("gpt2", "fused")])
def test_separate_qkv_loads_from_fused_and_separate(dense, model, source):
    layout = "TP2 SP DP2" if model == "llama" else "TP1 DP1"
    loss, folder, there = dense(layout, model_type=model, **(SEPARATE if source == "separate" else {}))
    settings = {**SEPARATE, "model_type": model, "rank": 8}
    here = None
    for result in run_ranks(start, LAYOUTS[layout].world_size, "lora", LAYOUTS[layout], settings, folder):
        assert result["loss"] == pytest.approx(loss, rel=2e-6)
        here = result["tensors"]
    for layer in range(SIZES["num_layers"]):
        qkv = f"decoder.layers.{layer}.self_attention.linear_qkv"
        for part in "qkv":
            for leaf in ("weight", "bias") if model == "gpt2" else ("weight",):
                expected = there.get(f"{qkv}.{part}.{leaf}")
                if source == "fused":
                    expected = rows_of(there[f"{qkv}.{leaf}"], part, layout=HEADS)
                assert torch.equal(here[f"{qkv}.{part}.{leaf}"], expected)


def start_and_go_on(rank: int, world_size: int, layout: Layout, settings: dict, padded: Path) -> list[float]:
    """Losses of a model that starts from the weights, and of one that goes on from them."""
    started = build("dense", layout, pretrained=padded, **settings).start().fixed_loss()
    session = build("dense", layout, **settings)
    checkpoint = Checkpoint(padded)
    source = WithoutSpareRows(checkpoint, vocab_size=session.engine.factory.vocab_size)
    load_engine(session.engine, {}, source, weights_only=True)
    return [started, session.fixed_loss()]


@pytest.mark.parametrize(("layout", "settings"), [("TP1 DP1", {}), ("TP2 SP DP2", LLAMA)])
def test_vocabulary_padding_rows_are_dropped(dense, tmp_path, layout, settings):
    """With a tied head and one of its own, full and sharded over the ranks."""
    loss, _, there = dense(layout, "fp32", **settings)
    writer = CheckpointWriter(tmp_path, STEPS)
    for name, tensor in there.items():
        if name.endswith(("exp_avg", "exp_avg_sq")):
            continue
        spare = 9.0 * torch.ones(47, *tensor.shape[1:]) if name in OF_THE_VOCABULARY else tensor[:0]
        writer.add(name, torch.cat([tensor, spare]))
    padded = writer.publish({"step": STEPS, "engine": {"factors": {}}})
    for losses in run_ranks(start_and_go_on, LAYOUTS[layout].world_size, LAYOUTS[layout], settings, padded):
        assert losses == pytest.approx([loss, loss], rel=2e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_layers": 1}, ["model: 12 (", "decoder.layers.1.", "there, absent here"]),
        ({"num_layers": 3}, ["model: 12 (", "decoder.layers.2.", "is absent there"]),
        ({"hidden_size": 32}, ["embedding.word_embeddings.weight is [500, 64] there, [500, 32] here"]),
        (
            {"seq_length": 16},
            ["model: 1 (", "embedding.position_embeddings.weight is [32, 64] there, [16, 64]"],
        ),
        ({"ffn_hidden_size": 128}, ["decoder.layers.0.mlp.linear_fc1.bias is [256] there, [128] here"]),
        (LLAMA, ["decoder.layers.0.mlp.linear_fc1.weight is [256, 64] there, [384, 64] here"]),
    ],
)
def test_weights_of_another_model_are_refused(dense, settings, words):
    _, folder, _ = dense("TP1 DP1", "fp32")
    message = run_ranks(refusal, 1, settings, folder)[0]
    assert all(word in message for word in [f"pretrained_checkpoint {folder}", *words]), message
    assert message.count("\n") == 0

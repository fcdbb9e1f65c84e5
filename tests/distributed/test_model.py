"""The whole GPT: against Hugging Face's GPT-2 with the same weights, on one rank and in shards."""

import functools
import math

import pytest
import torch

from tests.distributed.gpt_parity import (
    LAYERS,
    LENGTH,
    PADDED,
    VOCABULARY,
    by_kind,
    drawn_again,
    forward_and_backward,
    hugging_face,
    initial_weights,
    sample,
)
from tests.harness import run_ranks

STRUCTURES = {"dense": None, "W0+UV": True, "UV": False}


@functools.cache
def result(ranks: int, structure: str, sequence_parallel: bool = True, padded: int = PADDED) -> dict:
    return run_ranks(forward_and_backward, ranks, STRUCTURES[structure], sequence_parallel, padded)[0]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_loss_and_gradients_match_hugging_face(structure):
    """Proves embedding, attention, norms, activation, residuals, tying, and the loss, all at once."""
    ours = result(1, structure)
    model = hugging_face(ours["weights"])
    tokens, labels = sample()
    logits = model(tokens).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    losses.mean().backward()
    torch.testing.assert_close(ours["losses"], losses.detach(), rtol=1e-5, atol=0)
    gradients = dict(model.named_parameters())
    pairs = [
        ("embedding.word_embeddings.weight", gradients["transformer.wte.weight"].grad),
        ("embedding.position_embeddings.weight", gradients["transformer.wpe.weight"].grad),
    ]
    for i in range(LAYERS):
        block = f"transformer.h.{i}"
        pairs += [
            (f"decoder.layers.{i}.input_layernorm.weight", gradients[f"{block}.ln_1.weight"].grad),
            (f"decoder.layers.{i}.mlp.linear_fc2.bias", gradients[f"{block}.mlp.c_proj.bias"].grad),
        ]
        own = by_kind(ours["gradients"][f"decoder.layers.{i}.self_attention.linear_qkv.weight"])
        torch.testing.assert_close(
            own, gradients[f"{block}.attn.c_attn.weight"].grad.t(), rtol=1e-4, atol=1e-7
        )
        if structure != "dense":
            fc1 = f"decoder.layers.{i}.mlp.linear_fc1"
            product = gradients[f"{block}.mlp.c_fc.weight"].grad.t()
            pairs += [
                (f"{fc1}.U", product @ ours["weights"][f"{fc1}.V"].t()),
                (f"{fc1}.V", ours["weights"][f"{fc1}.U"].t() @ product),
            ]
    for name, expected in pairs:
        torch.testing.assert_close(
            ours["gradients"][name][: len(expected)],
            expected,
            rtol=1e-4,
            atol=1e-7,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("parallel", [True, False], ids=["SP", "without SP"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_sharded_model_matches_serial(structure, ranks, parallel):
    """Losses, logits and every gradient of one rank, from two and four."""
    one, many = result(1, structure), result(ranks, structure, parallel)
    torch.testing.assert_close(many["losses"], one["losses"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(many["logits"], one["logits"], rtol=1e-4, atol=1e-5)
    assert many["gradients"].keys() == one["gradients"].keys()
    for name, expected in one["gradients"].items():
        assert (many["gradients"][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_vocabulary_padding_is_never_predicted(ranks):
    """Never a probability, never a gradient, and the loss of a model without padding."""
    padded, exact = result(ranks, "dense"), result(1, "dense", padded=VOCABULARY)
    assert padded["logits"].shape == (3, LENGTH, PADDED)
    assert (padded["logits"][..., VOCABULARY:] == -math.inf).all()
    assert torch.isfinite(padded["logits"][..., :VOCABULARY]).all()
    torch.testing.assert_close(padded["losses"], exact["losses"], rtol=1e-5, atol=1e-6)
    embedding, gradient = (
        padded[kind]["embedding.word_embeddings.weight"] for kind in ("weights", "gradients")
    )
    assert embedding.shape[0] == gradient.shape[0] == PADDED
    assert not embedding[VOCABULARY:].any()
    assert not gradient[VOCABULARY:].any()
    assert torch.isfinite(gradient).all()


@functools.cache
def start(ranks: int, structure: str = "dense", padded: int = PADDED) -> dict:
    return run_ranks(initial_weights, ranks, STRUCTURES[structure], padded)[0]


def assert_same_start(first: dict, second: dict) -> None:
    for name in first.keys() & second.keys():
        rows = VOCABULARY if "word_embeddings" in name else len(first[name])
        assert torch.equal(first[name][:rows], second[name][:rows]), name


@pytest.mark.parametrize("ranks", [2, 4])
def test_initial_weights_do_not_depend_on_the_number_of_ranks(ranks):
    """The story of adapters that were drawn with the fan-in of a shard, so that their standard deviation
    doubled at tensor parallelism 4 (NVIDIA-NeMo/Megatron-Bridge issue 5840).
    """
    assert start(ranks).keys() == start(1).keys()
    assert_same_start(start(ranks), start(1))


def test_initial_weights_do_not_depend_on_the_padding():
    assert_same_start(start(1, padded=VOCABULARY), start(1))


def test_initial_weights_do_not_depend_on_factorisation():
    """W0 is the dense model's weight, and every other parameter its own."""
    dense, both, factors = start(1), start(2, "W0+UV"), start(1, "UV")
    assert dense.keys() <= both.keys()
    assert_same_start(dense, both)
    assert_same_start(dense, factors)
    assert not any(value.any() for name, value in factors.items() if name.endswith((".U", ".V")))


def test_initial_weight_matches_the_dense_model():
    for name, value in run_ranks(drawn_again, 1)[0].items():
        assert torch.equal(start(1)[name], value), name


def test_residual_outputs_are_scaled_at_initialisation():
    """By sqrt(2 layers), as GPT-2; everything else has the configured deviation, biases are 0 and norms 1."""
    for name, value in start(1).items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "layernorm" in name:
            assert (value == 1).all(), name
        else:
            residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            expected = 0.05 / math.sqrt(2 * LAYERS) if residual else 0.05
            drawn = value[:VOCABULARY] if "word_embeddings" in name else value
            assert drawn.std().item() == pytest.approx(expected, rel=0.1), name

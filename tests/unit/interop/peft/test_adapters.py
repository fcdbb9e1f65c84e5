"""A first-phase or LoRA model as base and adapter: PEFT computes what the run's own model computes."""

import json

import pytest
from safetensors import safe_open

from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.gpt import gpt_forward
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.verify import difference, sample_tokens
from inrank_megatron.interop.huggingface import dense as hf_dense
from inrank_megatron.interop.peft import adapters as peft
from tests.unit.interop.models import VOCABULARY, make_weights

SERVED = {"first phase": 8, "first phase, QKV fused": 8, "first phase, QKV separate": 16}
"""The rank of a padded adapter. The largest rank is 6; GPT-2's three of QKV in one module add up to 14."""
CASES = [("gpt2", name) for name in SERVED] + [("llama", name) for name in SERVED if "separate" not in name]
CASES += [("qwen2", "first phase, QKV fused"), ("qwen3", "first phase, QKV fused")]
TOKENS = sample_tokens(vocab_size=VOCABULARY, positions=24)


def written(folder, weights, **options):
    folder.mkdir()
    peft.write(weights, folder, Options(**options))
    return folder


def ranks_in(folder) -> dict[str, int]:
    """Of the modules in the adapter's file, by name."""
    with safe_open(folder / peft.TENSORS, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    suffix = ".lora_A.weight"
    return {
        name.removesuffix(suffix).removeprefix("base_model.model."): shape[0]
        for name, shape in shapes.items()
        if name.endswith(suffix)
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("family", "structure"), CASES)
def test_peft_logits_match(tmp_path, family, structure, padded):
    weights = make_weights(family, structure)
    folder = written(tmp_path / "adapter", weights, pad_ranks=padded)
    assert peft.matches(folder) and not hf_dense.matches(folder)
    found = difference(gpt_forward(weights)(TOKENS), peft.forward(folder, Options())(TOKENS))
    assert found.is_rounding, found
    config, ranks = json.loads((folder / peft.CONFIG).read_text()), ranks_in(folder)
    assert config["lora_alpha"] == config["r"] == max(ranks.values())
    if padded:
        assert set(ranks.values()) == {SERVED[structure]}
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
    else:
        assert config["rank_pattern"] == config["alpha_pattern"] == ranks


def test_the_base_alone_is_another_model(tmp_path):
    """A guard of this suite: an adapter that PEFT ignores would show."""
    weights = make_weights("gpt2", "first phase")
    folder = written(tmp_path / "adapter", weights)
    base = hf_dense.forward(folder / peft.BASE, Options())
    assert difference(gpt_forward(weights)(TOKENS), base(TOKENS)).largest > 0.1


def test_one_rank_for_all_needs_no_pattern(tmp_path):
    weights = make_weights("gpt2", "first phase", num_layers=1)
    specs = {
        name: spec.__class__(capacity=3, active_columns=3, rank=3) for name, spec in weights.factors.items()
    }
    one = weights.__class__(
        weights.origin, weights.config, VOCABULARY, specs,
        lambda name: weights.read(name)[:, :3] if name.endswith(".U") else
        weights.read(name)[:3] if name.endswith(".V") else weights.read(name),
    )  # fmt: skip
    config = json.loads((written(tmp_path / "adapter", one) / peft.CONFIG).read_text())
    assert (config["r"], config["rank_pattern"]) == (3, {})


@pytest.mark.parametrize(
    ("structure", "reason"), [("second phase", "no W0 .the second phase"), ("dense", "no factors")]
)
def test_a_model_without_a_base_is_refused(tmp_path, structure, reason):
    with pytest.raises(UserError, match=reason):
        written(tmp_path / "adapter", make_weights("gpt2", structure))
    assert not any((tmp_path / "adapter").iterdir())


def test_a_rank_that_no_server_takes_is_refused(tmp_path):
    weights = make_weights("gpt2", "first phase")
    name = next(iter(weights.factors))
    specs = dict(weights.factors) | {
        name: weights.factors[name].__class__(capacity=513, active_columns=513, rank=513)
    }
    large = weights.__class__(weights.origin, weights.config, VOCABULARY, specs, weights.read)
    with pytest.raises(UserError, match="largest rank is 513, servers take at most 512"):
        written(tmp_path / "adapter", large, pad_ranks=True)

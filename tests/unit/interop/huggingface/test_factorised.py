"""The factorised models for transformers: as small as the run's, the same function, and back again."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from inrank_megatron.errors import UserError
from inrank_megatron.interop.convert import check_only, convert
from inrank_megatron.interop.core.gpt import gpt_forward
from inrank_megatron.interop.core.run import open_weights
from inrank_megatron.interop.core.verify import sample_tokens
from inrank_megatron.interop.huggingface import dense as hf_dense
from inrank_megatron.interop.huggingface import factorised as hf_factorised
from inrank_megatron.interop.huggingface import modeling_inrank
from tests.unit.interop.models import (
    CASES,
    FACTORISED,
    GROUPED_CASES,
    OPTIONS,
    SIZES,
    VOCABULARY,
    assert_same,
    make_weights,
    write_run,
)

TOKENS = sample_tokens(vocab_size=VOCABULARY, positions=SIZES["seq_length"])
# The package is installed for the tests, and here it must not be there.
ALONE = """
import sys
sys.modules["inrank_megatron"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def ignore(_line: str) -> None:
    pass


GROUPED_FACTORISED = [case for case in GROUPED_CASES if "phase" in case[1]]


@pytest.mark.parametrize(("family", "structure"), [*FACTORISED, *GROUPED_FACTORISED])
def test_a_run_comes_back_to_the_bit(tmp_path, tokenizer, family, structure):
    weights = make_weights(family, structure, tokenizer=tokenizer)
    source = write_run(weights, tmp_path / "run")
    assert convert(source, tmp_path / "exported", "hf-factorised", OPTIONS, notify=ignore).largest <= 1e-4
    found = convert(tmp_path / "exported", tmp_path / "back", "run", OPTIONS, notify=ignore)
    assert found.largest <= 1e-4
    back = open_weights(tmp_path / "back", OPTIONS)
    assert_same(weights, back)
    assert back.factors == open_weights(source, OPTIONS).factors
    assert (tmp_path / "back/tokenizer/tokenizer.json").is_file()
    numbers = sum(t.numel() for t in load_file(tmp_path / "exported/model.safetensors").values())
    assert numbers == sum(math.prod(shape) for shape in weights.shapes.values())


@pytest.mark.parametrize(("family", "structure"), CASES)
def test_the_model_in_memory(family, structure):
    weights = make_weights(family, structure)
    model = hf_factorised.in_memory(weights)
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    assert (type(model).__module__ == modeling_inrank.__name__) == bool(weights.factors)
    with torch.no_grad():
        own = model(TOKENS).logits
    torch.testing.assert_close(own, gpt_forward(weights)(TOKENS), rtol=0, atol=1e-4)
    if weights.factors:
        assert sum(p.numel() for p in model.parameters()) == sum(map(math.prod, weights.shapes.values()))


@pytest.mark.parametrize(
    ("family", "structure"), [*FACTORISED[2:6:2], *FACTORISED[8:10], *GROUPED_FACTORISED[1:]]
)
def test_generation_with_and_without_a_cache(family, structure):
    model = hf_factorised.in_memory(make_weights(family, structure))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = TOKENS[:, :6]
    with_cache = model.generate(prompt, use_cache=True, **settings)
    assert with_cache.shape == (2, 18)
    assert with_cache.equal(model.generate(prompt, use_cache=False, **settings))


@pytest.mark.parametrize(
    ("family", "structure"), [FACTORISED[3], FACTORISED[5], FACTORISED[8], FACTORISED[9]]
)
def test_transformers_saves_and_loads_it(tmp_path, family, structure):
    """With and without the package, to the bit."""
    model = hf_factorised.in_memory(make_weights(family, structure))
    model.save_pretrained(tmp_path / "saved")
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert type(again) is type(model) and not any(loading.values())
    assert again(TOKENS).logits.equal(model(TOKENS).logits)
    torch.save(TOKENS, tmp_path / "tokens.pt")
    paths = [str(tmp_path / name) for name in ("saved", "tokens.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", ALONE, *paths], check=True, cwd=tmp_path, env=os.environ | {})
    assert torch.load(tmp_path / "logits.pt").equal(model(TOKENS).logits)


def test_the_export_needs_the_package_as_little(tmp_path):
    weights = make_weights("llama", "first phase, QKV fused")
    (tmp_path / "exported").mkdir()
    hf_factorised.write(weights, tmp_path / "exported", OPTIONS)
    torch.save(TOKENS, tmp_path / "tokens.pt")
    paths = [str(tmp_path / name) for name in ("exported", "tokens.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", ALONE, *paths], check=True, cwd=tmp_path)
    reference = gpt_forward(weights)(TOKENS)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), reference, rtol=0, atol=1e-4)
    listed = json.loads((tmp_path / "exported/config.json").read_text())["auto_map"]
    assert listed["AutoModel"] == "modeling_inrank.InRankLlamaModel"
    base = AutoModel.from_pretrained(tmp_path / "exported")
    assert type(base) is modeling_inrank.InRankLlamaModel


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_a_new_model_draws_its_factors(kind):
    """Also ``c_proj``, whose missing weight transformers' own start of GPT-2 would ask for."""
    spec = {"rank": 3, "base": False}
    if kind == "GPT2":
        config = modeling_inrank.InRankGPT2Config(
            n_embd=16, n_layer=1, n_head=2, vocab_size=9, bos_token_id=0, eos_token_id=0,
            factors={"h.0.mlp.c_proj": spec, "h.0.attn.c_attn": {"rank": 3, "base": True}},
        )  # fmt: skip
    else:
        config = modeling_inrank.InRankLlamaConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9, intermediate_size=24,
            factors={"layers.0.mlp.gate_up_proj": spec, "layers.0.self_attn.qkv_proj": spec},
        )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    drawn = {name: p for name, p in model.named_parameters() if name.endswith((".U", ".V"))}
    assert len(drawn) == (4 if kind == "GPT2" else 7)
    assert all(0.01 < p.std() < 0.03 for p in drawn.values())


def test_a_model_without_factors_is_refused(tmp_path):
    source = write_run(make_weights("gpt2", "dense"), tmp_path / "run")
    with pytest.raises(UserError, match=r"has no factorised linear; give --format hf-dense"):
        convert(source, tmp_path / "exported", "hf-factorised", OPTIONS, notify=ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factors": {"h.7.mlp.c_fc": {"rank": 3, "base": True}}}, "factors: h.7.mlp.c_fc: is not a linear"),
        ({"factors": {"h.0.mlp.c_fc": {"rank": "3", "base": True}}}, "must give rank and base"),
        ({"buffers": {"h.0.mlp.c_fc": 3}}, "buffers: h.0.mlp.c_fc: 3: must be"),
        ({"buffers": {"h.9.mlp.c_fc": 1}}, "buffers: h.9.mlp.c_fc: 1: must be"),
        ({"buffers": [1]}, "buffers: buffers"),
        ({"factors": None}, "must give rank and base"),
        ({"factors": {}}, "tensors that differ"),
        ({"separate_qkv": True}, "tensors that differ"),
    ],
)
def test_settings_that_are_not_those_of_the_tensors(tmp_path, change, words):
    hf_factorised.write(make_weights("gpt2", "first phase"), tmp_path, OPTIONS)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"buffers": {}} | change))
    with pytest.raises(UserError, match=words):
        hf_factorised.open_weights(tmp_path, OPTIONS)


def test_both_exports_are_one_model(tmp_path):
    weights = make_weights("llama", "second phase, QKV fused")
    for module, name in ((hf_dense, "dense"), (hf_factorised, "factorised")):
        (tmp_path / name).mkdir()
        module.write(weights, tmp_path / name, OPTIONS)
    assert check_only(tmp_path / "dense", tmp_path / "factorised", OPTIONS).is_rounding


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_static_cache_and_a_compiler_change_nothing(family):
    """``fullgraph``: nothing in the model breaks the graph that a compiler is given."""
    model = hf_factorised.in_memory(make_weights(family, "second phase"))
    ids = torch.tensor([[5, 9, 17]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, **options, use_cache=False)
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(expected, use_cache=False).logits
        torch.testing.assert_close(found, model(expected, use_cache=False).logits, rtol=0, atol=1e-5)

"""Hugging Face's own models: exported, read back, and read as others wrote them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from inrank_megatron.config.loading import OF_LLAMA, flatten, replace
from inrank_megatron.data.tokenizer import load_tokenizer
from inrank_megatron.interop.convert import convert
from inrank_megatron.interop.core import run as run_format
from inrank_megatron.interop.core.gpt import gpt_forward
from inrank_megatron.interop.core.verify import difference, sample_tokens
from inrank_megatron.interop.core.weights import weight_shapes
from inrank_megatron.interop.formats import format_of
from inrank_megatron.interop.huggingface import dense as hf_dense
from inrank_megatron.interop.huggingface import files as hf_files
from inrank_megatron.training.pretrained import choose_pretrained, read_pretrained
from tests.unit.interop.models import (
    CASES,
    GROUPED,
    GROUPED_CASES,
    OPTIONS,
    SIZES,
    VOCABULARY,
    assert_same,
    make_weights,
    write_run,
)

TEXT = "def convert(self):\n    return  'Zürich', 0.25 # …"
TOKENS = sample_tokens(vocab_size=VOCABULARY, positions=SIZES["seq_length"])


def ignore(_line: str) -> None:
    pass


@pytest.mark.parametrize(("family", "structure"), [*CASES, *GROUPED_CASES])
def test_a_run_becomes_a_model_that_transformers_loads(tmp_path, tokenizer, family, structure):
    """The story of a checkpoint converter whose output gave other logits than the model it came from
    (huggingface/transformers issue 12004), because the loading of its keys was never held against a forward
    pass. Here keys are exact in both directions and logits agree.
    """
    source = write_run(make_weights(family, structure, tokenizer=tokenizer), tmp_path / "run")
    target = tmp_path / "exported"
    found = convert(source, target, "hf-dense", OPTIONS, notify=ignore)
    assert found.largest <= 1e-4
    model, loading = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(loading.values())
    written = {"llama 3": "llama", "mistral": "llama"}.get(family, family)
    assert model.config.model_type == written and model.dtype == torch.float32
    reference = gpt_forward(run_format.open_weights(source, OPTIONS))(TOKENS)
    torch.testing.assert_close(model(TOKENS).logits, reference, rtol=0, atol=1e-4)
    assert torch.isfinite(reference).all() and reference.std() > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_padding_of_the_vocabulary_is_left(tmp_path, tokenizer, family):
    """The story of an exporter (NVIDIA-NeMo/Megatron-Bridge issue 5353) that left the rows with which the
    embedding is padded for tensor parallelism in its files, so that their shape contradicted ``vocab_size``.
    """
    source = write_run(make_weights(family, "dense", tokenizer=tokenizer), tmp_path / "run")
    convert(source, tmp_path / "exported", "hf-dense", OPTIONS, notify=ignore)
    values = json.loads((tmp_path / "exported/config.json").read_text())
    tensors = load_file(tmp_path / "exported/model.safetensors")
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    for name in names if family == "llama" else ["transformer.wte.weight"]:
        assert tensors[name].shape[0] == values["vocab_size"] == VOCABULARY


@pytest.mark.parametrize("family", ["gpt2", "llama", *GROUPED])
@pytest.mark.parametrize("structure", ["dense", "dense, QKV separate"])
def test_a_dense_run_comes_back_to_the_bit(tmp_path, tokenizer, family, structure):
    weights = make_weights(family, structure, tokenizer=tokenizer, norm_epsilon=1e-6, rotary_base=500.0)
    source = write_run(weights, tmp_path / "run")
    convert(source, tmp_path / "exported", "hf-dense", OPTIONS, notify=ignore)
    convert(tmp_path / "exported", tmp_path / "back", "run", OPTIONS, notify=ignore)
    back = run_format.open_weights(tmp_path / "back", OPTIONS)
    if structure == "dense":
        assert_same(weights, back)
    convert(tmp_path / "back", tmp_path / "again", "hf-dense", OPTIONS, notify=ignore)
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("exported", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    own = () if family == "gpt2" else OF_LLAMA
    sizes = ("model_type", *SIZES, "norm_epsilon", *own)
    there, here = flatten(weights.config), flatten(back.config)
    assert {name: there[name] for name in sizes} == {name: here[name] for name in sizes}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_tokenizer_goes_along_and_text_is_generated(tmp_path, tokenizer, family):
    weights = make_weights(family, "second phase", tokenizer=tokenizer)
    hf_dense.write(weights, tmp_path, OPTIONS)
    own, auto = load_tokenizer(str(tokenizer)), AutoTokenizer.from_pretrained(tmp_path)
    assert auto(TEXT).input_ids == own.encode(TEXT)
    assert auto.decode(own.encode(TEXT)) == TEXT
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == auto.eos_token_id == own.eod
    ids = torch.tensor([own.encode(TEXT)[:8]])
    generated = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=own.eod)
    assert generated.shape[1] > 8 and generated[:, :8].equal(ids)


def test_a_vocabulary_without_settings_is_made_a_whole_tokenizer(tmp_path, tokenizer):
    """For LLaMA transformers would read vocab.json as a tokenizer of another kind."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer / name, bare)
    (tmp_path / "exported").mkdir()
    hf_dense.write(make_weights("llama", "dense", tokenizer=bare), tmp_path / "exported", OPTIONS)
    auto = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert auto(TEXT).input_ids == load_tokenizer(str(tokenizer)).encode(TEXT)


@pytest.mark.parametrize(("openai_gelu", "name"), [(False, "gelu"), (True, "gelu_new")])
def test_the_activation_goes_both_ways(tmp_path, openai_gelu, name):
    hf_dense.write(make_weights("gpt2", "dense", openai_gelu=openai_gelu), tmp_path, OPTIONS)
    assert json.loads((tmp_path / "config.json").read_text())["activation_function"] == name
    weights = hf_dense.open_weights(tmp_path, OPTIONS)
    assert weights.config.model.openai_gelu == openai_gelu
    assert difference(gpt_forward(weights)(TOKENS), hf_dense.forward(tmp_path, OPTIONS)(TOKENS)).is_rounding


def test_large_models_are_cut_into_files_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_files, "SHARD_BYTES", 60_000)
    weights = make_weights("llama", "dense")
    hf_dense.write(weights, tmp_path, OPTIONS)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 70_000 for path in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored = {name: path.name for path in files for name in load_file(path)}
    assert index["weight_map"] == stored
    assert_same(weights, hf_dense.open_weights(tmp_path, OPTIONS))
    assert difference(gpt_forward(weights)(TOKENS), hf_dense.forward(tmp_path, OPTIONS)(TOKENS)).is_rounding


def gpt2(**settings) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "initializer_range": 0.2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **ends, **settings))


def llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"max_position_embeddings": 24, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **more, **settings))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_of_others_become_runs(tmp_path, family, dtype):
    model = (llama() if family == "llama" else gpt2()).to(dtype)
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    found = convert(tmp_path / "saved", tmp_path / "run", "run", OPTIONS, notify=ignore)
    assert found.is_rounding
    weights = run_format.open_weights(tmp_path / "run", OPTIONS)
    assert weights.config.training.method == "dense" and not weights.factors
    assert all(weights.read(name).dtype == torch.float32 for name in weights.shapes)
    # Not the model at hand: its table of angles has been rounded to BF16 too.
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)(TOKENS).logits
    torch.testing.assert_close(gpt_forward(weights)(TOKENS), reference, rtol=0, atol=1e-4)


SHRUNK = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 24,
    "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 4000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHRUNK, rope_parameters=LLAMA_3, tie_word_embeddings=True, rms_norm_eps=1e-5),
        MistralConfig(**SHRUNK, sliding_window=None, head_dim=12),
        Qwen2Config(**SHRUNK, tie_word_embeddings=True),
        Qwen3Config(**SHRUNK, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    ],
    ids=["llama", "mistral", "qwen2", "qwen3"],
)
def test_random_models_of_the_family_become_runs(tmp_path, config):
    """And come back as a model with the same logits; biases and norms of theirs are not trivial."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(tmp_path / "saved")
    reference = model.eval()(TOKENS).logits
    assert convert(tmp_path / "saved", tmp_path / "run", "run", OPTIONS, notify=ignore).is_rounding
    weights = run_format.open_weights(tmp_path / "run", OPTIONS)
    torch.testing.assert_close(gpt_forward(weights)(TOKENS), reference, rtol=0, atol=1e-4)
    convert(tmp_path / "run", tmp_path / "back", "hf-dense", OPTIONS, notify=ignore)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(back(TOKENS).logits, reference, rtol=0, atol=1e-5)
    assert back.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("method", ["dense", "fixed-rank", "lora", "relora", "inrank", "inrank-efficient"])
@pytest.mark.parametrize("qkv_factors", ["fused", "separate"])
def test_every_method_starts_from_a_converted_model(tmp_path, method, qkv_factors):
    hf_dense.write(make_weights("gpt2", "dense"), tmp_path, OPTIONS)
    weights = hf_dense.open_weights(tmp_path, OPTIONS)
    source = write_run(weights, tmp_path / "run")
    config = replace(
        weights.config, method=method, rank=4, factorised_linears="mlp-attention", qkv_factors=qkv_factors,
        pretrained_checkpoint=str(source),
    )  # fmt: skip
    folder, notes = choose_pretrained(config)
    assert notes == [f"starts from the weights of {folder}, step 0 of method dense"]
    shapes = weight_shapes(config, VOCABULARY, {})
    start = read_pretrained(folder, config)
    start.account(shapes)
    assert all(start(name, shape).shape == shape for name, shape in shapes.items())


@pytest.mark.parametrize("head", ["absent", "a copy of the embedding"])
def test_the_layout_of_the_public_gpt2(tmp_path, tokenizer, head):
    """That file has no ``transformer.`` before its names, and causal masks among its tensors."""
    model = gpt2()
    model.config.save_pretrained(tmp_path)
    tensors = {name.removeprefix("transformer."): t.clone() for name, t in model.state_dict().items()}
    if head == "absent":
        del tensors["lm_head.weight"]
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(24, 24).tril().view(1, 1, 24, 24)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer / name, tmp_path)
    weights = format_of(tmp_path).open_weights(tmp_path, OPTIONS)
    assert weights.config.model.openai_gelu and weights.tokenizer == tmp_path
    reference = model.eval()(TOKENS).logits
    torch.testing.assert_close(gpt_forward(weights)(TOKENS), reference, rtol=0, atol=1e-4)
    found = convert(tmp_path, tmp_path / "run", "run", OPTIONS, notify=ignore)
    assert found.is_rounding
    names = {path.name for path in (tmp_path / "run/tokenizer").iterdir()}
    assert names == {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}

"""What is not a complete model that a run can have is refused by name before anything is written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inrank_megatron.errors import UserError
from inrank_megatron.interop.convert import convert
from inrank_megatron.interop.formats import format_of
from inrank_megatron.interop.huggingface import dense as hf_dense
from tests.unit.interop.models import OPTIONS, make_weights

GPT2 = {
    "activation_function": "relu",
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
    "reorder_and_upcast_attn": True,
    "add_cross_attention": True,
    "tie_word_embeddings": False,
}
LLAMA = {
    "hidden_act": "gelu",
    "num_key_value_heads": 2,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
}
SETTINGS = [("gpt2", *item) for item in GPT2.items()] + [("llama", *item) for item in LLAMA.items()]


@pytest.fixture
def saved(tmp_path):
    """Makes the folder of a model, once for a test."""

    def save(family: str) -> Path:
        folder = tmp_path / family
        folder.mkdir()
        hf_dense.write(make_weights(family, "dense"), folder, OPTIONS)
        return folder

    return save


def change_settings(folder: Path, **changes) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refuse(folder: Path, *words: str) -> None:
    """Opening fails with one line in which these words are."""
    with pytest.raises(UserError) as caught:
        format_of(folder).open_weights(folder, OPTIONS)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("family", "name", "value"), SETTINGS)
def test_settings_that_no_run_has(saved, family, name, value):
    folder = saved(family)
    change_settings(folder, **{name: value})
    shown = "rope_parameters" if name == "rope_parameters" else f"{name} = {value!r}: must "
    refuse(folder, "config.json", shown)


def test_scaling_as_older_files_have_it(saved):
    folder = saved("llama")
    values = json.loads((folder / "config.json").read_text())
    del values["rope_parameters"]
    old = values | {"rope_theta": 700.0, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(old))
    assert hf_dense.open_weights(folder, OPTIONS).config.model.rotary_base == 700
    scaling = {"type": "dynamic", "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(old | {"rope_scaling": scaling}))
    refuse(folder, "rope_scaling", "dynamic")


def test_quantised_weights(saved):
    folder = saved("llama")
    change_settings(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refuse(folder, "quantization_config", "gptq")


def test_invalid_model_settings_are_refused(saved):
    folder = saved("gpt2")
    change_settings(folder, n_embd="wide")
    refuse(folder, "n_embd")
    change_settings(folder, n_embd=32, layer_norm_epsilon=0.0)
    refuse(folder, "norm_epsilon")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tensors_that_are_missing_or_too_many_or_of_another_shape(saved, family):
    folder = saved(family)
    norm = "transformer.h.1.ln_2.weight" if family == "gpt2" else "model.layers.1.input_layernorm.weight"
    change_tensors(folder, lambda tensors: tensors.update(lacking=tensors.pop(norm)))
    refuse(folder, "tensors that differ", f"{norm} is absent there, [32] expected", "lacking is [32] there")
    change_tensors(folder, lambda tensors: tensors.update({norm: tensors.pop("lacking")[:16].clone()}))
    refuse(folder, f"{norm} is [16] there, [32] expected")


def test_a_head_that_is_not_the_embedding(saved):
    folder = saved("gpt2")
    head = torch.zeros(301, 32)
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    refuse(folder, "lm_head.weight differs from wte.weight")


def test_a_table_of_another_model_is_no_buffer(saved):
    """Only what is known to be computed may be left out."""
    folder = saved("llama")
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.attn.bias": torch.ones(2)}))
    refuse(folder, "model.layers.0.attn.bias is [2] there, absent expected")


def test_pickled_weights_are_refused(saved):
    folder = saved("gpt2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, "pytorch_model.bin: a pickle", "save_pretrained()")
    (folder / "pytorch_model.bin").unlink()
    refuse(folder, "holds no *.safetensors")


def test_files_that_are_damaged_or_not_there(saved):
    folder = saved("gpt2")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refuse(folder, "model.safetensors: cannot be read")
    path.write_bytes(content)
    index = {"weight_map": dict.fromkeys(load_file(path), "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hf_dense.open_weights(folder, OPTIONS)
    index["weight_map"]["transformer.wpe.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(folder, "model-00002-of-00002.safetensors: cannot be read")
    index["weight_map"]["transformer.wpe.weight"] = "model.safetensors"
    del index["weight_map"]["transformer.wte.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(folder, "does not list the files next to it")


def test_numbers_of_another_type(saved):
    folder = saved("gpt2")
    change_tensors(folder, lambda tensors: tensors.update({"x": torch.ones(2, dtype=torch.int8)}))
    refuse(folder, "x is of type I8")


def test_other_families_and_no_model_at_all(saved, tmp_path):
    folder = saved("llama")
    change_settings(folder, model_type="mistral")
    with pytest.raises(
        UserError, match=r"is in none of the formats that can be read \(run, peft, hf-dense, hf-factorised"
    ):
        format_of(folder)
    (tmp_path / "a-file").write_text("{}")
    with pytest.raises(UserError, match="a-file: is in none of the formats"):
        format_of(tmp_path / "a-file")
    with pytest.raises(UserError, match="does not exist"):
        convert(tmp_path / "absent", tmp_path / "new", "run", OPTIONS, notify=lambda _line: None)


def test_a_refusal_leaves_nothing(saved, tmp_path):
    folder = saved("llama")
    change_settings(folder, num_key_value_heads=1)
    with pytest.raises(UserError, match="grouped-query attention is not supported"):
        convert(folder, tmp_path / "run", "run", OPTIONS, notify=lambda _line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]

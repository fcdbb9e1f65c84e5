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
from inrank_megatron.interop.huggingface.kinds import LLAMA3
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
    "attention_bias": True,
    "mlp_bias": True,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
}
SETTINGS = [
    *(("gpt2", *item) for item in GPT2.items()),
    *(("llama", *item) for item in LLAMA.items()),
    (
        "llama",
        "rope_parameters",
        {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4} | LLAMA3 | {"low_freq_factor": 2.0},
    ),
    ("qwen2", "use_sliding_window", True),
    ("qwen3", "attention_bias", True),
    ("qwen3", "layer_types", ["full_attention", "sliding_attention"]),
]


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
    shown = name if isinstance(value, dict | list) else f"{name} = {value!r}: must "
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


@pytest.mark.parametrize("base", [None, "1e4"])
def test_a_base_of_the_angles_that_is_no_number(saved, base):
    folder = saved("llama")
    change_settings(folder, rope_parameters={"rope_type": "default", "rope_theta": base})
    refuse(folder, "config.json", f"rope_theta = {base!r}: must be a number")


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
    change_settings(folder, model_type="mixtral", num_local_experts=8)
    with pytest.raises(
        UserError, match=r"is in none of the formats that can be read \(run, peft, hf-dense, hf-factorised"
    ) as caught:
        format_of(folder)
    shown = (
        "model_type = 'mixtral' (a mixture of experts), and of Hugging Face's models gpt2, llama, mistral,"
    )
    assert shown in str(caught.value)
    change_settings(folder, model_type="deepseek_v3", num_local_experts=None, kv_lora_rank=512)
    with pytest.raises(UserError, match=r"model_type = 'deepseek_v3' \(multi-latent attention\)"):
        format_of(folder)
    (tmp_path / "a-file").write_text("{}")
    with pytest.raises(UserError, match="a-file: is in none of the formats"):
        format_of(tmp_path / "a-file")
    with pytest.raises(UserError, match="does not exist"):
        convert(tmp_path / "absent", tmp_path / "new", "run", OPTIONS, notify=lambda _line: None)


def test_a_refusal_leaves_nothing(saved, tmp_path):
    folder = saved("llama")
    change_settings(folder, model_type="mistral", sliding_window=8)
    with pytest.raises(UserError, match="sliding_window = 8: must be None"):
        convert(folder, tmp_path / "run", "run", OPTIONS, notify=lambda _line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]

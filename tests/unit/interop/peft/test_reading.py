"""Any plain LoRA adapter of PEFT is merged into its base as PEFT merges it; others are refused by name."""

import json
from pathlib import Path

import pytest
import torch

from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.gpt import gpt_forward
from inrank_megatron.interop.core.verify import difference, sample_tokens
from inrank_megatron.interop.huggingface import dense as hf_dense
from inrank_megatron.interop.huggingface.model import auto_model
from inrank_megatron.interop.peft import adapters as peft
from tests.unit.interop.models import OPTIONS, VOCABULARY, make_weights

TOKENS = sample_tokens(vocab_size=VOCABULARY, positions=24)
LORAS = {
    "llama": {"target_modules": ["gate_proj", "down_proj", "q_proj"], "r": 3, "lora_alpha": 12},
    "gpt2": {"target_modules": ["c_fc"], "r": 4, "lora_alpha": 2, "use_rslora": True},
    "qwen2": {"target_modules": ["up_proj"], "r": 2, "alpha_pattern": {"layers.1.mlp.up_proj": 7}},
}


def adapter(root: Path, family: str, **settings) -> Path:
    """An adapter with random A and B, made and saved by PEFT, on a base in another folder."""
    from peft import LoraConfig, get_peft_model

    (base := root / "model").mkdir()
    hf_dense.write(make_weights(family, "dense"), base, OPTIONS)
    model = get_peft_model(auto_model(base), LoraConfig(init_lora_weights=False, **settings))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(root / "adapter")
    return root / "adapter"


@pytest.mark.parametrize("family", LORAS)
def test_logits_are_those_of_peft(tmp_path: Path, family: str) -> None:
    folder = adapter(tmp_path, family, **LORAS[family])
    weights = peft.open_weights(folder, OPTIONS)
    found = difference(gpt_forward(weights)(TOKENS), peft.forward(folder, OPTIONS)(TOKENS))
    assert found.is_rounding, found
    base = hf_dense.forward(tmp_path / "model", OPTIONS)
    assert difference(gpt_forward(weights)(TOKENS), base(TOKENS)).largest > 0.1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora = True: plain LoRA is read"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"base_model_name_or_path": "/nowhere"}, "its base '/nowhere' is no folder here"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, settings: dict, words: str) -> None:
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": ""} | settings
    (tmp_path / peft.CONFIG).write_text(json.dumps(values))
    with pytest.raises(UserError, match=words) as raised:
        peft.model_of(tmp_path)
    assert "\n" not in str(raised.value)


def test_tensors_that_fit_no_linear_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = adapter(tmp_path, "llama", **LORAS["llama"])
    tensors = load_file(folder / peft.TENSORS)
    name = next(name for name in tensors if name.endswith(peft.B))
    save_file(tensors | {name: torch.ones(5, 3)}, folder / peft.TENSORS)
    with pytest.raises(UserError, match=r"do not fit its base"):
        peft.open_weights(folder, OPTIONS)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(2)}, folder / peft.TENSORS)
    with pytest.raises(UserError, match=r"lm_head.weight: is no A or B"):
        peft.open_weights(folder, OPTIONS)

"""``AutoModelForCausalLM`` knows the factorised models whatever is imported first, and imports stay cheap."""

import subprocess
import sys

import pytest

ORDERS = {
    "ours first": "import inrank_megatron\nfrom transformers import AutoModelForCausalLM",
    "theirs first": "from transformers import AutoModelForCausalLM\nimport inrank_megatron",
    "theirs first, the name alone": "import transformers\nimport inrank_megatron",
    "ours first, then a base of ours": "import inrank_megatron\nfrom transformers import GPT2Config",
    "ours first, then a base of that": "import inrank_megatron\nimport transformers.modeling_layers",
    "the models themselves": "import inrank_megatron.interop.huggingface.modeling_inrank",
}
KNOWS = """
from transformers import AutoConfig, AutoModelForCausalLM
for kind in ("inrank_gpt2", "inrank_llama"):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 5}
    config = AutoConfig.for_model(kind, **sizes, bos_token_id=0, eos_token_id=0, factors={})
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__module__ == "inrank_megatron.interop.huggingface.modeling_inrank", type(model)
import sys
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("inrank_megatron")]
"""


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("order", ORDERS)
def test_the_models_are_known(order):
    run(ORDERS[order] + KNOWS)


def test_importing_the_package_imports_nothing_heavy():
    run(
        "import sys, inrank_megatron, inrank_megatron.config.cli\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'megatron'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )

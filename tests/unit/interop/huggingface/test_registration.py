"""``AutoModelForCausalLM`` knows the factorised models whatever is imported first, and imports stay cheap."""

import json
import subprocess
import sys

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


# Each order in a fork of one process, which has imported what transformers does and not what is in question:
# that is most of the time that an import takes.
FORKS = """
import json, os, sys, traceback
import accelerate, torch._dynamo, torch._inductor.compile_fx
assert not {"transformers", "inrank_megatron"} & sys.modules.keys()
failed = []
for name, code in json.loads(sys.argv[1]).items():
    if not (child := os.fork()):
        try:
            exec(code, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
print(json.dumps(failed))
"""


def run(code: str, *words: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *words], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def test_the_models_are_known():
    orders = json.dumps({name: order + KNOWS for name, order in ORDERS.items()})
    assert json.loads(run(FORKS, orders)) == []


def test_importing_the_package_imports_nothing_heavy():
    run(
        "import sys, inrank_megatron, inrank_megatron.config.cli\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'megatron'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )

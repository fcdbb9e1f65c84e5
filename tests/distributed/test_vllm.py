"""vLLM, where it is installed, generates what transformers does from the exports of a trained LLaMA."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from inrank_megatron.interop.command import run as convert
from tests.distributed.launches import data_flags, launch
from tools.convert_checkpoint import parse

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (pip install vllm)")

# vLLM's attention on CPUs wants heads of 32 features.
MODEL = "--model-type llama --num-layers 2 --hidden-size 128 --num-attention-heads 4 --num-query-groups 2"
SIZES = "--ffn-hidden-size 256 --seq-length 64 --micro-batch-size 4 --vocab-size 300 --init-method-std 0.2"
COURSE = "--train-iters 12 --switch-iters 6 --inrank --factorised-linears mlp-attention"
NEW = 24
PROMPTS = [[5 + 7 * i, 11, 200 - i, 42] for i in range(6)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    data = data_flags(tmp_path_factory.mktemp("data"))
    flags = f"{MODEL} {SIZES} {COURSE} --tensor-model-parallel-size 1 --save {run}".split()
    ended = launch([*flags, *data], num_procs=1)
    assert ended.process.returncode == 0, ended.stderr
    return run


@pytest.mark.parametrize("kind", ["hf-dense", "hf-factorised"])
def test_its_tokens_are_those_of_transformers(trained, tmp_path, kind):
    folder = tmp_path / kind
    convert(parse([str(trained), str(folder), "--format", kind]))
    command = [
        sys.executable,
        "-m",
        "tests.distributed.vllm_tokens",
        str(folder),
        json.dumps(PROMPTS),
        str(NEW),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    for prompt, found in zip(PROMPTS, json.loads(done.stdout.splitlines()[-1]), strict=True):
        ids = torch.tensor([[*prompt, *found["tokens"]]])
        with torch.no_grad():
            scores = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert scores.argmax(-1).tolist() == found["tokens"]
        own = scores.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        assert torch.allclose(own, torch.tensor(found["logprobs"]), atol=1e-4)

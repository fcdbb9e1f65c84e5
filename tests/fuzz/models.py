"""A whole small model in every format that is read, and what is done with one that a reader has opened."""

import json
from argparse import Namespace
from collections import OrderedDict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from inrank_megatron.checkpoint.verify import MANIFEST, sha256
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.verify import sample_tokens
from inrank_megatron.interop.core.weights import Weights
from inrank_megatron.interop.formats import Format, format_of, forward_of, read_weights
from inrank_megatron.interop.huggingface import dense as hf_dense
from inrank_megatron.interop.huggingface import factorised as hf_factorised
from inrank_megatron.interop.megatron import checkpoint as megatron
from inrank_megatron.interop.megatron.arguments import FAMILIES
from inrank_megatron.interop.peft import adapters as peft
from tests.unit.interop.models import OPTIONS, make_weights, write_run

SMALL = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 12, "seq_length": 8}


@cache
def weights(family: str, structure: str) -> Weights:
    """Of a few kilobytes."""
    return replace(make_weights(family, structure, **SMALL))


def run(root: Path) -> Path:
    return write_run(weights("gpt2", "first phase"), root / "run")


def exported(module: Format, family: str, structure: str):
    """What writes a folder in the format of ``module``."""

    def make(root: Path) -> Path:
        (folder := root / module.NAME).mkdir()
        module.write(weights(family, structure), folder, OPTIONS)
        return folder

    return make


dense = exported(hf_dense, "gpt2", "dense")
llama = exported(hf_dense, "llama", "dense")
factorised = exported(hf_factorised, "llama", "first phase, QKV separate")
adapter = exported(peft, "gpt2", "first phase")
distributed = exported(megatron, "gpt2", "second phase")


def with_arguments(root: Path) -> Path:
    """As Megatron-LM leaves it: its arguments say what the model is."""
    folder = distributed(root)
    (folder / megatron.RUN_RECORD).unlink()
    common = folder / "iter_0000007" / megatron.COMMON
    torch.save({"iteration": 7, "args": _arguments()}, common)
    return folder


def engine(root: Path) -> Path:
    """Of DeepSpeed, ZeRO 1 on two data-parallel ranks."""
    (folder := root / "engine" / "global_step7").mkdir(parents=True)
    (root / "engine" / "latest").write_text("global_step7")
    model = weights("gpt2", "dense")
    module = {name: model.read(name).bfloat16() for name in model.shapes}
    master_weights = torch.cat([tensor.float().flatten() for tensor in module.values()])
    master_weights = torch.cat([master_weights, master_weights.new_zeros(master_weights.numel() % 2)])
    state = {
        "module": module,
        "param_shapes": [OrderedDict((name, tensor.shape) for name, tensor in module.items())],
        "args": _arguments(),
        **{"global_steps": 7, "skipped_steps": 0, "iteration": 7, "mp_world_size": 1, "dp_world_size": 2},
    }
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    for rank, share in enumerate(master_weights.chunk(2)):
        groups = {
            "single_partition_of_fp32_groups": [share.clone()],
            "base_optimizer_state": {"state": {0: {"step": torch.tensor(7.0)}}},
        }
        path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": groups, "dp_world_size": 2}, path)
    return root / "engine"


def authors(root: Path) -> Path:
    """As the InRank authors' program leaves it."""
    h, f, modes = 8, 12, 4
    tensors = {"wte.weight": (30, h), "wpe.weight": (8, h), "ln_f.weight": (h,), "ln_f.bias": (h,)}
    for name in ("ln_1", "ln_2"):
        tensors |= {f"h.0.{name}.weight": (h,), f"h.0.{name}.bias": (h,)}
    for name, out in (("attn.c_attn", 3 * h), ("attn.c_proj", h)):
        tensors |= {f"h.0.{name}.weight": (h, out), f"h.0.{name}.bias": (out,)}
    for name, out, inp in (("mlp.fc1", f, h), ("mlp.fc2", h, f)):
        tensors |= {f"h.0.{name}.A": (modes, inp), f"h.0.{name}.B": (out, modes), f"h.0.{name}.bias": (out,)}
    state = {f"model.transformer.{name}": torch.ones(shape) for name, shape in tensors.items()}
    for name in ("fc1", "fc2"):
        state[f"model.transformer.h.0.mlp.{name}.current_modes_tensor"] = torch.tensor([2.0])
    settings = {"model": {"config": {"n_head": 2}, "mlp_cfg": {"linear1_cfg": {"buffer_modes": 1}}}}
    torch.save({"state_dict": state, "global_step": 9, "hyper_parameters": settings}, root / "last.ckpt")
    return root / "last.ckpt"


def read(path: Path) -> Any:
    """Every tensor is what the model says that it is."""
    _, found = read_weights(path, OPTIONS)
    for name, shape in found.shapes.items():
        assert tuple(found.read(name).shape) == tuple(shape), name
    return found


def read_with_pickles(path: Path) -> Any:
    """The same with the user's leave for what is not data: it is left out, and nothing runs."""
    return read_weights(path, Options(allow_pickle=True))[1].shapes


def compute(path: Path) -> Any:
    """Logits of the right shape, of the format's own software where it has some."""
    module = format_of(path)
    size = 2 if module is peft else read_weights(path, OPTIONS)[1].vocab_size
    tokens = sample_tokens(vocab_size=size, positions=4)
    logits = forward_of(module, path, OPTIONS)(tokens)
    assert logits.shape[:2] == tokens.shape and (module is peft or logits.shape[2] == size)
    return logits


def signed(path: Path) -> None:
    """Write the manifests of a run's checkpoints anew, so that what they name is what is there."""
    for manifest in path.rglob(MANIFEST):
        if not manifest.is_file() or manifest.is_symlink():
            continue
        try:
            listed = json.loads(manifest.read_text())
            for name, entry in listed["files"].items():
                file = manifest.parent / name
                if file.is_file() and not file.is_symlink():
                    entry.update(bytes=file.stat().st_size, sha256=sha256(file))
            manifest.write_text(json.dumps(listed))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue


def _arguments() -> Namespace:
    sizes = {**SMALL, "max_position_embeddings": 8, "norm_epsilon": 1e-5, "init_method_std": 0.02}
    return Namespace(**sizes, **FAMILIES["gpt2"], bias_gelu_fusion=False, vocab_size=301, rotary_base=10000)

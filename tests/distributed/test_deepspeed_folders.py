"""Checkpoint folders of a real DeepSpeed engine, read on one process."""

import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inrank_megatron.config.loading import to_yaml
from inrank_megatron.errors import UserError
from inrank_megatron.inspection.layers import inspect
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.deepspeed import folder as deepspeed_folder
from tests.contract.layouts import Layout
from tests.contract.sessions import VOCABULARY, configuration
from tests.distributed import deepspeed_folders as ranks
from tests.harness import run_ranks

ONE, TP2, DP2, TP2_DP2 = Layout(), Layout(2, 2), Layout(2, 1), Layout(4, 2)


def described(tmp_path: Path, name: str) -> Options:
    (tmp_path / "model.yaml").write_text(to_yaml(configuration(name, ONE)))
    return Options(model_config=tmp_path / "model.yaml", vocab_size=VOCABULARY)


def check(
    tmp_path: Path, name: str, layout: Layout, *, steps: int = 1, what: str = "masters", **settings
) -> Path:
    """Save and read back; every tensor to the bit."""
    folder = tmp_path / "saved"
    saved = run_ranks(
        ranks.save, layout.world_size, name, layout, settings, steps, str(folder), {"iteration": steps}
    )
    saved = saved[0][what]
    weights = deepspeed_folder.open_weights(folder, described(tmp_path, name))
    assert weights.shapes.keys() == saved.keys()
    for key, tensor in saved.items():
        found = weights.read(key)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), key
    assert weights.step == steps
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["inrank-efficient", "llama-inrank-efficient"])
def test_first_phase_fp32_folder_is_read_exactly(tmp_path, stage, name):
    """W0 is frozen: no shard of the optimizer holds it."""
    check(tmp_path, name, TP2_DP2, zero_stage=stage)


@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "bf16"), (2, "bf16"), (3, "bf16"), (1, "fp16"), (3, "fp16")]
)
def test_half_precision_folder_gives_fp32_master_weights(tmp_path, stage, precision):
    check(tmp_path, "lora", TP2_DP2, zero_stage=stage, **{precision: True})


@pytest.mark.parametrize("stage", [2, 3])
def test_mixed_or_missing_files_are_refused(tmp_path, stage):
    tag = check(tmp_path, "lora", TP2_DP2, zero_stage=stage) / "global_step1"
    options = described(tmp_path, "lora")
    shard = tag / "zero_pp_rank_1_mp_rank_01_optim_states.pt"
    shutil.copy(shard, stale := tag / "zero_pp_rank_2_mp_rank_01_optim_states.pt")
    refuse(tag, options, "saved by 2 tensor-parallel ranks x 2 replicas, and there are files of 2 x 3")
    stale.unlink()
    for model in tag.glob("*mp_rank_01_model_states.pt"):
        shutil.copy(model, tag / model.name.replace("mp_rank_01", "mp_rank_02"))
    refuse(tag, options, r"saved by 2 .*, and there are files of 3 x 2")
    for model in tag.glob("*mp_rank_02_model_states.pt"):
        model.unlink()
    shard.rename(tmp_path / "shard")
    refuse(tag, options, r"saved by 2 .* x 2 replicas, and there are files of 2 x 1")
    (tag / shard.name.replace("rank_1_", "rank_3_")).write_bytes(b"")
    refuse(tag, options, r"only files of data-parallel ranks \[0, 3\];")


def refuse(folder: Path, options: Options, match: str) -> None:
    with pytest.raises(UserError, match=match):
        deepspeed_folder.open_weights(folder, options)


def refuse_reading(folder: Path, options: Options, name: str, match: str) -> None:
    weights = deepspeed_folder.open_weights(folder, options)
    with pytest.raises(UserError, match=match):
        weights.read(name)


@pytest.mark.parametrize("stage", [2, 3])
def test_files_of_another_step_are_refused(tmp_path, stage):
    tags = []
    for steps in (1, 2):
        folder = str(tmp_path / f"of-{steps}")
        run_ranks(ranks.save, 4, "lora", TP2_DP2, {"zero_stage": stage}, steps, folder, {"iteration": steps})
        tags.append(Path(folder) / f"global_step{steps}")
    options, (tag, later) = described(tmp_path, "lora"), tags
    files = sorted(path.name for path in tag.iterdir())
    assert len(files) == {2: 6, 3: 8}[stage]
    for name in files:
        shutil.copytree(tag, mixed := tmp_path / "mixed")
        shutil.copy(later / name, mixed)
        quantity = "global_steps" if "model" in name else "the optimizer's step"
        refuse(mixed, options, rf"_states\.pt: {quantity} = .*_states\.pt .*files of several saves are mixed")
        shutil.rmtree(mixed)
    assert not deepspeed_folder.open_weights(tag, options).notes
    for name in files:
        if "optim" in name:
            shutil.copy(later / name, tag)
    if stage == 3:  # which has no working copies to hold them against
        (note,) = deepspeed_folder.open_weights(tag, options).notes
        assert "the optimizer counts 2 updates, the engine 1; " in note
    else:
        name = "decoder.layers.1.mlp.linear_fc1.bias"
        refuse_reading(tag, options, name, f"00_model_states.pt: {name} is not what its FP32 master")


def test_inconsistent_rank_files_are_refused(tmp_path):
    """As the files of other jobs of the same sizes and steps would look."""
    tag = check(tmp_path, "lora", TP2, zero_stage=0) / "global_step1"
    options, path = described(tmp_path, "lora"), tag / "mp_rank_01_model_states.pt"
    state = torch.load(path, weights_only=False)
    weight, bias = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.1.mlp.linear_fc2.bias"

    def plant(**changes: Tensor | None) -> None:
        module = {name: value for name, value in (state["module"] | changes).items() if value is not None}
        torch.save(state | {"module": module}, path)

    plant(**{weight: None})
    refuse(tag, options, rf"01_model.*: 1 \({weight} is absent there, \[128, 64\] in mp_rank_00_model")
    plant(**{"new.weight": torch.ones(2)})
    refuse(tag, options, r"01_model.*: 1 \(new.weight is \[2\] there, absent in mp_rank_00_model")
    plant(**{weight: state["module"][weight][:64]})
    refuse(tag, options, rf"01_model.*: 1 \({weight} is \[64, 64\] there, \[128, 64\] in mp_rank_00_model")
    plant(**{bias: state["module"][bias] + 0.5})
    refuse_reading(
        tag, options, bias, rf"01_model.*: {bias} differs by up to 5.0e-01 from that in mp_rank_00"
    )


def test_missing_optimizer_files_are_refused(tmp_path):
    tag = check(tmp_path, "lora", TP2, zero_stage=2) / "global_step1"
    [shard] = tag.glob("*mp_rank_01_optim_states.pt")
    shard.unlink()
    refuse(tag, described(tmp_path, "lora"), r"optim_states.pt of tensor-parallel ranks \[0\] and .*\[0, 1\]")


def test_half_precision_copies_are_read_where_master_weights_are_unnamed(tmp_path):
    """Without ZeRO DeepSpeed stores FP32 master weights as one nameless tensor."""
    folder = check(tmp_path, "dense", DP2, what="copies", zero_stage=0, bf16=True)
    [note] = deepspeed_folder.open_weights(folder, described(tmp_path, "dense")).notes
    assert "working copies" in note


@pytest.mark.parametrize(("name", "matrix"), [("dense", "weight"), ("inrank-efficient", "U")])
def test_inspection_reads_ranks(tmp_path, name, matrix):
    folder = check(tmp_path, name, DP2, zero_stage=2)
    options = described(tmp_path, name)
    weights, found = deepspeed_folder.open_weights(folder, options), inspect(folder, options)
    assert (found.format, found.step) == ("deepspeed", 1)
    for row in found.layers:
        assert row.columns == min(weights.shapes[f"{row.layer}.{matrix}"])
        assert 1 <= row.rank <= row.columns == len(row.singular_values)


@pytest.mark.parametrize("layout", [ONE, TP2, DP2], ids=["one", "tp2", "dp2"])
@pytest.mark.parametrize("stage", [1, 3])
def test_second_phase_folder_is_read_on_every_layout(tmp_path, stage, layout):
    """After the switch, which makes a new engine; its steps count on."""
    name = "inrank-efficient-attention"
    check(tmp_path, name, layout, steps=3, zero_stage=stage)


@pytest.mark.parametrize("stage", [2, 3])
def test_matches_deepspeed_zero_to_fp32(tmp_path, stage):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = check(tmp_path, "relora", DP2, zero_stage=stage)
    expected = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    weights = deepspeed_folder.open_weights(folder, described(tmp_path, "relora"))
    for name in weights.shapes:
        assert torch.equal(weights.read(name), expected[name][: weights.shapes[name][0]]), name


OLDER = {
    "decoder": "encoder",
    "linear_qkv": "query_key_value",
    "linear_proj": "dense",
    "linear_fc1": "dense_h_to_4h",
    "linear_fc2": "dense_4h_to_h",
    "pre_mlp_layernorm": "post_attention_layernorm",
}


def older(name: str) -> str:
    """Megatron-DeepSpeed's name of a tensor."""
    bare = name.removeprefix("module.")
    return "language_model." + ".".join(OLDER.get(word, word) for word in bare.split("."))


def as_megatron_deepspeed_saves(tag: Path, arguments: Namespace, version: float = 3.0) -> None:
    """Its names, of working copies in nested dictionaries as its ``state_dict_for_save_checkpoint`` makes."""
    for path in tag.glob("*model_states.pt"):
        state = torch.load(path, weights_only=False)
        module = {
            "embedding": {"word_embeddings": {}, "position_embeddings": {}},
            "encoder": {},
            "output_layer": {},
        }
        for name, tensor in state["module"].items():
            part, _, rest = older(name).removeprefix("language_model.").partition(".")
            place = module[part]
            if part == "embedding":
                kind, _, rest = rest.partition(".")
                place = place[kind]
            place[rest] = tensor
        state["module"] = {"language_model": module}
        state["param_shapes"] = [
            {older(name): shape for name, shape in group.items()} for group in state["param_shapes"]
        ]
        state |= {"args": arguments, "checkpoint_version": version}
        torch.save(state, path)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_megatron_deepspeed_names_and_arguments_are_understood(tmp_path, name):
    llama = {"model_type": "llama"} if name == "llama" else {}
    settings = {"zero_stage": 1, "bf16": True, **llama}
    saved = run_ranks(
        ranks.save, 4, "dense", TP2_DP2, settings, 1, str(tmp_path / "saved"), {"iteration": 1}
    )[0]["masters"]
    tag = tmp_path / "saved" / "global_step1"
    model = configuration("dense", ONE, **llama).model
    arguments = Namespace(
        **{size: getattr(model, size) for size in ("num_layers", "hidden_size", "num_attention_heads")},
        ffn_hidden_size=model.ffn_hidden_size, seq_length=32, max_position_embeddings=32,
        layernorm_epsilon=model.norm_epsilon, normalization="rmsnorm" if llama else "layernorm",
        swiglu=bool(llama), use_rotary_position_embeddings=bool(llama), add_position_embedding=not llama,
        add_bias_linear=not llama, bias_gelu_fusion=True, rope_theta=10000, vocab_size=VOCABULARY,
        untie_embeddings_and_output_weights=bool(llama), init_method_std=0.02,
    )  # fmt: skip
    as_megatron_deepspeed_saves(tag, arguments)
    weights = deepspeed_folder.open_weights(tag, Options())
    assert weights.config.model.norm_epsilon == model.norm_epsilon
    assert weights.config.model.openai_gelu is not bool(llama), "its fused GELU is the tanh approximation"
    assert weights.shapes.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(weights.read(key), tensor), key
    path = tag / "mp_rank_00_model_states.pt"
    torch.save(torch.load(path, weights_only=False) | {"checkpoint_version": 1.0}, path)
    refuse(tag, Options(), "checkpoint_version = 1.0: must be at least 2")


def test_model_config_is_read_from_the_folder(tmp_path):
    """Megatron's arguments, as its programs put them next to the weights; without them the user says it."""
    arguments = Namespace(
        num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=256, seq_length=32,
        max_position_embeddings=32, norm_epsilon=1e-5, normalization="LayerNorm", swiglu=False,
        position_embedding_type="learned_absolute", add_bias_linear=True, bias_gelu_fusion=False,
        untie_embeddings_and_output_weights=False, vocab_size=VOCABULARY, rotary_base=10000,
        init_method_std=0.02,
    )  # fmt: skip
    folder = tmp_path / "saved"
    run_ranks(ranks.save, 1, "dense", ONE, {"zero_stage": 1}, 1, str(folder), {"args": arguments})
    weights = deepspeed_folder.open_weights(folder, Options())
    assert weights.vocab_size == VOCABULARY and weights.config.model.ffn_hidden_size == 256
    assert not weights.config.model.openai_gelu

    (bare := tmp_path / "bare").mkdir()
    state = torch.load(folder / "global_step1" / "mp_rank_00_model_states.pt", weights_only=False)
    del state["args"]
    torch.save(state, bare / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="does not say what its model is; give --model-config FILE"):
        deepspeed_folder.open_weights(bare, Options())
    with pytest.raises(UserError, match="512 rows, and how many of them are padding it does not say; give"):
        deepspeed_folder.open_weights(bare, Options(model_config=described(tmp_path, "dense").model_config))

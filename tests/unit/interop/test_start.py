"""Models of other programs as the start of a run: settings, weights, refusals."""

from pathlib import Path

import pytest
import torch

from inrank_megatron.config.cli import parse
from inrank_megatron.errors import UserError
from inrank_megatron.interop.huggingface import dense as hf_dense
from inrank_megatron.interop.huggingface import factorised as hf_factorised
from inrank_megatron.interop.peft import adapters as peft
from inrank_megatron.interop.start import (
    StartTensors,
    fingerprint,
    is_other_program,
    start_settings,
    start_weights,
)
from tests.unit.interop.models import OPTIONS, cached_model, make_weights, write_run


def written(module, folder: Path, weights) -> Path:
    folder.mkdir()
    module.write(weights, folder, OPTIONS)
    return folder


@pytest.mark.usefixtures("no_network")
def test_one_name_gives_architecture_tokenizer_and_revision(tmp_path: Path, tokenizer: Path) -> None:
    folder = cached_model(tmp_path, "qwen3", tokenizer, name="owner/model", revision="a" * 40)
    argv = ["--inrank", "--pretrained-checkpoint", "owner/model", "--train-iters", "500"]
    launch = parse(argv, world_size=1, other_starts=start_settings)
    config, model = launch.config, make_weights("qwen3", "dense").config.model
    assert config.model.model_copy(update={"init_method_std": 0}) == model.model_copy(
        update={"init_method_std": 0}
    )
    assert config.training.pretrained_checkpoint == "owner/model"
    assert config.training.pretrained_revision == "a" * 40
    assert config.data.tokenizer == str(folder)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.min_lr, optimizer.lr_warmup_iters) == (1e-4, 1e-5, 5)
    assert (optimizer.matrix_optimizer, optimizer.factor_optimizer) == ("adamw", "adamw")
    assert launch.notes[0] == (
        "model settings, tokenizer and optimizers from owner/model, whose weights the run starts from"
    )
    assert launch.notes[1].startswith("lr 0.0001, min_lr 1e-05, lr_decay_style cosine, lr_warmup_iters 5: ")
    assert launch.notes[2].startswith("seq_length 24, the longest by default for a model with 24 positions; ")
    given = parse([*argv, "--seq-length", "16"], world_size=1, other_starts=start_settings)
    assert len(given.notes) == 2 and given.config.model.seq_length == 16


def test_weights_are_those_of_the_model(tmp_path: Path, tokenizer: Path) -> None:
    weights = make_weights("llama 3", "dense", tokenizer=tokenizer)
    folder = written(hf_dense, tmp_path / "model", weights)
    tensors = StartTensors(start_weights(str(folder), None))
    assert tensors.names == weights.shapes.keys()
    for name, tensor in tensors.tensors(sorted(tensors.names)):
        assert torch.equal(tensor, weights.read(name)) and tensors.shape(name) == tensor.shape
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    assert torch.equal(tensors.read(name, ((3, 2), (4, 5))), weights.read(name)[3:7, 2:7])


def test_an_adapter_starts_merged(tmp_path: Path, tokenizer: Path) -> None:
    weights = make_weights("gpt2", "first phase", tokenizer=tokenizer)
    folder = written(peft, tmp_path / "adapter", weights)
    assert start_settings(str(folder), None)["tokenizer"] == str(folder / "base")
    got = start_weights(str(folder), None)
    for name in got.shapes:
        torch.testing.assert_close(got.read(name).float(), hf_dense.merged(weights, name), rtol=0, atol=1e-6)


def test_runs_and_absent_paths_are_left_to_others(tmp_path: Path) -> None:
    run = write_run(make_weights("gpt2", "dense"), tmp_path / "run")
    [checkpoint] = (run / "checkpoints").iterdir()
    for path in (run, checkpoint, tmp_path, tmp_path / "absent"):
        assert not is_other_program(str(path)) and start_settings(str(path), None) == {}


def test_a_kind_from_which_no_run_starts_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    factorised = written(hf_factorised, tmp_path / "small", make_weights("gpt2", "second phase"))
    (other := tmp_path / "mixtral").mkdir()
    (other / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 8}')
    for folder, words in (
        (factorised, "format hf-factorised, and a run starts"),
        (other, "a mixture of experts"),
    ):
        with pytest.raises(UserError, match=words) as raised:
            start_settings(str(folder), None)
        assert "\n" not in str(raised.value)


def test_other_values_have_another_fingerprint(tmp_path: Path) -> None:
    weights = make_weights("gpt2", "dense")
    folder = written(hf_dense, tmp_path / "model", weights)
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert fingerprint(folder) != before

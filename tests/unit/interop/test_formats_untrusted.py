"""Folders that are damaged, or made to do harm: one line of error, no code run, nothing lost."""

import io
import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from inrank_megatron.errors import UserError
from inrank_megatron.evaluation.models import find_model
from inrank_megatron.generation.generate import Sampling, continuations
from inrank_megatron.interop.convert import check_only, convert
from inrank_megatron.interop.formats import read_weights
from inrank_megatron.interop.megatron import checkpoint as megatron
from inrank_megatron.interop.peft import adapters as peft
from tests.unit.interop.models import OPTIONS, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def silent(_message: str) -> None:
    """Where a conversion's progress goes."""


def damaged(models, tmp_path, name: str):
    return shutil.copytree(models / name, tmp_path / name)


def settings(folder, file: str = "config.json", **changes) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CODE = """
open({marker!r}, "w")
from transformers import GPT2Config as EvilConfig, GPT2LMHeadModel as EvilModel
"""


def test_code_beside_a_model_never_runs(models, tmp_path, monkeypatch):
    """transformers would ask at standard input; whoever pipes a file there has not agreed to anything."""
    folder, marker = damaged(models, tmp_path, "hf-dense"), tmp_path / "ran"
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    settings(folder, model_type="evil", auto_map=classes)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(UserError) as caught:
        find_model(str(folder), OPTIONS).load(torch.device("cpu"))
    assert "\n" not in str(caught.value) and not marker.exists()


def garbage_weights(folder):
    (folder / "model.safetensors").write_bytes(b"nothing of the kind")


def empty_index(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


def lists_in_the_index(folder):
    index = {"weight_map": {"transformer.wte.weight": ["model.safetensors"]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_that_leads_out(folder):
    (folder / "model.safetensors").rename(folder.parent / "out.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../out.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def endless_settings(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


def weights_from_a_pipe(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def nested_settings(folder):
    (folder / "config.json").write_text("[" * 200_000)


DAMAGE = {
    "garbage for weights": garbage_weights,
    "empty index": empty_index,
    "lists in the index": lists_in_the_index,
    "index that leads out": index_that_leads_out,
    "settings without end": endless_settings,
    "weights from a pipe": weights_from_a_pipe,
    "settings nested without end": nested_settings,
    "no heads": lambda folder: settings(folder, n_head=0),
    "words for sizes": lambda folder: settings(folder, vocab_size="many", n_positions="some"),
    "layers by the million": lambda folder: settings(folder, n_layer=2_000_000),
    "a vocabulary of 10^12": lambda folder: settings(folder, vocab_size=10**12),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_line_to_every_tool(models, tmp_path, damage):
    folder = damaged(models, tmp_path, "hf-dense")
    DAMAGE[damage](folder)
    for use in (
        lambda: find_model(str(folder), OPTIONS).load(torch.device("cpu")),
        lambda: convert(folder, tmp_path / "to", "run", OPTIONS, notify=silent),
    ):
        with pytest.raises(UserError) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "to").exists()


ADAPTERS = {
    "garbage for tensors": lambda folder: (folder / peft.TENSORS).write_bytes(b"?"),
    "no tensors": lambda folder: (folder / peft.TENSORS).unlink(),
    "no settings": lambda folder: (folder / peft.CONFIG).write_text("{}"),
    "no JSON": lambda folder: (folder / peft.CONFIG).write_text("?"),
    "a word for a rank": lambda folder: settings(folder, peft.CONFIG, rank_pattern={"c_fc": "large"}),
    "a base that lies elsewhere": lambda folder: (folder / peft.BASE).rename(folder.parent / "elsewhere"),
}


@pytest.mark.parametrize("damage", ADAPTERS)
def test_a_damaged_adapter_is_one_line(models, tmp_path, damage):
    folder = damaged(models, tmp_path, "peft")
    ADAPTERS[damage](folder)
    with pytest.raises(UserError) as caught:
        check_only(models / "run", folder, OPTIONS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "state",
    [{}, {"module": None}, {"module": {}, "mp_world_size": "x"}, {"module": {7: torch.ones(2)}}],
    ids=str,
)
def test_a_damaged_engine_folder_is_one_line(tmp_path, state):
    torch.save(state, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError) as caught:
        read_weights(tmp_path, OPTIONS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["..", "\udcff\udcfe", "9" * 5000, "[" * 300])
def test_a_pointer_that_says_anything_is_one_line(models, tmp_path, text):
    folder = damaged(models, tmp_path, "megatron")
    (folder / megatron.LATEST).write_text(text, errors="surrogateescape")
    with pytest.raises(UserError):
        read_weights(folder, OPTIONS)


def test_two_conversions_to_one_folder(models, tmp_path):
    """The one that comes second finds the place taken, and leaves what is there alone."""
    target = tmp_path / "to"

    def other(message: str) -> None:
        if not target.exists():
            convert(models / "run", target, "hf-factorised", OPTIONS, notify=silent)

    with pytest.raises(UserError, match="nothing was written there"):
        convert(models / "run", target, "hf-dense", OPTIONS, notify=other)
    assert json.loads((target / "config.json").read_text())["model_type"] == "inrank_gpt2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["to"]


def test_what_a_killed_conversion_left_is_cleared_away_and_nothing_else(models, tmp_path):
    dead, alive = tmp_path / ".to.999999999.partial", tmp_path / f".to.{os.getppid()}.partial"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "weights").write_text("half")
    convert(models / "run", tmp_path / "to", "hf-dense", OPTIONS, notify=silent)
    assert not dead.exists() and (alive / "weights").exists()


def test_targets_that_are_refused_before_anything_is_read(models, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link to a folder").symlink_to(tmp_path / "elsewhere")
    run = damaged(models, tmp_path, "run")
    for target, reason in {
        tmp_path / "file" / "x": "is a file",
        tmp_path / "link": "is a link",
        tmp_path / "link to a folder": "is a link",
        tmp_path / ("x" * 300): "cannot be a folder",
        run / "checkpoints" / "step_00000099": "would look like a checkpoint",
        run: "exists already",
    }.items():
        with pytest.raises(UserError, match=reason):
            convert(run, target, "hf-dense", OPTIONS, notify=silent)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert convert(run, tmp_path.__class__("."), "hf-dense", OPTIONS, notify=silent).is_rounding
    assert (tmp_path / "empty" / "config.json").exists()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(do_sample=True)], ids=["greedy", "drawn"])
def test_no_text_from_weights_that_are_no_numbers(models, sampling):
    """The likeliest of predictions that are no numbers would be some token, and the text look like one."""
    model = find_model(str(models / "hf-dense"), OPTIONS).pretrained()
    with torch.no_grad():
        model.transformer.wte.weight[3] = float("nan")
    with pytest.raises(UserError, match="predictions are not numbers"):
        continuations(model, [1, 2], tokens=3, eod=0, sampling=sampling)


def test_weights_that_are_no_numbers_are_not_converted(models, tmp_path):
    folder = damaged(models, tmp_path, "hf-dense")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wte.weight"][3] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its predictions are not numbers"):
        convert(folder, tmp_path / "to", "run", OPTIONS, notify=silent)
    assert not (tmp_path / "to").exists()


def test_a_model_of_another_kind_names_few_of_its_tensors(models, tmp_path):
    folder = damaged(models, tmp_path, "hf-dense")
    settings(folder, model_type="bert", architectures=["BertModel"])
    with pytest.raises(UserError, match=r"missing keys: .* and \d+ more") as caught:
        find_model(str(folder), OPTIONS).load(torch.device("cpu"))
    assert len(str(caught.value)) < 1500

"""The schema: presets, strict types, messages, and the round trip through YAML."""

from pathlib import Path

import pytest
import torch

from inrank_megatron.config.loading import (
    GPT2_PRESETS,
    PRESETS,
    fields,
    flatten,
    from_flat,
    load,
    replace,
    resolve,
    sections,
    to_yaml,
)
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.growing_rank import largest_update

BASE = {"model_preset": "tiny", "train_iters": 10}


def test_names_are_unique_over_sections_and_described():
    names = [name for model in sections().values() for name in model.model_fields]
    assert len(names) == len(set(names))
    assert all(info.description for info in fields().values())


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_fills_sizes_and_what_follows_from_them(preset):
    model = from_flat({"model_preset": preset, "train_iters": 7}).model
    assert model.model_dump() | PRESETS[preset] == model.model_dump()
    if preset in GPT2_PRESETS:
        assert (model.model_type, model.ffn_hidden_size) == ("gpt2", 4 * model.hidden_size)
    published = PRESETS[preset].get("max_position_embeddings")
    assert model.max_position_embeddings == (published or model.seq_length)


@pytest.mark.parametrize(("width", "inner"), [(64, 192), (192, 512), (512, 1408), (768, 2048)])
def test_a_llama_has_an_mlp_as_large_as_that_of_a_gpt2(width, inner):
    """Three matrices of 8/3 of the width instead of two of 4 times the width, up to whole tiles of 64."""
    model = from_flat(BASE | {"model_type": "llama", "hidden_size": width}).model
    assert model.ffn_hidden_size == inner
    assert 0 <= 3 * inner - 8 * width < 3 * 64


def test_a_presets_mlp_belongs_to_its_width_and_architecture():
    preset = {"model_preset": "llama-60m", "train_iters": 1}
    assert from_flat(preset | {"num_layers": 2}).model.ffn_hidden_size == 1376
    assert from_flat(preset | {"hidden_size": 192}).model.ffn_hidden_size == 512
    assert from_flat(preset | {"model_type": "gpt2"}).model.ffn_hidden_size == 2048
    assert from_flat(preset | {"hidden_size": 192, "ffn_hidden_size": 8}).model.ffn_hidden_size == 8


def test_explicit_sizes_win_over_the_preset_and_carry_through():
    model = from_flat(BASE | {"hidden_size": 64, "seq_length": 32}).model
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (4, 64, 256)
    assert model.max_position_embeddings == 32
    assert from_flat(BASE | {"hidden_size": 64, "ffn_hidden_size": 100}).model.ffn_hidden_size == 100


def test_decay_ends_with_the_run_unless_said_otherwise():
    assert from_flat(BASE).decay_iters == 10
    assert from_flat(BASE | {"lr_decay_iters": 5}).decay_iters == 5


def test_numbers_written_as_yaml_reads_them():
    config = from_flat(BASE | {"lr": "6e-4", "clip_grad": 1, "data_path": [0.3, "a.txt", 0.7, "b.txt"]})
    assert (config.optimizer.lr, config.optimizer.clip_grad) == (6e-4, 1.0)
    assert config.data.data_path == ["0.3", "a.txt", "0.7", "b.txt"]
    assert from_flat(BASE | {"data_path": "a.txt"}).data.data_path == ["a.txt"]


def test_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        from_flat(BASE).optimizer.lr = 1.0


def test_yaml_round_trip_is_exact(tmp_path: Path):
    odd = {
        "lr": 1 / 3,
        "adam_eps": 1e-8,
        "data_path": ["0.5", "ä b.txt"],
        "bf16": True,
        "switch_epochs": 0.5,
        "split": "1,0,0",
        "tensor_model_parallel_size": "auto",
        "tokenizer": "123",
    }
    config = from_flat(BASE | odd)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load(tmp_path / "config.yaml") == config
    assert from_flat(flatten(config)) == config


def test_a_preset_of_inrank_fills_what_is_not_given():
    run = {"method": "inrank-efficient", "threshold": 0.8}
    paper = from_flat(BASE | run | {"inrank_preset": "paper"}).inrank
    assert (paper.rank_criterion, paper.rank_check_interval, paper.truncation) == ("eq7", 1, "plain")
    assert (paper.buffer, paper.threshold, paper.absorb_columns) == (100, 0.8, False)
    released = from_flat(BASE | run | {"inrank_preset": "released", "buffer": 7}).inrank
    assert (released.frozen_base, released.factor_init, released.rank_criterion) == (
        False,
        "kaiming",
        "released",
    )
    assert (released.rank_check_interval, released.rank_check_start, released.buffer) == (25, 200, 7)


def test_a_preset_of_inrank_does_not_reach_other_methods():
    inrank = from_flat(BASE | {"method": "fixed-rank", "rank": 4, "inrank_preset": "released"}).inrank
    assert (inrank.factor_init, inrank.frozen_base, inrank.buffer) == (None, True, None)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_a_preset_is_stored_with_what_it_filled_and_what_overrode_it(tmp_path, preset):
    config = from_flat(BASE | {"method": "inrank", "inrank_preset": preset, "threshold": 0.7, "buffer": 3})
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load(tmp_path / "config.yaml") == config


def test_resolve_fills_what_needs_the_number_of_processes():
    config = from_flat(BASE | {"tensor_model_parallel_size": "auto", "micro_batch_size": 3})
    even, odd = resolve(config, world_size=4), resolve(config, world_size=3)
    assert (even.parallel.tensor_model_parallel_size, even.training.global_batch_size) == (2, 6)
    assert (odd.parallel.tensor_model_parallel_size, odd.training.global_batch_size) == (1, 9)
    assert resolve(even, world_size=2) == even
    assert replace(config, lr=1.0).optimizer.lr == 1.0


BAD = [
    ({"hiden_size": 3}, ["hiden_size", "no such setting", "did you mean hidden_size"]),
    ({"hidden-size": 3}, ["hidden-size", "did you mean hidden_size"]),
    ({"xyzzy": 3, "lrr": 1}, ["xyzzy: no such setting", "lrr", "did you mean lr?", "--help"]),
    ({"model_preset": None}, ["num_layers, hidden_size", "missing", "model_preset (tiny, small"]),
    ({"model_preset": "tny"}, ["model_preset = 'tny'", "'tiny', 'small'", "--model-preset"]),
    ({"train_iters": None}, ["train_iters: is required", "--train-iters"]),
    ({"train_iters": 2.5}, ["train_iters = 2.5: must be a valid integer", "--train-iters"]),
    ({"train_iters": 0}, ["train_iters = 0", "greater than or equal to 1"]),
    ({"num_layers": True}, ["num_layers = True", "integer"]),
    ({"hidden_size": "wide"}, ["hidden_size = 'wide'", "integer"]),
    ({"bf16": 1}, ["bf16 = 1: must be a valid boolean", "leave it out for False"]),
    ({"lr": True}, ["lr = True: must be a valid number", "0.0006"]),
    ({"lr": "fast"}, ["lr = 'fast'", "number"]),
    ({"lr": -1}, ["lr = -1", "greater than or equal to 0"]),
    ({"lr": "nan"}, ["lr = nan", "finite"]),
    ({"threshold": 0}, ["threshold = 0", "greater than 0"]),
    ({"threshold": 1.5}, ["threshold = 1.5", "less than or equal to 1", "0.9"]),
    ({"adam_beta2": 1.0}, ["adam_beta2 = 1.0", "less than 1"]),
    ({"initial_rank": 0}, ["initial_rank = 0", "greater than or equal to 1"]),
    ({"rank_check_interval": 0}, ["rank_check_interval = 0", "greater than or equal to 1"]),
    ({"eval_interval": 0}, ["eval_interval = 0", "greater than or equal to 1"]),
    ({"method": "inrnk"}, ["method = 'inrnk'", "'inrank-efficient'"]),
    ({"method": "inrank", "inrank_preset": "papers"}, ["inrank_preset = 'papers'", "'paper' or 'released'"]),
    ({"factor_lr_multiplier": 0}, ["factor_lr_multiplier = 0", "greater than 0"]),
    ({"parameter_budget": 1.1}, ["parameter_budget = 1.1", "less than or equal to 1"]),
    ({"resume": "yes"}, ["resume = 'yes'", "'never' or 'auto'"]),
    ({"tensor_model_parallel_size": "many"}, ["tensor_model_parallel_size = 'many'", "'auto'"]),
    ({"tensor_model_parallel_size": 0}, ["tensor_model_parallel_size = 0", "'auto'"]),
    ({"data_path": []}, ["data_path = []", "at least one path"]),
    ({"data_path": {"a": 1}}, ["data_path = {'a': 1}", "list"]),
    ({"lr": -1, "bf16": "no"}, ["lr = -1", "; bf16 = 'no'"]),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[str(change) for change, _ in BAD])
def test_bad_settings_get_one_clear_line(change, words):
    with pytest.raises(UserError) as caught:
        from_flat(BASE | change)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_faulty_source_does_not_blame_what_follows_from_it():
    with pytest.raises(UserError) as caught:
        from_flat({"model_preset": "tny", "train_iters": 2.5})
    assert "num_layers" not in str(caught.value)
    assert "lr_decay_iters" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["name: value"]),
        (b"- 1\n", ["name: value"]),
        (b"lr: [1\n", ["not valid YAML"]),
        (b"seed: 1\nlr: 1\nseed: 2\n", ["not valid YAML", "seed is given 2 times"]),
        (b"seed: 2020-13-45\n", ["not valid YAML", "month must be"]),
        (b"model_preset: tiny\ntrain_iters: 1\ndata_path: ['']\n", ["data_path", "must not be empty"]),
        (b"\xff\xfe\x00", ["cannot be read"]),
        (b"lrr: 1\n", ["lrr: no such setting", "did you mean lr"]),
        (b"model_preset: tiny\ntrain_iters: -1\n", ["train_iters = -1"]),
    ],
)
def test_bad_files_are_named(tmp_path, content, words):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert message.count(str(path)) == 1 and "\n" not in message
    assert all(word in message for word in words), message


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read \(No such file"):
        load(tmp_path / "none.yaml")


def test_what_inrank_gives_its_columns_is_on_record():
    """A default that changes must not change a run that goes on."""

    def columns(**settings):
        inrank = from_flat(BASE | {"method": "inrank"} | settings).inrank
        return inrank.absorb_columns, inrank.new_column_moments

    assert columns() == (False, "zero")
    assert columns(adam_beta2=0.999) == (False, "mean")
    assert columns(pretrained_checkpoint="runs/dense") == (True, "zero")
    assert columns(pretrained_checkpoint="runs/dense", frozen_base=False) == (False, "zero")
    given = {"absorb_columns": True, "new_column_moments": "mean"}
    assert columns(**given) == (True, "mean")
    dense = from_flat(BASE).inrank
    assert (dense.absorb_columns, dense.new_column_moments) == (None, None)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.99), (0.0, 0.5)])
def test_the_largest_update_is_adams(betas):
    """No gradients lead to more, and those that grow as (beta2 / beta1)^t come up to it."""
    beta1, beta2 = betas
    back = torch.arange(2000, dtype=torch.float64)
    first, second = (1 - beta1) * beta1**back, (1 - beta2) * beta2**back

    def update(gradients):
        return ((first * gradients).sum(-1) / (second * gradients**2).sum(-1).sqrt()).abs()

    limit = largest_update(beta1, beta2)
    assert update((beta1 / beta2) ** back) == pytest.approx(limit, rel=1e-9)
    noise = torch.randn(100, 2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert update(noise).max() < limit

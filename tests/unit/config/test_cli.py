"""The command line: flags over the file, one line for a mistake, a readable help."""

import json
import sys
from pathlib import Path

import pytest

from inrank_megatron.config.checks import check
from inrank_megatron.config.cli import parse
from inrank_megatron.config.defaults import find_config
from inrank_megatron.config.loading import fields, flatten, from_flat, load, to_yaml
from inrank_megatron.config.topology import topology_of
from inrank_megatron.errors import UserError

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def run_file(tmp_path):
    def write(**settings):
        path = tmp_path / "run.yaml"
        path.write_text(to_yaml(from_flat({"model_preset": "tiny", "train_iters": 20} | settings)))
        return ["--config", str(path)]

    return write


def flat(argv, world_size=2):
    return flatten(parse(argv, world_size=world_size).config)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_every_shipped_file_passes_the_checks(path, world_size):
    assert path.read_text().startswith("# ")
    launch = parse(["--config", str(path)], world_size=world_size)
    check(launch.config, world_size=world_size)
    topology = topology_of(launch.config, world_size=world_size, vocab_size=50257)
    assert load(path).training.global_batch_size in (topology.global_batch_size, None)


@pytest.mark.parametrize("world_size", [*range(1, 17), 64])
def test_the_quickstart_takes_any_number_of_processes(world_size):
    config = parse([], world_size=world_size).config
    topology = topology_of(config, world_size=world_size)
    assert topology.tensor_model_parallel_size == (2 if world_size % 2 == 0 else 1)
    assert topology.global_batch_size == 16 * topology.data_parallel_size


def test_no_argument_is_the_quickstart():
    launch = parse([], world_size=4)
    assert launch.config_path == find_config("quickstart.yaml")
    assert launch.config.parallel.tensor_model_parallel_size == 2
    assert parse([], world_size=3).config.parallel.tensor_model_parallel_size == 1
    assert (launch.config.training.method, launch.dry_run, launch.deepspeed_config) == ("dense", False, None)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--inrank", "--switch-iters", "300"], "train_iters: from {file}"),
        (["--global-batch-size", "7"], "micro_batch_size: from {file}"),
        (["--tensor-model-parallel-size", "3"], "num_attention_heads: from model_preset tiny"),
        (["--inrank", "--buffer", "192"], "initial_rank: from the defaults"),
        (["--lr-warmup-iters", "300", "--train-iters", "260"], None),
    ],
)
def test_an_error_about_a_setting_that_nobody_gave_names_its_origin(argv, named, monkeypatch):
    """Of the quickstart, which a user may not know to be in force."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        launch = parse(argv, world_size=3)
        with launch.naming_origins():
            check(launch.config, world_size=3)
    if named is None:
        assert "quickstart" not in str(error.value)
    else:
        assert str(error.value).endswith(f" ({named.format(file='configs/quickstart.yaml')})")


def test_run_continues_with_its_own_file(tmp_path):
    """Without ``--config`` the defaults of a resumed run are its own, not the quick start's."""
    (tmp_path / "config.yaml").write_text(
        "model_preset: tiny\ntrain_iters: 7\nmicro_batch_size: 3\nlr: 0.5\n"
    )
    save = ["--save", str(tmp_path)]
    assert flat([*save, "--resume", "auto"])["train_iters"] == 7
    assert flat([*save, "--resume", "5", "--train-iters", "9"])["train_iters"] == 9
    assert flat(save)["train_iters"] == 260
    assert flat(["--save", str(tmp_path / "new"), "--resume", "auto"])["train_iters"] == 260


def test_a_run_that_goes_on_keeps_its_factors(tmp_path):
    """Also where another choice is the default: one matrix for grouped queries, keys and values."""
    grouped = {"model_preset": "smollm2-135m", "train_iters": 9, "method": "fixed-rank", "rank": 8}
    grouped |= {"factorised_linears": "mlp-attention", "qkv_factors": "fused"}
    (tmp_path / "config.yaml").write_text(to_yaml(from_flat(grouped)))
    assert flat(["--save", str(tmp_path), "--resume", "auto"])["qkv_factors"] == "fused"


def test_a_run_from_other_weights_has_their_model(tmp_path):
    """Not the quick start's, unless a file says so; a flag wins."""
    (tmp_path / "config.yaml").write_text(
        to_yaml(from_flat({"model_preset": "llama-60m", "train_iters": 1, "lr": 1}))
    )
    checkpoint = tmp_path / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    for path in (tmp_path, checkpoint):
        got = flat(["--inrank", "--pretrained-checkpoint", str(path), "--seq-length", "64"])
        assert (got["model_type"], got["hidden_size"], got["ffn_hidden_size"]) == ("llama", 512, 1376)
        assert (got["seq_length"], got["lr"], got["train_iters"]) == (64, 1e-4, 260)
    assert flat(["--pretrained-checkpoint", str(tmp_path / "absent")])["hidden_size"] == 192
    (tmp_path / "own.yaml").write_text("model_preset: tiny\ntrain_iters: 5\n")
    own = ["--config", str(tmp_path / "own.yaml"), "--pretrained-checkpoint", str(tmp_path)]
    assert flat(own)["hidden_size"] == 192


def test_installed_package_finds_its_configs(tmp_path, monkeypatch):
    package = tmp_path / "inrank_megatron_configs"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "extra.yaml").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "inrank_megatron_configs", raising=False)
    assert find_config("extra.yaml") == package / "extra.yaml"


def test_flags_win_over_the_file(run_file):
    file = run_file(lr=1e-3, bf16=True, seed=5)
    argv = [*file, "--lr", "2e-4", "--no-bf16", "--tensor_model_parallel_size=2", "--seq-length", "64"]
    got = flat(argv)
    assert (got["lr"], got["bf16"], got["seed"], got["tensor_model_parallel_size"]) == (2e-4, False, 5, 2)
    assert got["seq_length"] == 64


def test_every_setting_has_a_flag_that_sets_it(run_file):
    special = {
        "method": "inrank",
        "model_preset": "llama-60m",
        "model_type": "llama",
        "lr_decay_style": "linear",
        "resume": "auto",
        "rank_criterion": "eq7",
        "eq7_window": "fixed",
        "factorised_linears": "mlp-attention",
        "qkv_factors": "separate",
        "recompute_granularity": "full",
        "truncation": "plain",
        "factor_init": "random",
        "relora_reset": "full",
        "inrank_preset": "paper",
        "final_ranks": "output",
        "split": "1,1,1",
        "optimizer": "sgd",
        "factor_optimizer": "muon",
        "matrix_optimizer": "muon",
        "new_column_moments": "zero",
        "on_loss_spike": "skip",
        "hang_timeout_seconds": "30",
    }
    for name, info in fields().items():
        flag, method = "--" + name.replace("_", "-"), ["--method", "inrank-efficient"]
        if name == "rank" or name.startswith("relora"):
            method = ["--method", "relora"]
        if "bool" in str(info.annotation):
            argv, expected = [f"--no-{flag[2:]}" if info.default else flag], not info.default
        else:
            floating = "float" in str(info.annotation)
            value = special.get(name, "0.5" if floating else "3" if "int" in str(info.annotation) else "word")
            expected = float(value) if floating else int(value) if value.isdigit() else value
            expected = [expected] if "list" in str(info.annotation) else expected
            argv = [flag, value]
        extra = method if name != "method" else []
        assert flat([*run_file(), *extra, *argv], world_size=3)[name] == expected


def test_a_flag_for_the_architecture_replaces_what_follows_from_the_files(run_file):
    """Also from a run folder's file, which has every size."""
    llama = flat([*run_file(), "--model-preset", "llama-130m"])
    assert (llama["model_type"], llama["ffn_hidden_size"], llama["norm_epsilon"]) == ("llama", 2048, 1e-6)
    gpt2 = flat([*run_file(model_preset="llama-130m"), "--model-preset", "tiny"])
    assert (gpt2["model_type"], gpt2["ffn_hidden_size"], gpt2["norm_epsilon"]) == ("gpt2", 768, 1e-5)
    assert flat([*run_file(), "--model-type", "llama"])["ffn_hidden_size"] == 512


def test_lists_take_several_words(run_file):
    got = flat([*run_file(), "--data-path", "0.3", "a.txt", "0.7", "b.txt", "--lr", "1"])
    assert got["data_path"] == ["0.3", "a.txt", "0.7", "b.txt"]


def test_a_source_on_the_command_line_replaces_the_files_choice(run_file):
    file = run_file(dataset="Salesforce/wikitext:wikitext-2-raw-v1")
    got = flat([*file, "--data-path", "a.txt"])
    assert (got["data_path"], got["dataset"]) == (["a.txt"], None)
    file = run_file(train_data_path="t", valid_data_path="v")
    got = flat([*file, "--dataset", "name"])
    assert (got["dataset"], got["train_data_path"], got["valid_data_path"]) == ("name", None, None)
    got = flat([*file, "--valid-data-path", "w"])
    assert (got["train_data_path"], got["valid_data_path"]) == (["t"], ["w"])


def test_a_preset_on_the_command_line_replaces_the_files_sizes(run_file):
    got = flat([*run_file(hidden_size=64), "--model-preset", "small", "--num-layers", "2"])
    sizes = [got[name] for name in ("num_layers", "hidden_size", "ffn_hidden_size", "seq_length")]
    assert sizes == [2, 768, 3072, 1024]


def test_one_way_to_say_when_to_switch_replaces_the_other(run_file):
    got = flat([*run_file(switch_iters=5), "--inrank", "--switch-epochs", "0.5"])
    assert (got["switch_iters"], got["switch_epochs"]) == (None, 0.5)


def test_a_preset_of_inrank_replaces_the_files_choice_of_what_it_sets(run_file):
    file = run_file(method="inrank", rank_criterion="update", buffer=9, new_column_norm=0.2)
    got = flat([*file, "--inrank-preset", "released", "--threshold", "0.8"])
    assert (got["rank_criterion"], got["buffer"], got["threshold"]) == ("released", 100, 0.8)
    assert got["new_column_norm"] == 0.2


def test_one_way_to_choose_ranks_replaces_the_other(run_file):
    file = run_file(method="warm-start", output_threshold=0.8, switch_patience=3)
    got = flat([*file, "--parameter-budget", "0.4", "--switch-iters", "5"])
    assert (got["output_threshold"], got["parameter_budget"]) == (None, 0.4)
    assert (got["switch_patience"], got["switch_iters"]) == (None, 5)


def test_inrank_is_short_for_the_method(run_file):
    assert flat([*run_file(), "--inrank"])["method"] == "inrank-efficient"
    assert flat([*run_file(method="fixed-rank", rank=4), "--inrank"])["method"] == "inrank-efficient"
    assert flat([*run_file(), "--inrank", "--method", "inrank-efficient"])["method"] == "inrank-efficient"


def test_one_precision_replaces_the_other(run_file):
    got = flat([*run_file(bf16=True), "--fp16"])
    assert (got["bf16"], got["fp16"]) == (False, True)
    assert flat([*run_file(bf16=True), "--no-fp16"])["bf16"]


def test_older_name_of_a_value_is_understood_with_a_notice(run_file):
    older = parse([*run_file(), "--inrank", "--final-ranks", "refound"], world_size=2)
    present = parse([*run_file(), "--inrank", "--final-ranks", "re-estimated"], world_size=2)
    assert older.config == present.config and older.config.inrank.final_ranks == "re-estimated"
    assert set(older.notes) - set(present.notes) == {"final_ranks = refound is called re-estimated now"}


def test_older_name_of_a_value_in_a_stored_run_is_understood(tmp_path):
    config = from_flat({"model_preset": "tiny", "train_iters": 9, "final_ranks": "re-estimated"})
    stored = tmp_path / "config.yaml"
    stored.write_text(to_yaml(config).replace("re-estimated", "refound"))
    assert load(stored) == config


def test_arguments_of_launchers_are_accepted(run_file, tmp_path):
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"steps_per_print": 5}))
    argv = [*run_file(), "--local_rank=1", "--deepspeed", "--deepspeed_config", str(settings), "--dry-run"]
    launch = parse(argv, world_size=2)
    assert (launch.dry_run, launch.deepspeed_config) == (True, {"steps_per_print": 5})
    parse([*run_file(), "--local-rank", "1"], world_size=2)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--hiden-size", "3"], ["--hiden-size: no such flag", "did you mean --hidden-size"]),
        (["--inran"], ["--inran: no such flag", "did you mean --inrank"]),
        (["--learning_rte=1"], ["--learning-rte: no such flag", "--help"]),
        (["--lr"], ["--lr", "expected one argument"]),
        (["--data-path"], ["--data-path", "expected at least one argument"]),
        (["data.txt"], ["data.txt", "--name value"]),
        (["--", "--inrank", "--num-layers", "4"], ["--: this command takes", "leave the -- out"]),
        (["--data-path", "a.txt", "--", "b.txt"], ["--: this command takes", "leave the -- out"]),
        (["--local-rank", "x"], ["--local-rank", "'x'"]),
        (["--bf16=1"], ["--bf16", "'1'"]),
    ],
)
def test_mistyped_flags_end_with_one_line_and_status_2(argv, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(argv, world_size=1)
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert all(word in shown.err for word in words), shown.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--train-iters", "2.5"], ["train_iters = '2.5'", "integer"]),
        (["--train-iters", "-3"], ["train_iters = -3", "greater than or equal to 1"]),
        (["--lr", "fast"], ["lr = 'fast'", "number"]),
        (["--method", "galore"], ["method = 'galore'", "'inrank-efficient'"]),
        (["--inrank", "--method", "dense"], ["--method dense", "--inrank means", "one of the two"]),
        (["--initial-rank", "4"], ["--initial-rank 4", "no effect with method dense", "--inrank"]),
        (["--method", "inrank", "--switch-iters", "4"], ["--switch-iters 4", "method inrank;", "--inrank"]),
        (
            ["--inrank", "--rank", "4"],
            ["--rank 4", "method inrank-efficient", "--method fixed-rank or lora or relora"],
        ),
        (["--config", "none.yaml"], ["none.yaml", "No such file"]),
        (["--deepspeed_config", "none.json"], ["none.json", "No such file", "JSON"]),
    ],
)
def test_bad_values_are_user_errors(argv, words):
    with pytest.raises(UserError) as caught:
        parse(argv, world_size=2)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("content", "word"), [("[1]", "one JSON object"), ("{", "JSON object")])
def test_bad_deepspeed_json_is_refused(tmp_path, content, word):
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(UserError, match=word):
        parse(["--deepspeed_config", str(tmp_path / "ds.json")], world_size=1)


def test_a_mistyped_name_in_the_file_names_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("hiden_size: 3\n")
    with pytest.raises(UserError, match=r"run\.yaml: hiden_size: no such setting, did you mean hidden_size"):
        parse(["--config", str(path)], world_size=1)


def test_help_is_grouped_and_shows_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], world_size=1)
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"\n{group}:\n" in shown for group in ("launch", "model", "optimizer", "inrank", "data"))
    assert "--threshold X" in shown and "[0.9]" in shown
    assert max(map(len, shown.splitlines())) <= 100

"""Every run of ``configs/paper`` trains to its end once it is shrunk: three steps, with the switch or the
merge after the second. Only sizes, lengths and data change; what the files decide beyond them stays.
"""

from pathlib import Path

import pytest
import yaml

from tests.distributed.launches import data_flags, launch, records
from tests.harness import ROOT

FILES = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "configs/paper").glob("*.yaml")}
STEPS, CHANGE = 3, 2
SMALLER = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "train_iters": STEPS,
    "lr_warmup_iters": 1,
    "save_interval": STEPS,
    "eval_interval": STEPS,
    "eval_iters": 1,
}
"""What replaces a file's own values."""
IF_GIVEN = {"rank": 16, "relora_interval": CHANGE, "relora_warmup_iters": CHANGE}
LEFT_OUT = ("model_preset", "dataset", "tokenizer", "switch_epochs")
SCALES = ("lr", "min_lr", "fp16", "relora_interval", "relora_warmup_iters")
"""What else the files of one method and family may differ in."""


def shrunk(name: str) -> dict:
    """The settings of a file, shrunk."""
    found = FILES[name]
    small = {key: value for key, value in found.items() if key not in LEFT_OUT} | SMALLER
    small |= {key: value for key, value in IF_GIVEN.items() if key in found}
    small |= {"switch_iters": CHANGE} if "switch_epochs" in found else {}
    return small | ({"model_type": "llama", "ffn_hidden_size": 128} if name.startswith("llama") else {})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return [*data_flags(tmp_path_factory.mktemp("data")), "--vocab-size", "512"]


def train(name: str, folder: Path, data: list[str], *flags: str) -> Path:
    """The finished run."""
    folder.mkdir()
    path, run = folder / "run.yaml", folder / "run"
    path.write_text(yaml.safe_dump(shrunk(name)))
    done = launch(["--config", str(path), *data, *flags, "--save", str(run)])
    assert done.process.returncode == 0, done.stderr
    assert [record["step"] for record in records(run, "train")] == list(range(1, STEPS + 1))
    return run


@pytest.mark.parametrize("method", ["dense", "fixed_rank", "inrank"])
@pytest.mark.parametrize("precision", [["--no-fp16"], ["--fp16"], ["--no-fp16", "--bf16"]], ids="-".join)
def test_inranks_runs_train(method, precision, tmp_path, data):
    run = train(f"gpt2_small_{method}", tmp_path / "run", data, *precision)
    phases = [record["phase"] for record in records(run, "train")]
    assert (phases[0] != phases[-1]) == (method == "inrank")


def test_reloras_runs_train_from_a_dense_checkpoint(tmp_path, data):
    dense = train("llama_60m_dense", tmp_path / "dense", data)
    start = ["--pretrained-checkpoint", str(dense / "checkpoints" / f"step_{STEPS:08d}")]
    run = train("llama_60m_relora", tmp_path / "relora", data, *start)
    rates = [record["lr"] for record in records(run, "train")]
    assert rates[-1] < shrunk("llama_60m_relora")["min_lr"] < rates[-2], "no warm-up follows the merge"


@pytest.mark.parametrize("name", FILES)
def test_other_sizes_are_the_same_run_once_shrunk(name):
    family, _, method = name.split("_", 2)
    other = f"{family}_{'small' if family == 'gpt2' else '60m'}_{method}"
    first, second = (
        {key: value for key, value in shrunk(one).items() if key not in SCALES} for one in (name, other)
    )
    assert first == second

"""Bad input ends a launch with one line on every rank, before training and before anything is written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from inrank_megatron.data.tokenizer import train_tokenizer
from tests.distributed.launches import TINY, Launch, data_flags, launch

RUN = [*TINY, "--train-iters", "4", "--switch-iters", "2"]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def wrong_tokens(folder: Path) -> list[str]:
    """Tokens of a larger vocabulary than the tokenizer's."""
    train_tokenizer(["some text to learn from"], vocab_size=260).save(folder / "tokenizer")
    builder = IndexedDatasetBuilder(str(folder / "tokens.bin"), dtype=np.int32)
    builder.add_item(torch.arange(5000, dtype=torch.int32))
    builder.end_document()
    builder.finalize(str(folder / "tokens.idx"))
    return ["--data-path", str(folder / "tokens"), "--tokenizer", str(folder / "tokenizer")]


def faults(folder: Path) -> dict[str, list[str]]:
    """What the line must say, and the flags that provoke it; each on one rank."""
    occupied = folder / "occupied"
    (occupied / "plots").mkdir(parents=True)
    (occupied / "thesis.txt").write_text("do not lose me")
    good = data_flags(folder / "data")
    json_file = write(folder / "ds.json", json.dumps({"gradient_clipping": 0.25}))
    return {
        "no such flag, did you mean --hidden-size": ["--hiden-size", "64"],
        "no such setting, did you mean train_iters": [
            "--config",
            write(folder / "c.yaml", "train_iter: 3\n"),
        ],
        "must divide the 1 processes": ["--tensor-model-parallel-size", "2"],
        "global_batch_size = 5": ["--global-batch-size", "5"],
        "initial_rank 2 + buffer 63 = 65": ["--initial-rank", "2", "--buffer", "63"],
        "does not exist": ["--data-path", str(folder / "absent.txt")],
        "is empty": ["--data-path", write(folder / "empty.txt", "")],
        "a sequence needs seq_length + 1": [
            "--data-path",
            write(folder / "short.txt", "Only a few words. " * 5),
        ],
        "token id 4999": wrong_tokens(folder),
        "holds files that are not a run's": [*good, "--save", str(occupied)],
        "cannot be used as run folder": [*good, "--save", str(occupied / "thesis.txt" / "run")],
        "gradient_clipping = 0.25: contradicts": [*good, "--clip-grad", "1", "--deepspeed_config", json_file],
        "DeepSpeed refuses its configuration": [
            *good,
            "--deepspeed_config",
            write(folder / "bad.json", '{"zero_optimization": {"reduce_bucket_sizee": 5}}'),
        ],
    }


@pytest.mark.timeout(600)
def test_bad_input_ends_with_one_line(tmp_path):
    cases = faults(tmp_path)
    run = [*RUN, "--tensor-model-parallel-size", "1"]
    saves = {message: tmp_path / f"run-{number}" for number, message in enumerate(cases)}
    started = {}
    for message, flags in cases.items():
        cache = ["--data-cache-path", str(tmp_path / "cache")]
        started[message] = Launch([*run, *cache, "--save", str(saves[message]), *flags])
    for message, one in started.items():
        with one:
            assert one.wait() != 0, message
        assert message in one.stderr and one.stderr.count("\n") == 1, one.stderr
        progress = ("tokenizing ", "checking ")  # of data, on a slow machine
        assert all(line.startswith(progress) for line in one.stdout.splitlines()), one.stdout
        assert not saves[message].exists(), message
    assert (tmp_path / "occupied" / "thesis.txt").read_text() == "do not lose me"


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_every_rank_reports_the_error(tmp_path, launcher):
    refused = launch([*RUN, "--num-attention-heads", "5"], launcher=launcher, num_procs=2)
    assert refused.process.returncode != 0
    for rank in (0, 1):
        assert f"rank {rank}: error: num_attention_heads = 5: must divide hidden_size = 64" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_unrelated_apex_package_is_refused_in_a_dry_run(tmp_path):
    """On every rank."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    args, script = (
        [*RUN, "--optimizer", "apex-fused-adam", "--dry-run"],
        Path(__file__).with_name("first_path.py"),
    )
    refused = launch(args, num_procs=2, script=script, env={"FIRST_PATH": str(tmp_path)})
    assert refused.process.returncode != 0 and refused.stdout == ""
    for rank in (0, 1):
        line = f"rank {rank}: error: optimizer = 'apex-fused-adam': needs NVIDIA apex, and the `apex`"
        assert line in refused.stderr

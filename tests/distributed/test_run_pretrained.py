"""A run starts from the weights of a dense one, and needs that no more once it has begun."""

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from inrank_megatron.config.loading import load
from inrank_megatron.interop.huggingface import dense as hf_dense
from tests.distributed.launches import TINY, Launch, data_flags, last_step, launch, records
from tests.local_hub import local_hub
from tests.unit.interop.models import OPTIONS, VOCABULARY, make_tokenizer, make_weights

COMMIT = "c" * 40
DENSE = [*TINY[1 : TINY.index("--rank-check-interval")], "--lr-warmup-iters", "2"]
RELORA = ["--method", "relora", "--rank", "8", "--relora-interval", "4", "--relora-warmup-iters", "2"]


def test_relora_and_inrank_start_from_a_dense_run(tmp_path):
    data, dense = data_flags(tmp_path / "data"), tmp_path / "dense"
    common = [*DENSE, *data, "--eval-iters", "2", "--lr", "3e-3"]
    launch([*common, "--train-iters", "30", "--save", str(dense)])
    dense_losses = [record["loss"] for record in records(dense, "train")]
    start = ["--pretrained-checkpoint", str(dense)]

    relora = tmp_path / "relora"
    flags = [*common, *RELORA, *start, "--train-iters", "6", "--save", str(relora)]
    done = launch([*flags, "--tensor-model-parallel-size", "2"], num_procs=2)
    assert done.process.returncode == 0, done.stderr
    assert f"starts from the weights of {dense}" in done.stdout
    assert load(relora / "config.yaml").training.pretrained_checkpoint == str(dense)
    losses = [record["loss"] for record in records(relora, "train")]
    # The data start from zero, so its first batch is the dense run's first, which lowered its loss since.
    assert losses[0] < 0.9 * dense_losses[0]
    assert len(losses) == 6

    refused = launch([*common, *RELORA, "--pretrained-checkpoint", str(relora), "--train-iters", "6"])
    assert refused.process.returncode != 0
    assert "holds factors U, V" in refused.stderr and refused.stderr.count("\n") == 1

    inrank = tmp_path / "inrank"
    flags = ["--inrank", "--rank-check-interval", "4", "--switch-iters", "60", "--train-iters", "64"]
    with Launch([*common, *flags, *start, "--save", str(inrank)]) as started:
        started.until(lambda: last_step(inrank) >= 1, "the first step")
        assert last_step(inrank) < 60
        shutil.rmtree(dense)
        assert started.wait() == 0, started.stderr
    train = records(inrank, "train")
    assert train[0]["loss"] == pytest.approx(losses[0], rel=1e-5)
    assert train[-1]["step"] == 64 and train[-1]["phase"] != train[0]["phase"]


def test_a_model_of_the_hub_starts_in_one_command(tmp_path):
    """The first launch downloads it; no later one asks the hub for anything, which may then be gone."""
    tokenizer = tmp_path / "tokenizer"
    make_tokenizer().save(tokenizer)
    (served := tmp_path / "served" / "owner" / "model").mkdir(parents=True)
    hf_dense.write(make_weights("qwen2", "dense", tokenizer=tokenizer), served, OPTIONS)
    text = tmp_path / "text.txt"
    text.write_text("The castle was built in the year of the great fire. " * 400)
    flags = ["--data-path", str(text), "--train-iters", "6", *RELORA, "--micro-batch-size", "2"]
    flags += ["--data-cache-path", str(tmp_path / "cache"), "--pretrained-checkpoint"]

    def start(name: str, endpoint: str, run: Path, *, ranks: int = 1) -> Launch:
        env = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
        args = [*flags, name, "--save", str(run), "--tensor-model-parallel-size", str(ranks)]
        # Not forked: forks have read HF_HOME already.
        return launch(args, launcher="torchrun" if ranks > 1 else "python", num_procs=ranks, env=env)

    with local_hub(tmp_path / "served", COMMIT) as hub:
        first = start("owner/model", hub.endpoint, tmp_path / "first", ranks=2)
        assert first.process.returncode == 0, first.stderr
        assert hub.sent.count("model.safetensors") == 1 and "tokenizer.json" in hub.sent
        hub.calls.clear()
        second = start("owner/model", hub.endpoint, tmp_path / "second")
        assert second.process.returncode == 0, second.stderr
        assert not hub.calls
    refused = start("owner/absent", hub.endpoint, tmp_path / "third")
    assert refused.process.returncode != 0 and refused.stderr.count("\n") == 1
    assert "owner/absent: is not a folder here and cannot be loaded from the hub" in refused.stderr
    for run, done in ((tmp_path / "first", first), (tmp_path / "second", second)):
        assert f"of owner/model, revision {COMMIT}" in done.stdout
        assert "warms up again, to a low rate" in done.stdout
        stored = load(run / "config.yaml")
        assert stored.training.pretrained_revision == COMMIT and stored.model.query_groups == 1
        assert len(records(run, "train")) == 6
        saved = Tokenizer.from_file(str(run / "tokenizer" / "tokenizer.json"))
        assert saved.get_vocab_size() == VOCABULARY
    losses = [[record["loss"] for record in records(tmp_path / run, "train")] for run in ("first", "second")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

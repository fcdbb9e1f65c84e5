"""Which checkpoint a run may start from."""

from pathlib import Path

import pytest
import torch

from inrank_megatron.checkpoint.folder import Checkpoint
from inrank_megatron.checkpoint.writing import CheckpointWriter
from inrank_megatron.config.loading import from_flat, replace, to_yaml
from inrank_megatron.config.schema import Config
from inrank_megatron.data.tokenizer import train_tokenizer
from inrank_megatron.errors import UserError
from inrank_megatron.training.pretrained import check_tokenizer, choose_pretrained, read_pretrained


@pytest.fixture
def run(tmp_path) -> Path:
    """A dense run with checkpoints of steps 2 and 4, of which nothing but the folders is looked at."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text(to_yaml(from_flat({"model_preset": "tiny", "train_iters": 4})))
    for step in (2, 4):
        save(path, step)
    return path


def save(run: Path, step: int, factors: dict | None = None) -> Path:
    writer = CheckpointWriter(run / "checkpoints", step)
    writer.add("w", torch.ones(3))
    writer.add("w.exp_avg", torch.ones(3))
    for name in factors or {}:
        writer.add(f"{name}.U", torch.ones(4, 3)), writer.add(f"{name}.V", torch.ones(3, 4))
    return writer.publish({"step": step, "engine": {"factors": factors or {}}})


def config_of(path: Path, **changes) -> Config:
    flat = {"model_preset": "tiny", "train_iters": 9, "method": "relora", "rank": 4, **changes}
    return from_flat({**flat, "pretrained_checkpoint": str(path)})


def test_the_newest_whole_checkpoint_of_a_run(run):
    folder, notes = choose_pretrained(config_of(run))
    assert folder == run / "checkpoints" / "step_00000004"
    assert notes == [f"starts from the weights of {folder}, step 4 of method dense"]
    (folder / "index.json").write_text("{}")
    folder, notes = choose_pretrained(config_of(run))
    assert folder == run / "checkpoints" / "step_00000002"
    assert len(notes) == 2 and notes[0].startswith("skipped a broken checkpoint")


def test_a_checkpoint_itself(run):
    older = run / "checkpoints" / "step_00000002"
    folder, _ = choose_pretrained(config_of(older))
    assert folder == older
    weights = read_pretrained(folder, config_of(older))
    assert torch.equal(weights("w", (3,)), torch.ones(3))
    weights.account({"w": (3,)})  # a moment is not a weight
    with pytest.raises(UserError, match=r"model: 1 \(w is \[3\] there, \[4\] here"):
        weights.account({"w": (4,)})


def refuse(config: Config, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_pretrained(config)
    message = str(caught.value)
    assert message.startswith("pretrained_checkpoint: ") and "\n" not in message
    assert message.count("pretrained_checkpoint") == 1
    assert all(word in message for word in words), message


def test_what_is_no_dense_run_is_refused(run, tmp_path):
    refuse(config_of(tmp_path / "absent"), "there is no such folder")
    refuse(config_of(tmp_path), "not a run folder")
    last = run / "checkpoints" / "step_00000004"
    (last / "state.json").unlink()
    refuse(config_of(last), "missing, truncated or altered")
    (run / "checkpoints" / "step_00000002" / "manifest.json").unlink()
    refuse(config_of(run), "none of its checkpoints is complete")
    spec = {"columns": 3, "active": 3, "rank": 3, "base": False, "final": True}
    save(run, 6, factors={"decoder.layers.0.mlp.linear_fc1": spec})
    refuse(config_of(run), "holds factors U, V of 1 linears", "name a run of method dense")


def test_the_same_shapes_may_be_another_function(run):
    refuse(config_of(run, num_attention_heads=2), "num_attention_heads 4 there, 2 here")
    refuse(config_of(run, norm_epsilon=1e-6), "norm_epsilon 1e-05 there, 1e-06 here")


def test_a_node_that_does_not_see_the_folder_says_so(run):
    config = replace(config_of(run), seed=3)
    with pytest.raises(UserError, match="cannot be read on every rank"):
        read_pretrained(run / "checkpoints" / "step_00000099", config)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (257, []),
        (304, ["left out 47 rows of the embedding, which pad its vocabulary"]),
        (256, "has 256 rows, and the tokenizer 257 tokens; .* resize_token_embeddings"),
        (257 + 1025, "has 1282 rows, and the tokenizer only 257 tokens; up to 1024"),
    ],
)
def test_rows_of_the_embedding_beyond_the_tokens(tmp_path, rows, expected):
    """Models are padded, to 50,304 rows for GPT-2's 50,257 tokens; one with fewer rows is another's."""
    writer = CheckpointWriter(tmp_path / "run" / "checkpoints", 1)
    writer.add("embedding.word_embeddings.weight", torch.ones(rows, 3))
    folder, tokenizer = writer.publish({"step": 1}), train_tokenizer([], vocab_size=257)
    if isinstance(expected, list):
        assert check_tokenizer(Checkpoint(folder), tokenizer, own=None) == expected
    else:
        with pytest.raises(UserError, match=expected) as raised:
            check_tokenizer(Checkpoint(folder), tokenizer, own=None)
        assert "\n" not in str(raised.value)

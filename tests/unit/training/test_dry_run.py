"""What a plan refuses as its run would, before any text is read."""

from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from inrank_megatron.config.cli import parse
from inrank_megatron.data.tokenizer import train_tokenizer
from inrank_megatron.errors import UserError
from inrank_megatron.interop.start import start_settings
from inrank_megatron.training.dry_run import print_plan

ROWS = 1500


@pytest.fixture
def model(tmp_path) -> Path:
    """A GPT-2 as transformers saves it, without a tokenizer."""
    sizes = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=32, vocab_size=ROWS)
    GPT2LMHeadModel(sizes).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def plan(model: Path, *flags: str) -> None:
    (model.parent / "text.txt").write_text("some text\n" * 9)
    argv = ["--dry-run", "--pretrained-checkpoint", str(model), "--data-path", str(model.parent / "text.txt")]
    print_plan(parse([*argv, *flags], world_size=1, other_starts=start_settings))


def test_a_tokenizer_that_has_not_the_tokens_of_the_weights(model, capsys):
    small = model.parent / "small"
    train_tokenizer([], vocab_size=257).save(small)
    with pytest.raises(UserError, match=f"its embedding has {ROWS} rows, and the tokenizer only 257 tokens"):
        plan(model, "--tokenizer", str(small))
    assert capsys.readouterr().out == ""

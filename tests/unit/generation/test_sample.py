"""The text that a run shows when it ends."""

import argparse
import json
from pathlib import Path

import pytest

from inrank_megatron.config.schema import DataConfig
from inrank_megatron.data.prepare import prepare
from inrank_megatron.data.tokenizer import train_tokenizer
from inrank_megatron.generation.sample import MOST_PARAMETERS, write_sample
from tests.runs import random_weights, write_run

TEXT = "The parser reads arguments. " + Path(argparse.__file__).read_text()


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT)
    train_tokenizer([TEXT], vocab_size=400).save(folder / "tokenizer")
    cache, tokenizer = str(folder / "cache"), str(folder / "tokenizer")
    data = DataConfig(
        train_data_path=[str(folder / "text.txt")],
        valid_data_path=[str(folder / "text.txt")],
        split="1",
        tokenizer=tokenizer,
        data_cache_path=cache,
    )
    return prepare(data).valid, Path(tokenizer)


def test_a_sample_begins_with_the_first_words_of_the_validation_text(valid, tmp_path):
    file, tokenizer = valid
    settings = {"seq_length": 64, "max_position_embeddings": 64}
    run = write_run(
        tmp_path / "run", random_weights(vocab_size=400, tokenizer=tokenizer, ranks=6, settings=settings)
    )
    assert write_sample(run, file, parameters=1) is None
    record = json.loads((run / "sample.json").read_text())
    assert TEXT.startswith(record["prompt"]) and TEXT[len(record["prompt"])].isspace()
    assert len(record["prompt"].split()) > 3 and record["text"].strip()
    assert (record["temperature"], record["top_p"], record["seed"]) == (0.8, 0.95, 0)


def test_why_there_is_none(valid, tmp_path):
    """It never ends a run that is complete."""
    assert write_sample(tmp_path, None, parameters=1) == "no validation text to begin with"
    assert (
        write_sample(tmp_path, valid[0], parameters=MOST_PARAMETERS + 1)
        == "not made of more than 150 M parameters"
    )
    broken = write_sample(tmp_path, valid[0], parameters=1)
    assert broken.startswith("could not be made (") and "\n" not in broken
    assert not list(tmp_path.iterdir())

"""What tests of evaluation share. Imports of libraries wait: see tests/conftest.py."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 tokens of this project's own English."""
    from inrank_megatron.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([Path(argparse.__file__).read_text()], vocab_size=400).save(folder)
    return folder


@pytest.fixture
def evaluated(tmp_path: Path) -> Iterator[Callable[..., dict]]:
    """Evaluates as the tool does, on one process, and gives its record: ``evaluated(path, "--data", x)``."""
    from inrank_megatron.distributed.process_groups import initialise, shutdown
    from inrank_megatron.evaluation.command import evaluate
    from tools.evaluate import parse

    def run(*words: object) -> dict:
        cache = ("--data-cache-path", str(tmp_path / "cache"))
        return evaluate(parse([*map(str, words), *cache]), parallel)

    parallel = initialise(backend="gloo", tensor_model_parallel_size=1)
    yield run
    shutdown()

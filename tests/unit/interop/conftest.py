"""The tokenizer that all models of these tests have."""

from pathlib import Path

import pytest

from tests.unit.interop.models import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save(folder)
    return folder

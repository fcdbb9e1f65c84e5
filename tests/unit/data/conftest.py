"""What the tests of the data path share. Imports of libraries wait: they read the environment at import,
which the tests' own set-up writes after this file is read."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from inrank_megatron.config.schema import DataConfig

if TYPE_CHECKING:
    from inrank_megatron.data.token_file import TokenFile


@pytest.fixture
def make_file(tmp_path: Path) -> "Callable[..., TokenFile]":
    """A token file of the given sequences, one document each, without words."""
    from inrank_megatron.data.token_store import TokenStore
    from tests.unit.data.texts import write_pair

    def make(*sequences: list[int], name: str = "tokens") -> "TokenFile":
        write_pair(tmp_path / name, *sequences)
        return TokenStore(tmp_path / name, name=name).sequences(0, len(sequences))

    return make


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained tokenizer of 300 tokens."""
    from inrank_megatron.data.tokenizer import train_tokenizer
    from tests.unit.data.texts import prose

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([prose(2000, seed=0)], vocab_size=300).save(folder)
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., DataConfig]:
    """A data section whose cache lies in the test's own folder."""

    def make(**fields: object) -> DataConfig:
        lists = {
            name: [str(word) for word in value] for name, value in fields.items() if isinstance(value, list)
        }
        return DataConfig(
            **{"data_cache_path": str(tmp_path / "cache"), "vocab_size": 300, **fields, **lists}
        )

    return make

"""What is taken from the hub's local cache, and what is said where neither cache nor network has it."""

from pathlib import Path

import pytest

from inrank_megatron.errors import UserError
from inrank_megatron.interop.huggingface.snapshot import revision_of, snapshot
from tests.unit.interop.models import NO_NETWORK, cached_model

pytestmark = pytest.mark.usefixtures("no_network")


def test_what_the_cache_has_is_taken_without_the_network(tmp_path: Path, tokenizer: Path) -> None:
    older = cached_model(tmp_path, "qwen2", tokenizer, name="owner/model", revision="a" * 40)
    newer = cached_model(tmp_path, "qwen2", tokenizer, name="owner/model", revision="b" * 40)
    assert snapshot("owner/model") == newer and revision_of(newer) == "b" * 40
    assert snapshot("owner/model", revision="a" * 40) == older
    assert revision_of(tmp_path) is None


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_copy_without_all_files_is_not_taken(tmp_path: Path, tokenizer: Path, missing: str) -> None:
    folder = cached_model(tmp_path, "gpt2", tokenizer, name="owner/model", revision="a" * 40)
    (folder / missing).unlink()
    with pytest.raises(
        UserError, match=r"owner/model: is not a folder here and cannot be loaded from the hub"
    ):
        snapshot("owner/model")
    if missing == "model.safetensors":
        assert snapshot("owner/model", with_weights=False) == folder


def test_a_copy_without_a_tokenizer_is_taken_where_the_hub_cannot_be_reached(
    tmp_path: Path, tokenizer: Path
) -> None:
    folder = cached_model(tmp_path, "gpt2", tokenizer, name="owner/model", revision="a" * 40)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").unlink()
    assert snapshot("owner/model") == folder


def test_an_unknown_revision_is_one_line(tmp_path: Path, tokenizer: Path) -> None:
    cached_model(tmp_path, "gpt2", tokenizer, name="owner/model", revision="a" * 40)
    with pytest.raises(UserError, match="from the hub at revision v2") as raised:
        snapshot("owner/model", revision="v2")
    assert "\n" not in str(raised.value) and NO_NETWORK.startswith("http")

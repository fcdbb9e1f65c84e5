"""Names that no folder can have are refused in one line."""

from pathlib import Path

import pytest

from inrank_megatron.config.folders import named_folder, named_path
from inrank_megatron.config.loading import from_flat
from inrank_megatron.errors import UserError


def test_names_that_no_folder_can_have(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("~nobody-of-this-name/run", str(tmp_path / "loop" / "run"), str(tmp_path / ("a" * 300))):
        with pytest.raises(UserError, match=r"cannot be a folder \(.*\); choose another --save"):
            named_folder(name, flag="--save")


def test_a_home_of_nobody_is_a_name_like_any_other():
    assert named_path("~nobody-of-this-name/run") == Path("~nobody-of-this-name/run")


def test_any_other_name_is_a_folder_there_or_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert named_folder("~/a/b", flag="--save") == tmp_path / "a" / "b"
    assert named_folder("a b", flag="--save") == Path("a b")


@pytest.mark.parametrize("name", ["save", "data_cache_path", "tokenizer", "pretrained_checkpoint"])
def test_a_name_is_not_empty(name):
    """As of an unset variable of the shell, it would be the working directory."""
    with pytest.raises(UserError, match=f"{name} = '': must not be empty"):
        from_flat({"model_preset": "tiny", "train_iters": 1, name: ""})

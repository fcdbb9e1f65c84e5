"""Models by a name that may be a folder's or the hub's."""

from pathlib import Path

import pytest

from inrank_megatron.errors import UserError
from inrank_megatron.interop.formats import format_of
from inrank_megatron.interop.hub import local_notes, located


def test_a_local_folder_with_a_hub_s_name_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (folder := tmp_path / "gpt2").mkdir()
    with pytest.raises(
        UserError, match=r"of the formats .* local folder .*, not the hub's model of that name"
    ):
        located("gpt2")
    (folder / "config.json").write_text("{}")
    assert located("gpt2") == folder
    assert local_notes("gpt2") == (f"gpt2 is the local folder {folder}, not the hub's model of that name",)
    assert local_notes("./gpt2") == local_notes(str(folder)) == local_notes("gpt3") == ()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_pointers_in_a_model_s_folder_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=rf"{name}: is a Git LFS pointer.* `git lfs pull`"):
            format_of(path)


def test_an_empty_name_is_not_the_working_directory():
    with pytest.raises(UserError, match="an empty path; name a run"):
        located("")

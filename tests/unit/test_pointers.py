"""A pointer of large-file storage is refused by name; whatever only speaks of one is not."""

from pathlib import Path

import pytest

from inrank_megatron.errors import UserError
from inrank_megatron.pointers import refuse_pointer

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (LFS, "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
        (b"/annex/objects/SHA256E-s12--0a1b.txt\n", "is a git-annex pointer, not the file itself"),
        (b"# xet version 0\n\nfilesize = 12\nhash = '0a1b'\n", "is a Xet pointer, not the file itself"),
    ],
)
def test_git_lfs_pointer_is_refused_by_name(tmp_path: Path, content: bytes, expected: str) -> None:
    (path := tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: ") as raised:
        refuse_pointer(path)
    assert expected in str(raised.value)


def test_other_files_pass(tmp_path: Path) -> None:
    (tmp_path / "about.md").write_bytes(b"A file that begins with `" + LFS + b"` is a pointer.")
    (tmp_path / "long.txt").write_bytes(LFS * 10)
    (tmp_path / "empty").touch()
    for name in ("about.md", "long.txt", "empty", "missing", "."):
        refuse_pointer(tmp_path / name)

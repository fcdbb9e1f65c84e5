"""What the words of a data path name: files, folders, patterns, pairs; and what is refused."""

import os
from pathlib import Path

import pytest

from inrank_megatron.data.paths import Found, Prefix, find
from inrank_megatron.errors import UserError
from tests.unit.data.texts import write_pair


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("some text\n")
    return folder


def names(found: Found, folder: Path) -> list[str]:
    paths = [entry.path if isinstance(entry, Prefix) else entry for entry in found.entries]
    return [path.relative_to(folder).as_posix() for path in paths]


def fault(word: object) -> str:
    with pytest.raises(UserError) as raised:
        find(str(word))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_folder_is_all_its_data_in_the_order_of_the_names(tmp_path: Path) -> None:
    data = ["b.txt", "a/2.jsonl", "a/10.jsonl", "a/deep/er/x.parquet", "c.TXT"]
    rest = ["README.md", "a/LICENSE", ".gitattributes", ".git/config", "dataset_infos.json", "sha256sums.txt"]
    make(tmp_path, *data, *rest)
    (tmp_path / "a" / "empty.txt").touch()
    write_pair(tmp_path / "a" / "pair", [1, 2])
    (tmp_path / "a" / "pair.words.npy").touch()
    found = find(str(tmp_path))
    assert names(found, tmp_path) == sorted([*data, "a/pair"])
    assert Prefix(tmp_path / "a" / "pair") in found.entries
    assert found.notes == (
        f"{tmp_path}: 7 files are not data and left out (.git, .gitattributes, README.md, and 4 more)",
    )


def test_pictures_among_notes_are_left_out(tmp_path: Path) -> None:
    """One screenshot in a folder of notes stopped the run; a PDF, which has text, still does."""
    make(tmp_path, "note.md", "img/plan.PNG", "img/photo.jpeg", "logo.svg", "paper.pdf")
    found = find(str(tmp_path))
    assert names(found, tmp_path) == ["note.md", "paper.pdf"]
    assert "3 files are not data and left out (img/photo.jpeg, img/plan.PNG, logo.svg)" in found.notes[0]


def test_folder_without_data_or_of_another_program_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a", "README.md")
    assert "is a folder without data files (README.md)" in fault(tmp_path / "a")
    (tmp_path / "b").mkdir()
    assert "is a folder without data files;" in fault(tmp_path / "b")
    make(tmp_path / "c", "dataset_dict.json", "train/data-00000-of-00001.arrow")
    assert f"give it as --dataset {tmp_path / 'c'}" in fault(tmp_path / "c")


def test_splits_that_a_folder_mixes_are_said(tmp_path: Path) -> None:
    make(tmp_path / "a", "train-00000-of-00002.parquet", "validation-00000-of-00001.parquet")
    [note] = find(str(tmp_path / "a")).notes
    assert "splits train, validation; give each split its own path" in note
    make(tmp_path / "b", "train/1.txt", "test/1.txt")
    assert "splits test, train" in find(str(tmp_path / "b")).notes[0]
    make(tmp_path / "c", "train/1.txt", "trains.txt", "testament.txt", "developers.txt")
    assert find(str(tmp_path / "c")).notes == ()


def test_links_are_followed_once(tmp_path: Path) -> None:
    make(tmp_path / "folder", "a.txt", "sub/b.txt")
    make(tmp_path / "other", "c.txt")
    (tmp_path / "folder" / "sub" / "up").symlink_to(tmp_path / "folder")
    (tmp_path / "folder" / "away").symlink_to(tmp_path / "other")
    assert names(find(str(tmp_path / "folder")), tmp_path / "folder") == ["a.txt", "away/c.txt", "sub/b.txt"]
    (tmp_path / "folder" / "lost.txt").symlink_to("nowhere")
    assert "lost.txt is a link to nowhere, which is not there" in fault(tmp_path / "folder")


def test_patterns_match_as_in_the_shell(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a.txt", "c.jsonl", "sub/d.txt", "sub/deep/e.txt", ".hidden.txt", "sub/README.md")
    write_pair(tmp_path / "sub" / "p", [1])
    assert names(find(f"{tmp_path}/*.txt"), tmp_path) == ["a.txt", "b.txt"]
    assert names(find(f"{tmp_path}/**/*.txt"), tmp_path) == ["a.txt", "b.txt", "sub/d.txt", "sub/deep/e.txt"]
    assert names(find(f"{tmp_path}/[bc].*"), tmp_path) == ["b.txt", "c.jsonl"]
    # as the shell: a file that is named counts whatever its name, a folder is all that lies below it
    assert names(find(f"{tmp_path}/sub/*"), tmp_path) == [
        "sub/README.md",
        "sub/d.txt",
        "sub/deep/e.txt",
        "sub/p",
    ]
    everything = find(f"{tmp_path}/**")
    assert len(everything.entries) == len(set(everything.entries)) == 7
    (tmp_path / "empty.txt").touch()
    found = find(f"{tmp_path}/*.txt")
    assert names(found, tmp_path) == ["a.txt", "b.txt"]
    assert "1 file is empty and left out" in found.notes[0]
    assert f"data path {tmp_path}/*.csv matches no data file; correct it" in fault(f"{tmp_path}/*.csv")


def test_existing_name_is_not_taken_for_a_pattern(tmp_path: Path) -> None:
    make(tmp_path, "a[1].txt", "a1.txt", "*.txt", "b[2]/x.txt")
    assert names(find(f"{tmp_path}/a[1].txt"), tmp_path) == ["a[1].txt"]
    assert names(find(f"{tmp_path}/*.txt"), tmp_path) == ["*.txt"]
    assert names(find(f"{tmp_path}/b[2]"), tmp_path) == ["b[2]/x.txt"]
    write_pair(tmp_path / "p[3]", [1])
    assert find(f"{tmp_path}/p[3]").entries == (Prefix(tmp_path / "p[3]"),)
    assert names(find(f"{tmp_path}/?[[]3].*"), tmp_path) == ["p[3]"]


def test_paths_with_spaces_umlauts_home_and_file_urls_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "Übung 1/täxt.txt", "s/x.txt")
    assert names(find(f"{tmp_path}/Übung 1/"), tmp_path) == ["Übung 1/täxt.txt"]
    assert names(find(f"file://{tmp_path}/%C3%9Cbung%201"), tmp_path) == ["Übung 1/täxt.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names(find("~/s"), tmp_path) == names(find("~/s/*.txt"), tmp_path) == ["s/x.txt"]
    monkeypatch.chdir(tmp_path / "s")
    assert find(".").entries == (Path("x.txt"),)


def test_remote_paths_and_pipes_are_refused(tmp_path: Path) -> None:
    for word in ("https://example.org/a.txt", "s3://bucket/a.jsonl", "hf://datasets/a"):
        assert f"data path {word} is not on this machine; download it or mount it" in fault(word)
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe or device, and data are read more than once" in fault(tmp_path / "pipe")
    assert "is a pipe or device" in fault("/dev/null")
    assert "is a pipe or device" in fault(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert "is a link to loop, which is not there" in fault(tmp_path / "loop")
    assert find(str(tmp_path / "missing.txt")).entries == (tmp_path / "missing.txt",)

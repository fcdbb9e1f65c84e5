"""Datasets by name and by folder give what the same files give by their paths."""

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.compute as compute
import pyarrow.parquet
import pytest

from inrank_megatron.data.corpus import Source, open_source
from inrank_megatron.data.hub import load_splits
from inrank_megatron.data.hub_names import LEGACY_NAMES
from inrank_megatron.errors import UserError

DOCUMENTS = ["First document.\nTwo lines.", "Zweites Dokument: Größe, 日本 🙂", "third"]
POEM = "Over the hill\r\n\r\nthe evening bell\n\nrings for the mill.\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets reads where its cache lies once, at import."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def texts(source: Source) -> list[str]:
    return [piece.text for piece in source.pieces()]


def fault(dataset: str | Path, **options: str) -> str:
    with pytest.raises(UserError) as raised:
        for source in load_splits(str(dataset), text_column="text", **options).values():
            texts(source)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def write_parquet(path: Path, columns: dict[str, list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_folders_and_saved_datasets_give_the_same_rows(tmp_path: Path) -> None:
    import datasets

    folder, saved = tmp_path / "folder", tmp_path / "saved"
    for split, texts_of_split in {"train": DOCUMENTS, "validation": ["held out"]}.items():
        write_parquet(folder / f"{split}.parquet", {"text": texts_of_split})
    splits = load_splits(str(folder), text_column="text")
    datasets.DatasetDict({name: split.rows for name, split in splits.items()}).save_to_disk(saved)
    for place in (folder, saved):
        splits = load_splits(str(place), text_column="text")
        assert set(splits) == {"train", "valid"}
        assert texts(splits["train"]) == DOCUMENTS
        assert texts(splits["valid"]) == ["held out"]
        assert splits["train"].notes == []
    with pytest.raises(UserError, match="no column 'body' among"):
        load_splits(str(folder), text_column="body")


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".md", ".tokens", ".raw"])
def test_a_folder_of_texts_gives_what_the_file_gives(tmp_path: Path, suffix: str) -> None:
    """datasets gives a line a row, and its rows without text are left out: blank lines were lost."""
    file = tmp_path / "poem" / f"train{suffix}"
    file.parent.mkdir()
    file.write_bytes(gzip.compress(POEM.encode()) if suffix.endswith(".gz") else POEM.encode())
    splits = load_splits(str(tmp_path / "poem"), text_column="text")
    assert set(splits) == {"train"}
    assert texts(splits["train"]) == texts(open_source(str(file), text_column="text")) == [POEM]
    assert splits["train"].notes == []


def test_file_names_say_the_split_of_a_folder_of_texts(tmp_path: Path) -> None:
    for name in ("a-train.txt", "b-train.txt", "dev.txt", "test.txt", "README.md"):
        (tmp_path / name).write_text(f"{name}\n")
    splits = load_splits(str(tmp_path), text_column="text", document_separator="-")
    assert {role: texts(split) for role, split in splits.items()} == {
        "train": ["a", "train.txt\n", "b", "train.txt\n"],
        "valid": ["dev.txt\n"],
        "test": ["test.txt\n"],
    }
    (tmp_path / "other.txt").write_text("of no split")
    splits = load_splits(str(tmp_path), text_column="text")
    assert "1 of its files are left out" in splits["train"].notes[0]


def test_configurations_in_the_card_of_a_folder_are_used(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: test\n    path: x.txt\n---\n"
    )
    (tmp_path / "x.txt").write_text(POEM, newline="")
    assert texts(load_splits(f"{tmp_path}:small", text_column="text", needed="test")["test"]) == [POEM]


def test_a_folder_that_could_be_meant_for_the_hubs_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_parquet(Path("owner/name/train.parquet"), {"text": DOCUMENTS})
    notes = load_splits("owner/name", text_column="text")["train"].notes
    assert f"(the local folder {tmp_path}/owner/name) is read" in notes[0]
    assert load_splits(str(tmp_path / "owner" / "name"), text_column="text")["train"].notes == []
    Path("empty").mkdir()
    assert f"(the local folder {tmp_path}/empty) cannot be loaded" in fault("empty")


def test_rows_of_a_dataset_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    options = compute.CastOptions(target_type=pyarrow.string(), allow_invalid_utf8=True)
    column = compute.cast(pyarrow.array([b"fine", b"caf\xe9"]), options=options)
    write_parquet(tmp_path / "a.parquet", {"text": column})
    assert "(train), row 2: 'text' is not UTF-8 at its byte 3" in fault(tmp_path)
    write_parquet(tmp_path / "a.parquet", {"text": [b"plain bytes"]})
    source = load_splits(str(tmp_path), text_column="text")["train"]
    assert texts(source) == ["plain bytes"]
    assert "is binary" in source.notes[0]


@pytest.mark.parametrize("name", ["train.txt", "train.jsonl", "train.parquet"])
def test_pointers_in_a_folder_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert f"{name}: is a Git LFS pointer" in fault(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("README.md", b"---\nconfigs: [\n---\n", "expected the node content"),
        ("a.parquet", b"PAR1 and no more", "magic bytes not found"),
        ("a.jsonl", b'{"text": "cut', "while generating the dataset: "),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdxx", "StopIteration"),
        ("a.zip", b"PK\x03\x04", "not a zip file"),
        ("state.json", b"{}", "_data_files"),
        ("dataset_dict.json", b"[]", "list indices"),
    ],
)
def test_damaged_datasets_are_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    """datasets lets through whatever the library of a format raises."""
    if name == "README.md":
        (tmp_path / "x.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / name).write_bytes(content)
    if name == "state.json":
        (tmp_path / "dataset_info.json").write_text("{}")
    message = fault(tmp_path)
    assert "cannot be loaded (" in message
    assert words in message


def test_what_is_not_a_dataset_is_refused_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """datasets takes the name of a format for the files of that format in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("not meant")
    for name in ("text", "json"):
        assert f"{name} is a format, not a dataset" in fault(name)
    assert "give it with --data-path" in fault(tmp_path / "secret.txt")
    assert "give OWNER/NAME[:CONFIG]" in fault("no_such_dataset")


def test_dataset_that_cannot_be_had_offline_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"dataset nobody/nothing:x cannot be loaded .*local cache") as raised:
        load_splits("nobody/nothing:x", text_column="text")
    assert "\n" not in str(raised.value)


def test_names_without_an_owner_are_mapped() -> None:
    """Hub clients of today refuse them, after some older ones took them for links."""
    assert "Salesforce/wikitext" in fault("wikitext:wikitext-103-raw-v1")
    assert all("/" in name and "/" not in old for old, name in LEGACY_NAMES.items())


@pytest.mark.parametrize("name", ["wikitext", "Salesforce/wikitext"])
def test_a_cache_under_the_earlier_name_is_found(tmp_path: Path, name: str) -> None:
    import datasets

    write_parquet(tmp_path / "wikitext" / "train.parquet", {"text": DOCUMENTS})
    datasets.load_dataset(str(tmp_path / "wikitext"))  # leaves what the hub's own leaves
    source = load_splits(name, text_column="text")["train"]
    assert texts(source) == DOCUMENTS
    assert "lies as wikitext" in source.notes[0]


def test_lines_that_datasets_made_rows_of_are_a_text_again(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "enwik8").mkdir()
    (tmp_path / "enwik8" / "train.txt").write_bytes(POEM.encode())
    datasets.load_dataset(str(tmp_path / "enwik8"))
    source = load_splits("LTCB/enwik8", text_column="text")["train"]
    assert texts(source) == [POEM.replace("\r", "")]
    assert "joined as one text" in source.notes[-1]


def test_documents_that_were_made_of_lines_stay_documents(tmp_path: Path) -> None:
    """What datasets keeps of a dataset's origin stays when its rows are changed."""
    import datasets

    (tmp_path / "train.txt").write_text("one\ntwo\n")
    rows = datasets.load_dataset("text", data_files=str(tmp_path / "train.txt"), split="train")
    rows.map(lambda row: {"text": f"Title\n{row['text']}"}).save_to_disk(tmp_path / "saved")
    source = load_splits(str(tmp_path / "saved"), text_column="text")["train"]
    assert texts(source) == ["Title\none", "Title\ntwo"]
    assert source.notes == []
    rows.save_to_disk(tmp_path / "lines")
    assert texts(load_splits(str(tmp_path / "lines"), text_column="text")["train"]) == ["one", "two"]


def test_card_says_how_texts_are_divided(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: x.txt\n  sample_by: paragraph\n---\n"
    )
    (tmp_path / "x.txt").write_text("a\nb\n\nc\nd\n")
    assert texts(load_splits(str(tmp_path), text_column="text")["train"]) == ["a\nb", "c\nd\n"]


def test_json_of_a_folder_gives_what_the_path_gives(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    (tmp_path / "train.ndjson").write_text(lines)
    splits = load_splits(str(tmp_path), text_column="text")
    assert texts(splits["train"]) == texts(open_source(str(tmp_path / "train.ndjson"), text_column="text"))


def test_a_file_that_changed_unseen_is_read_again(tmp_path: Path) -> None:
    """datasets tells a file by its name and modification time, which a copy may have restored."""
    file = tmp_path / "train.jsonl"
    for text in ("before", "behind"):
        file.write_text(json.dumps({"text": text}) + "\n")
        os.utime(file, ns=(10**18, 10**18))
        assert texts(load_splits(str(tmp_path), text_column="text")["train"]) == [text]


def test_a_folder_by_a_link_leaves_out_what_the_folder_does(tmp_path: Path) -> None:
    write_parquet(tmp_path / "folder/train.parquet", {"text": DOCUMENTS})
    (tmp_path / "link").symlink_to("folder")
    assert load_splits(str(tmp_path / "link"), text_column="text")["train"].notes == []

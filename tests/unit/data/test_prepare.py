"""Token files: exact counts, made once, and never used when they are not what was written."""

import gzip
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from inrank_megatron.config.schema import DataConfig
from inrank_megatron.data.batches import TrainBatches
from inrank_megatron.data.cache import file_sha256
from inrank_megatron.data.pieces import Piece
from inrank_megatron.data.prepare import PreparedData, prepare
from inrank_megatron.data.token_file import write_tokens
from inrank_megatron.data.tokenizer import load_tokenizer
from inrank_megatron.errors import UserError
from tests.unit.data.texts import prose, write_pair


class Stages(list):
    """A progress callback that remembers."""

    def __call__(self, stage: str, _tokens: int | None) -> None:
        self.append(stage)

    def built(self) -> bool:
        return any(stage.startswith("tokenizing") for stage in self)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text(prose(20000, seed=1))
    return tmp_path / "corpus.txt"


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def whole(file) -> np.ndarray:
    return file.tokens(0, file.num_tokens)


def test_wikitext_gives_the_same_data_in_both_formats(shared_data: Path, settings) -> None:
    folder = shared_data / "wikitext-103"
    for names in (
        ("wiki.valid.tokens", "wiki.test.tokens"),
        ("validation-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
    ):
        data = prepare(
            settings(
                train_data_path=[folder / names[0]],
                test_data_path=[folder / names[1]],
                tokenizer=str(shared_data / "gpt2-bpe"),
                split="1,0,0",
            )
        )
        (train, weight), test = data.train[0], data.test
        assert (train.num_tokens, train.num_words, weight) == (247_265 + 1, 217_646, 1.0)
        assert (test.num_tokens, test.num_words) == (282_440 + 1, 245_569)
        assert data.valid is None
        assert train.tokens(train.num_tokens - 1, 1)[0] == data.tokenizer.eod


def test_embedded_corpus_is_prepared_and_divided(settings) -> None:
    data = prepare(settings(vocab_size=1000))
    assert data.tokenizer.vocab_size == 1000
    counts = data.meta["splits"]
    assert list(counts) == ["train", "valid", "test"]
    assert counts["train"]["tokens"] == data.train[0][0].num_tokens > 400_000
    assert min(counts["valid"]["words"], counts["test"]["words"]) > 3000
    text = data.tokenizer.decode(data.valid.tokens(0, data.valid.num_tokens))
    assert text.count("<|endoftext|>") >= data.valid.num_documents == counts["valid"]["documents"]


def test_a_text_is_cut_by_position_and_loses_nothing(settings, corpus: Path, tokenizer_folder: Path) -> None:
    data = prepare(settings(data_path=[corpus], tokenizer=str(tokenizer_folder), split="6,3,1"))
    parts = [data.train[0][0], data.valid, data.test]
    tokenizer = load_tokenizer(str(tokenizer_folder))
    expected = [*tokenizer.encode(corpus.read_text()), tokenizer.eod]
    assert np.concatenate([whole(part) for part in parts]).tolist() == expected
    text = corpus.read_text()
    assert sum(part.num_words for part in parts) == len(text.split()) + text.count("\n")
    assert parts[0].num_sequences > parts[1].num_sequences >= parts[2].num_sequences >= 1


def test_the_tokenizer_is_trained_on_the_train_share_alone(settings, tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": "abcd efgh " * 50 if number < 90 else "vwxyz " * 50}) for number in range(100)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = prepare(settings(data_path=[tmp_path / "a.jsonl"], split="90,10,0"))
    assert len(data.tokenizer.encode(" efgh")) == 1
    assert len(data.tokenizer.encode(" vwxyz")) == 6


def test_sources_are_blended_by_weight(settings, tmp_path: Path, tokenizer_folder: Path) -> None:
    for name, words in {"a": 9000, "b": 30000}.items():
        (tmp_path / name).write_text(prose(words, seed=words))
    weighted = ["3", tmp_path / "a", "1", tmp_path / "b"]
    shared = {"tokenizer": str(tokenizer_folder), "split": "8,2,0"}
    data = prepare(settings(data_path=weighted, **shared))
    assert [weight for _, weight in data.train] == [0.75, 0.25]
    assert data.valid.num_tokens == sum(stop - start for _, start, stop in data.valid.segments)
    assert len(data.valid.segments) == 2


def test_short_files_are_joined(settings, tmp_path: Path, tokenizer_folder: Path) -> None:
    """Fifty notes, each shorter than a sequence, are one text whose documents end where the notes do."""
    texts = [prose(10 + number % 3, seed=number) for number in range(50)]
    (tmp_path / "notes").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "notes" / f"{number:02d}.txt").write_text(text)
    (tmp_path / "notes" / "README.md").write_text("no data")
    shared = {"tokenizer": str(tokenizer_folder), "split": "8,1,1"}
    tokenizer = load_tokenizer(str(tokenizer_folder))
    documents = [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    data = prepare(settings(data_path=[tmp_path / "notes"], split="1", tokenizer=str(tokenizer_folder)))
    [(train, weight)] = data.train
    assert (whole(train).tolist(), weight) == (flat(documents), 1.0)
    assert (train.num_documents, train.num_sequences) == (50, 50)
    assert train.num_words == sum(len(text.split()) + text.count("\n") for text in texts)
    TrainBatches(data.train, seq_length=100, global_batch_size=4, seed=0)
    assert data.notes == (f"{tmp_path / 'notes'}: 1 file is not data and left out (README.md)",)
    parts = prepare(settings(data_path=[f"{tmp_path}/notes/??.txt"], **shared))
    held_out = [number for number in range(50) if number % 5 == 2]
    expected = [documents[number] for number in range(50) if number not in held_out]
    assert whole(parts.train[0][0]).tolist() == flat(expected)
    assert (parts.valid.num_documents, parts.test.num_documents) == (5, 5)
    both = [*whole(parts.valid), *whole(parts.test)]
    assert sorted(both) == sorted(flat(documents[number] for number in held_out))


def test_folder_is_one_component_of_a_blend(settings, tmp_path: Path, tokenizer_folder: Path) -> None:
    for name in ("a/1.txt", "a/2.txt", "b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(prose(100, seed=len(name)))
    write_pair(tmp_path / "a" / "3", [5] * 40)
    shared = {"tokenizer": str(tokenizer_folder), "split": "1"}
    data = prepare(settings(data_path=["3", tmp_path / "a", "1", tmp_path / "b.txt"], **shared))
    assert [weight for _, weight in data.train] == [0.75, 0.25]
    assert [file.num_documents for file, _ in data.train] == [3, 1]
    assert whole(data.train[0][0])[-40:].tolist() == [5] * 40
    assert data.train[0][0].num_words is None
    assert data.train[1][0].name == str(tmp_path / "b.txt")


def test_cache_inside_the_data_folder_is_left_out(settings, tmp_path: Path, tokenizer_folder: Path) -> None:
    """As with --data-path . in the folder where the program runs: its token files are no data."""
    (tmp_path / "a.txt").write_text(prose(100, seed=0))
    config = settings(data_path=[tmp_path], tokenizer=str(tokenizer_folder), split="1")
    made, found = prepare(config), prepare(config)
    assert made.folder == found.folder
    assert made.notes == (f"{tmp_path}: 1 file is not data and left out (cache/)",)


KEYS = {"one": "392c5e50a241b708", "several": "81bb595af011830f"}


def test_keys_stay_those_of_earlier_versions(settings, tmp_path: Path) -> None:
    """A run names its data by the key: where tokens and order are as ever, so is the key. Files without
    weights were blended by their tokens once; a run that began so goes on so, a new one has another key.
    """
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(prose(300, seed=ord(name)))
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    assert prepare(settings(data_path=[a])).folder.name == KEYS["one"]
    assert prepare(settings(data_path=[a]), recorded=KEYS["one"]).folder.name == KEYS["one"]
    assert prepare(settings(data_path=["2", a, "1", b])).folder.name == KEYS["several"]
    joined = prepare(settings(data_path=[a, b]))
    assert joined.folder.name not in KEYS.values()
    left = "no text is left for test: --split cuts between documents, and the text has only 2"
    assert (len(joined.train), joined.notes) == (1, (left,))
    former = prepare(settings(data_path=[a, b]), recorded=KEYS["several"])
    assert former.folder.name == KEYS["several"]
    assert [(file.num_tokens, weight) for file, weight in former.train] == [
        (643, 643 / 1272),
        (629, 629 / 1272),
    ]
    assert "blended by their tokens, as when this run began" in former.notes[0]
    assert prepare(settings(data_path=[a, b]), recorded="of other data").folder == joined.folder


def test_a_folder_of_an_earlier_version_is_used(settings, tmp_path: Path, tokenizer_folder: Path) -> None:
    """Each part had a pair of files of its own."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(prose(300, seed=ord(name)))
    words = ["2", tmp_path / "a.txt", "1", tmp_path / "b.txt"]
    config = settings(data_path=words, tokenizer=str(tokenizer_folder), split="1")
    data = prepare(config)
    before = [whole(file).tolist() for file, _ in data.train]
    meta = json.loads((data.folder / "meta.json").read_text())
    [record] = meta["files"]
    meta["files"] = []
    for number, part in enumerate(record.pop("sources")):
        prefix = data.folder / f"train-{number:02d}"
        pieces = [Piece(Path(part["name"]).read_text(), True)]
        write_tokens(prefix, pieces, tokenizer=data.tokenizer, name="a", progress=Stages())
        hashes = {suffix: file_sha256(Path(f"{prefix}{suffix}")) for suffix in (".bin", ".idx", ".words.npy")}
        meta["files"].append(record | {"sequences": 1, "sha256": hashes})
    (data.folder / "meta.json").write_text(json.dumps(meta))
    stages = Stages()
    found = prepare(config, progress=stages)
    assert not stages.built()
    assert [whole(file).tolist() for file, _ in found.train] == before
    assert [(file.name, weight) for file, weight in found.train] == [
        (file.name, weight) for file, weight in data.train
    ]


def test_remarks_of_sources_are_kept_and_said_once(settings, tmp_path: Path, tokenizer_folder: Path) -> None:
    lines = "".join(json.dumps({"text": f"a row {number}\n"}) + "\n" for number in range(3))
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(lines)
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n')
    config = settings(data_path=[f"{tmp_path}/*.jsonl"], tokenizer=str(tokenizer_folder), split="1")
    made, found = prepare(config), prepare(config)
    assert made.notes == found.notes
    assert made.notes[-1] == f"{tmp_path / 'c.jsonl'}: holds no text"
    meta = json.loads((made.folder / "meta.json").read_text())
    meta["files"][0]["sources"][1]["notes"] = meta["files"][0]["sources"][0]["notes"] = ["a remark"]
    (made.folder / "meta.json").write_text(json.dumps(meta))
    names = f"{tmp_path / 'a.jsonl'} + {tmp_path / 'b.jsonl'}"
    assert f"{names}: a remark" in prepare(config).notes
    few = prepare(settings(data_path=[tmp_path / "a.jsonl"], split="8,1,1", tokenizer=str(tokenizer_folder)))
    assert few.test is not None and "no text is left" not in str(few.notes)
    (tmp_path / "a.jsonl").write_text(lines.splitlines()[0])
    few = prepare(settings(data_path=[tmp_path / "a.jsonl"], split="8,1,1", tokenizer=str(tokenizer_folder)))
    cause = "--split cuts between documents, and the text has only 1"
    assert few.notes[-1] == f"no text is left for valid and test: {cause}"
    assert "holds no text" in fault(
        settings(data_path=["1", tmp_path / "a.jsonl", "1", tmp_path / "c.jsonl"])
    )


def test_made_once_and_again_for_other_content(settings, corpus: Path) -> None:
    first, second, third = Stages(), Stages(), Stages()
    config = settings(data_path=[corpus])
    made = prepare(config, progress=first)
    found = prepare(config, progress=second)
    assert (first.built(), second.built()) == (True, False)
    assert made.folder == found.folder
    assert made.tokenizer.identity == found.tokenizer.identity
    corpus.write_text(prose(20000, seed=2))
    assert prepare(config, progress=third).folder != made.folder
    assert third.built()


def _prepare_in_child(config: DataConfig, queue: multiprocessing.Queue, barrier) -> None:
    stages = Stages()
    barrier.wait()
    data = prepare(config, progress=stages)
    queue.put((stages.built(), str(data.folder), int(whole(data.train[0][0]).sum())))


def test_two_processes_make_it_once(settings, corpus: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(2)
    children = [
        context.Process(target=_prepare_in_child, args=(settings(data_path=[corpus]), queue, barrier))
        for _ in range(2)
    ]
    for child in children:
        child.start()
    results = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert sorted(built for built, _, _ in results) == [False, True]
    assert len({(folder, total) for _, folder, total in results}) == 1


def _prepare_slowly(config: DataConfig, marker: Path) -> None:
    def progress(stage: str, tokens: int | None) -> None:
        if stage.startswith("checking"):  # the token files are there, their record is not
            marker.touch()
            time.sleep(60)

    prepare(config, progress=progress)


def test_preparation_killed_in_the_middle_is_made_again(settings, corpus: Path, tmp_path: Path) -> None:
    config, marker = settings(data_path=[corpus]), tmp_path / "marker"
    child = multiprocessing.get_context("fork").Process(target=_prepare_slowly, args=(config, marker))
    child.start()
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    cache = Path(config.data_cache_path)
    assert list(cache.glob("*.partial"))
    stages = Stages()
    data = prepare(config, progress=stages)
    assert stages.built()
    assert data.folder.is_dir()
    assert not list(cache.glob("*.partial"))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped bit": lambda folder: _flip(folder / "train-00.bin"),
    "short file": lambda folder: os.truncate(folder / "train-00.bin", 100),
    "missing index": lambda folder: (folder / "train-00.idx").unlink(),
    "wrong words": lambda folder: _flip(folder / "train-00.words.npy"),
    "no record": lambda folder: (folder / "meta.json").unlink(),
    "half a record": lambda folder: (folder / "meta.json").write_text('{"format_version": 2, "fi'),
    "empty record": lambda folder: (folder / "meta.json").write_text('{"format_version": 2}'),
    "record of other files": lambda folder: (folder / "meta.json").write_text(
        '{"format_version": 2, "files": [], "splits": {}, "unigram_perplexity": {}, "tokenizer": {}}'
    ),
    "no tokenizer": lambda folder: shutil.rmtree(folder / "tokenizer"),
    "other tokenizer": lambda folder: shutil.copytree(
        folder.parent.parent / "other", folder / "tokenizer", dirs_exist_ok=True
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_made_again(
    settings, corpus: Path, tokenizer_folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tokenizer_folder, corpus.parent / "other")
    config = settings(data_path=[corpus])
    before = whole(prepare(config).train[0][0])
    DAMAGE[damage](prepare(config).folder)
    stages = Stages()
    after = prepare(config, progress=stages)
    assert stages.built()
    assert "unusable" in caplog.text
    np.testing.assert_array_equal(whole(after.train[0][0]), before)


def test_existing_token_files_are_used(settings, tmp_path: Path, tokenizer_folder: Path) -> None:
    write_pair(tmp_path / "pair", *[[number] * 10 for number in range(100)])
    for paths in (["pair"], ["pair.bin"], ["pair.idx"], ["pair.bin", "pair.idx"]):
        words = [tmp_path / path for path in paths]
        data = prepare(settings(data_path=words, tokenizer=str(tokenizer_folder), split="90,10,0"))
        assert whole(data.valid).tolist() == [number for number in range(90, 100) for _ in range(10)]
        assert (data.valid.num_documents, data.valid.num_words) == (10, None)
    assert sorted(path.name for path in data.folder.iterdir()) == ["meta.json", "tokenizer"]


def fault(config: DataConfig) -> str:
    with pytest.raises(UserError) as raised:
        prepare(config)
    assert "\n" not in str(raised.value)
    assert not list(Path(config.data_cache_path).glob("*.partial"))
    return str(raised.value)


def test_faulty_token_files_are_refused(settings, tmp_path: Path, tokenizer_folder: Path) -> None:
    prefix = tmp_path / "pair"
    config = settings(data_path=[prefix], tokenizer=str(tokenizer_folder))
    write_pair(prefix, [1, 2, 300], [4])
    assert "holds the token id 300; ids must be below the tokenizer's vocabulary of 300" in fault(config)
    assert "--tokenizer" in fault(settings(data_path=[prefix]))
    write_pair(prefix, [1, -2, 3], dtype=np.int32)
    assert "token id -2" in fault(config)
    write_pair(prefix, [1, 2, 3], [4])
    os.truncate(f"{prefix}.bin", 6)
    assert "does not hold the 4 tokens" in fault(config)
    os.truncate(f"{prefix}.idx", 40)
    assert "does not have the size" in fault(config)
    Path(f"{prefix}.idx").write_bytes(b"no index")
    assert "not a Megatron index" in fault(config)


def test_files_without_text_are_refused(settings, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    assert "holds no text" in fault(settings(data_path=[tmp_path / "a.jsonl"]))
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    assert "b.jsonl, line 2: malformed JSON" in fault(settings(data_path=[tmp_path / "b.jsonl"]))


def test_cache_that_cannot_be_written_is_refused(settings, tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "file").touch()
    config = settings(data_path=[corpus], data_cache_path=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="--data-cache-path"):
        prepare(config)


def test_record_says_what_the_folder_holds(settings, corpus: Path) -> None:
    data: PreparedData = prepare(settings(data_path=[corpus]))
    assert data.meta == json.loads((data.folder / "meta.json").read_text())
    assert data.meta["tokenizer"]["identity"] == data.tokenizer.identity
    assert data.meta["files"][0]["largest_id"] < data.tokenizer.vocab_size == 300
    assert data.meta["splits"]["valid"] == data.valid.counts()


def test_remarks_on_a_name_are_of_the_name_that_is_given(settings, tmp_path: Path) -> None:
    """Two names of one content share the token files, not what is said of the names."""
    for name in ("corpus.jsonl", "corpus.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b'{"text": "one document"}\n' * 20, mtime=0))
    wrong, right = (
        prepare(settings(data_path=[tmp_path / name], split="1"))
        for name in ("corpus.jsonl", "corpus.jsonl.gz")
    )
    assert wrong.folder == right.folder
    assert "whatever its name says" in wrong.notes[0]
    assert right.notes == ()


def test_pointers_of_a_pair_are_named(settings, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"tokens{suffix}").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        )
    with pytest.raises(UserError, match=r"tokens\.bin: is a Git LFS pointer"):
        prepare(settings(data_path=[tmp_path / "tokens"]))

"""Hundreds of sources with few open files."""

import os
import resource
from pathlib import Path

import pytest

from inrank_megatron.config.schema import DataConfig
from inrank_megatron.data.batches import TrainBatches
from inrank_megatron.data.prepare import prepare
from inrank_megatron.errors import UserError
from tests.unit.data.children import in_child
from tests.unit.data.texts import write_pair

SOURCES = 120


def limit_open_files(more: int) -> None:
    """So many more files than are open now. The limit is on a file's number, and there may be gaps."""
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(more + 1)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened[-1], opened[-1]))
    for file in opened:
        os.close(file)


def first_batch(config: DataConfig) -> tuple[int, list[int], int]:
    data = prepare(config)
    batches = TrainBatches(data.train, seq_length=8, global_batch_size=2 * SOURCES, seed=0)
    return len(data.train), sorted(batches.rows(0, 0, 2 * SOURCES)[:, 0].tolist()), data.valid.num_tokens


@pytest.mark.parametrize("weighted", [True, False])
def test_many_token_files_need_few_descriptors(
    settings, tmp_path: Path, tokenizer_folder: Path, weighted: bool
) -> None:
    for number in range(SOURCES):
        write_pair(tmp_path / f"{number:03d}", *[[number] * 17] * 4)
    words = [word for number in range(SOURCES) for word in ("1", tmp_path / f"{number:03d}")]
    config = settings(
        data_path=words if weighted else words[1::2], tokenizer=str(tokenizer_folder), split="1,1,0"
    )

    def work() -> tuple[int, list[int], int]:
        limit_open_files(50)
        return first_batch(config)

    components, first_tokens, held_out = in_child(work)
    assert (components, held_out) == (SOURCES if weighted else 1, 34 * SOURCES)
    if weighted:
        assert first_tokens == sorted([*range(SOURCES), *range(SOURCES)])


@pytest.mark.parametrize("weighted", [True, False])
def test_many_texts_need_few_descriptors(settings, tmp_path: Path, weighted: bool) -> None:
    for number in range(SOURCES):
        (tmp_path / f"{number:03d}.jsonl").write_text(
            f'{{"text": "{number} and some words, 24 letters"}}\n' * 4
        )
    words = [word for number in range(SOURCES) for word in ("1", tmp_path / f"{number:03d}.jsonl")]
    config = settings(data_path=words if weighted else words[1::2], split="1,1,0")

    def work() -> tuple[int, list[int], int]:
        limit_open_files(12)
        return first_batch(config)

    components, _, held_out = in_child(work)
    assert (components, held_out > 10 * SOURCES) == (SOURCES if weighted else 1, True)


def test_descriptor_limit_error_names_the_limit(settings, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    config = settings(data_path=[tmp_path / "a.txt"])
    made = prepare(config)

    def work() -> str:
        limit_open_files(0)
        with pytest.raises(UserError) as raised:
            prepare(config)
        return str(raised.value)

    message = in_child(work)
    assert "Too many open files" in message
    assert "files open: raise that with ulimit -n" in message
    assert "writable" not in message
    assert made.folder.is_dir()

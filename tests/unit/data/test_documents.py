"""Documents in token files: the ids of their whole text, and what the tokenizer puts around them."""

import json
from pathlib import Path

import pytest

from inrank_megatron.data.prepare import prepare
from inrank_megatron.data.tokenizer import load_tokenizer
from tests.unit.data.texts import prose
from tests.unit.data.tokenizer_layouts import layouts


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (path := tmp_path / "layout").mkdir()
    layouts()[request.param](path)
    return path


@pytest.mark.parametrize("folder", ["Llama 3", "T5", "begins and ends", "tokenizer.json"], indirect=True)
def test_each_document_begins_and_ends_as_the_tokenizer_has_it(
    folder: Path, tmp_path: Path, settings
) -> None:
    texts = [prose(30, seed=seed) + "don't!\n\n" for seed in range(3)]
    (path := tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = prepare(settings(train_data_path=[path], split="1", tokenizer=str(folder)))
    tokenizer = load_tokenizer(str(folder))
    documents = [[*tokenizer.before, *tokenizer.encode(text), *tokenizer.after] for text in texts]
    [(file, _)] = data.train
    assert file.tokens(0, file.num_tokens).tolist() == [token for ids in documents for token in ids]
    for ids in documents:
        assert ids.count(tokenizer.eod) == 1
    assert data.tokenizer.identity == tokenizer.identity


@pytest.mark.parametrize("folder", ["Llama 2", "Llama 3", "prefix space", "BERT"], indirect=True)
def test_pieces_of_a_long_text_have_the_ids_of_the_full_text(folder: Path, tmp_path: Path, settings) -> None:
    """Blocks of a LLaMA tokenizer began with a space each, and patterns that take punctuation with the line
    ends after it were cut between them.
    """
    text = "".join(prose(40, seed=seed) + "...\n\n" for seed in range(600))
    (path := tmp_path / "text.txt").write_text(text)
    data = prepare(settings(train_data_path=[path], split="1", tokenizer=str(folder)))
    tokenizer = load_tokenizer(str(folder))
    [(file, _)] = data.train
    ids = [*tokenizer.before, *tokenizer.encode(text), *tokenizer.after]
    assert file.tokens(0, file.num_tokens).tolist() == ids
    assert file.num_sequences == len(text) // (16 * 1024)
    assert file.num_words == len(text.split()) + text.count("\n")


def test_special_tokens_are_parsed_on_demand_alone(tmp_path: Path, settings) -> None:
    (path := tmp_path / "text.txt").write_text(prose(300, seed=1) + "<|endoftext|>" + prose(300, seed=2))
    plain, parsed = (
        prepare(settings(train_data_path=[path], split="1", parse_special_tokens=on)) for on in (False, True)
    )
    counts = []
    for data in (plain, parsed):
        [(file, _)] = data.train
        counts.append(file.tokens(0, file.num_tokens).tolist().count(data.tokenizer.eod))
    assert counts == [1, 2]
    again = prepare(settings(train_data_path=[path], split="1", tokenizer=str(parsed.folder / "tokenizer")))
    assert again.tokenizer.identity == parsed.tokenizer.identity, "a run's tokenizer goes on as it was"

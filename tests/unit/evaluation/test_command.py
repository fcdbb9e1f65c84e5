"""Models of every kind on texts of every kind, and what is refused."""

import json

import pytest
import torch
import torch.nn.functional as F

from inrank_megatron.checkpoint.writing import CheckpointWriter
from inrank_megatron.data.tokenizer import load_tokenizer
from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.gpt import gpt_forward
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.run import open_weights
from inrank_megatron.interop.formats import writable
from tests.runs import random_weights, write_run
from tests.unit.data.texts import prose, write_pair
from tests.unit.data.tokenizer_layouts import layouts

VOCABULARY = 400


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def any_run(request, tmp_path_factory, tokenizer_folder):
    weights = random_weights(
        vocab_size=VOCABULARY,
        tokenizer=tokenizer_folder,
        ranks=6,
        frozen_base=False,
        settings={"model_type": request.param},
    )
    return write_run(tmp_path_factory.mktemp("runs") / request.param, weights)


@pytest.fixture(scope="session")
def gpt2_run(tmp_path_factory, tokenizer_folder):
    weights = random_weights(vocab_size=VOCABULARY, tokenizer=tokenizer_folder, ranks=6)
    return write_run(tmp_path_factory.mktemp("run") / "run", weights)


@pytest.fixture(scope="session")
def wikitext(tmp_path_factory, shared_data):
    """The first 20,000 characters of WikiText's validation text."""
    text = (shared_data / "wikitext-103" / "wiki.valid.tokens").read_text()[:20_000]
    (path := tmp_path_factory.mktemp("wikitext") / "wiki.txt").write_text(text)
    return path


@pytest.mark.parametrize("name", ["hf-dense", "hf-factorised"])
@pytest.mark.parametrize("stride", [32, 20])
def test_an_export_has_the_perplexity_of_its_run(any_run, tmp_path, wikitext, evaluated, name, stride):
    (folder := tmp_path / name).mkdir()
    writable()[name].write(open_weights(any_run, Options()), folder, Options())
    options = ("--data", wikitext, "--seq-length", 32, "--stride", stride)
    own, other = evaluated(any_run, *options), evaluated(folder, *options)
    assert (own["format"], other["format"]) == ("run", name)
    assert other["perplexity"] == pytest.approx(own["perplexity"], rel=1e-4)
    assert [own[k] for k in ("tokens", "words", "bytes")] == [other[k] for k in ("tokens", "words", "bytes")]


def test_counts_are_those_of_the_text(gpt2_run, tmp_path, evaluated):
    text = prose(300, seed=1) + "Übergröße 北京\n"
    (path := tmp_path / "text.txt").write_text(text, encoding="utf-8")
    record = evaluated(gpt2_run, "--data", path)
    assert record["tokens"] == len(
        load_tokenizer(str(gpt2_run / "tokenizer")).encode(text)
    )  # the end is scored
    assert record["words"] == 302 + 31 and record["bytes"] == len(text.encode())


def test_tables_token_files_and_datasets(gpt2_run, tmp_path, tokenizer_folder, evaluated):
    import datasets

    documents = [prose(100, seed=seed) for seed in range(3)]
    (rows := tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": d}) + "\n" for d in documents))
    record = evaluated(gpt2_run, "--data", rows, "--text-column", "body")
    tokenizer = load_tokenizer(str(tokenizer_folder))
    ids = [[*tokenizer.encode(document), tokenizer.eod] for document in documents]
    write_pair(tmp_path / "pair", *ids)
    pair = evaluated(gpt2_run, "--data", tmp_path / "pair")
    assert pair["loss"] == record["loss"] and pair["words"] is None
    split = datasets.Dataset.from_dict({"text": documents})
    datasets.DatasetDict({"validation": split, "test": split.select([0])}).save_to_disk(tmp_path / "set")
    whole = evaluated(gpt2_run, "--dataset", tmp_path / "set")
    assert (whole["loss"], whole["words"]) == (record["loss"], record["words"])
    assert evaluated(gpt2_run, "--dataset", tmp_path / "set", "--split", "test")["tokens"] == len(ids[0]) - 1
    with pytest.raises(UserError, match="'train' is needed"):
        evaluated(gpt2_run, "--dataset", tmp_path / "set", "--split", "train")


def test_a_model_that_only_transformers_knows(tmp_path, tokenizer_folder, evaluated):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=32, initializer_range=0.2, **sizes)
    model = GPTNeoXForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "neox")
    load_tokenizer(str(tokenizer_folder)).save(tmp_path / "neox")
    (path := tmp_path / "text.txt").write_text(prose(5, seed=1))
    record = evaluated(tmp_path / "neox", "--data", path)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    ids = torch.tensor([[*tokenizer.encode(prose(5, seed=1)), tokenizer.eod]])
    assert ids.shape[1] <= 33, "one window"
    expected = model(ids, labels=ids).loss.item()
    assert record["loss"] == pytest.approx(expected, rel=1e-5) and record["format"] == "transformers"


def test_a_text_begins_as_the_tokenizer_has_it(tmp_path, evaluated):
    """The beginning is context, not scored; without it the first word would not be."""
    (folder := tmp_path / "tokenizer").mkdir()
    layouts()["Llama 3"](folder)
    run = write_run(tmp_path / "run", random_weights(vocab_size=VOCABULARY, tokenizer=folder, ranks=None))
    (path := tmp_path / "text.txt").write_text(prose(5, seed=1))
    record = evaluated(run, "--data", path)
    tokenizer = load_tokenizer(str(folder))
    ids = torch.tensor([[*tokenizer.before, *tokenizer.encode(prose(5, seed=1)), tokenizer.eod]])
    assert tokenizer.before and ids.shape[1] <= 33, "one window"
    logits = gpt_forward(open_weights(run, Options()))(ids[:, :-1])[0]
    assert record["loss"] == pytest.approx(F.cross_entropy(logits, ids[0, 1:]).item(), rel=1e-5)
    assert record["tokens"] == ids.shape[1] - 1


def test_what_is_refused(gpt2_run, tmp_path, tokenizer_folder, evaluated):
    from inrank_megatron.data.tokenizer import train_tokenizer

    (path := tmp_path / "text.txt").write_text(prose(100, seed=1))
    (tmp_path / "empty.txt").write_text("")
    write_pair(tmp_path / "beyond", [1, 2, VOCABULARY])
    train_tokenizer([prose(2000, seed=2)], vocab_size=300).save(tmp_path / "other")
    without = write_run(tmp_path / "run", random_weights(vocab_size=300, tokenizer=None, ranks=None))
    for words, message in (
        ((gpt2_run, "--data", tmp_path / "empty.txt"), "empty.txt is empty"),
        ((gpt2_run, "--data", tmp_path / "beyond"), "token id 400; ids must be below"),
        ((gpt2_run, "--data", path, "--tokenizer", tmp_path / "other"), "tokenizer is not that of"),
        ((gpt2_run, "--data", path, "--seq-length", 33), "has 32 positions; lower --seq-length"),
        ((gpt2_run, "--data", path, "--stride", 33), "stride = 33: must lie between"),
        ((without, "--data", path), "no tokenizer next to it"),
        ((without, "--data", path, "--tokenizer", tokenizer_folder), "has a vocabulary of 300"),
        ((tmp_path / "absent", "--data", path), "does not exist"),
        (("no-such-model", "--data", path), "cannot be loaded from the hub"),
        ((tmp_path, "--data", path), "is in none of the formats that can be read"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            evaluated(*words)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("words", [
    ("--data", "a", "--dataset", "b"), ("--data", "a", "--split", "test"), ("--split", "train"),
    ("--data", "a", "--stride", "0"), ("--data", ""), ("--data-cache-path", ""), ("--tokenizer", ""),
])  # fmt: skip
def test_contradictions_on_the_command_line(words):
    from tools.evaluate import parse

    with pytest.raises(SystemExit):
        parse(["run", *words])


def test_the_tool_prints_lines_and_refuses_in_one(gpt2_run, tmp_path, capsys):
    from tools.evaluate import main

    (path := tmp_path / "text.txt").write_text(prose(100, seed=1))
    words = [str(gpt2_run), "--data-cache-path", str(tmp_path / "cache"), "--data"]
    assert main([*words, str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{gpt2_run} (run) on {path}\n")
    assert "bits per byte" in shown
    assert "word perplexity" not in shown, (
        "a word is harder to guess for these weights than a token by chance"
    )
    assert main([*words, str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["word_perplexity"] > 1e6
    assert main([*words, str(tmp_path / "absent")]) == 1
    refused = capsys.readouterr()
    assert refused.out == "" and refused.err.count("\n") == 1 and refused.err.startswith("error: data path")


def test_a_run_is_judged_on_its_own_data(tmp_path, tokenizer_folder, evaluated):
    """A text that has changed is refused, and so is a tokenizer that is not the one next to the weights."""
    (path := tmp_path / "text.txt").write_text(prose(8000, seed=1))
    data = {"data_path": [str(path)], "split": "1,1", "data_cache_path": str(tmp_path / "cache")}
    model = {"vocab_size": VOCABULARY, "tokenizer": tokenizer_folder, "ranks": None}
    settings = data | {"tokenizer": str(tokenizer_folder)}
    run = write_run(tmp_path / "run", weights := random_weights(**model, settings=settings))
    assert evaluated(run)["data"] == f"valid split of {run}"
    with pytest.raises(UserError, match=r"test split of .* holds no text; name another split"):
        evaluated(run, "--split", "test")
    writer = CheckpointWriter(run / "checkpoints", 1)
    for name in weights.shapes:
        writer.add(name, weights.read(name))
    writer.publish({"step": 1, "engine": {"factors": {}}, "identity": {"data": "0123456789abcdef"}})
    with pytest.raises(UserError, match="was trained on data 0123456789abcdef, its settings now give"):
        evaluated(run)
    (tmp_path / "one.txt").write_text("A text of one document.\n")
    short = settings | {"data_path": [str(tmp_path / "one.txt")], "split": "80,10,10"}
    of_one = write_run(tmp_path / "of one", random_weights(**model, settings=short))
    with pytest.raises(UserError, match=r"holds no text \(--split cuts between documents, .* has only 1\);"):
        evaluated(of_one, "--split", "test")
    other = write_run(tmp_path / "other", random_weights(**model, settings=data))
    with pytest.raises(UserError, match="its tokenizer is not that of"):
        evaluated(other)

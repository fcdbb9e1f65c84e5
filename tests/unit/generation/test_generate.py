"""Text from runs and exports against a slow oracle, and what is refused."""

import argparse
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from inrank_megatron.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from inrank_megatron.errors import UserError
from inrank_megatron.evaluation.models import find_model
from inrank_megatron.generation.command import run
from inrank_megatron.generation.generate import Sampling, _Numbers, continuations, new_tokens, prompt_ids
from inrank_megatron.interop.core.gpt import gpt_forward
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.run import open_weights
from inrank_megatron.interop.formats import writable
from tests.forked import run_forked
from tests.harness import ROOT
from tests.runs import random_weights, write_run
from tests.unit.data.tokenizer_layouts import layouts
from tools.generate import parse

PROMPT = "The parser of the arguments"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([Path(argparse.__file__).read_text()], vocab_size=400).save(folder)
    return folder


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def any_run(request, tmp_path_factory, tokenizer_folder) -> Path:
    weights = random_weights(
        vocab_size=400, tokenizer=tokenizer_folder, ranks=6, settings={"model_type": request.param}
    )
    return write_run(tmp_path_factory.mktemp("runs") / request.param, weights)


@pytest.fixture(scope="session")
def gpt2_run(tmp_path_factory, tokenizer_folder) -> Path:
    weights = random_weights(vocab_size=400, tokenizer=tokenizer_folder, ranks=None)
    return write_run(tmp_path_factory.mktemp("run") / "run", weights)


@pytest.fixture
def generated(capsys):
    """What the tool prints."""

    def call(*words: object) -> str:
        run(parse([str(word) for word in words]))
        return capsys.readouterr().out.removesuffix("\n")

    return call


def oracle(folder: Path, prompt: str, *, tokens: int) -> str:
    """The likeliest token each time, by the whole Megatron-Core model, without a cache."""
    forward, tokenizer = (
        gpt_forward(open_weights(folder, Options())),
        load_tokenizer(str(folder / "tokenizer")),
    )
    ids = tokenizer.before + tokenizer.encode(prompt) or [tokenizer.eod]
    start = len(ids)
    while len(ids) < start + tokens:
        ids.append(int(forward(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == tokenizer.eod:
            return prompt + tokenizer.decode(ids[start:-1])
    return prompt + tokenizer.decode(ids[start:])


@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_greedy_text_of_a_run_is_that_of_the_oracle(any_run, generated, prompt):
    text = generated(any_run, "--greedy", "--prompt", prompt, "--max-new-tokens", 20)
    assert text == oracle(any_run, prompt, tokens=20) and len(text) > len(prompt)


@pytest.mark.parametrize("prompt", ["the fox", ""])
def test_a_prompt_begins_as_a_document_does(tmp_path, prompt, capsys):
    """What the tokenizer adds stands before it, and an empty one is that alone. Rows of the model beyond the
    tokens, here the likeliest, are none.
    """
    (folder := tmp_path / "tokenizer").mkdir()
    layouts()["Llama 3"](folder)
    tokenizer = load_tokenizer(str(folder))
    assert prompt_ids(prompt, tokenizer) == [*tokenizer.before, *tokenizer.encode(prompt)]
    assert tokenizer.before == [0]
    weights = random_weights(vocab_size=440, tokenizer=folder, ranks=None, settings={"model_type": "llama"})
    head = weights.read("output_layer.weight")
    head[400:] *= 100
    spare = replace(weights, read=lambda name: head if name == "output_layer.weight" else weights.read(name))
    run(parse([str(write_run(tmp_path / "run", spare)), "--prompt", prompt]))
    printed = capsys.readouterr()
    assert printed.out.startswith(prompt) and len(printed.out) > len(prompt) + 20
    assert "each document begins with <s>" in printed.err


@pytest.mark.parametrize("name", ["hf-dense", "hf-factorised"])
def test_greedy_text_of_an_export_is_that_of_its_run(any_run, tmp_path, generated, name):
    (folder := tmp_path / name).mkdir()
    writable()[name].write(open_weights(any_run, Options()), folder, Options())
    options = ("--greedy", "--prompt", PROMPT, "--max-new-tokens", 20)
    assert generated(folder, *options) == generated(any_run, *options)


def test_generation_ends_with_the_document(gpt2_run, tmp_path, generated):
    """With a final norm that points to the end of text, it is the likeliest token everywhere."""
    weights = open_weights(gpt2_run, Options())
    eod = load_tokenizer(str(weights.tokenizer)).eod

    def read(name: str) -> torch.Tensor:
        tensor = weights.read(name)
        if name == "decoder.final_layernorm.weight":
            return torch.zeros_like(tensor)
        embedding = "embedding.word_embeddings.weight"
        return 10 * weights.read(embedding)[eod] if name == "decoder.final_layernorm.bias" else tensor

    ending = write_run(tmp_path / "run", replace(weights, read=read))
    assert generated(ending, "--greedy", "--prompt", PROMPT) == PROMPT


def test_the_space_before_the_first_new_word(tmp_path, generated):
    """SentencePiece's decoder drops the one that its text begins with."""
    words = {f"\u2581{word}": i for i, word in enumerate(["the", "parser", "of", "was", "read"])}
    backend = tokenizers.Tokenizer(models.WordLevel(words | {"<|endoftext|>": 5}, unk_token="<|endoftext|>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    Tokenizer(backend, end_of_text="<|endoftext|>").save(tmp_path / "words")
    weights = random_weights(vocab_size=6, tokenizer=tmp_path / "words", ranks=None)
    text = generated(write_run(tmp_path / "run", weights), "--prompt", "the parser", "--max-new-tokens", 5)
    assert text.startswith("the parser ") and set(text.split()) <= set(["the", "parser", "of", "was", "read"])


def test_a_model_s_own_ways_of_generating_do_not_count(gpt2_run):
    greedy = {"tokens": 12, "eod": 0, "sampling": Sampling(do_sample=False, options={})}
    model = find_model(str(gpt2_run), Options()).pretrained().eval()
    plain = continuations(model, [5, 6, 7], **greedy)
    model.generation_config.repetition_penalty = 3.0
    assert continuations(model, [5, 6, 7], **greedy) == plain


def test_draws_depend_on_the_seed_alone(gpt2_run, generated):
    options = ("--prompt", PROMPT, "--num-return-sequences", 2, "--max-new-tokens", 12)
    first = generated(gpt2_run, *options, "--seed", 1)
    assert first == generated(gpt2_run, *options, "--seed", 1) != generated(gpt2_run, *options, "--seed", 2)
    one, other = first.split("\n---\n")
    assert one != other
    greedy = generated(gpt2_run, "--no-do-sample", "--prompt", PROMPT, "--max-new-tokens", 12)
    least = ("--do-sample", "--top-k", 1, "--temperature", 0.5, "--top-p", 0.9)
    assert generated(gpt2_run, "--prompt", PROMPT, "--max-new-tokens", 12, *least) == greedy


def test_room_for_text():
    assert [new_tokens(None, prompt=p, positions=300) for p in (1, 200, 299)] == [128, 100, 1]
    assert new_tokens(100, prompt=200, positions=300) == 100
    with pytest.raises(UserError, match="have room for 100; lower --max-new-tokens"):
        new_tokens(101, prompt=200, positions=300)
    with pytest.raises(UserError, match="leaves no room for text; shorten the prompt"):
        new_tokens(None, prompt=300, positions=300)


def test_what_is_refused(gpt2_run, tmp_path, tokenizer_folder, generated):
    without = write_run(tmp_path / "run", random_weights(vocab_size=300, tokenizer=None, ranks=None))
    for words, message in (
        ((gpt2_run, "--prompt", PROMPT * 20), "leaves no room for text"),
        ((gpt2_run, "--prompt", PROMPT, "--max-new-tokens", 32), "lower --max-new-tokens"),
        ((gpt2_run, "--prompt-file", tmp_path / "absent"), "prompt: cannot be read"),
        ((without, "--prompt", PROMPT), "no tokenizer next to it"),
        ((without, "--prompt", PROMPT, "--tokenizer", tokenizer_folder), "has 400 tokens"),
        ((tmp_path / "absent", "--prompt", PROMPT), "does not exist"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            generated(*words)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("words", [
    ("--greedy", "--top-k", "5"), ("--no-do-sample", "--num-return-sequences", "2"), ("--top-p", "1.5"),
    ("--temperature", "0"), ("--temperature", "1e-300"), ("--tokenizer", ""),
    ("--prompt", "a", "--prompt-file", "b"),
])  # fmt: skip
def test_contradictions_on_the_command_line(words):
    with pytest.raises(SystemExit):
        parse(["run", *words])


def test_the_tool_reads_standard_input_and_prints_errors_in_one_line(gpt2_run):
    tool = ROOT / "tools" / "generate.py"
    command = [sys.executable, str(tool), str(gpt2_run), "--max-new-tokens", "3"]
    done = subprocess.run(command, input=PROMPT + "\n", capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith(PROMPT), done.stderr
    said = "text is sampled with temperature 0.8, top-p 0.95, seed 0; --greedy takes the likeliest"
    assert done.stderr == f"{said} token each time\n"
    refused = run_forked(tool, gpt2_run / "absent", "--prompt", PROMPT)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert refused.stderr.startswith("error: ")


def test_numbers_that_are_missing_after_the_first_token_are_found_at_the_end():
    """Nobody waits for them in between, and nothing that draws a token meets them."""
    numbers, ids = _Numbers(), torch.zeros(1, 1)
    good, bad = torch.tensor([[1.0, 2.0]]), torch.tensor([[float("nan"), 2.0]])
    assert torch.equal(numbers(ids, good), good)
    assert torch.equal(numbers(ids, bad), torch.tensor([[0.0, 2.0]]))
    numbers(ids, good)
    with pytest.raises(UserError, match="not numbers"):
        numbers.check()
    with pytest.raises(UserError, match="not numbers"):
        _Numbers()(ids, bad)
    with pytest.raises(UserError, match="not numbers"):  # of a temperature of almost nothing
        _Numbers()(ids, torch.tensor([[float("inf"), 2.0]]))


def test_what_is_no_text_at_standard_input(gpt2_run, monkeypatch):
    """Python lets any bytes through where the language of the system is C."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\udcff"))
    with pytest.raises(UserError, match=r"prompt: cannot be read \(not UTF-8 text\)"):
        run(parse([str(gpt2_run)]))

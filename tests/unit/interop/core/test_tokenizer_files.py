"""Special tokens of a tokenizer of transformers survive the way into a run and back."""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from inrank_megatron.interop.core import run as run_format
from inrank_megatron.interop.huggingface import dense as hf_dense
from tests.unit.interop.models import OPTIONS, make_weights, write_run

TEXT = "<|im_start|>a <tool> b"


def save_theirs(ours: Path, folder: Path) -> None:
    """With tokens of its own at the beginning, as padding, and inside a text."""
    backend = tokenizers.Tokenizer.from_file(str(ours / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "<|im_start|>")])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    begin = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|im_start|>",
        additional_special_tokens=["<|im_start|>"],
    ).save_pretrained(folder)


def test_special_tokens_survive_both_ways(tmp_path: Path, tokenizer: Path) -> None:
    save_theirs(tokenizer, tmp_path / "theirs")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    run = write_run(make_weights("llama", "dense", tokenizer=tmp_path / "theirs"), tmp_path / "run")
    (back := tmp_path / "back").mkdir()
    hf_dense.write(run_format.open_weights(run, OPTIONS), back, OPTIONS)
    for folder in (run / "tokenizer", back):
        got = AutoTokenizer.from_pretrained(folder)
        assert got.special_tokens_map == theirs.special_tokens_map
        assert got.get_added_vocab() == theirs.get_added_vocab() and len(got) == len(theirs)
        assert got(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
        assert got.decode(got(TEXT)["input_ids"]) == theirs.decode(theirs(TEXT)["input_ids"])
    config = json.loads((back / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (theirs.bos_token_id, theirs.eos_token_id)

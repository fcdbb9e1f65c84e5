"""What ``tools/evaluate.py`` does with its options."""

import argparse
import json
import sys
from collections.abc import Callable

from inrank_megatron.config.folders import named_path
from inrank_megatron.config.out_of_memory import or_on_the_cpu, within_memory
from inrank_megatron.data.tokenizer import load_tokenizer
from inrank_megatron.distributed.platform import device
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.errors import UserError
from inrank_megatron.evaluation.models import Model, find_model
from inrank_megatron.evaluation.perplexity import Score, total_loss
from inrank_megatron.evaluation.texts import Text, check_tokens, dataset_split, files, run_split
from inrank_megatron.evaluation.windows import SlidingWindows
from inrank_megatron.interop.core.options import options_of
from inrank_megatron.reporting.console import unless_nobody_reads
from inrank_megatron.reporting.learnt import tells_of_words

SPLIT = "valid"


def run(arguments: argparse.Namespace, parallel: Parallel) -> None:
    """Evaluate on all ranks and print on the first.

    Raises:
        UserError: see :func:`evaluate`.
    """
    record = evaluate(arguments, parallel)
    if parallel.rank == 0:
        with unless_nobody_reads():
            print(json.dumps(record, indent=1) if arguments.json else _as_lines(record))


def evaluate(arguments: argparse.Namespace, parallel: Parallel) -> dict:
    """The record of an evaluation, on every rank of ``parallel``, which has no tensor parallelism.

    Raises:
        UserError: on all ranks, for what the user can correct, if possible before weights are read.
    """
    model, text, windows = parallel.call_or_raise_on_all_ranks(lambda: _prepared(arguments))
    if parallel.rank == 0:
        for note in (*model.notes, *text.notes):
            print(note, file=sys.stderr)
    forward = parallel.call_or_raise_on_all_ranks(
        lambda: within_memory(
            lambda: model.load(device()),
            lambda: f"the weights do not fit; free memory{or_on_the_cpu(device())}",
        )
    )
    nats = total_loss(forward, windows, rows=arguments.micro_batch_size, parallel=parallel, device=device())
    score = Score(nats, windows.num_targets, text.file.num_words, text.num_bytes())
    return _record(model, text, windows, score)


def _prepared(arguments: argparse.Namespace) -> tuple[Model, Text, SlidingWindows]:
    model = find_model(arguments.path, options_of(arguments))
    seq_length = arguments.seq_length or model.seq_length
    if seq_length > model.positions:
        raise UserError(
            f"seq_length = {seq_length}: {model.name} has {model.positions} positions; lower --seq-length"
        )
    text = _text(arguments, model)
    parses = arguments.parse_special_tokens
    own = load_tokenizer(model.tokenizer, parse_special_tokens=parses) if model.tokenizer else None
    check_tokens(text, vocab_size=model.vocab_size, tokenizer=own, model=model.name)
    return (
        model,
        text,
        SlidingWindows(text.file, seq_length=seq_length, stride=arguments.stride or seq_length),
    )


def _text(arguments: argparse.Namespace, model: Model) -> Text:
    split = arguments.split or SPLIT
    if not (arguments.data or arguments.dataset):
        if model.kind != "run":
            raise UserError(
                f"{model.name}: is not a run, so it has no split of its own; give --data or --dataset"
            )
        return run_split(named_path(model.name), split)
    tokenizer = arguments.tokenizer or model.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{model.name}: no tokenizer next to it; name the one it was trained with, with --tokenizer"
        )
    source = {
        "tokenizer": tokenizer,
        "text_column": arguments.text_column,
        "document_separator": arguments.document_separator,
        "data_cache_path": arguments.data_cache_path,
        "parse_special_tokens": arguments.parse_special_tokens,
    }
    if arguments.data:
        return files(arguments.data, **source)
    return dataset_split(arguments.dataset, split, **source)


def _record(model: Model, text: Text, windows: SlidingWindows, score: Score) -> dict:
    return {
        "model": model.name,
        "format": model.kind,
        "step": model.step,
        "data": text.name,
        "vocab_size": model.vocab_size,
        "seq_length": windows.seq_length,
        "stride": windows.stride,
        "windows": len(windows),
        "loss": score.loss,
        "perplexity": score.perplexity,
        "word_perplexity": score.word_perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "words": score.words,
        "bytes": score.bytes,
    }


def _as_lines(record: dict) -> str:
    step = f", step {record['step']}" if record["step"] else ""
    lines = [
        f"{record['model']} ({record['format']}{step}) on {record['data']}",
        f"{record['windows']:,} windows of {record['seq_length']} tokens, a new one every {record['stride']}",
    ]
    formats: dict[str, Callable] = {
        "loss": "{:.6f} nats per token".format,
        "perplexity": "{:.6g}".format,
        "word_perplexity": "{:.6g}".format,
        "bits_per_byte": "{:.6f}".format,
        "tokens": "{:,}".format,
        "words": "{:,}".format,
    }
    if not tells_of_words(record["word_perplexity"], record["vocab_size"]):
        del formats["word_perplexity"]
    for name, shown in formats.items():
        value = record[name]
        lines.append(f"  {name.replace('_', ' '):16} {'unknown' if value is None else shown(value)}")
    return "\n".join(lines)

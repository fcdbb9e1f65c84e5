"""What ``tools/generate.py`` does with its options."""

import argparse
import sys

from inrank_megatron.config.folders import named_path
from inrank_megatron.config.out_of_memory import or_on_the_cpu, within_memory
from inrank_megatron.data.tokenizer import load_tokenizer
from inrank_megatron.distributed.platform import device
from inrank_megatron.errors import UserError
from inrank_megatron.evaluation.models import find_model
from inrank_megatron.generation.generate import (
    DEFAULT_SAMPLING,
    Sampling,
    continuations,
    new_tokens,
    prompt_ids,
)
from inrank_megatron.interop.core.options import options_of
from inrank_megatron.reporting.console import unless_nobody_reads

BETWEEN = "---"


def run(arguments: argparse.Namespace) -> None:
    """Print the prompt with what follows it; several sequences with a line between them.

    Raises:
        UserError: for what the user can correct, before the weights are read.
    """
    text = _prompt(arguments)
    model = find_model(arguments.path, options_of(arguments))
    named = arguments.tokenizer or model.tokenizer
    if named is None:
        raise UserError(
            f"{model.name}: no tokenizer next to it; name the one it was trained with, with --tokenizer"
        )
    tokenizer = load_tokenizer(named)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{named}: has {tokenizer.vocab_size} tokens, {model.name} knows {model.vocab_size}; give the "
            "--tokenizer that the model was trained with"
        )
    ids = prompt_ids(text, tokenizer)
    tokens = new_tokens(arguments.max_new_tokens, prompt=len(ids), positions=model.positions)
    sampling = _sampling(arguments)
    for note in (*model.notes, *tokenizer.notes, *_how(sampling)):
        print(note, file=sys.stderr)
    found = within_memory(
        lambda: continuations(
            model.pretrained().to(device()).eval(),
            ids,
            tokens=tokens,
            eod=tokenizer.eod,
            vocab_size=tokenizer.vocab_size,
            sampling=sampling,
        ),
        lambda: _smaller(sampling.sequences, tokens),
    )
    # Some decoders drop the space before the first word that they are given.
    start = len(tokenizer.decode(ids))
    with unless_nobody_reads():
        print(f"\n{BETWEEN}\n".join(text + tokenizer.decode(ids + row)[start:] for row in found))


def _smaller(sequences: int, tokens: int) -> str:
    """The cache of keys and values, and the logits, are in proportion to sequences and tokens."""
    fewer = f"--num-return-sequences {sequences // 2} (half of the cache), " if sequences > 1 else ""
    return f"give {fewer}--max-new-tokens {max(1, tokens // 2)} or a shorter prompt{or_on_the_cpu(device())}"


def _prompt(arguments: argparse.Namespace) -> str:
    """The text of --prompt, a file or standard input; the line end that closes a file is not part of it."""
    try:
        if arguments.prompt_file is None:
            given = arguments.prompt
            text = sys.stdin.read().removesuffix("\n") if given is None else given
            text.encode()  # raises for bytes that are not text, which Python lets through
            return text
        return named_path(arguments.prompt_file).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"prompt: cannot be read ({reason}); give --prompt or a text file") from None


def _sampling(arguments: argparse.Namespace) -> Sampling:
    if not arguments.do_sample:
        return Sampling(do_sample=False, options={})
    names = ("temperature", "top_k", "top_p")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return Sampling(True, arguments.seed, arguments.num_return_sequences, DEFAULT_SAMPLING | given)


def _how(sampling: Sampling) -> list[str]:
    """What a reader of sampled text needs to reproduce it."""
    if not sampling.do_sample:
        return []
    shown = ", ".join(f"{name.replace('_', '-')} {value:g}" for name, value in sampling.options.items())
    return [
        f"text is sampled with {shown}, seed {sampling.seed}; --greedy takes the likeliest token each time"
    ]

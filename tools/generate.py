"""Generate text with a run, an export, or a model of the Hugging Face hub.

Examples::

    python tools/generate.py runs/wikitext --prompt "The castle was built"
    python tools/generate.py exported --prompt "The castle" --top-p 0.9 --temperature 0.7 --seed 3
    python tools/generate.py exported --prompt "The castle" --greedy
    echo "The castle was built" | python tools/generate.py runs/wikitext --max-new-tokens 20

The text comes from transformers' generate, with its cache of keys and values; the options have its names.
Tokens are sampled; with --greedy, each is the most likely one. The text also ends where the document ends.
"""

import argparse
import sys

from inrank_megatron.config.tool_options import (
    add_allow_pickle,
    add_model_description,
    count,
    tool_parser,
    word,
)
from inrank_megatron.distributed.environment import complete
from inrank_megatron.distributed.launcher import refuse_ranks
from inrank_megatron.errors import UserError

# Scores are divided by it, and in FP32 their quotients must be numbers.
LOWEST_TEMPERATURE = 1e-30


def main(argv: list[str]) -> int:
    """Generate; the exit status is 0, or 1 after one line about what the user can correct."""
    complete()
    arguments = parse(argv)
    # Imported here: torch takes seconds, --help should not.
    from inrank_megatron.distributed.platform import prepare_process

    try:
        refuse_ranks("generate.py")
        prepare_process()
        # After the process is prepared: it imports Megatron-Core.
        from inrank_megatron.generation.command import run

        run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; those of sampling exclude --greedy."""
    parser = tool_parser("generate.py", __doc__)
    parser.add_argument("path", metavar="PATH", help="run folder, one checkpoint, export, or name on the hub")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", metavar="TEXT", help="the prompt [standard input]; an empty one starts a new document"
    )
    prompts.add_argument("--prompt-file", metavar="FILE", help="text file with the prompt")
    parser.add_argument(
        "--tokenizer", type=word, help="name on the hub or folder, for a model without a tokenizer of its own"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=count,
        metavar="N",
        help="tokens to generate [128, or fewer if the model has no positions for them]",
    )
    parser.add_argument(
        "--do-sample",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="sample each token, or take the most likely one [sample]",
    )
    parser.add_argument("--greedy", dest="do_sample", action="store_false", help="the same as --no-do-sample")
    parser.add_argument(
        "--temperature",
        type=_temperature,
        help="temperature of sampling; a lower one gives more likely text [0.8]",
    )
    parser.add_argument("--top-k", type=count, metavar="N", help="sample from the N most likely tokens [50]")
    parser.add_argument(
        "--top-p",
        type=_positive,
        help="sample from the most likely tokens whose probabilities sum to this [0.95]",
    )
    parser.add_argument("--seed", type=_seed, default=0, help="seed of sampling, below 2^63 [0]")
    parser.add_argument(
        "--num-return-sequences",
        type=_sequences,
        default=1,
        metavar="N",
        help="number of texts to sample, up to 1024 [1]",
    )
    add_allow_pickle(parser)
    add_model_description(parser)
    arguments = parser.parse_args(argv)
    if arguments.top_p is not None and arguments.top_p > 1:
        parser.error("--top-p is a share: above 0, at most 1")
    drawn = {"temperature": None, "top_k": None, "top_p": None, "num_return_sequences": 1}
    given = [name for name, default in drawn.items() if getattr(arguments, name) != default]
    if given and not arguments.do_sample:
        parser.error(
            f"--{given[0].replace('_', '-')} needs sampling; leave out --greedy and --no-do-sample, or this"
        )
    return arguments


def _sequences(text: str) -> int:
    return count(text, most=1024)  # they are drawn at once


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 2^63")
    return value


def _temperature(text: str) -> float:
    value = _positive(text)
    if value < LOWEST_TEMPERATURE:
        raise argparse.ArgumentTypeError(f"{text} is below {LOWEST_TEMPERATURE:g}; give --greedy")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

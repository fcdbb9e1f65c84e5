"""Compute the perplexity of a run, an export, or a model of the Hugging Face hub, on any text.

Examples::

    python tools/evaluate.py runs/wikitext                                   # its own validation split
    python tools/evaluate.py runs/wikitext --split test
    python tools/evaluate.py exported --data wiki.test.tokens --stride 512
    torchrun --nproc-per-node 2 tools/evaluate.py gpt2 --dataset Salesforce/wikitext:wikitext-103-raw-v1

Every token but the first is scored exactly once, in FP32, and the losses are summed in FP64. Several
processes divide the windows among them; the result does not depend on their number. With a --stride below
the sequence length, each token has at least seq_length - stride tokens of context.
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
from inrank_megatron.errors import UserError


def main(argv: list[str]) -> int:
    """Evaluate; the exit status is 0, or 1 after one line about what the user can correct."""
    complete()
    arguments = parse(argv)
    # Imported here: torch takes seconds, --help should not.
    from inrank_megatron.distributed.launcher import adopt_ranks
    from inrank_megatron.distributed.platform import backend, prepare_process

    rank = 0
    try:
        rank = adopt_ranks().rank
        prepare_process()
        # After the process is prepared: these import Megatron-Core.
        from inrank_megatron.distributed.process_groups import initialise, shutdown
        from inrank_megatron.evaluation.command import run

        parallel = initialise(backend=backend(), tensor_model_parallel_size=1)
        try:
            run(arguments, parallel)
        finally:
            shutdown()
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; --data and --dataset exclude each other, and files have no split."""
    parser = tool_parser("evaluate.py", __doc__)
    parser.add_argument("path", metavar="PATH", help="run folder, one checkpoint, export, or name on the hub")
    parser.add_argument(
        "--data",
        type=word,
        nargs="+",
        metavar="PATH",
        help="files, folders or patterns of text, JSON, parquet, Arrow, or .bin/.idx, which are scored in "
        "full",
    )
    parser.add_argument(
        "--dataset", type=word, metavar="OWNER/NAME[:CONFIG]", help="dataset of the Hugging Face hub"
    )
    parser.add_argument(
        "--split",
        choices=("train", "valid", "test"),
        help="split of the dataset or of the run's own text [valid]",
    )
    parser.add_argument(
        "--text-column", type=word, default="text", help="column or key that holds the text [text]"
    )
    parser.add_argument(
        "--document-separator", type=word, metavar="TEXT", help="text that ends a document, as in training"
    )
    parser.add_argument(
        "--tokenizer", type=word, help="name on the hub or folder, for a model without a tokenizer of its own"
    )
    parser.add_argument(
        "--parse-special-tokens",
        action="store_true",
        help="read special tokens written out in the text as those tokens [as in the run; otherwise as text]",
    )
    parser.add_argument(
        "--data-cache-path", type=word, default="data_cache", help="folder of token files [data_cache]"
    )
    parser.add_argument("--seq-length", type=count, help="tokens in a window [the model's sequence length]")
    parser.add_argument(
        "--stride", type=count, help="tokens from the start of one window to that of the next [seq-length]"
    )
    parser.add_argument("--micro-batch-size", type=count, default=4, help="windows in one forward pass [4]")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    add_allow_pickle(parser)
    add_model_description(parser)
    arguments = parser.parse_args(argv)
    if arguments.data and arguments.dataset:
        parser.error("give --data or --dataset, not both")
    if arguments.data and arguments.split:
        parser.error(
            "--split selects a split of a dataset or of a run; files given with --data are scored in full"
        )
    if arguments.split == "train" and not arguments.dataset:
        parser.error("--split train is for --dataset; a run's own splits to evaluate on are valid and test")
    return arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Show ranks, spectra and cost of a model's linears, next to the ranks that untrained factors would get; or
the spectra of what lies between two models.

Examples::

    python tools/inspect_ranks.py runs/wikitext
    python tools/inspect_ranks.py runs/wikitext/checkpoints/step_00000100 runs/wikitext
    python tools/inspect_ranks.py --untrained

With A and B, each linear has the singular values of W_B - W_A, which is the cumulative update if A is from
before training. W is the weight that the linear computes with: W0 + U V, U V, or a dense weight. The two may
be in different formats; their architectures must be the same.

A and B may each be a run folder (its best checkpoint is used), one checkpoint in it, a folder in another
format that docs/guides/convert.md lists, or a model of the Hugging Face hub. --untrained shows the ranks that
the criterion of InRank's released code finds without any data (the paper's table 3). For a dense linear, the
rank is the smallest at which the explained ratio of its own spectrum reaches the threshold. The tool runs in
one process and uses no GPU.
"""

import argparse
import sys

from inrank_megatron.config.tool_options import (
    add_allow_pickle,
    add_model_description,
    count,
    path,
    tool_parser,
)
from inrank_megatron.distributed.environment import complete
from inrank_megatron.distributed.launcher import refuse_ranks
from inrank_megatron.errors import UserError


def main(argv: list[str]) -> int:
    """Print; the exit status is 0, or 1 after one line about what the user can correct."""
    complete()
    options = parse(argv)
    try:
        refuse_ranks("inspect_ranks.py")
        show(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def show(options: argparse.Namespace) -> None:
    """Print what the options ask for."""
    # Imported here: torch takes seconds, --help should not.
    from inrank_megatron.inspection.command import print_comparison, print_model, print_untrained
    from inrank_megatron.interop.core.options import options_of
    from inrank_megatron.interop.hub import readable

    output = {"as_json": options.json, "png": options.png, "leading": options.leading}
    if options.untrained:
        print_untrained(options.hidden_size, options.threshold, as_json=options.json)
    elif options.other is None:
        print_model(readable(options.path), options_of(options), **output)
    else:
        print_comparison(readable(options.path), readable(options.other), options_of(options), **output)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; paths and ``--untrained`` exclude each other, and one of the two is needed."""
    parser = tool_parser("inspect_ranks.py", __doc__)
    parser.add_argument(
        "path", metavar="A", nargs="?", help="run folder, one checkpoint, export, or name on the hub"
    )
    parser.add_argument(
        "other", metavar="B", nargs="?", help="another one: show singular values of W_B - W_A"
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--png", type=path, metavar="FILE", help="also draw ranks and spectra into this file")
    parser.add_argument(
        "--leading",
        type=count,
        default=3,
        metavar="N",
        help="number of singular values in the table [3]; JSON has all",
    )
    parser.add_argument(
        "--untrained", action="store_true", help="give the ranks of untrained factors; needs no A"
    )
    parser.add_argument(
        "--hidden-size", type=_width, nargs="+", metavar="N", help="widths of --untrained [768 1024 1280]"
    )
    parser.add_argument(
        "--threshold", type=float, nargs="+", metavar="A", help="thresholds of --untrained [0.8 0.85 0.9]"
    )
    add_allow_pickle(parser)
    add_model_description(parser)
    options = parser.parse_args(argv)
    if (options.path is None) != options.untrained:
        parser.error("give a run, a checkpoint or an export, or --untrained")
    if options.untrained and options.png:
        parser.error("--png draws a model; leave it out with --untrained")
    if options.path and (options.hidden_size or options.threshold):
        parser.error("--hidden-size and --threshold belong to --untrained; a run has its own")
    return options


def _width(text: str) -> int:
    return count(text, most=2**15)  # matrices of 4 x width x width are drawn and decomposed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

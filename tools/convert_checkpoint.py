"""Convert a run, or a checkpoint of another program, and prove that the result is the same model.

Examples::

    python tools/convert_checkpoint.py runs/wikitext exported --format hf-dense
    python tools/convert_checkpoint.py runs/wikitext exported --check-only
    python tools/convert_checkpoint.py openai-community/gpt2 runs/gpt2 --format run

Both models compute on the same tokens; the largest difference of a logit is printed, and the conversion fails
where it is above --tolerance. FROM may be a run folder (its best checkpoint), one checkpoint in it, a folder
in any other format that is known here, or the name of a GPT-2 or LLaMA on the Hugging Face hub. One process,
no GPU, no launcher.
"""

import argparse
import os
import signal
import sys

from inrank_megatron.config.tool_options import add_allow_pickle, add_model_description, positive, tool_parser
from inrank_megatron.distributed.environment import complete
from inrank_megatron.distributed.launcher import refuse_ranks
from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.options import TOLERANCE


def main(argv: list[str]) -> int:
    """Convert; the exit status is 0, or 1 after one line about what the user can correct."""
    complete()
    arguments = parse(argv)
    # Both models compute on the CPU. With a GPU in sight Megatron would move the angles of a LLaMA to it, and
    # take memory there that a training may need.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Imported here: torch takes seconds, --help should not.
    from inrank_megatron.interop.command import run

    # Ends as an error does, so that what was half written goes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        refuse_ranks("convert_checkpoint.py")
        run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; a format is needed to write, not to check."""
    parser = tool_parser("convert_checkpoint.py", __doc__)
    parser.add_argument("source", metavar="FROM", help="what to convert")
    parser.add_argument("target", metavar="TO", help="a new folder")
    parser.add_argument("--format", help="format of TO")
    parser.add_argument(
        "--check-only", action="store_true", help="compare an old TO with FROM; write nothing"
    )
    add_allow_pickle(parser)
    parser.add_argument(
        "--pad-ranks", action="store_true", help="one rank for all adapters, that servers take (peft)"
    )
    add_model_description(parser)
    parser.add_argument(
        "--tolerance",
        type=positive,
        default=TOLERANCE,
        metavar="X",
        help="largest difference of a logit that passes for rounding (%(default)g)",
    )
    arguments = parser.parse_args(argv)
    if arguments.format is None and not arguments.check_only:
        parser.error("give --format, or --check-only to compare what was converted before")
    return arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

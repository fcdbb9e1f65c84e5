"""Convert a run, or a checkpoint of another program, and check that the result is the same model.

Examples::

    python tools/convert_checkpoint.py runs/wikitext exported --format hf-dense
    python tools/convert_checkpoint.py runs/wikitext exported --check-only
    python tools/convert_checkpoint.py openai-community/gpt2 runs/gpt2 --format run

Both models compute logits for the same tokens. The largest difference is printed, and the conversion fails
if it is above --tolerance. FROM may be a run folder (its best checkpoint is used), one checkpoint in it, a
folder in another format that docs/guides/convert.md lists, or a model of the Hugging Face hub (GPT-2, LLaMA,
Mistral, Qwen2 or Qwen3).
The tool runs in one process and uses no GPU; start it without a launcher.
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
    parser.add_argument("source", metavar="FROM", help="run, checkpoint, export, or name on the hub")
    parser.add_argument("target", metavar="TO", help="a new folder")
    parser.add_argument("--format", help="format of TO: run, hf-dense, hf-factorised, peft or megatron")
    parser.add_argument(
        "--check-only", action="store_true", help="compare an existing TO with FROM; write nothing"
    )
    add_allow_pickle(parser)
    parser.add_argument(
        "--pad-ranks", action="store_true", help="pad all modules to one rank that servers accept (peft)"
    )
    add_model_description(parser)
    parser.add_argument(
        "--tolerance",
        type=positive,
        default=TOLERANCE,
        metavar="X",
        help="largest difference of a logit that counts as rounding [%(default)g]",
    )
    arguments = parser.parse_args(argv)
    if arguments.format is None and not arguments.check_only:
        parser.error("give --format, or --check-only to compare what was converted before")
    return arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Check and measure this project on this machine's GPUs: ``bash tests/gpu.sh``.

Exit status: 0 all passed; 1 all done, and some did not pass; 75 some are left, run it again; 130 ended
by Ctrl-C, run it again; 2 the call is wrong, or there is no GPU to use.
"""

import argparse
import signal
import sys
from pathlib import Path

LEAST_MINUTES = 9


def main(argv: list[str]) -> int:
    options = _parse(argv)
    # Imported here: --help needs nothing that has to be installed.
    from tests.gpu.command import run

    return run(options)


def _parse(argv: list[str]) -> argparse.Namespace:
    summary, statuses = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(prog="gpu.sh", description=summary, epilog=statuses, allow_abbrev=False)
    parser.add_argument(
        "--minutes",
        type=_minutes,
        help=f"start no case that may end after them; {LEAST_MINUTES} or more",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="cases, or all below a name such as losses/TP2"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and run none")
    parser.add_argument("--again", action="store_true", help="run again what did not pass")
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of results [gpu_results/...]")
    parser.add_argument(
        "--rehearse",
        type=int,
        choices=(1, 2, 4, 8),
        nargs="?",
        const=1,
        metavar="N",
        help="run on N processes of the CPU in the place of GPUs [1]",
    )
    return parser.parse_args(argv)


def _minutes(text: str) -> float:
    value = float(text)
    if not value >= LEAST_MINUTES:
        raise argparse.ArgumentTypeError(f"{text}: the longest case and its start need {LEAST_MINUTES}")
    return value


if __name__ == "__main__":
    # A batch system's time is up: as with Ctrl-C the report is written, and no process stays.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))

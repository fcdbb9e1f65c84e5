"""Write the report of a run again, or lay several runs side by side, from their records alone.

Examples::

    python tools/report.py runs/wikitext
    python tools/report.py runs/wikitext runs/dense --output comparison.html

With one run, its report.html and plots/ are written again. Useful for a run that was killed or is still
running. With several, one page shows their curves, ranks, costs and the settings that differ; nothing is
written into the run folders.
"""

import argparse
import sys
from pathlib import Path

from inrank_megatron.config.tool_options import path, tool_parser
from inrank_megatron.distributed.environment import complete
from inrank_megatron.distributed.launcher import refuse_ranks
from inrank_megatron.errors import UserError

DEFAULT_OUTPUT = Path("comparison.html")


def main(argv: list[str]) -> int:
    """Write and print where; the exit status is 0, or 1 after one line about what the user can correct."""
    options = parse(argv)
    complete()
    try:
        refuse_ranks("report.py")
        print(write(options.runs, options.output or DEFAULT_OUTPUT))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write(runs: list[Path], output: Path) -> Path:
    """The report of one run in its folder, or that of several runs at ``output``; returns its path."""
    # Imported here, when there is a place for Matplotlib's cache.
    from inrank_megatron.reporting.report import write_report
    from inrank_megatron.reporting.several import write_comparison

    if len(runs) > 1:
        return write_comparison(runs, output)
    [run] = runs
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run folder, it has no config.yaml; name the folder given to --save")
    return write_report(run)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; ``--output`` is for several runs."""
    parser = tool_parser("report.py", __doc__)
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument(
        "--output",
        type=path,
        metavar="FILE",
        help="the page of several runs [comparison.html]; replaces only such a page",
    )
    options = parser.parse_args(argv)
    if options.output and len(options.runs) == 1:
        parser.error("--output is for several runs; the report of one run goes into its folder")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

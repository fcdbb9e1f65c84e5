"""Write ``report.html`` and ``plots/`` of a run again from its records: ``python tools/report.py RUN``.

Useful for a run that was killed or is still running.
"""

import argparse
import sys
from pathlib import Path

from inrank_megatron.distributed.environment import complete
from inrank_megatron.distributed.launcher import refuse_ranks
from inrank_megatron.errors import UserError


def main(argv: list[str]) -> int:
    """Write and print where; the exit status is 0, or 1 after one line about what the user can correct."""
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", help="run folder")
    run = Path(parser.parse_args(argv).run)
    complete()
    # Imported here, when there is a place for Matplotlib's cache.
    from inrank_megatron.reporting.report import write_report

    try:
        refuse_ranks("report.py")
        if not (run / "config.yaml").is_file():
            raise UserError(
                f"{run}: not a run folder, it has no config.yaml; name the folder given to --save"
            )
        print(write_report(run))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

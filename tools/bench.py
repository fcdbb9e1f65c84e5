"""Measure what the factorised layers, rank decisions and training steps cost, against what arithmetic allows.

Example: ``python tools/bench.py wire --preset large``. ``--help`` lists the subcommands, ``--json`` prints
rows for programs.
"""

import sys

from inrank_megatron.benchmarks.command import main
from inrank_megatron.errors import UserError

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")

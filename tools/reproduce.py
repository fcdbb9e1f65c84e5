"""Run the experiments of ``docs/evidence/learned_ranks.md`` and ``docs/evidence/comparison.md`` again.

Example: ``python tools/reproduce.py teacher``. ``--help`` lists the experiments, ``--json`` prints rows for
programs. Each says on stderr how far it is.
"""

import sys

from inrank_megatron.errors import UserError
from inrank_megatron.experiments.command import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")

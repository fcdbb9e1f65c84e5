"""Run the papers' systems and the experiments of ``docs/evidence`` again.

Example: ``python tools/reproduce.py theorem2 --quick``. ``--list`` names the experiments with their cost,
``--json`` prints rows for programs. Each says on stderr how far it is.
"""

import sys

from inrank_megatron.errors import UserError
from inrank_megatron.experiments.command import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")

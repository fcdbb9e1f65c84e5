"""Run an experiment of ``docs/evidence`` again: ``python tools/reproduce.py theorem2 --quick``.

``--list`` names all of them, with what they take.
"""

import sys

from inrank_megatron.errors import UserError
from inrank_megatron.experiments.command import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")

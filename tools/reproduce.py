"""Run an experiment of ``docs/evidence`` again: ``python tools/reproduce.py theorem2 --quick``.

``--list`` names all of them, with what they take.
"""

import os
import sys

from inrank_megatron.errors import UserError
from inrank_megatron.experiments.command import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # `| head` ends it without a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)

"""The main program, with a folder of the environment's first on its path. Launched by test_run_refusals."""

import os
import runpy
import sys

from tests.harness import PRETRAIN

if __name__ == "__main__":
    sys.path.insert(0, os.environ["FIRST_PATH"])
    runpy.run_path(str(PRETRAIN), run_name="__main__")

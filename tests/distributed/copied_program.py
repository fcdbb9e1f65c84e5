"""The main program of a copy of the package: ``copied_program.py FOLDER ARGS...``."""

import runpy
import sys


def main() -> None:
    folder = sys.argv.pop(1)
    for name in [name for name in sys.modules if name.partition(".")[0] == "inrank_megatron"]:
        del sys.modules[name]  # a fork has imported that of the checkout
    sys.path.insert(0, folder)
    runpy.run_path(f"{folder}/launch/pretrain_gpt2.py", run_name="__main__")


if __name__ == "__main__":
    main()

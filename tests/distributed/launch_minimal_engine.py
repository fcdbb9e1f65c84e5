"""Launched by test_cpu_training: prepares the process, then trains :mod:`minimal_engine`."""

import sys

from inrank_megatron.distributed.platform import prepare_process

if __name__ == "__main__":
    prepare_process()
    from minimal_engine import main

    main(sys.argv[1:])

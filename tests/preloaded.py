"""Imported by the server whose forks are the ranks of tests: all that a rank would import at its start.

That takes 4 s of one core per rank, most of what a short test takes.
"""

import gc

from inrank_megatron.distributed.platform import prepare_process

prepare_process()

import torch._dynamo  # noqa: E402, F401  which torch's optimizers import when they are made

import inrank_megatron.reporting.report  # noqa: E402
import inrank_megatron.training.run  # noqa: E402, F401

# So that a collection in a fork looks at what the fork made, not at the libraries.
gc.collect()
gc.freeze()

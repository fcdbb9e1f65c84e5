"""One rank: reads requests from its standard input, as ``pool.py`` writes them, and answers each."""

import gc
import json
import os
import pickle
import sys
import traceback
from pathlib import Path
from typing import TextIO

from tests.gpu.failures import last_lines


def main() -> None:
    # Libraries print, and the standard output is the answers': theirs goes to the log.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _answer(answers, _join)
    for line in sys.stdin:
        _answer(answers, _run, json.loads(line))


def _join() -> dict:
    """Join the other ranks by the product's own way, with NCCL on GPUs."""
    from inrank_megatron.distributed.platform import backend, prepare_process

    prepare_process()
    from inrank_megatron.distributed.process_groups import initialise

    initialise(backend=backend(), tensor_model_parallel_size=1)
    gc.collect()
    gc.freeze()
    return {}


def _run(request: dict) -> dict:
    """A case of ``ranks.py``, whose results go to files, or its check by ``oracle.py``."""
    import torch.distributed as dist

    from tests.gpu import oracle, ranks
    from tests.harness import call

    rank, world_size = dist.get_rank(), dist.get_world_size()
    kind, settings, files = request["kind"], request["settings"], request["files"]
    if request["check"]:
        results = [pickle.loads(Path(file).read_bytes()) for file in files]
        figures = call(oracle.CHECKS[kind], rank, world_size, (settings, results))
        return {"figures": [vars(figure) for figure in figures]}
    result = call(ranks.CASES[kind], rank, world_size, (settings,))
    Path(files[rank]).write_bytes(pickle.dumps(result))
    return {}


def _answer(answers: TextIO, function, *args) -> None:
    try:
        answer = function(*args)
    except BaseException:
        traceback.print_exc()
        answer = {"error": last_lines(traceback.format_exc())}
    answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()

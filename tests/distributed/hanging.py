"""The main program, one rank of which hangs in a step, or all of which are slow at all that they do for the
first time. Launched by test_run_hangs and by tests/cluster.

``TEST_HANG``: ``asleep``, ``spinning``, or ``in a collective`` that no other rank enters, from step 6 on;
``raises``, an error in that step; ``slow``: pauses of ``SLOW_SECONDS``. ``TEST_HANG_RANK``: which rank.
"""

import os
import runpy
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from inrank_megatron.distributed.platform import prepare_process

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain_gpt2.py"
HANG, HANG_RANK = "TEST_HANG", "TEST_HANG_RANK"
STEP = 6
SLOW_SECONDS = 4.2


def spin() -> None:
    while True:
        pass


def sleep() -> None:
    time.sleep(600)


def fail() -> None:
    raise ValueError("planted (for the test)")


def enter_alone() -> None:
    dist.all_reduce(torch.zeros(3), group=others[0])


others: list[dist.ProcessGroup] = []
HANGS: dict[str, Callable[[], None]] = {
    "asleep": sleep,
    "spinning": spin,
    "in a collective": enter_alone,
    "raises": fail,
}


def plant_hang(what: str, rank: str | None) -> None:
    from inrank_megatron.engine.engine import Engine

    train_step = Engine.train_step

    def hanging(self, *args, step, **options):
        if step == 1:
            others.append(dist.new_group())
        if step == STEP and os.environ.get("RANK", "0") == rank:
            HANGS[what]()
        return train_step(self, *args, step=step, **options)

    Engine.train_step = hanging


def plant_pauses() -> None:
    """Before the first step of each phase, evaluation, rank check, switch and save."""
    from inrank_megatron.checkpoint.writing import PartWriter
    from inrank_megatron.engine import changes, decisions
    from inrank_megatron.engine.engine import Engine
    from inrank_megatron.training import recorded_evaluation

    slow(Engine, "train_step", lambda engine, *_: f"step, first phase {engine.in_first_phase}")
    slow(decisions, "_decide", lambda *_: "rank check")
    slow(changes, "refactor", lambda *_: "switch")
    slow(recorded_evaluation, "evaluate", lambda *_: "evaluation")
    slow(PartWriter, "add", lambda *_: "save")


def slow(owner, name: str, kind) -> None:
    """Have ``owner.name`` pause at the first call of each kind, which follows from the arguments."""
    function, met = getattr(owner, name), set()

    def slower(*args, **options):
        if (found := kind(*args)) not in met:
            met.add(found)
            print(f"slow: {found}", flush=True)
            time.sleep(SLOW_SECONDS)
        return function(*args, **options)

    setattr(owner, name, slower)


if __name__ == "__main__":
    prepare_process()
    if os.environ[HANG] == "slow":
        plant_pauses()
    else:
        plant_hang(os.environ[HANG], os.environ[HANG_RANK])
    runpy.run_path(str(PRETRAIN), run_name="__main__")

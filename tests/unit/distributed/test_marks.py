"""What a rank says that it does, and what a mark costs."""

import re
import threading
import time
import timeit

import torch
import torch.distributed as dist

from inrank_megatron.distributed.entered import OF_SIDE_THREADS, entered_collectives
from inrank_megatron.distributed.marks import Marks
from tests.harness import run_ranks


def test_words():
    marks = Marks()
    assert re.fullmatch(r"the start, \w+ \(marks\.py:\d+\)", marks.in_words())
    marks.begin("step", 12)
    marks.micro_batches += 3
    assert marks.in_words().startswith("step 12, micro-batch 3, ")
    marks.begin("save", 12)
    assert re.match(r"step 12, save, \w+ \(", marks.in_words())


def test_a_mark_costs_next_to_nothing():
    marks = Marks()
    seconds = min(timeit.repeat(lambda: marks.begin("step", 1), number=1000, repeat=5)) / 1000
    assert seconds < 20e-6, "some 0.5 us on a core that does nothing else"


def _collectives(rank: int, world_size: int) -> tuple[dict, dict]:
    side = dist.new_group(group_desc=OF_SIDE_THREADS)
    before = entered_collectives()
    dist.all_reduce(torch.zeros(1))
    dist.all_reduce(torch.zeros(1), group=side)
    return before, entered_collectives()


def test_entered_collectives_are_counted_by_group_but_not_those_of_side_threads():
    for before, after in run_ranks(_collectives, 2):
        grown = {name: after[name] - before[name] for name in before}
        assert sum(grown.values()) == 1 and before.keys() == after.keys()


def _in_a_collective(rank: int, world_size: int) -> str:
    words = []
    if rank == 0:
        threading.Thread(target=lambda: (time.sleep(0.5), words.append(Marks().in_words()))).start()
    else:
        time.sleep(1.0)
    dist.all_reduce(torch.zeros(1))
    return words[0] if words else ""


def test_a_collective_is_called_by_its_name():
    assert run_ranks(_in_a_collective, 2)[0].startswith("the start, all_reduce (")

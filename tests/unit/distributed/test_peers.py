"""When a rank may end, none of its threads is inside PyTorch any more."""

import threading
import time

import torch.distributed as dist

from inrank_megatron.distributed.hang import State
from inrank_megatron.distributed.launcher import Ranks
from inrank_megatron.distributed.peers import Peers
from inrank_megatron.distributed.rendezvous import Arrival, Meeting


def test_no_state_is_asked_for_once_a_rank_has_left():
    """An end of the interpreter during such a call aborted a run that had trained to its end."""
    asked, answered = threading.Event(), []

    def state() -> State:
        asked.set()
        time.sleep(0.3)
        answered.append(time.monotonic())
        return State("waiting", 0.0, 60.0, {})

    arrivals = [Arrival(f"host{n}", "one", n, 0.0, 2, "127.0.0.1", None, "") for n in range(2)]
    peers = Peers(Meeting(Ranks(world_size=2), dist.HashStore(), arrivals), silence=0.5, state=state)
    assert asked.wait(10)
    peers.leave()
    left = time.monotonic()
    time.sleep(0.5)
    assert answered and max(answered) < left

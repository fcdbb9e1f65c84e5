"""Decides from what all ranks report whether the job hangs, and for which rank the others wait."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from inrank_megatron.distributed.roll import Arrival, several

NAMED = 2


@dataclass(frozen=True)
class State:
    """What a rank reports about itself.

    Attributes:
        doing: its work, in words.
        pause, limit: seconds since it last made progress, and how long that may take (``Pauses``).
        entered: number of collectives that it has entered in each process group, by the group's name.
    """

    doing: str
    pause: float
    limit: float
    entered: Mapping[str, int]


def verdict(states: Sequence[State | None], arrivals: Sequence[Arrival]) -> str | None:
    """What to say of a job that hangs; None if it does not.

    Args:
        states: of all ranks in their order, None where one has not said anything yet.
    """
    known = [state for state in states if state is not None]
    if len(known) < len(states) or any(state.pause <= state.limit for state in known):
        return None
    seconds = f"no rank has made progress for {min(state.pause for state in known):.0f} s"
    held_up, each_other = awaited(known)
    ranks = ", ".join(
        f"rank {rank} on host {arrivals[rank].host} (in {known[rank].doing})" for rank in held_up[:NAMED]
    )
    more = f" and {len(held_up) - NAMED} more" if len(held_up) > NAMED else ""
    end = "then continue with --resume auto; for longer pauses raise --hang-timeout-seconds"
    if each_other:
        return f"{ranks}{more} wait for each other: {seconds}; see why, {end}"
    if len(held_up) < len(known):
        verb, them = ("makes", "it") if len(held_up) == 1 else ("make", "them")
        return f"{ranks}{more} {verb} no progress: {seconds}, and the others wait for {them}; see why, {end}"
    hosts = several("host", sorted({arrival.host for arrival in arrivals}))
    return (
        f"all ranks are equally far and make no progress: {seconds}, {ranks}{more}; see whether the "
        f"network of {hosts}, a device or a disk is lost or too slow, {end}"
    )


def awaited(states: Sequence[State]) -> tuple[list[int], bool]:
    """The ranks that others wait for in a collective and that wait for none, all if none waits; or, where
    ranks wait for each other, those that most wait for, and True.

    A rank waits for those that have entered fewer collectives of a group.
    """
    waiting: list[set[int]] = [set() for _ in states]  # by the rank that they wait for
    for rank, own in enumerate(states):
        for other, theirs in enumerate(states):
            common = own.entered.keys() & theirs.entered.keys()
            if any(own.entered[group] < theirs.entered[group] for group in common):
                waiting[rank].add(other)
    wait, ranks = set().union(*waiting), range(len(states))
    if free := [rank for rank in ranks if rank not in wait and (waiting[rank] or not wait)]:
        return free, False
    most = max(map(len, waiting))
    return [rank for rank in ranks if len(waiting[rank]) == most], True

"""State that one session leaves and another goes on from; functions that ranks run."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from inrank_megatron.checkpoint.slices import Box, within
from inrank_megatron.engine.state import engine_record, load_engine
from tests.contract.cases import CHECK
from tests.contract.gathered import copied_slices
from tests.contract.layouts import Layout
from tests.contract.probes import snapshot
from tests.contract.sessions import Session, build


@dataclass(frozen=True)
class Tensors:
    """Full tensors in memory, as a checkpoint has them."""

    by_name: dict[str, Tensor]
    folder: Path = Path("step_00000001")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.by_name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.by_name[name].shape)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.by_name[name]) for name in names)

    def read(self, name: str, box: Box) -> Tensor:
        return self.by_name[name][within(box, (0,) * len(box[0]))]


def leave_and_go_on(
    rank: int, world_size: int, name: str, layout: Layout, steps: int, more: int, settings: dict | None = None
) -> dict:
    """State after ``steps``, and this rank's slices of it, the loss on a fixed batch, and the losses of
    ``more`` steps from there.
    """
    session = build(name, layout, switch=CHECK + 2, **(settings or {})).start().train(steps)
    record, tensors, fixed = engine_record(session.engine), snapshot(session), session.fixed_loss()
    slices = copied_slices(session.engine)
    return {
        "record": record,
        "tensors": tensors if rank == 0 else None,
        "slices": slices,
        "fixed": fixed,
        **_onward(session, more),
    }


def resume(
    rank: int,
    world_size: int,
    name: str,
    layout: Layout,
    step: int,
    more: int,
    left: dict,
    settings: dict | None = None,
) -> dict:
    """The same losses from the state that ``leave_and_go_on`` left, and that state as read back at once.

    The fixed batch comes before the first step, as in a resumed run that has only its last evaluation to do.
    """
    session = build(name, layout, switch=CHECK + 2, record=left["record"], **(settings or {}))
    session.step = step

    load_engine(session.engine, left["record"], Tensors(left["tensors"]))
    tensors, record, fixed = snapshot(session), engine_record(session.engine), session.fixed_loss()
    return {
        "record": record,
        "tensors": tensors if rank == 0 else None,
        "fixed": fixed,
        **_onward(session, more),
    }


def _onward(session: Session, more: int) -> dict:
    """The losses of ``more`` steps, whether the ranks were final before and after, and the record then."""
    before, steps = session.is_final, len(session.losses)
    session.train(more)
    return {
        "losses": session.losses[steps:],
        "switched": (before, session.is_final),
        "last record": engine_record(session.engine),
    }

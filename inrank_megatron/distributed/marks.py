"""What a rank does, left by its main thread where other threads read it."""

import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

NEW_MODEL = ("switch", "rollback")
"""The kinds of work after which none is known any more: the model has been built again."""
PACKAGE = str(Path(__file__).parents[1])


class Work(NamedTuple):
    """A piece of the run: ``kind`` (``step``, ``evaluation``, ...) in or after optimizer step ``step``."""

    kind: str
    step: int
    serial: int  # how many came before it


@dataclass
class Marks:
    """The newest mark of a rank. To leave one takes less than a microsecond and waits for nothing.

    Attributes:
        work: None before the training.
        micro_batches: that the present work has taken.
        completed: kinds of work that came to their end since the session began, switched or rolled back.
    """

    work: Work | None = None
    micro_batches: int = 0
    completed: frozenset[str] = frozenset()

    def begin(self, kind: str, step: int) -> None:
        serial = 0
        if self.work is not None:
            serial = self.work.serial + 1
            if self.work.kind in NEW_MODEL:
                self.completed = frozenset()
            elif self.work.kind not in self.completed:
                self.completed |= {self.work.kind}
        self.work = Work(kind, step, serial)
        self.micro_batches = 0

    def in_words(self) -> str:
        """For example ``step 12, micro-batch 3, all_reduce (replicated.py:43)``."""
        work, micro_batches = self.work, self.micro_batches
        parts = ["the start"] if work is None else [f"step {work.step}"]
        if work is not None and work.kind != "step":
            parts.append(work.kind)
        if micro_batches:
            parts.append(f"micro-batch {micro_batches}")
        return ", ".join([*parts, _place()])


def _place() -> str:
    """The function that the main thread is in, a collective by its name, and the line of ours behind it."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    if not frames:
        return "its end"
    named = next(filter(_is_collective, frames), frames[0])
    below = frames[frames.index(named) :]
    line = next((f for f in below if f.f_code.co_filename.startswith(PACKAGE)), below[0])
    return f"{named.f_code.co_name} ({Path(line.f_code.co_filename).name}:{line.f_lineno})"


def _is_collective(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_filename.endswith("distributed_c10d.py") and not code.co_name.startswith("_")

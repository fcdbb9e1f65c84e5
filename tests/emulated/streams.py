"""Streams of the emulated device: what each of them, and the host, knows to be done.

Vector clocks. A stream does its work in order and numbers it; ``known`` holds, of every other stream, the
number of the last work that comes before whatever is given to this one next. What the host has waited for
comes before all that it gives out later.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Clock = dict["Stream", int]


class Stream:
    """As ``torch.cuda.Stream``.

    Attributes:
        known: of other streams, how much comes before the next work of this one.
        given: how much work this one has been given.
    """

    def __init__(self, streams: "Streams", name: str):
        self._streams, self.name = streams, name
        self.known: Clock = {}
        self.given = 0

    def knows(self, stream: "Stream", number: int) -> bool:
        """Whether work ``number`` of ``stream`` comes before the next work of this one."""
        return stream is self or self.known.get(stream, 0) >= number

    def begin(self) -> int:
        """The number of the next work, which the host gives out now."""
        merge(self.known, self._streams.host)
        self.given += 1
        return self.given

    def clock(self) -> Clock:
        """All that has been given to it, and what comes before that."""
        return self.known | {self: self.given}

    def wait_stream(self, other: "Stream") -> None:
        merge(self.known, other.clock())

    def wait_event(self, event: "Event") -> None:
        merge(self.known, event.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event(self._streams)
        event.record(self)
        return event

    def synchronize(self, what: str = "synchronises") -> None:
        self._streams.host_waits(self.clock(), what)

    def query(self) -> bool:
        """Whether it is done: yes, which nobody may count on, as at another time it is not."""
        return True


class Event:
    """As ``torch.cuda.Event``. ``clock``: what came before it; nothing until it is recorded."""

    def __init__(self, streams: "Streams"):
        self._streams = streams
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = (stream or self._streams.current).clock()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._streams.current).wait_event(self)

    def synchronize(self) -> None:
        self._streams.host_waits(self.clock, "waits for an event", noted=not self._streams.elsewhere)

    def query(self) -> bool:
        """As :meth:`Stream.query`."""
        return True


class Streams:
    """Of one device.

    Args:
        note: takes down that the host waits, and for what.

    Attributes:
        current: the stream that work is given to. host: what the host has waited for.
        elsewhere: whether another thread computes, whose waits for events do not stop the host's main one.
    """

    def __init__(self, note: Callable[[str], None]):
        self._note = note
        self.default = self.current = Stream(self, "the default stream")
        self.host: Clock = {}
        self.elsewhere = False
        self._all = [self.default]
        self._of_groups: dict[str, Stream] = {}

    def make(self) -> Stream:
        self._all.append(Stream(self, f"stream {len(self._all)}"))
        return self._all[-1]

    def of_group(self, name: str) -> Stream:
        """That on which NCCL does what was begun with ``async_op`` in this process group."""
        if name not in self._of_groups:
            self._of_groups[name] = self.make()
        return self._of_groups[name]

    @contextmanager
    def entered(self, stream: Stream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    def host_waits(self, clock: Clock, what: str, *, noted: bool = True) -> None:
        merge(self.host, clock)
        if noted:
            self._note(what)

    def work(self) -> dict[str, int]:
        """How much each stream has been given."""
        return {stream.name: stream.given for stream in self._all}

    def synchronize(self, what: str = "synchronises") -> None:
        """The host waits for everything."""
        for stream in self._all:
            merge(self.host, stream.clock())
        self._note(what)


def merge(clock: Clock, other: Clock) -> None:
    """Whatever either knows."""
    for stream, number in other.items():
        if clock.get(stream, 0) < number:
            clock[stream] = number

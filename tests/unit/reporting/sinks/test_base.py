"""A sink that is slow, fails or never answers costs the training nothing, and is named once."""

import threading
import time

from inrank_megatron.reporting.sinks import base
from inrank_megatron.reporting.sinks.base import BackgroundSink


class Kept:
    """Fails for the steps named."""

    def __init__(self, *, fails=()):
        self.steps, self.fails, self.finished = [], fails, None

    def scalars(self, values, step):
        if step in self.fails:
            raise ConnectionError("no answer\nfrom the server")
        self.steps.append(step)

    def close(self, *, finished):
        self.finished = finished


def test_all_records_arrive_in_order():
    kept = Kept()
    sink = BackgroundSink("kept", lambda: kept)
    for step in range(1, 6):
        sink.scalars({"lm loss": 1.0}, step)
    sink.close(finished=True)
    assert kept.steps == [1, 2, 3, 4, 5] and kept.finished is True and sink.fault() is None


def test_a_failure_is_named_once_and_later_records_arrive():
    kept = Kept(fails=(2, 3))
    sink = BackgroundSink("kept", lambda: kept)
    for step in range(1, 5):
        sink.scalars({"lm loss": 1.0}, step)
    sink.close(finished=False)
    assert kept.steps == [1, 4] and kept.finished is False
    assert sink.fault() == (
        "kept: a record was lost (ConnectionError: no answer from the server); training goes on, and the run "
        "folder has every record"
    )
    assert sink.fault() is None


def test_a_sink_that_cannot_be_opened():
    def refuse():
        raise SystemExit("not logged in")

    sink = BackgroundSink("kept", refuse)
    sink.scalars({"lm loss": 1.0}, 1)
    sink.close(finished=True)
    assert "cannot be opened (SystemExit: not logged in)" in sink.fault()


def test_a_sink_that_never_answers_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(base, "CAPACITY", 2)
    answer = threading.Event()
    sink = BackgroundSink("kept", answer.wait)
    began = time.monotonic()
    for step in range(5):
        sink.scalars({"lm loss": 1.0}, step)
    sink.close(finished=True, patience=0.1)
    assert time.monotonic() - began < 5
    assert "it is more than 2 records behind" in sink.fault()
    answer.set()


def test_the_end_waits_for_the_last_records_only_so_long():
    answer = threading.Event()
    sink = BackgroundSink("kept", answer.wait)
    began = time.monotonic()
    sink.close(finished=True, patience=0.1)
    assert 0.1 <= time.monotonic() - began < 5 and "not taken within 0 s" in sink.fault()
    answer.set()

"""Saving while training goes on: what waits, what is recorded when, and how a failure comes to light."""

import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from inrank_megatron.checkpoint import writing
from inrank_megatron.checkpoint.folder import Checkpoint, published
from inrank_megatron.checkpoint.slices import full_slice
from inrank_megatron.checkpoint.writing import PartWriter
from inrank_megatron.config.loading import from_flat
from inrank_megatron.errors import UserError
from inrank_megatron.training import saving
from inrank_megatron.training.saving import Saver, without_best

DEVICE = torch.device("cpu")


class Alone:
    """The one rank of a job."""

    rank, world_size = 0, 1

    def gather_from_all_ranks(self, value):
        return [value]

    def largest(self, value, device):
        return int(value)


class Records:
    def __init__(self):
        self.events, self.messages = [], []

    def event(self, kind, step, text, **values):
        self.events.append({"kind": kind, "step": step, **values})

    def message(self, text):
        self.messages.append(text)


@pytest.fixture
def records():
    return Records()


@pytest.fixture
def make(tmp_path, records):
    def made(**options):
        options = {"keep_last": None, "verified": None, **options}
        return Saver(tmp_path / "checkpoints", parallel=Alone(), device=DEVICE, run_logger=records, **options)

    return made


@pytest.fixture
def held(monkeypatch):
    """Writers wait for this event before they touch a file of tensors."""
    release, write = threading.Event(), writing.save_file

    def save_file(tensors, path):
        assert release.wait(60)
        write(tensors, path)

    monkeypatch.setattr(writing, "save_file", save_file)
    yield release
    release.set()


def save(saver, step, tensor=None, *, snapshot_bytes=4):
    slices = [full_slice("w", torch.full((3,), float(step)) if tensor is None else tensor)]
    saver.save(slices, {"step": step, "validation_loss": None}, snapshot_bytes=snapshot_bytes)


def steps(tmp_path):
    return sorted(int(path.name[5:]) for path in published(tmp_path / "checkpoints"))


def test_training_goes_on_while_the_state_of_before_is_written(make, tmp_path, held, records):
    saver, weight = make(), torch.zeros(3)
    save(saver, 4, weight)
    weight += 1
    assert not saver.any_rank_stops(False) and steps(tmp_path) == [] and records.events == []
    time.sleep(0.2)
    held.set()
    saver.wait()
    assert steps(tmp_path) == [4]
    [(_, written)] = Checkpoint(tmp_path / "checkpoints/step_00000004").tensors(["w"])
    assert not written.any()
    [event] = records.events
    assert event["step"] == 4 and event["path"] == "checkpoints/step_00000004"
    assert 0 <= event["blocked_seconds"] < 0.2 <= event["seconds"]


def test_checkpoint_is_recorded_at_the_next_step(make, held, records):
    saver = make()
    save(saver, 4)
    held.set()
    deadline = time.monotonic() + 60
    while not records.events and time.monotonic() < deadline:
        assert not saver.any_rank_stops(False)
    assert [event["step"] for event in records.events] == [4]
    assert not saver.any_rank_stops(False) and saver.any_rank_stops(True) and len(records.events) == 1


def test_one_checkpoint_is_in_flight(make, tmp_path, held, records):
    saver = make()
    save(saver, 4)
    threading.Timer(0.3, held.set).start()
    save(saver, 6)
    assert steps(tmp_path)[:1] == [4] and records.events[0]["step"] == 4
    saver.wait()
    assert [event["step"] for event in records.events] == [4, 6]
    assert records.events[1]["blocked_seconds"] > 0.2, "the wait for the one before counts"


def test_a_state_that_does_not_fit_is_written_piece_by_piece(make, tmp_path, monkeypatch, records):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(writing, "FILE_BYTES", 1)
    seen = []

    def writer(*args, **options):
        seen.append(options)
        return PartWriter(*args, **options)

    monkeypatch.setattr(saving, "PartWriter", writer)
    saver = make()
    save(saver, 4, snapshot_bytes=501)
    assert steps(tmp_path) == [4], "it has been waited for"
    [event] = records.events
    assert event["blocked_seconds"] == event["seconds"]
    save(saver, 6, snapshot_bytes=500)
    saver.wait()
    assert [options["deferred"] for options in seen] == [False, True] and steps(tmp_path) == [
        4,
        6,
    ]


@pytest.mark.parametrize("found", ["at the next step", "at the next save", "at the end"])
def test_a_write_that_fails_ends_the_run(make, tmp_path, monkeypatch, found, records):
    saver = make()
    save(saver, 4)
    saver.wait()
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", no_space)
    save(saver, 6)
    with pytest.raises(UserError, match=r"step_00000006: the checkpoint cannot be written .*No space left"):
        if found == "at the next save":
            save(saver, 8)
        elif found == "at the end":
            saver.wait()
        while found == "at the next step":
            saver.any_rank_stops(False)
    saver.wait()
    assert {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()} == before
    assert [event["step"] for event in records.events] == [4]


def test_a_fault_of_the_program_is_no_message_to_the_user(make, monkeypatch):
    saver = make()
    monkeypatch.setattr(writing, "save_file", lambda *_: 1 / 0)
    save(saver, 4)
    with pytest.raises(ZeroDivisionError):
        saver.wait()


def test_older_checkpoints_are_removed(make, tmp_path, monkeypatch, records):
    saver = make(keep_last=2)
    for step in (2, 4, 6):
        save(saver, step)
    saver.wait()
    assert steps(tmp_path) == [4, 6]

    def refused(path, target):
        if path.name.startswith("step_"):
            raise PermissionError(13, "Permission denied")
        return path.replace(target)

    monkeypatch.setattr("pathlib.Path.rename", refused)
    save(saver, 8)
    saver.wait()
    assert steps(tmp_path) == [4, 6, 8]
    assert records.messages == [
        "older checkpoints cannot be removed ([Errno 13] Permission denied); the run continues"
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, True),
        ({"train_iters": 13}, False),
        ({"save_interval": 8}, False),
        ({"save_interval": None}, False),
        ({"save_interval": 12}, False),
        ({"keep_last": None}, False),
    ],
)
def test_intervals_that_never_coincide(changes, said):
    flat = {"model_preset": "tiny", "train_iters": 12, "keep_last": 1, "save_interval": 3, "eval_interval": 4}
    warning = without_best(from_flat(flat | changes))
    assert (warning is not None) == said
    assert not said or "coincide at step 12 first, of 12; make --save-interval" in warning

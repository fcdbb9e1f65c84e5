"""What counts as the same failure, and when a run is not started again."""

import pytest

from inrank_megatron.config.loading import from_flat, replace
from inrank_megatron.errors import UserError
from inrank_megatron.training.repeated_failures import FAILURES, MOST, Failures, refuse_repeated

CONFIG = from_flat({"model_preset": "tiny", "train_iters": 10})
LOST = "rank 2 on host node-2 has ended (last seen in step {}) and no step is possible without it; fix that"


def fail(run, *messages, config=CONFIG, session=0.0):
    for number, message in enumerate(messages):
        Failures(run, config, session=session + number).note(message)


def test_the_third_failure_of_a_kind_is_the_last(tmp_path):
    fail(tmp_path, *(LOST.format(step) for step in range(MOST - 1)))
    refuse_repeated(tmp_path, CONFIG)
    fail(tmp_path, LOST.format(99), session=50.0)
    with pytest.raises(UserError, match=r"failed 3 times .*step 0 \(rank 2 on host node-2 has ended\);"):
        refuse_repeated(tmp_path, CONFIG)
    refuse_repeated(tmp_path, replace(CONFIG, lr=1e-5))
    Failures(tmp_path, CONFIG, session=9.0).clear()
    refuse_repeated(tmp_path, CONFIG)


def test_ranks_of_one_session_count_once(tmp_path):
    for message in ("ValueError: planted", LOST.format(3), LOST.format(3)):
        Failures(tmp_path, CONFIG, session=1.0).note(message)
    refuse_repeated(tmp_path, CONFIG)
    assert (tmp_path / FAILURES).read_text().count("failure") == 1


@pytest.mark.parametrize("between", ["another failure", "another setting", "a checkpoint"])
def test_whatever_differs_begins_the_count_again(tmp_path, between):
    fail(tmp_path, "out of memory", "out of memory")
    if between == "another failure":
        fail(tmp_path, "ValueError: planted", session=50.0)
    if between == "another setting":
        fail(tmp_path, "out of memory", config=replace(CONFIG, lr=1e-5), session=50.0)
    if between == "a checkpoint":
        (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    fail(tmp_path, "out of memory", session=60.0)
    refuse_repeated(tmp_path, CONFIG)


def test_a_run_folder_that_cannot_be_written_or_read_is_another_matter(tmp_path):
    fail(tmp_path / "gone", "out of memory")
    (tmp_path / "a file").touch()
    fail(tmp_path / "a file", "out of memory")
    (tmp_path / FAILURES).write_text("{")
    refuse_repeated(tmp_path, CONFIG)

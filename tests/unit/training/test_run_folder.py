"""Which run folder a run may use, and what it takes up there."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest
import torch

from inrank_megatron.checkpoint.folder import newest_complete
from inrank_megatron.checkpoint.weights import write_weights
from inrank_megatron.checkpoint.writing import CheckpointWriter
from inrank_megatron.config.loading import from_flat, load, replace
from inrank_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from inrank_megatron.errors import UserError
from inrank_megatron.training.folder_lock import FolderLock
from inrank_megatron.training.run_folder import choose_run_folder, claim
from inrank_megatron.training.run_place import NAMES
from tests.forked import server

TOKENIZER = train_tokenizer(["a text"], vocab_size=257)
SCALING = {"skipped": 0, "in_a_row": 0, "state": {}}
STATE = {
    "seconds": 1.0,
    "identity": {"data": "0" * 16, "switch_step": None},
    "engine": {"factors": {}, "optimizer_steps": {}, "loss_scaling": SCALING},
}


def config_of(save, **changes):
    flat = {"model_preset": "tiny", "train_iters": 10, "save": None if save is None else str(save)}
    return from_flat(flat | changes)


def choose(config, lock=None):
    return choose_run_folder(config, lock or FolderLock(), name="quickstart")


def begin(path, *, steps=(), **changes):
    """A run of which only ``steps`` were saved."""
    config, lock = config_of(path, **changes), FolderLock()
    claim(choose(config, lock), config, lock, TOKENIZER)
    del lock  # which frees it, as the end of a process does
    for step in steps:
        writer = CheckpointWriter(path / "checkpoints", step)
        writer.add("w", torch.ones(3))
        writer.publish({"step": step, **STATE})
    return config


def resumed(config, **changes):
    return replace(config, resume="auto", **changes)


def test_a_new_folder_is_only_made_when_it_is_claimed(tmp_path):
    config, lock = config_of(tmp_path / "a" / "b"), FolderLock()
    run = choose(config, lock)
    assert run.is_new and run.checkpoint is None and not run.path.exists()
    claim(run, config, lock, TOKENIZER)
    assert load(run.path / "config.yaml") == config
    assert run.checkpoints.is_dir()
    assert load_tokenizer(str(run.path / "tokenizer")).identity == TOKENIZER.identity


def test_without_a_name_every_run_has_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(None, method="inrank")
    for name in ("quickstart-inrank", "quickstart-inrank-2", "quickstart-inrank-3"):
        lock = FolderLock()
        run = choose(config, lock)
        assert run.path == Path("runs") / name
        claim(run, config, lock, TOKENIZER)


def test_the_newest_whole_checkpoint_is_taken_up(tmp_path):
    config = begin(tmp_path / "run", steps=(2, 4, 6))
    (tmp_path / "run" / "checkpoints" / "step_00000006" / "state.json").unlink()
    run = choose(resumed(config, lr=1e-5, train_iters=20))
    assert run.checkpoint.name == "step_00000004" and not run.is_new
    broken, changed, rates = run.notes
    assert "skipped a broken checkpoint" in broken and "step_00000006" in broken
    assert "train_iters 10 -> 20" in changed and "lr 0.0006 -> 1e-05" in changed
    assert rates.startswith("learning rate at step 5: 0.0003 by the settings so far, 8.54e-06 now")


def test_a_run_without_a_checkpoint_starts_again_and_says_so(tmp_path):
    run = choose(resumed(begin(tmp_path / "run")))
    assert run.checkpoint is None and not run.is_new
    assert "the run starts from the beginning" in run.notes[0]


def test_a_folder_that_was_claimed_half_counts_as_empty(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.yaml.x1").touch()
    assert choose(config_of(tmp_path)).is_new


def test_what_is_refused(tmp_path):
    config = begin(tmp_path / "run", steps=(2,))
    with pytest.raises(UserError, match="holds this run already; continue it with --resume auto"):
        choose(config)
    with pytest.raises(UserError, match=r"another run \(seed 1234 there, 5 here\)"):
        choose(resumed(config, seed=5))
    other = begin(tmp_path / "other", steps=(2,), global_batch_size=8)
    with pytest.raises(UserError, match=r"size 8 there, 4 here.*give --global-batch-size 8 or choose"):
        choose(resumed(other, global_batch_size=4))
    with pytest.raises(UserError, match=r"another run .*switch_iters None there, 7 here"):
        choose(resumed(config, method="inrank-efficient", switch_iters=7))
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(UserError, match="files that are not a run's"):
        choose(resumed(config))
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"is a file|cannot be used as run folder"):
            begin(path)


def test_a_checkpoint_is_named_by_its_step(tmp_path):
    config = begin(tmp_path / "run", steps=(2, 4, 6))
    lock = FolderLock()
    run = choose(replace(config, resume=4), lock)
    assert run.checkpoint.name == "step_00000004"
    assert "later checkpoints (step 6) stay aside" in run.notes[-1]
    assert newest_complete(run.checkpoints)[0].name == "step_00000006", "nothing happens before the claim"
    claim(run, config, lock, TOKENIZER)
    del lock
    assert choose(resumed(config)).checkpoint.name == "step_00000004", "from where it went back to"
    lock = FolderLock()
    claim(choose(replace(config, resume=6), lock), config, lock, TOKENIZER)
    del lock
    assert choose(resumed(config)).checkpoint.name == "step_00000006"


def test_what_the_run_went_back_to_is_gone(tmp_path):
    config = begin(tmp_path / "run", steps=(2, 4))
    lock = FolderLock()
    run = choose(replace(config, resume=2), lock)
    claim(run, config, lock, TOKENIZER)
    del lock
    shutil.rmtree(run.checkpoint)
    with pytest.raises(UserError, match=r"of steps 4 were set aside .* name one of them with --resume"):
        choose(resumed(config))
    assert choose(replace(config, resume=4)).checkpoint.name == "step_00000004"


@pytest.mark.parametrize("resume", [0, 5, 99])
def test_a_step_that_does_not_exist(tmp_path, resume):
    config = begin(tmp_path / "run", steps=(2, 4, 6))
    message = rf"resume = {resume}: .*no checkpoint of that step, there are those of steps 2, 4, 6; name one"
    with pytest.raises(UserError, match=message):
        choose(replace(config, resume=resume))


def test_a_step_of_no_run(tmp_path):
    begin(tmp_path / "run")
    for save, words in {
        None: "no --save names a run",
        tmp_path / "new": "holds no run",
        tmp_path / "run": "there is none at all",
    }.items():
        with pytest.raises(UserError, match=f"resume = 2: .*{words}"):
            choose(config_of(save, resume=2))
        assert not (tmp_path / "new").exists()


def test_a_step_that_is_damaged_is_not_passed_over(tmp_path):
    config = begin(tmp_path / "run", steps=(2, 4))
    (tmp_path / "run" / "checkpoints" / "step_00000004" / "index.json").unlink()
    with pytest.raises(UserError, match=r"step_00000004/index\.json: missing"):
        choose(replace(config, resume=4))


def test_a_state_that_tells_too_little(tmp_path):
    config = begin(tmp_path / "run")
    writer = CheckpointWriter(tmp_path / "run" / "checkpoints", 2)
    writer.add("w", torch.ones(3))
    writer.publish({"step": 2, **STATE, "engine": {"factors": {}}, "identity": {}})
    lacks = r"state\.json: lacks identity.data, identity.switch_step, engine.optimizer_steps, engine.loss"
    with pytest.raises(UserError, match=lacks):
        choose(resumed(config))


def test_what_the_method_does_not_read_may_differ(tmp_path):
    """Another version of the program may have other defaults for it."""
    config = begin(tmp_path / "run", steps=(2,))
    assert config.training.method == "dense"
    assert choose(resumed(config, absorb_columns=True)).checkpoint is not None
    inrank = begin(tmp_path / "inrank", method="inrank")
    theirs = (
        r"absorb_columns False there, True here\); give its settings, as in --config .*inrank/config.yaml, or"
    )
    with pytest.raises(UserError, match=theirs):
        choose(resumed(inrank, absorb_columns=True))


def test_weights_alone_may_go_on_as_another_run(tmp_path):
    config = begin(tmp_path / "run")
    write_weights(tmp_path / "run" / "checkpoints", step=0, factors={}, tensors=[("w", torch.ones(2))])
    run = choose(resumed(config, seed=9, global_batch_size=64, split="8,1,1"))
    assert run.checkpoint.name == "step_00000000" and "holds weights alone" in run.notes[0]
    for change in ({"hidden_size": 64}, {"method": "lora", "rank": 4}):
        with pytest.raises(UserError, match="holds another run"):
            choose(resumed(config, **change))


def test_only_broken_checkpoints_are_refused(tmp_path):
    config = begin(tmp_path / "run", steps=(2, 4))
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        (checkpoint / "manifest.json").write_text("{")
    with pytest.raises(
        UserError, match=r"none of its checkpoints is complete .*start again with another --save"
    ):
        choose(resumed(config))


def hold(path, claimed, end):
    config = config_of(path)
    lock = FolderLock()
    claim(choose(config, lock), config, lock, TOKENIZER)
    claimed.set()
    end.wait()


def test_one_job_at_a_time(tmp_path):
    path = tmp_path / "run"
    config = config_of(path)
    late = FolderLock()
    new = choose(config, late)
    context = server()
    claimed, end = context.Event(), context.Event()
    job = context.Process(target=hold, args=(path, claimed, end), daemon=True)
    job.start()
    assert claimed.wait(60)
    with pytest.raises(UserError, match="another job is running in it"):
        choose(resumed(config))
    with pytest.raises(UserError, match="another job is running in it"):
        claim(new, config, late, TOKENIZER)
    job.kill()  # its lock must not outlive it
    job.join()
    assert not choose(resumed(config)).is_new
    with pytest.raises(UserError, match="another job has just begun a run in it"):
        claim(new, config, late, TOKENIZER)


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(tmp_path):
    """Its records tell what it was; a start from the beginning would wipe them."""
    config = begin(tmp_path / "run")
    records = tmp_path / "run" / "metrics.jsonl"
    records.write_text('{"kind": "train", "step": 1}\n')
    assert choose(resumed(config)).checkpoint is None
    records.write_text('{"kind": "checkpoint", "step": 8, "path": "checkpoints/step_00000008"}\n')
    with pytest.raises(UserError, match="a checkpoint at step 8, and there is none"):
        choose(resumed(config))


def test_the_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose(config_of("~/runs/first")).path == tmp_path / "runs/first"


def test_what_others_write_does_not_make_a_run(tmp_path):
    """A log that the shell opens before the program starts lies in the folder already."""
    for name in ("log.txt", "slurm-77.out", "job.sh"):
        (tmp_path / name).write_text(name)
    (tmp_path / "wandb").mkdir()
    config, lock = config_of(tmp_path), FolderLock()
    run = choose(config, lock)
    assert run.is_new and run.notes == [
        f"{tmp_path} holds job.sh, log.txt, slurm-77.out, wandb, which the run leaves alone"
    ]
    claim(run, config, lock, TOKENIZER)
    assert (tmp_path / "log.txt").read_text() == "log.txt" and load(tmp_path / "config.yaml") == config


def test_the_configuration_of_another_program(tmp_path):
    (tmp_path / "config.yaml").write_text("trainer: 1\n")
    with pytest.raises(UserError, match=r"config\.yaml: trainer: no such setting.*choose another --save"):
        choose(config_of(tmp_path))
    assert (tmp_path / "config.yaml").read_text() == "trainer: 1\n"


@pytest.mark.parametrize("name", sorted(NAMES - {"config.yaml", "logs"}))
def test_what_a_run_would_write_over_is_named(tmp_path, name):
    (tmp_path / "log.txt").write_text("")
    (tmp_path / name).write_text("of another program")
    with pytest.raises(UserError, match=f"not a run's, and a run would overwrite {name};"):
        choose(config_of(tmp_path))
    assert (tmp_path / name).read_text() == "of another program"


@pytest.mark.parametrize("name", ["logs", "plots", "tensorboard", "summary.json"])
def test_a_file_in_the_place_of_a_folder_is_found_before_the_run_goes_on(tmp_path, name):
    config = begin(tmp_path / "run", steps=(2,))
    if name == "summary.json":
        (tmp_path / "run" / name).mkdir()
    else:
        (tmp_path / "run" / name).write_text("")
    with pytest.raises(UserError, match=f"{name}: is a .*, and the run keeps a .* there; move it away"):
        choose(resumed(config))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "logs").write_text("")
    with pytest.raises(UserError, match="logs: is a file, and the run keeps a folder there"):
        choose(config_of(tmp_path / "new"))


def test_folders_that_are_none_for_a_run(tmp_path, monkeypatch):
    (tmp_path / "checkout" / ".git").mkdir(parents=True)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "a"))
    monkeypatch.chdir(tmp_path / "a" / "b")
    for path, words in {
        "/": "the root",
        "~": "your home",
        "../../checkout": "a checkout",
        "..": "your home",
        str(tmp_path): "around the one",
    }.items():
        with pytest.raises(UserError, match=f"is .*{words}.*as --save .*run"):
            choose(config_of(path))
    assert choose(config_of(".")).is_new
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        choose(config_of(tmp_path / "file"))


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path / "closed")
    with pytest.raises(UserError, match="closed cannot be written"):
        choose(config_of(tmp_path / "closed" / "new" / "run"))


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """As Lustre mounted without them: the run begins, leaves no lock for the next one, and says so."""

    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for _ in range(2):  # the first one is killed
        lock = FolderLock()
        lock.take(tmp_path)
        assert lock.note == f"{tmp_path}: its file system has no locks; start no second job in it"

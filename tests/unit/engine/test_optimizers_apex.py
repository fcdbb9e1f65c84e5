"""NVIDIA apex is recognised by what it holds: the package index has another package of its name."""

import sys

import pytest

from inrank_megatron.config.loading import from_flat
from inrank_megatron.engine.optimizers import check_installed
from inrank_megatron.errors import UserError

APEX = from_flat({"model_preset": "tiny", "train_iters": 1, "optimizer": "apex-fused-adam"})


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages that comes before all others; whatever `apex` this machine has is out of sight."""
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def package(folder, *files):
    for file in files:
        path = folder / "apex" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('imported')")


def refusal() -> str:
    with pytest.raises(UserError) as caught:
        check_installed(APEX)
    message = str(caught.value)
    assert "\n" not in message and "github.com/NVIDIA/apex" in message and "--optimizer adamw" in message
    return message


def test_absent_apex_is_refused(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "it is not installed" in refusal()


@pytest.mark.parametrize("files", [["__init__.py"], ["__init__.py", "optimizers/__init__.py"]], ids=str)
def test_unrelated_package_named_apex_is_refused(site, files):
    package(site, *files)
    assert f"the `apex` at {site / 'apex' / '__init__.py'} is another package" in refusal()


def test_empty_apex_folder_is_refused(site):
    (site / "apex" / "docs").mkdir(parents=True)
    assert f"the `apex` at {site / 'apex'} is another package" in refusal()


def test_nvidia_apex_is_accepted(site):
    package(site, "__init__.py", "optimizers/__init__.py", "optimizers/fused_adam.py")
    check_installed(APEX)
    assert "apex" not in sys.modules


def test_other_optimizers_do_not_need_apex(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("adamw", "fused-adam", "cpu-adam", "sgd"):
        check_installed(
            APEX.model_copy(update={"optimizer": APEX.optimizer.model_copy(update={"optimizer": name})})
        )

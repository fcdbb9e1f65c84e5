"""A wheel of the project, installed away from the checkout: what it carries, and its programs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_project import FILES, PROJECT, ROOT

PACKAGES = PROJECT["tool"]["setuptools"]["package-dir"]  # name of the package -> its folder
CARRIED = (".py", ".yaml", ".json", ".html", ".css", ".j2")
COPIED = ("pyproject.toml", "README.md", "LICENSE", *PACKAGES.values())


def run(*words: str | Path, folder: Path, **env: str) -> str:
    """Standard output of a Python program in ``folder``, which must succeed."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=outside | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder into which pip installed the wheel. The build leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in FILES:
        if (name := path.relative_to(ROOT)).parts[0] in COPIED:
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / "source" / name)
    pip, alone = ("-m", "pip", "--disable-pip-version-check"), ("--no-deps", "--no-index")
    run(*pip, "wheel", *alone, "--no-build-isolation", "-w", "wheels", "./source", folder=folder)
    [wheel] = (folder / "wheels").iterdir()
    run(*pip, "install", *alone, "--no-compile", "--target", "installed", wheel, folder=folder)
    return folder / "installed"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_carries_every_file_of_a_package(installed, package):
    source = ROOT / PACKAGES[package]
    tracked = {path.relative_to(source) for path in FILES if path.is_relative_to(source)}
    found = {
        path.relative_to(installed / package) for path in (installed / package).rglob("*") if path.is_file()
    }
    assert found == {path for path in tracked if path.suffix in CARRIED}


def test_an_installed_launch_plans_the_default_run_from_a_folder_of_the_user(installed, tmp_path):
    words = ("-m", "inrank_megatron_launch.pretrain_gpt2", "--inrank", "--dry-run")
    plan = run(*words, folder=tmp_path, PYTHONPATH=str(installed), OMP_NUM_THREADS="1")
    assert "memory" in plan and list(tmp_path.iterdir()) == []


def test_installed_tools_say_their_options_and_use_the_installed_packages(installed, tmp_path):
    tools = sorted(path.stem for path in (installed / "inrank_megatron_tools").glob("*.py"))
    code = (
        "import contextlib, importlib, runpy, sys\n"
        f"for name in {list(PACKAGES)!r}: print(importlib.import_module(name).__path__[0])\n"
        "sys.argv[1:] = ['--help']\n"
        f"for tool in {tools!r}:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        runpy.run_module('inrank_megatron_tools.' + tool, run_name='__main__', alter_sys=True)\n"
    )
    said = run("-c", code, folder=tmp_path, PYTHONPATH=str(installed))
    assert said.splitlines()[: len(PACKAGES)] == [str(installed / name) for name in PACKAGES]
    assert len(tools) > 5 and said.count("usage: ") == len(tools)

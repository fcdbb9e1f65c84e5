"""Every patch is needed, works, and stays away from machines with CUDA.

When a test here fails because upstream works without its patch: delete the patch, or raise the
lower end of the supported range in pyproject.toml first.
"""

import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from inrank_megatron.errors import UserError
from inrank_megatron_patches import versions
from inrank_megatron_patches.registry import CPU_PATCHES, PATCHES, apply_all

NAMES = [patch.__name__.rpartition(".")[2] for patch in PATCHES]
IMPORTS = {
    "megatron_jit_fuser": "megatron.core",
    "deepspeed_muon": "deepspeed.runtime.zero.muon.original_muon",
}
TRACKERS = {
    "deepspeed_mlflow": ("mlflow", "deepspeed"),
    "megatron_wandb": ("wandb", "megatron.core.inference_params"),
}
"""What is left out, and an import that brings it."""
SYMBOLS = [name for name in NAMES if name not in {*IMPORTS, *TRACKERS}]
COMPILER = "torch._inductor.compile_fx"
FOLDER = Path(__file__).resolve().parents[2] / "patches"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA")


@pytest.fixture(scope="module")
def upstream(tmp_path_factory) -> dict:
    """What :mod:`unpatched` saw, on a machine without a compiler or ninja."""
    empty = tmp_path_factory.mktemp("empty")
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("unpatched.py"))],
        env={**os.environ, "PATH": str(empty), "TORCH_EXTENSIONS_DIR": str(empty), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SYMBOLS)
def test_upstream_still_fails_without_the_patch(upstream, name):
    if name == "deepspeed_is_fp16_supported" and not upstream[name]["failure"]:
        pytest.skip("this processor multiplies float16 matrices")
    assert upstream[name]["needed_before"], f"upstream works without patches/{name}.py: delete it"
    assert upstream[name]["failure"], f"upstream works without patches/{name}.py: delete it"


@pytest.mark.parametrize("name", SYMBOLS)
def test_patch_fixes_the_symbol(upstream, name):
    assert not upstream[name]["needed_after"]


# Ends the process there: the import of the compiler takes longer than all before it.
AT_A_MODULE = """
import os, sys
class Finder:
    def find_spec(name, *_):
        if name == "{}":
            os._exit(9)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("name", [*IMPORTS, *TRACKERS])
def test_upstream_still_imports_what_the_patch_leaves_out(name):
    left_out, module = TRACKERS[name] if name in TRACKERS else (COMPILER, IMPORTS[name])
    code = f"{AT_A_MODULE.format(left_out)}import {module}"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 9, f"upstream works without patches/{name}.py: delete it\n{process.stderr}"


def test_a_process_of_a_run_imports_nothing_that_it_may_not_need():
    """No compiler, no tracker, and no Matplotlib: one rank draws, at the end."""
    code = f"""if True:
        import sys
        from inrank_megatron.distributed.platform import prepare_process
        prepare_process()
        assert not {COMPILER!r} in sys.modules
        assert not any(patch.needed() for patch in sys.modules["inrank_megatron_patches.registry"].PATCHES)
        import megatron.core.jit, torch
        assert megatron.core.jit.jit_fuser(print) is megatron.core.jit.jit_fuser(dynamic=True)(print) is print
        assert torch.compile.__module__ == "torch"
        import {", ".join(IMPORTS.values())}
        import {", ".join(module for _, module in TRACKERS.values())}, inrank_megatron.training.run
        unwanted = {["matplotlib", *dict(TRACKERS.values())]!r}
        assert not [name for name in unwanted if name in sys.modules]
        import importlib.util  # who asks for them later has them
        assert all(importlib.util.find_spec(name).origin for name in {tuple(dict(TRACKERS.values()))!r})
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_file_of_the_folder_is_a_patch_in_the_registry():
    helpers = {"__init__", "imports", "registry", "versions"}
    assert {path.stem for path in FOLDER.glob("*.py")} - helpers == set(NAMES)


@pytest.mark.parametrize("patch", PATCHES, ids=NAMES)
def test_patch_states_reason_and_versions(patch):
    assert "Reason:" in patch.__doc__
    package = patch.__name__.rpartition(".")[2].split("_")[0]
    package = {"cuda": "torch", "megatron": "megatron-core"}.get(package, package)
    assert f"Checked with {package} {', '.join(versions.TESTED_VERSIONS[package])}." in patch.__doc__


def test_no_patch_acts_where_cuda_is(monkeypatch):
    """No machine of these tests has CUDA: its presence is pretended, the symbols are the real ones."""
    symbols = ("current_device", "get_rng_state", "manual_seed", "synchronize")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = {name: getattr(torch.cuda, name) for name in symbols}
    assert not any(patch.needed() for patch in CPU_PATCHES)
    apply_all()
    assert all(getattr(torch.cuda, name) is symbol for name, symbol in before.items())


def test_untested_version_gets_one_warning_line(monkeypatch, caplog):
    monkeypatch.setitem(versions.TESTED_VERSIONS, "torch", ("0.4", "1.0"))
    versions.warn_if_untested.cache_clear()
    with caplog.at_level(logging.WARNING, logger="inrank_megatron"):
        versions.warn_if_untested("torch")
        versions.warn_if_untested("torch")
    versions.warn_if_untested.cache_clear()
    assert [record.getMessage().partition("is untested")[2] for record in caplog.records] == [
        " with the patches for runs without CUDA; they were checked with 0.4, 1.0"
    ]


def test_missing_symbol_names_the_remedy():
    with pytest.raises(UserError, match=r"torch .* has no gone\.symbol.*; install torch 2\.11 or"):
        versions.require_symbol(types.ModuleType("gone"), "symbol", package="torch")

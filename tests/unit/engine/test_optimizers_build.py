"""Operators that do not build on this machine: one line with what to do, no traceback."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.ops.op_builder.builder import (
    CUDAMismatchException,
    MissingCUDAException,
    assert_no_cuda_mismatch,
    installed_cuda_version,
)
from torch.utils import cpp_extension

from inrank_megatron.engine.optimizers import unbuilt

ROOT = Path(__file__).resolve().parents[3]
# Each operator with each PATH; nothing was compiled before.
_BUILD = """
import os, sys
import torch
from inrank_megatron.distributed.platform import prepare_process
prepare_process()
from inrank_megatron.config.loading import from_flat
from inrank_megatron.engine.optimizers import build_optimizer
from inrank_megatron.errors import UserError
for os.environ["PATH"] in sys.argv[1:]:
    for name in ("cpu-adam", "fused-adam"):
        config = from_flat({"model_preset": "tiny", "train_iters": 1, "optimizer": name})
        try:
            build_optimizer([{"params": [torch.nn.Parameter(torch.ones(4))]}], config)
        except UserError as error:
            print(error)
"""


def test_missing_ninja_or_compiler_is_reported(tmp_path):
    only_ninja = tmp_path / "bin"
    only_ninja.mkdir()
    (only_ninja / "ninja").symlink_to(shutil.which("ninja", path=Path(sys.executable).parent))
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "CXX": "c++"}
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, str(tmp_path), str(only_ninja)],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("optimizer = ")]
    assert len(lines) == 4, done.stdout
    for name, line in zip(("cpu-adam", "fused-adam") * 2, lines, strict=True):
        assert line.startswith(f"optimizer = '{name}': its operator does not build on this machine (")
    for line in lines[:2]:
        assert "inja" in line and line.endswith("or install ninja into it, or give --optimizer adamw")
    for line in lines[2:]:
        assert "c++" in line and "install a C++ compiler (Debian, Ubuntu: apt install g++), or" in line


def nvcc(folder: Path, *, release: str) -> None:
    script = folder / "bin/nvcc"
    script.parent.mkdir(parents=True)
    script.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.89'\n")
    script.chmod(0o755)


def test_cuda_without_nvcc_is_reported(tmp_path, monkeypatch):
    """DeepSpeed's own refusal, where a run on a GPU meets it."""
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    with pytest.raises(MissingCUDAException) as error:
        installed_cuda_version()
    line = unbuilt("fused-adam", error.value)
    assert "/bin/nvcc" in line and "install the CUDA toolkit" in line and "set CUDA_HOME" in line


def test_cuda_version_mismatch_is_reported(tmp_path, monkeypatch):
    nvcc(tmp_path, release="11.8")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(CUDAMismatchException) as error:
        assert_no_cuda_mismatch()
    line = unbuilt("fused-adam", error.value)
    assert "Installed CUDA version 11.8 does not match" in line
    assert "install the CUDA toolkit 13.0, which this torch is built with" in line


def test_failed_compilation_shows_the_compiler_error():
    log = (
        "Error building extension 'fused_adam': [1/3] nvcc --generate-dependencies multi_tensor_adam.cu\n"
        "FAILED: multi_tensor_adam.cuda.o\n/usr/include/c++/14/cmath(12): error: no __float128 here\n"
        "ninja: build stopped: subcommand failed."
    )
    line = unbuilt("fused-adam", RuntimeError(log))
    assert "(/usr/include/c++/14/cmath(12): error: no __float128 here)" in line and "\n" not in line

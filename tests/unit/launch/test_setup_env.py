"""The installation as a whole, in a small checkout of its own: the real script, pip and virtual environment,
with stand-ins of `nvidia-smi`, of the package indexes and of torch.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.builds import LEAVE_THEM
from tests.unit.launch import machines
from tests.unit.launch.machines import A100, NO_DRIVER, V100

ROOT = Path(__file__).resolve().parents[3]
# pip builds the project with this, without a network.
_BACKEND = """
import os, zipfile
def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "project-1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        info = "project-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: project\\nVersion: 1.0\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""


@dataclass
class Checkout:
    """A checkout, the programs that it finds, and the folders of two package indexes."""

    root: Path
    bin: Path
    configured: Path
    pytorch: Path
    address: str

    def run(self, *args: str, script: str = "launch/setup_env.sh", **env: str) -> tuple[int, list[str]]:
        """Exit status and lines of the script."""
        given = {"PATH": f"{self.bin}:/usr/bin:/bin", "PIP_CONFIG_FILE": os.devnull, "HOME": str(self.root)}
        given |= {"PIP_INDEX_URL": f"{self.address}/configured", "PIP_NO_CACHE_DIR": "1"}
        done = subprocess.run(
            ["bash", script, *args], cwd=self.root, env=given | env, text=True, check=False, timeout=240,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, done.stdout.splitlines()

    def refusal(self, *args: str, **env: str) -> str:
        """The one line with which it fails; nothing counts as done."""
        status, lines = self.run(*args, **env)
        errors = [line for line in lines if not line.endswith("...")]
        assert status == 1 and len(errors) == 1 and errors[0].startswith("error: "), lines
        assert not (self.root / ".venv/torch-for").exists()
        return errors[0]

    def torch(self) -> str | None:
        """The installed version."""
        found = list(self.root.glob(".venv/lib/python*/site-packages/torch-*.dist-info"))
        return found[0].name.removeprefix("torch-").removesuffix(".dist-info") if found else None


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[Checkout]:
    folder = tmp_path_factory.mktemp("setup")
    with machines.served(folder / "indexes") as address:
        names = ("checkout", "bin", "indexes/configured", "indexes/pytorch")
        checkout = Checkout(*(folder / name for name in names), address)
        for path in (checkout.root / "launch", checkout.bin, checkout.configured, checkout.pytorch):
            path.mkdir(parents=True)
        for path in (ROOT / "launch").iterdir():
            if path.is_file():
                shutil.copy(path, checkout.root / "launch")
        (checkout.root / "launch/constraints.txt").write_text("torch==2.13.0\n", encoding="utf-8")
        (checkout.root / "backend.py").write_text(_BACKEND, encoding="utf-8")
        (checkout.root / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
            encoding="utf-8",
        )
        python = checkout.bin / "python3"
        python.write_text(f'#!/bin/sh\nexec {sys._base_executable} "$@"\n', encoding="utf-8")
        python.chmod(0o755)
        environment(checkout.root)
        yield checkout


def environment(root: Path) -> None:
    """The virtual environment that the script would make in seconds, with the pip of this one."""
    venv.create(root / ".venv")
    (packages,) = (root / ".venv").glob("lib/python*/site-packages")
    shutil.copytree(importlib.util.find_spec("pip").submodule_search_locations[0], packages / "pip")
    (root / ".venv/made-for").write_text(f"{root}\n", encoding="utf-8")


@pytest.fixture
def checkout(made) -> Iterator[Checkout]:
    """The checkout with no GPU and empty indexes; all but torch is installed from the first test on."""
    point_at(made, f"{made.address}/pytorch")
    yield made
    for path in [*made.root.glob(".venv/lib/python*/site-packages/torch*"), made.configured, made.pytorch]:
        shutil.rmtree(path)
    for path in [
        *made.root.glob(".venv/installed-*"),
        made.root / ".venv/torch-for",
        made.bin / "nvidia-smi",
    ]:
        path.unlink(missing_ok=True)
    made.configured.mkdir()
    made.pytorch.mkdir()


def point_at(checkout: Checkout, address: str) -> None:
    """Have the script take ``address`` for PyTorch's own index."""
    text = (ROOT / "launch/torch_build.py").read_text(encoding="utf-8")
    assert text.count('"https://download.pytorch.org/whl"') == 1
    text = text.replace("https://download.pytorch.org/whl", address)
    (checkout.root / "launch/torch_build.py").write_text(text, encoding="utf-8")


def test_a_node_without_gpus_then_one_with(checkout):
    """The configured index has CPU builds alone, later under the plain version too."""
    machines.torch_wheel(checkout.configured, "2.13.0+cpu", None)
    assert checkout.run(CUDA_VISIBLE_DEVICES="") == (
        0, ["Installing into .venv (once; some minutes) ...", "Installed."],
    )  # fmt: skip
    assert checkout.torch() == "2.13.0+cpu"
    assert checkout.run(CUDA_VISIBLE_DEVICES="") == (0, []), "a second call finds the work done"

    machines.nvidia_smi(checkout.bin, A100, A100)
    point_at(checkout, "http://127.0.0.1:9")
    assert checkout.refusal() == (
        "error: torch 2.13.0+cu130 or 2.13.0+cu126: not found where pip is set to look (`pip config list`) "
        "and at http://127.0.0.1:9 (not reachable from here); connect this machine to a package index that "
        "has it, or name one: bash launch/setup_env.sh --torch-index URL"
    )
    assert checkout.torch() == "2.13.0+cpu", "what works on the other machine stays"

    point_at(checkout, f"{checkout.address}/pytorch")
    machines.torch_wheel(checkout.configured, "2.13.0", None)
    machines.torch_wheel(checkout.pytorch / "cu130", "2.13.0+cu130", "13.0")
    computes = "torch 2.13.0+cu130 computes on 2 x NVIDIA A100-SXM4-80GB."
    checking = "Checking that torch works on this machine ..."
    assert checkout.run() == (0, [checking, computes, "Installed."])
    assert checkout.run() == (0, [])
    assert checkout.run(CUDA_VISIBLE_DEVICES="")[0] == 0 and checkout.torch() == "2.13.0+cu130"
    assert checkout.run() == (0, []), "each machine's check is kept"


def test_the_build_for_an_older_driver(checkout):
    """The plain version has CUDA 13, which this driver does not serve."""
    machines.torch_wheel(checkout.configured, "2.13.0", "13.0")
    machines.torch_wheel(checkout.pytorch / "cu126", "2.13.0+cu126", "12.6")
    machines.nvidia_smi(checkout.bin, V100, driver="535.129.03")
    assert checkout.run()[0] == 0 and checkout.torch() == "2.13.0+cu126"


def test_a_build_without_kernels_for_the_card(checkout):
    """What the table of builds has wrong, the check finds, and the next build is tried once."""
    point_at(checkout, "http://127.0.0.1:9")
    machines.torch_wheel(checkout.configured, "2.13.0+cu130", "13.0")
    machines.nvidia_smi(checkout.bin, A100)
    fault = "CUDA error: no kernel image is available for execution on the device"
    assert checkout.refusal(**{"STUB_kernel_13.0": fault}) == (
        f"error: torch 2.13.0+cu130 (sm_80 sm_90): {fault} (NVIDIA A100-SXM4-80GB (compute capability 8.0), "
        f"driver 580.65.06); see `nvidia-smi`, {LEAVE_THEM}"
    )
    machines.torch_wheel(checkout.configured, "2.13.0+cu126", "12.6")
    assert checkout.run(**{"STUB_kernel_13.0": fault})[0] == 0 and checkout.torch() == "2.13.0+cu126"


def test_gpus_that_no_build_makes_work(checkout):
    """No other build is fetched; later the quickstart stops at the same place."""
    for version, cuda in (("2.13.0+cu130", "13.0"), ("2.13.0+cu126", "12.6")):
        machines.torch_wheel(checkout.configured, version, cuda)
    machines.nvidia_smi(checkout.bin, A100)
    fault = "CUDA unknown error - this may be due to an incorrectly set up environment"
    assert fault in checkout.refusal(**{"STUB_init_13.0": fault})
    assert checkout.torch() == "2.13.0+cu130"
    assert checkout.run()[0] == 0
    status, lines = checkout.run(script="launch/quickstart.sh", **{"STUB_init_13.0": fault})
    assert status == 1 and len(lines) == 1 and lines[0].startswith("error: ") and fault in lines[0], lines


def test_an_index_by_argument(checkout):
    """On a node without a GPU, for those that have one and no network."""
    machines.torch_wheel(checkout.configured, "2.13.0+cpu", None)
    machines.torch_wheel(checkout.configured.parent / "configured/mirror/cu126", "2.13.0+cu126", "12.6")
    index = f"{checkout.address}/configured/mirror/cu126"
    assert checkout.run("--torch-index", index, CUDA_VISIBLE_DEVICES="")[0] == 0
    assert checkout.torch() == "2.13.0+cu126"
    machines.nvidia_smi(checkout.bin, A100)
    assert checkout.run(PIP_INDEX_URL="http://127.0.0.1:9")[0] == 0, "nothing is fetched"
    message = checkout.refusal("--torch-index", f"{checkout.address}/configured/mirror/cu999")
    assert f"not found at {checkout.address}/configured/mirror/cu999;" in message


def test_a_torch_that_an_interruption_left_broken(checkout):
    machines.torch_wheel(checkout.configured, "2.13.0+cpu", None)
    assert checkout.run(CUDA_VISIBLE_DEVICES="")[0] == 0
    (folder,) = checkout.root.glob(".venv/lib/python*/site-packages/torch")
    (folder / "__init__.py").write_text("from torch import _C\n", encoding="utf-8")
    (checkout.root / ".venv/torch-for").unlink()
    assert checkout.run(CUDA_VISIBLE_DEVICES="")[0] == 0
    assert "ones" in (folder / "__init__.py").read_text(encoding="utf-8")


def test_no_index_for_the_other_packages(checkout):
    machines.torch_wheel(checkout.configured, "2.13.0+cpu", None)
    project = checkout.root / "pyproject.toml"
    whole = project.read_text(encoding="utf-8")
    project.write_text(whole.replace("requires = []", 'requires = ["absent>=7"]'), encoding="utf-8")
    status, lines = checkout.run("test", CUDA_VISIBLE_DEVICES="")
    project.write_text(whole, encoding="utf-8")
    assert status == 1 and len(lines) == 2, lines
    said = "error: pip cannot install the project's packages: No matching distribution found for absent>=7; "
    assert lines[1].startswith(said)
    assert not (checkout.root / ".venv/installed-test").exists()


def test_refusals_before_anything_is_made(checkout):
    shutil.copytree(checkout.root / "launch", checkout.root / "other/launch")
    other = Checkout(checkout.root / "other", checkout.bin, checkout.configured, checkout.pytorch, "")
    machines.nvidia_smi(checkout.bin, A100, driver="470.82.01")
    assert other.refusal().startswith("error: NVIDIA driver 470.82.01: torch on NVIDIA A100")
    assert "the arguments are [test] [--torch-index URL]" in other.refusal("--torch-indx", "x")
    assert "--torch-index: needs the address" in other.refusal("--torch-index")
    machines.nvidia_smi(checkout.bin, fails=(9, NO_DRIVER))
    (checkout.bin / "uname").write_text("#!/bin/sh\necho Darwin\n", encoding="utf-8")
    (checkout.bin / "uname").chmod(0o755)
    assert other.refusal() == "error: Darwin: this project needs Linux (a container or WSL will do)"
    (checkout.bin / "uname").unlink()
    assert not (other.root / ".venv").exists()

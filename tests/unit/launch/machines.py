"""Stand-ins of what an installation meets: `nvidia-smi`, the driver's files, a package index with builds of
torch of a few bytes.
"""

import shlex
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

A100 = "8.0, GPU-aaaa, NVIDIA A100-SXM4-80GB"
H100 = "9.0, GPU-cccc, NVIDIA H100 80GB HBM3"
V100 = "7.0, GPU-bbbb, Tesla V100-SXM2-32GB"
T4 = "7.5, GPU-dddd, Tesla T4"
B200 = "10.0, GPU-eeee, NVIDIA B200"
K80 = "3.7, GPU-ffff, Tesla K80"
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
    "NVIDIA driver is installed and running."
)

# A torch with the behaviour of the real one where an installation looks at it.
_TORCH = """
import os
__version__ = {version!r}
class version:
    cuda = {cuda!r}
class cuda:
    init = lambda: _fail("init")
    is_available = lambda: True
    device_count = lambda: 2
    get_arch_list = lambda: ["sm_80", "sm_90"]
def _fail(where):
    fault = os.environ.get(f"STUB_{{where}}_{cuda}", "")
    if fault:
        raise RuntimeError(fault + chr(10) + "more lines")
class ones:
    def __init__(self, *shape, device):
        _fail("kernel")
    def __matmul__(self, other):
        return self
    def sum(self):
        return 64.0**3
"""


def nvidia_smi(folder: Path, *cards: str, driver: str = "580.65.06", fails: tuple[int, str] | None = None):
    """A `nvidia-smi` in ``folder`` that lists these cards, or fails with a status and a text."""
    status, text = fails or (0, "\n".join(f"{driver}, {card}" for card in cards))
    return program(folder, f"echo {shlex.quote(text)}\nexit {status}\n")


def old_nvidia_smi(folder: Path, driver: str, card: str) -> Path:
    """One that does not know the compute capability."""
    unknown = 'Field "compute_cap" is not a valid field to query.'
    return program(
        folder,
        f"case $1 in *compute_cap*) echo {shlex.quote(unknown)}; exit 2 ;; esac\n"
        f"echo '{driver}, GPU-0000, {card}'\n",
    )


def program(folder: Path, body: str) -> Path:
    """Of shell built-ins alone: the folder may be all of the PATH."""
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{body}", encoding="utf-8")
    script.chmod(0o755)
    return script


def driver_files(system: Path, *, driver: str, models: dict[int, str], given: tuple[int, ...]) -> None:
    """What the kernel module shows below ``system``: cards by their minor number, of which some are given."""
    folder = system / "proc/driver/nvidia"
    folder.mkdir(parents=True)
    (folder / "version").write_text(
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build  (dvs-builder)\n"
        "GCC version:  gcc version 12.3.0\n",
        encoding="utf-8",
    )
    for minor, model in models.items():
        card = folder / f"gpus/0000:{minor:02}:00.0"
        card.mkdir(parents=True)
        (card / "information").write_text(
            f"Model: \t\t {model}\nIRQ:   \t\t 44\nGPU UUID: \t GPU-{minor}\nDevice Minor: \t {minor}\n",
            encoding="utf-8",
        )
    for minor in given:
        device(system, f"nvidia{minor}")


def device(system: Path, name: str) -> None:
    (system / "dev").mkdir(exist_ok=True)
    (system / "dev" / name).touch()


def on_the_bus(system: Path, *, vendor: str = "0x10de", kind: str = "0x030200") -> None:
    folder = system / "sys/bus/pci/devices/0000:65:00.0"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n", encoding="ascii")
    (folder / "class").write_text(f"{kind}\n", encoding="ascii")


def torch_wheel(index: Path, version: str, cuda: str | None, *, source: str | None = None) -> None:
    """A wheel of torch in the package index ``index``."""
    (index / "torch").mkdir(parents=True, exist_ok=True)
    info = f"torch-{version}.dist-info"
    files = {
        "torch/__init__.py": source or _TORCH.format(version=version, cuda=cuda),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(index / "torch" / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which ``folder`` is served on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            """Nothing: the test's output is not the place."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

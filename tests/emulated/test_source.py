"""Where the package names CUDA: the emulated device does not reach these places."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("inrank_megatron", "tools", "launch")
ALLOWED = {
    "inrank_megatron/distributed/platform.py": "decides what the process runs on",
    "inrank_megatron/distributed/device_copies.py": "an event that ends with copies to the host",
    "inrank_megatron/distributed/determinism.py": "chooses kernels of the whole process",
    "inrank_megatron/distributed/peak_memory.py": "what torch has counted of the device's memory",
    "inrank_megatron/preflight/versions.py": "which CUDA torch was built for",
    "inrank_megatron/engine/optimizers.py": "says why an operator does not build",
    "inrank_megatron/benchmarks/layer.py": "how many sequences a measurement takes",
    "inrank_megatron/benchmarks/links.py": "takes a device for each of two processes, and waits for it",
    "inrank_megatron/benchmarks/blocks.py": "the precision of a measurement",
    "inrank_megatron/benchmarks/counts.py": "counts kernels and waits where there are any",
    "inrank_megatron/benchmarks/timing.py": "waits for what it measures",
    "launch/builds.py": "installs torch",
    "launch/torch_build.py": "installs torch",
    "launch/torch_probe.py": "installs torch",
}


def test_the_places_that_name_cuda_are_known():
    """Everything else takes its device as an argument, or from platform.py."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {str(path.relative_to(ROOT)): names for path in paths if (names := mentions(path))}
    assert found.keys() == ALLOWED.keys(), found


def mentions(path: Path) -> list[str]:
    """Lines that read ``torch.cuda`` or hold the word as a value."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    seen = []
    for node in ast.walk(tree):
        attribute = isinstance(node, ast.Attribute) and node.attr == "cuda"
        value = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if attribute or (value and node.value.split(":")[0] == "cuda"):
            seen.append(f"line {node.lineno}: {ast.unparse(node)}")
    return seen

"""What the repository as a whole keeps: its layout, its commands, its versions, its words."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    ".mkdocs.yml",
    ".pre-commit-config.yaml",
    "LICENSE",
    "README.md",
    "configs",
    "docs",
    "inrank_megatron",
    "launch",
    "patches",
    "pyproject.toml",
    "tests",
    "tools",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Import name -> distribution, where they differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "megatron": "megatron-core",
    "mlflow": "mlflow-skinny",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
# Who asks for apex builds it, and is refused with that advice where it is absent: it is not on the package
# index. vLLM is larger than all of the others together; its test is skipped where it is absent.
NOT_DECLARED = {"apex", "vllm"}
PACKAGES = set(PROJECT["tool"]["setuptools"]["package-dir"])
OWN = {path.name for path in ROOT.iterdir() if path.is_dir()} | PACKAGES


def tracked() -> list[Path]:
    """Files of the project: what git tracks or would, else (a source archive) what lies in its folders."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listing.returncode == 0:
        return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]
    return [path for name in TOP_LEVEL for path in [ROOT / name, *(ROOT / name).rglob("*")] if path.is_file()]


FILES = tracked()
PYTHON = [path for path in FILES if path.suffix == ".py"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_top_level_entries():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} <= TOP_LEVEL


def test_unit_tests_mirror_the_package():
    """``tests/unit/a/test_b.py``, or ``test_b_more.py``, is of ``inrank_megatron/a/b.py``; that of several
    folders lies above.
    """
    unit = ROOT / "tests" / "unit"
    for path in unit.glob("*/**/test_*.py"):
        folder, name = path.parent.relative_to(unit), path.stem.removeprefix("test_")
        package = ROOT / folder if folder.parts[0] == "launch" else ROOT / "inrank_megatron" / folder
        modules = [module.stem for module in package.iterdir()]
        assert any(f"{name}_".startswith(f"{module}_") for module in modules), name_of(path)


def test_no_path_of_a_machine():
    folders = [f"{folder}/".encode() for folder in {ROOT, Path.home()} - {Path("/")}]
    texts = {name_of(path): path.read_bytes() for path in FILES}
    assert [name for name, text in texts.items() if any(folder in text for folder in folders)] == []


def test_no_unsafe_or_silent_code():
    patterns = (
        r"weights_only\s*=\s*False",
        r"\bpickle\.loads?\(",
        r"trust_remote_code\s*=\s*True",
        r"except[^\n]*:\s*\n?\s*pass\b",
        r"except\s*:",
    )
    texts = {name_of(p): p.read_text(encoding="utf-8") for p in PYTHON if "tests" not in p.parts}
    found = [
        (name, pattern) for name, text in texts.items() for pattern in patterns if re.search(pattern, text)
    ]
    assert found == []


def test_ci_runs_the_readme_test_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "bash launch/quickstart.sh" in readme and "bash tests/run.sh" in readme
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert lines[-2:] == ["bash tests/run.sh", "exec bash tests/cluster.sh"]


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.suffix == ".sh" or path == ROOT / ".ci/run"], ids=name_of
)
def test_shell_scripts_parse_and_stop_at_errors(path):
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")
    result = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_import_is_a_declared_dependency():
    declared = {Requirement(line).name.lower() for line in _requirements()}
    siblings = {folder: {path.stem for path in folder.glob("*.py")} for folder in {p.parent for p in PYTHON}}
    missing = {
        (name_of(path), name)
        for path in PYTHON
        for name in _imported_names(path)
        - sys.stdlib_module_names
        - OWN
        - siblings[path.parent]
        - NOT_DECLARED
        if DISTRIBUTIONS.get(name, name).lower() not in declared
    }
    assert not missing, "declare these in pyproject.toml"


def test_pins_lie_in_the_declared_ranges():
    ranges = {Requirement(line).name.lower(): Requirement(line).specifier for line in _requirements()}
    pins = dict(
        line.lower().split("==")
        for line in (ROOT / "launch/constraints.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    assert pins.keys() == ranges.keys()
    assert {name: pin for name, pin in pins.items() if pin not in ranges[name]} == {}


def test_versions_in_the_documents_are_those_of_pyproject():
    text = (ROOT / "docs/reference/platforms.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \| `([<>=~][^`]*)` \|", text, flags=re.MULTILINE)
    documented = {name: SpecifierSet(versions) for name, versions in rows}
    declared = {r.name: r.specifier for r in map(Requirement, PROJECT["project"]["dependencies"])}
    assert documented.pop("python") == SpecifierSet(PROJECT["project"]["requires-python"])
    assert documented == {name: declared[name] for name in documented}
    assert {"torch", "megatron-core", "deepspeed"} <= documented.keys()


def test_third_party_notices_name_every_dependency():
    text = (ROOT / "docs/reference/third_party.md").read_text(encoding="utf-8").lower()
    names = {Requirement(line).name.lower() for line in PROJECT["project"]["dependencies"]}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_every_package_folder_is_in_the_wheel():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT).parts for path in PYTHON}
    assert {".".join(parts) for parts in folders if parts[0] == "inrank_megatron"} <= listed


def test_mapped_packages_are_importable_from_anywhere(tmp_path):
    """Launch scripts use them although their folders have other names than the packages."""
    names = list(PROJECT["tool"]["setuptools"]["package-dir"])
    code = f"import importlib\nfor name in {names!r}: print(importlib.import_module(name).__path__)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=_without_python_path(), check=True)


def test_installed_version_is_the_one_of_the_source():
    from inrank_megatron import __version__

    assert importlib.metadata.version("inrank-megatron") == __version__


def test_the_changelog_begins_with_the_version():
    from inrank_megatron import __version__

    text = (ROOT / "docs/changelog.md").read_text(encoding="utf-8")
    first, *others = re.findall(r"^## (\S+)", text, re.MULTILINE)
    newest = others[0] if first == "Unreleased" else first
    assert newest == __version__


def test_pre_commit_runs_the_versions_and_checks_of_the_tests():
    [ruff, local] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    pins = (ROOT / "launch/constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ruff=={ruff['rev'].removeprefix('v')}" in pins
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]
    assert [hook["entry"] for hook in local["hooks"]] == [".venv/bin/mypy"]


def test_ruff_finds_nothing():
    for words in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *words, "."]
        done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(900)  # 13 s of a core without a cache, a second with one
def test_mypy_finds_nothing():
    """The settings are in pyproject.toml."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _requirements() -> list[str]:
    return PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["test"]


def _imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def _without_python_path() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

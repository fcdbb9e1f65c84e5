"""The rules on who may import whom, read from the source."""

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "inrank_megatron"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# The parts of the package from the bottom up: each may import those of the levels below it, none of its own
# level, none above. Modules at the top of the package are below all of them.
FLOORS = (
    ("errors", "fields"),
    ("pointers",),
    ("distributed",),
    ("lowrank",),
    ("config", "checkpoint"),
    ("model", "data", "reporting"),
    ("engine", "interop", "planning", "preflight", "spectra"),
    ("evaluation", "theory"),
    ("generation", "inspection"),
    ("training",),
    ("experiments", "benchmarks"),
)
# The same inside of the contribution: a method asks for changes of layers, whose algebra knows neither.
LOWRANK_FLOORS = (("criteria", "linalg"), ("layers",), ("methods",))
# What the formats of other programs have in common lies below them, the list of formats above. DeepSpeed's
# folders hold Megatron's arguments, adapters are for a model of Hugging Face.
INTEROP_FLOORS = (
    ("core",),
    ("huggingface", "megatron"),
    ("deepspeed", "peft", "inrank_reference"),
    ("formats",),
    ("convert", "hub"),
    ("start",),
    ("command",),
)
# The one call at import: a finder that waits for transformers, so that AutoModelForCausalLM knows our models
# without a further step of the user's, and --help still imports neither torch nor transformers.
REGISTERS = (
    "from inrank_megatron.interop.huggingface.registration import register_when_imported",
    "register_when_imported()",
)
MAY_READ_GLOBAL_GROUPS = "inrank_megatron.distributed.process_groups"
MAY_CALL_DEEPSPEED = "inrank_megatron.engine"


def test_imports_run_one_way():
    assert_downward("inrank_megatron", FLOORS)
    outside = ("launch", "tools", "tests")
    assert [(m, name) for m in MODULES for name in imports(m) if name.split(".")[0] in outside] == []


def test_the_contribution_runs_one_way():
    assert_downward("inrank_megatron.lowrank", LOWRANK_FLOORS)


def test_formats_of_other_programs_know_what_they_share_alone():
    assert_downward("inrank_megatron.interop", INTEROP_FLOORS)


def test_the_page_of_the_algorithm_needs_nothing_of_the_package():
    assert not [name for name in imports("inrank_megatron.lowrank.simple") if name.startswith("inrank")]


@pytest.mark.parametrize(
    ("package", "levels"),
    [
        ("inrank_megatron", FLOORS),
        ("inrank_megatron.lowrank", (*LOWRANK_FLOORS, ("simple",))),
        ("inrank_megatron.interop", INTEROP_FLOORS),
    ],
)
def test_every_part_has_its_level(package, levels):
    parts = {name.split(".")[package.count(".") + 1] for name in MODULES if name.startswith(f"{package}.")}
    assert parts == {part for level in levels for part in level}


def assert_downward(package: str, levels: tuple[tuple[str, ...], ...]) -> None:
    """Each import within ``package`` is of the module's own part, or of one on a lower level; what lies next
    to the package's modules is not asked.
    """
    level_of = {part: number for number, level in enumerate(levels) for part in level}
    depth = package.count(".") + 1
    upward = set()
    for module in MODULES:
        if not f"{module}.".startswith(f"{package}."):
            continue
        part = module.split(".")[depth] if module != package else None
        imported = {name.split(".")[depth] for name in imports(module) if name.startswith(f"{package}.")}
        own = level_of.get(part, len(levels))
        upward |= {(module, one) for one in imported - {part} if level_of.get(one, -1) >= own}
    assert not upward, f"modules, and what they must not import: of the same level or above it: {upward}"


def test_one_module_reads_the_global_groups_of_megatron():
    reads = {m: [n for n in imports(m) if "parallel_state" in n or n.endswith(".mpu")] for m in MODULES}
    reading = {module: names for module, names in reads.items() if names}
    assert reading.keys() == {MAY_READ_GLOBAL_GROUPS}, f"{reading}: take the process group as an argument"


def test_only_the_engine_imports_deepspeed():
    uses = {m for m in MODULES if any(name.split(".")[0] == "deepspeed" for name in imports(m))}
    outside = {module for module in uses if not module.startswith(MAY_CALL_DEEPSPEED)}
    assert uses and not outside, f"{outside}: the engine alone knows DeepSpeed"


def test_rank_decisions_know_nothing_of_processes():
    criteria = [name for name in MODULES if name.startswith("inrank_megatron.lowrank.criteria.")]
    names = {(module, name) for module in criteria for name in imports(module)}
    assert names and [pair for pair in names if pair[1].startswith("torch.distributed")] == []


def test_no_import_cycle():
    graph = {module: {known(name) for name in imports(module)} & MODULES.keys() for module in MODULES}
    graphlib.TopologicalSorter({module: edges - {module} for module, edges in graph.items()}).prepare()


def test_packages_hold_at_most_a_docstring_and_the_version():
    for path in [path for path in MODULES.values() if path.name == "__init__.py"]:
        for node in tree(path).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            version = isinstance(node, ast.Assign) and [t.id for t in node.targets] == ["__version__"]
            allowed = docstring or version or registers(path, node)
            assert allowed, f"line {node.lineno} of {path} belongs in a module"


def test_nothing_runs_at_import():
    """At the top level: definitions, constants and imports; a bare call or a loop is neither."""
    for path in [*MODULES.values(), *sorted((ROOT / "patches").glob("*.py"))]:
        for node in tree(path).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            allowed = docstring or isinstance(node, _DEFINITIONS) or registers(path, node)
            assert allowed, f"line {node.lineno} of {path} runs at import"


def registers(path: Path, node: ast.stmt) -> bool:
    """Whether the statement is the package's import or call of what waits for transformers."""
    return path == PACKAGE / "__init__.py" and ast.unparse(node) in REGISTERS


_DEFINITIONS = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
    ast.If,  # TYPE_CHECKING and `__name__ == "__main__"`
)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(module: str) -> set[str]:
    """Full names of what ``module`` imports anywhere, functions included; ``a.b`` for ``from a import b``."""
    return set(_imported(tree(MODULES[module])))


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def known(name: str) -> str:
    """The module of this package that ``name`` is or stands in."""
    return name if name in MODULES else name.rpartition(".")[0]

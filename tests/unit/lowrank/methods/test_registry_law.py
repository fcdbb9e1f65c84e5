"""A method owns itself: no other file of the package names one, and each has its page."""

import ast
import re
from pathlib import Path

import pytest

from inrank_megatron.lowrank.methods.registry import METHODS

ROOT = Path(__file__).parents[4]
OWNERS = ("inrank_megatron/lowrank/methods/", "inrank_megatron/interop/")
"""The methods themselves, and other programs' formats, which are of one method or another."""
# Who names methods all the same: "inrank" is also the section of all methods' settings, "dense" also a linear
# or a phase without factors in records and tables, and the comparison has a command line of each method.
EXCEPTIONS = {
    "inrank_megatron/benchmarks/blocks.py": {"dense"},
    "inrank_megatron/benchmarks/decoding.py": {"dense"},
    "inrank_megatron/config/loading.py": {"inrank"},
    "inrank_megatron/experiments/arms.py": {"dense", "fixed-rank", "inrank", "lora", "relora", "warm-start"},
    "inrank_megatron/experiments/compare.py": {"dense"},
    "inrank_megatron/experiments/figure4.py": {"dense", "fixed-rank"},
    "inrank_megatron/experiments/registry.py": {"relora"},
    "inrank_megatron/experiments/relora.py": {"dense", "lora", "relora"},
    "inrank_megatron/experiments/results.py": {"dense"},
    "inrank_megatron/experiments/tables2_3_5.py": {"dense"},
    "inrank_megatron/inspection/show.py": {"dense"},
    "inrank_megatron/reporting/behind.py": {"dense"},
    "inrank_megatron/reporting/console.py": {"dense"},
    "inrank_megatron/reporting/predicted.py": {"dense"},
    "inrank_megatron/reporting/glance.py": {"dense"},
    "inrank_megatron/reporting/learnt.py": {"dense"},
    "inrank_megatron/reporting/plots.py": {"dense"},
    "inrank_megatron/reporting/report.py": {"dense"},
    "inrank_megatron/reporting/run.py": {"dense"},
    "inrank_megatron/reporting/tables.py": {"dense"},
    "inrank_megatron/training/summary.py": {"dense"},
}
FILES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("inrank_megatron", "launch", "tools")
    for path in (ROOT / folder).rglob("*.py")
)
NAMES = "|".join(METHODS)
NAMED = re.compile(rf"({NAMES})|.*--method[= ]({NAMES})\b.*", re.DOTALL)


def named(source: str) -> set[str]:
    """Methods that a string of a program names, by itself or as the value of ``--method``."""
    strings = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    found = (NAMED.fullmatch(text) for text in strings if isinstance(text, str))
    return {match[1] or match[2] for match in found if match}


def test_no_file_but_its_own_names_a_method():
    found = {path: named((ROOT / path).read_text(encoding="utf-8")) for path in FILES}
    strangers = {path: names for path, names in found.items() if names and not path.startswith(OWNERS)}
    assert strangers == EXCEPTIONS


def test_a_name_in_a_condition_or_in_advice_is_found():
    source = 'if method == "relora":\n    say(f"give --method warm-start, or {x}")\n'
    assert named(source) == {"relora", "warm-start"}


def test_two_methods_do_not_give_one_flag_two_meanings():
    sections = {section for method in METHODS.values() for section in method.settings}
    names = [name for section in sections for name in section.model_fields]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_its_place_in_the_docs(name):
    page, _, anchor = METHODS[name].page.partition("#")
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    heads = [head.lower().replace(" ", "-") for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    assert not anchor or anchor in heads
    assert f"`{name}`" in (ROOT / "docs" / "concepts" / "methods.md").read_text(encoding="utf-8")

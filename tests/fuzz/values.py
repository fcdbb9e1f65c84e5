"""Hostile values, and their way into the trees of JSON and YAML files."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

DEEP = 10**5
MARK = "<literal {}>"


class Literal:
    """Text that stands in a file as it is, where no value of Python's would be written so."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return f"Literal({self.text[:40]!r} of {len(self.text)})"


SCALARS = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**32, 2**63 - 1, 2**64, 10**8, 10**12, 10**18, -(10**18),
    10**400, 0.5, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
    "", "x", "0", "1e9", "auto", "NaN", "x" * 10**5, "\ud800", "\0", "\n", "a\nb", "é", "../../etc/passwd",
    "/etc/passwd", "/dev/zero", "~root", "{}", "!!python/name:os.system", "9" * 5000,
)  # fmt: skip
TREES = (
    [], {}, [[]], [None], [0], [-1], [10**18], ["x"], [1, 2, 3], {"x": None}, {"": 0}, [{}], {"x": {"x": {}}},
    [10**9, 10**9, 10**9], [2**62, 4], [0.5], ["../x"], list(range(300)),
)  # fmt: skip
LITERALS = (
    Literal("9" * 5000), Literal("1e999"), Literal("-"), Literal("[" * DEEP),
    Literal("[" * DEEP + "]" * DEEP), Literal('{"x":' * DEEP), Literal("[" * 900 + "]" * 900), Literal("01"),
)  # fmt: skip
VALUES = st.sampled_from([*SCALARS, *TREES, *LITERALS])
EDITS = ("replace", "delete", "rename", "add", "twice", "copy")


def edits() -> st.SearchStrategy[tuple]:
    """One change of a tree: what to do, at which node (modulo their number), with what."""
    return st.tuples(st.sampled_from(EDITS), st.integers(0, 10**4), VALUES)


def edit(tree: Any, change: tuple) -> Any:
    """The tree with one node changed in place (or another tree, where the root is meant)."""
    kind, where, value = change
    nodes = list(places(tree))
    if not nodes:
        return value
    holder, key = nodes[where % len(nodes)]
    if kind == "replace" or isinstance(holder, list):
        holder[key] = value
    elif kind == "delete":
        del holder[key]
    elif kind == "rename":
        holder[_name(value)] = holder.pop(key)
    elif kind == "copy":
        other, name = nodes[where // 7 % len(nodes)]
        holder[key] = copy.deepcopy(other[name])
    elif kind == "twice":
        holder[Twice(key)] = value
    else:
        holder[_name(value)] = holder[key]
    return tree


class Twice(str):
    """A key that equals no other, so that a file has it twice."""

    __slots__ = ()

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key) below the root, at the least depth first."""
    level = [tree]
    while level:
        below = []
        for holder in level:
            items = holder.items() if isinstance(holder, dict) else enumerate(holder)
            for key, value in list(items):
                yield holder, key
                if isinstance(value, dict | list):
                    below.append(value)
        level = below


def dump(tree: Any) -> bytes:
    """The tree as JSON, which YAML reads too."""
    texts: list[str] = []

    def marked(literal: Literal) -> str:
        texts.append(literal.text)
        return MARK.format(len(texts) - 1)

    written = json.dumps(tree, default=marked)
    for number, text in enumerate(texts):
        written = written.replace(json.dumps(MARK.format(number)), text)
    return written.encode()


def _name(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)[:300]

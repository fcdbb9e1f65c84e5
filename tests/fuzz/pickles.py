"""Damage to files of torch.save and the list of a torch_dist checkpoint: zips, pickles and what they name."""

import contextlib
import os
import pickle
import struct
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from inrank_megatron.interop.core.restricted_pickle import load_metadata
from tests.fuzz.mutate import DEEPER
from tests.fuzz.readers import TRAP
from tests.fuzz.values import SCALARS, TREES

BOMB = 3 * 2**27
"""Bytes of zeros in a member of a zip, which take a megabyte there."""


class Trap:
    """Makes a folder if it is unpickled as Python does it."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (TRAP,)


class Printing:
    """The same by a function that no list of forbidden ones has."""

    def __reduce__(self) -> tuple:
        return eval, (f"__import__('os').mkdir({TRAP!r})",)


STREAMS = (
    pickle.dumps(Trap()), pickle.dumps(Printing()), pickle.dumps({"state_dict": Trap()}), pickle.dumps({}),
    b"\x80\x04N" + b"r" + struct.pack("<I", 2**30) + b".",  # a memo of 2^30 entries
    b"\x80\x04N" + b"r" + struct.pack("<I", 2**32 - 1) + b".",
    b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b"x.",  # bytes that are not there
    b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",
    b"\x80\x02" + b"(" * 10**5 + b"t" * 10**5 + b".", b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".",
    b"\x80\x02ccollections\nOrderedDict\n)R.",
    b"I" + b"9" * 10**5 + b"\n.", b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    b"\x80\x02ctorch\nSize\n]K\x01a\x85R.", b"\x80\x02]q\x00h\x00a.", b"\x80\x02K\x01Q.",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", b"\x80\x04\x95" + b"\xff" * 8 + b".",
)  # fmt: skip
TENSORS = (
    lambda: torch.zeros(1).expand(10**5, 10**5, 10**2), lambda: torch.empty(0),
    lambda: torch.tensor(float("nan")),
    lambda: torch.zeros(1, device="meta").expand(10**6, 10**6), lambda: torch.zeros(3, dtype=torch.complex64),
    lambda: torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**9, 10**9)),
    lambda: torch.ones(2, 2, dtype=torch.bool), lambda: torch.zeros((2,) * 20),
    lambda: torch.full((3,), 1e38),
    lambda: torch.zeros(1, dtype=torch.int64), lambda: torch.zeros(1).expand(10**9),
)  # fmt: skip
VALUES = (*SCALARS, *TREES, *TENSORS)


def edited_object(path: Path, changes: Iterable[tuple]) -> None:
    """Change values in what torch.save wrote; other files stay."""
    if path.suffix not in (".pt", ".ckpt"):
        return
    try:
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, weights_only=True)
    except Exception:  # damaged before
        return
    for kind, where, number in changes:
        value = VALUES[number % len(VALUES)]
        value = value() if callable(value) else value
        nodes = _places(content)
        if not nodes:
            continue
        holder, key = nodes[where % len(nodes)]
        if kind == "delete" and isinstance(holder, dict):
            del holder[key]
        elif kind == "add" and isinstance(holder, dict):
            holder[value if isinstance(value, str | int | float | bool | None) else "x"] = holder[key]
        elif isinstance(holder, dict | list):
            holder[key] = value
        else:
            setattr(holder, key, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, path)


def _places(content: Any) -> list[tuple[Any, Any]]:
    found, todo = [], [content]
    while todo:
        holder = todo.pop()
        if isinstance(holder, dict):
            items = list(holder.items())
        elif isinstance(holder, list):
            items = list(enumerate(holder))
        elif hasattr(holder, "__dict__") and not isinstance(holder, torch.Tensor | type):
            items = list(vars(holder).items())
        else:
            continue
        found += [(holder, key) for key, _ in items]
        todo += [value for _, value in items]
    return found


def edited_zip(path: Path, stream: int) -> None:
    """Put another pickle, or a member that unpacks to a thousand times its size, into a zip."""
    if path.suffix not in (".pt", ".ckpt"):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError):
        return
    names = list(members)
    name = next((name for name in names if name.endswith("data.pkl")), names[0]) if names else "x/data.pkl"
    bomb = stream % 16 == 15
    with zipfile.ZipFile(
        path, "w", zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED, compresslevel=1
    ) as archive:
        for other in names:
            if other != name or bomb:
                archive.writestr(other, members[other])
        target = names[stream % len(names)] if bomb and names else name
        if not bomb:
            archive.writestr(target, STREAMS[stream % len(STREAMS)])
        else:
            with (
                warnings.catch_warnings(),
                archive.open(zipfile.ZipInfo(target), "w", force_zip64=True) as member,
            ):
                warnings.simplefilter("ignore")
                for _ in range(BOMB // 2**24):
                    member.write(bytes(2**24))


def edited_list(path: Path, changes: Iterable[tuple]) -> None:
    """Change the list of a torch_dist checkpoint: sizes, chunks and places; other files stay."""
    if path.name != ".metadata":
        return
    try:
        metadata = load_metadata(path, allow_pickle=False)
    except Exception:  # damaged before
        return
    if not isinstance(metadata, Metadata):
        return
    for kind, where, number in changes:
        if kind == "stream":
            path.write_bytes(STREAMS[number % len(STREAMS)])
            return
        nodes = _records(metadata)
        holder, key = nodes[where % len(nodes)]
        value = VALUES[number % len(VALUES)]
        value = torch.Size((2**40, 2**20)) if callable(value) else value
        if isinstance(holder, list | dict):
            holder[key] = value
        else:
            object.__setattr__(holder, key, value)  # records are frozen
    with contextlib.suppress(Exception):  # of what no pickle can hold
        path.write_bytes(pickle.dumps(metadata))


def _records(metadata: Metadata) -> list[tuple[Any, Any]]:
    found, todo, seen = [], [metadata], set()
    while todo:
        holder = todo.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        if isinstance(holder, dict):
            items = list(holder.items())
        elif isinstance(holder, list):
            items = list(enumerate(holder))
        elif hasattr(holder, "__dict__") and not isinstance(holder, torch.dtype | type):
            items = list(vars(holder).items())
        else:
            continue
        found += [(holder, key) for key, _ in items]
        todo += [value for _, value in items]
    return found


_DOINGS = ("replace", "replace", "delete", "add", "stream")
_CHANGES = st.lists(
    st.tuples(st.sampled_from(_DOINGS), st.integers(0, 10**4), st.integers(0, 999)),
    min_size=1, max_size=2,
)  # fmt: skip
OBJECT, ZIP, LIST = ("object", _CHANGES), ("zip", st.integers(0, 99)), ("list", _CHANGES)
DEEPER.update(object=edited_object, zip=edited_zip, list=edited_list)

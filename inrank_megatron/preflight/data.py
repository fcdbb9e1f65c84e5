"""The same texts on every host, by number, sizes and samples of the files, before they are read whole.

Preparing the data compares all of their content, after minutes or hours of reading.
"""

import hashlib
import math
import platform
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from inrank_megatron.config.sizes import shown_size
from inrank_megatron.data.paths import PAIR, Prefix, find
from inrank_megatron.data.sources import parse_blend
from inrank_megatron.data.token_file import pair_file
from inrank_megatron.errors import UserError
from inrank_megatron.preflight.findings import ERROR, Finding, HostFacts, unlike_the_others
from inrank_megatron.preflight.place import Place

DATA = "data"
SAMPLED_FILES = 64
SAMPLE_BYTES = 2**16


class Data:
    """Files that the run reads; what the hub has under one name is compared once it is prepared."""

    on_one_host = False

    def gather(self, place: Place) -> dict[str, Any]:
        data = place.config.data
        words = [data.data_path, data.train_data_path, data.valid_data_path, data.test_data_path]
        if data.dataset is not None:
            return {DATA: f"dataset {data.dataset.rstrip('/').rpartition('/')[2]}"}
        if not any(words):
            return {DATA: f"the texts of Python {platform.python_version()}"}
        try:
            return {DATA: _described([file for given in words if given for file in files_of(given)])}
        except (UserError, OSError) as error:
            return {DATA: f"cannot be read: {error}"}

    def judge(self, hosts: Sequence[HostFacts]) -> Iterator[Finding]:
        unreadable = [host for host in hosts if str(host.facts[DATA]).startswith("cannot")]
        if len(unreadable) == len(hosts):
            for host in hosts:
                yield Finding(ERROR, DATA, host.host, host.facts[DATA], "must be there", "correct the path")
        else:
            remedy = "copy the same files there, or give a folder that all hosts share"
            yield from unlike_the_others(hosts, DATA, remedy, shown=partial(self.shown, DATA))

    def shown(self, row: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        return f"{shown_size(value['bytes'])}, files: {value['files']}, samples: {value['digest']}"


def files_of(words: list[str]) -> Iterator[Path]:
    """The files that a data path names, in their order. Raises as ``find``."""
    for word, _ in parse_blend(words):
        for entry in find(word).entries:
            if isinstance(entry, Prefix):
                yield from (pair_file(entry.path, suffix) for suffix in PAIR)
            else:
                yield entry


def _described(files: list[Path]) -> dict[str, Any]:
    """Number, bytes, and a digest of all sizes and of samples: start, middle and end of some files."""
    sizes = [path.stat().st_size for path in files]
    digest = hashlib.sha256(repr(sizes).encode())
    step = max(1, math.ceil(len(files) / SAMPLED_FILES))
    for path, size in list(zip(files, sizes, strict=True))[::step]:
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return {"files": len(files), "bytes": sum(sizes), "digest": digest.hexdigest()[:12]}

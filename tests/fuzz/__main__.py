"""Every reader under ever new damage, for as long as is asked:

python -m tests.fuzz --minutes N [NAME ...]    NAME: the readers whose names hold one of these words
"""

import argparse
import faulthandler
import importlib
import itertools
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.fuzz.bounds import Unending
from tests.fuzz.readers import Reader, Tally, attack, intact

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
BATCH = 20
"""Inputs of one seed: after a fault the next seed goes on."""


def main() -> int:
    """1 if any reader had a fault; each different one is printed once."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first batch")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    faulthandler.enable()
    chosen = [name for name in MODULES if name.removeprefix("test_") in options.names] or MODULES
    readers = [
        reader
        for module in chosen
        for reader in importlib.import_module(f"tests.fuzz.{module}").READERS
        if chosen is not MODULES or not options.names or any(name in reader.name for name in options.names)
    ]
    print(f"seed {options.seed}", flush=True)
    faults = 0
    for reader in readers:
        faults += _one(reader, seconds=60 * options.minutes / len(readers), first=options.seed)
    return bool(faults)


def _one(reader: Reader, *, seconds: float, first: int) -> int:
    faults: dict[tuple, str] = {}
    tally, end = Tally(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        original, scratch = intact(reader, Path(folder, "made")), Path(folder, "scratch")
        for seed in itertools.count(first):
            if time.monotonic() > end:
                break
            try:
                attack(reader, original, scratch, examples=BATCH, seed=seed, tally=tally)
            except (Exception, Unending) as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                if (key := (type(error).__name__, place.filename, place.lineno)) not in faults:
                    faults[key] = "".join(traceback.format_exception(error))
                    print(f"FAULT of {reader.name}, seed {seed}:\n{faults[key]}", flush=True)
    print(f"{reader.name}: {tally.refused} refused, {tally.read} read, {len(faults)} faults", flush=True)
    return len(faults)


if __name__ == "__main__":
    sys.exit(main())

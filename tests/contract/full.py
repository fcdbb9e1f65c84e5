"""The full product of the engine's settings, for `tests/full.sh`: one line of JSON for each comparison."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.contract.compare import compare
from tests.contract.comparisons import EVERYTHING, Comparison, name_of, product
from tests.harness import close_pools


def part(share: str) -> Iterator[Comparison]:
    """Those of a share such as ``2/4``: the second of every four."""
    number, of = map(int, share.split("/"))
    yield from list(product(EVERYTHING))[number - 1 :: of]


def main(path: Path = Path("full_results.jsonl"), share: str = "1/1") -> int:
    """Run what the file does not hold yet; 1 if any comparison of it failed."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {record["case"] for record in records}
    for comparison in part(share):
        if name_of(comparison) in done:
            continue
        began = time.monotonic()
        try:
            record = compare(comparison)
        except AssertionError as error:  # a rank that failed, too
            record = {"passed": False, "error": str(error)[-2000:]}
        record = {"case": name_of(comparison), **record, "seconds": round(time.monotonic() - began, 1)}
        records.append(record)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(record["case"], "passed" if record["passed"] else "FAILED", flush=True)
    close_pools()
    failed = [record["case"] for record in records if not record["passed"]]
    print(f"{len(records)} cases, {len(failed)} failed", *failed, sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(*([Path(sys.argv[1])] if sys.argv[1:] else []), *sys.argv[2:]))

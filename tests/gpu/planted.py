"""A rank that answers as ``worker.py`` does and fails as it is asked to; it needs no torch."""

import json
import os
import sys
import time


def main() -> None:
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        fault = json.loads(line)["fault"] if os.environ["RANK"] == "1" else None
        if fault == "die":
            print("the last words", file=sys.stderr)
            os._exit(9)
        if fault == "hang":
            time.sleep(600)
        print(json.dumps({"error": "Error: planted"} if fault == "raise" else {"figures": []}), flush=True)


if __name__ == "__main__":
    main()

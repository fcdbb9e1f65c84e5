"""``tools/preflight.py`` on one host: the table, JSON, and the exit status of every rank."""

import json

from tests.distributed.launches import TINY, data_flags, launch
from tests.harness import ROOT

TOOL = ROOT / "tools" / "preflight.py"


def test_one_host(tmp_path):
    flags = [*TINY, "--train-iters", "4", *data_flags(tmp_path / "data"), "--save", str(tmp_path / "run")]
    done = launch([*flags, "--json"], num_procs=2, script=TOOL)
    assert done.process.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["passed"] and found["findings"] == []
    assert {"torch", "data", "free for checkpoints", "all-reduce in the host"} <= {
        r["check"] for r in found["rows"]
    }
    (tmp_path / "data" / "corpus.txt").unlink()
    done = launch(flags, num_procs=2, script=TOOL)
    assert done.process.returncode == 1
    [error] = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert ": data: cannot be read: " in error and f"{tmp_path}/data/corpus.txt" in error
    assert "hosts: 1; errors: 1; warnings: 0; seconds: " in done.stdout
    assert not (tmp_path / "run").exists()

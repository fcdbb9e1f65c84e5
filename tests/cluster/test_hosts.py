"""The hosts themselves: they reach each other by name, and die with who made them."""

import subprocess
import sys
from pathlib import Path

from tests.cluster.hosts import Cluster, need, wait_until
from tests.harness import ROOT

CREATES = """
import sys, time
from pathlib import Path
from tests.cluster.hosts import Cluster
with Cluster(1, Path(sys.argv[1])) as cluster:
    cluster.hosts[0].run("sh", "-c", "setsid sleep 600 >/dev/null 2>&1 &")
    print(cluster.hosts[0].first_pid, flush=True)
    time.sleep(600)
"""


def test_hosts_have_their_own_names_addresses_and_processes(tmp_path):
    need()
    with Cluster(2, tmp_path) as cluster:
        first, second = cluster.hosts
        assert second.run("hostname").strip() == "node-2" and second.run("hostname", "-I").split() == [
            second.address
        ]
        first.run("sh", "-c", "setsid sleep 600 >/dev/null 2>&1 &")
        wait_until(lambda: first.processes() == ["sleep 600"], "no process", seconds=10)
        assert second.processes() == []
        command = "import socket; print(socket.create_connection(('node-2', 22), 5))"
        refused = subprocess.run(
            first.command([sys.executable, "-c", command]), capture_output=True, text=True, check=False
        )
        assert "ConnectionRefusedError" in refused.stderr  # so the host is there


def test_not_even_a_killed_test_leaves_a_host(tmp_path):
    need()
    command = [sys.executable, "-c", CREATES, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as creator:
        first = Path(f"/proc/{creator.stdout.readline().strip()}")
        assert first.is_dir()
        creator.kill()
        wait_until(lambda: not first.is_dir(), "the host is there", seconds=10)

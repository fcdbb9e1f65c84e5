"""The check before a run, over hosts with real faults: it names the host and ends in time."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.cluster.hosts import DEVICE, Cluster, Host, need
from tests.cluster.trainings import SECONDS, environment
from tests.distributed.launches import TINY, data_flags, last_step
from tests.forked import Forked
from tests.harness import PRETRAIN, ROOT, free_port

PROGRAM = Path(__file__).with_name("preflight_on_host.py")
TOOL = ROOT / "tools" / "preflight.py"
LONGEST = 30  # seconds
PORTS = "32000-65000"  # among which a free one is chosen; a free port to meet at is below (tests.ports)


@dataclass
class Site:
    """Four hosts, their corpus, a folder that all share, and a full disk that all share."""

    cluster: Cluster
    folder: Path

    @property
    def hosts(self) -> list[Host]:
        return self.cluster.hosts

    def flags(self, save: Path, *more: str) -> list[str]:
        batch = ["--global-batch-size", "16", "--train-iters", "4"]
        return [*TINY, *batch, *data_flags(self.folder / "data"), "--save", str(save), *more]

    def start(
        self,
        program: Path,
        flags: list[str],
        *,
        hosts: int,
        slots: int = 1,
        faults: dict[str, dict] | None = None,
    ) -> tuple[list[int], list[str], list[str]]:
        """Run the program on hosts with ``faults`` to its end; status, output and errors of each rank."""
        size, port = hosts * slots, free_port()
        ranks = []
        try:
            for rank in range(size):
                host = self.hosts[rank // slots]
                env = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
                env |= {
                    "MASTER_ADDR": "node-1",
                    "LOCAL_RANK": str(rank % slots),
                    "LOCAL_WORLD_SIZE": str(slots),
                }
                words = [
                    str(host.first_pid),
                    json.dumps((faults or {}).get(host.name, {})),
                    str(program),
                    *flags,
                ]
                ranks.append(Forked(PROGRAM, words, num_procs=1, env=env, cwd=ROOT, port=0))
            statuses = [rank.wait(timeout=120) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        stdout, stderr = zip(*(rank.communicate() for rank in ranks), strict=True)
        return statuses, list(stdout), list(stderr)

    def check(self, save: Path, *, passes: bool, **options) -> dict:
        """What the tool finds on four hosts."""
        began = time.monotonic()
        statuses, stdout, stderr = self.start(
            TOOL, [*self.flags(save), "--json", "--wait", "100"], hosts=4, **options
        )
        seconds = time.monotonic() - began
        assert statuses == [0 if passes else 1] * len(statuses), stderr
        found = json.loads(stdout[0])
        assert "seconds" in found, found
        assert found["passed"] == passes and not any(stdout[1:]) and found["seconds"] < LONGEST
        print(f"{len(statuses)} ranks on 4 hosts: {seconds:.1f} s, of which checks {found['seconds']} s")
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    need()
    folder = tmp_path_factory.mktemp("preflight")
    for name in ("shared", "full", "other/numpy-1.0.dist-info"):
        (folder / name).mkdir(parents=True)
    package = folder / "other" / "numpy-1.0.dist-info" / "METADATA"
    package.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    disk = folder / "full"
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], check=True
    )  # before the hosts
    try:
        with Cluster(4, folder) as cluster:
            yield Site(cluster, folder)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def brief(found: dict) -> list[tuple[str, str, str]]:
    """Without links, which other work on this machine slows down."""
    rows = [(finding["level"], finding["host"], finding["row"]) for finding in found["findings"]]
    return sorted(row for row in rows if row[2] != "links")


def test_sound_hosts_pass(site):
    found = site.check(site.folder / "shared" / "run", passes=True, slots=2)
    rows = {(row["check"], row["value"]): (row["hosts"], row["verdict"]) for row in found["rows"]}
    everywhere = ["node-1", "node-2", "node-3", "node-4"], "ok"
    assert rows["connections", "to all hosts"] == everywhere
    assert rows["run folder", f"{site.folder}/shared/run shared"] == everywhere
    for name in ("inrank-megatron", "torch", "settings", "data", "clock", "all-reduce in the host", "links"):
        assert {host for row in found["rows"] if row["check"] == name for host in row["hosts"]} == {
            *everywhere[0]
        }
    assert "error" not in {row["verdict"] for row in found["rows"]}
    assert [*(site.folder / "shared").iterdir()] == []


def test_every_fault_names_its_host(site):
    """A package, a clock, a text and a folder that are not those of the other hosts."""
    save = site.folder / "shared"
    text = site.folder / "data" / "corpus.txt"
    site.flags(save)  # writes it
    other = site.folder / "other" / "corpus.txt"
    other.write_bytes(text.read_bytes()[::-1])  # of the same size
    site.hosts[2].run("mount", "--bind", str(other), str(text))
    site.hosts[3].run("mount", "-t", "tmpfs", "none", str(save))
    faults = {"node-2": {"clock": 5.0, "packages": str(site.folder / "other")}}
    try:
        found = site.check(save / "run", passes=False, faults=faults)
    finally:
        site.hosts[2].run("umount", str(text))
        site.hosts[3].run("umount", str(save))
    expected = [("error", "node-2", "numpy"), ("error", "node-3", "data"), ("error", "node-4", "run folder")]
    assert brief(found) == [*expected, ("warning", "node-2", "clock")]
    values = {finding["row"]: finding["value"] for finding in found["findings"]}
    assert values["numpy"] == "1.0" and values["clock"].startswith("+5.0 s")
    assert values["run folder"] == f"{save}/run of its own"


def test_a_full_disk(site):
    found = site.check(site.folder / "full" / "run", passes=False)
    assert brief(found) == [("error", f"node-{n}", "free for checkpoints") for n in range(1, 5)]


def test_a_firewall_that_opens_the_meeting_point_alone(site):
    """A process group would wait for its timeout, and say nothing."""
    rule = ["ipproto", "tcp", "sport", PORTS, "dport", PORTS, "blackhole"]
    site.hosts[2].run("ip", "rule", "add", *rule)
    try:
        found = site.check(site.folder / "shared" / "run", passes=False)
    finally:
        site.hosts[2].run("ip", "rule", "del", *rule)
    values = {
        finding["host"]: finding["value"] for finding in found["findings"] if finding["level"] == "error"
    }
    assert values["node-3"].startswith("not reached from hosts node-1, node-2, node-4 (")
    assert {finding["row"] for finding in found["findings"]} == {"connections"}


def test_a_slow_link(site):
    """10 Mbit/s, as a cable that has fallen back; a warning, which lets a run start."""
    site.hosts[3].run(*f"tc qdisc add dev {DEVICE} root tbf rate 10mbit burst 32kb latency 50ms".split())
    try:
        found = site.check(site.folder / "shared" / "run", passes=True)
    finally:
        site.hosts[3].run("tc", "qdisc", "del", "dev", DEVICE, "root")
    slow = next(finding for finding in found["findings"] if finding["row"] == "links")
    assert slow["host"] == "node-4" and slow["level"] == "warning"
    assert slow["value"].endswith("GB/s to hosts node-1, node-2, node-3")


def test_a_run_is_stopped_by_an_error_on_every_rank_and_not_by_a_warning(site):
    """Before its data are read; without the check it starts."""
    save = site.folder / "shared" / "run"
    faults = {"node-2": {"packages": str(site.folder / "other")}}
    statuses, _, stderr = site.start(PRETRAIN, site.flags(save), hosts=2, faults=faults)
    assert statuses == [1, 1] and not save.exists()
    for rank, told in enumerate(stderr):
        [line] = [line for line in told.splitlines() if "error" in line]
        assert line.startswith(
            f"rank {rank}: error: host node-2: numpy: 1.0: must be as on the other hosts (2."
        )
        assert line.endswith("--no-preflight starts without the check")
    faults = {"node-2": {"clock": 5.0}}
    statuses, stdout, stderr = site.start(PRETRAIN, site.flags(save), hosts=2, faults=faults)
    assert statuses == [0, 0], stderr
    assert last_step(save) == 4
    assert "warning: host node-2: clock: +5.0 s against the other hosts" in stdout[0]


def test_the_table_with_a_real_launcher(cluster, trainings):
    env = environment(cluster, 4, 1)
    flags = [
        *TINY,
        "--train-iters",
        "4",
        *data_flags(trainings / "data"),
        "--save",
        str(trainings / "checked"),
    ]
    start = f"source .venv/bin/activate; exec deepspeed --hostfile {env['HOSTFILE']} --master_addr node-1"
    line = f"{start} --master_port {env['MASTER_PORT']} {TOOL} {' '.join(flags)}"
    began = time.monotonic()
    command = cluster.hosts[0].command(["bash", "-c", line])
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=SECONDS, check=False)
    told = done.stdout + done.stderr
    print(f"deepspeed with pdsh on 4 hosts: {time.monotonic() - began:.1f} s")
    assert done.returncode == 0, told
    [torch] = [line for line in told.splitlines() if " torch " in line]
    assert torch.split()[1:] == ["torch", "all", "4", version("torch"), "ok"]
    assert "hosts: 4; errors: 0; warnings: " in told

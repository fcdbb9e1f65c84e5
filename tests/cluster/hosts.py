"""Hosts on one machine: each has its own network, name, processes and mounts, and a bridge joins them.

A host is a set of namespaces that its first process holds. It dies with the process that made it, and then
the kernel ends all that runs on the host and removes its network and its mounts.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.harness import ROOT

# Program -> the package of Debian that has it.
PROGRAMS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "iptables": "iptables",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "mpirun": "openmpi-bin",
}
INSTALL = "apt-get install -y --no-install-recommends " + " ".join(dict.fromkeys(PROGRAMS.values()))
ADDRESS = "10.77.0.{}"
DEVICE = "eth0"
# Of the daemons: below what outgoing connections are given.
_NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
# A shell reaps the orphans of its host.
_FIRST_PROCESS = "hostname {name}; ip link set lo up; echo ready; sleep infinity & wait"


def need(*programs: str) -> None:
    """Skip the test where namespaces cannot be made or a program is missing; fail there in CI."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in ("ip", *programs) if shutil.which(name, path=path) is None]
    if os.geteuid() == 0 and not missing:
        return
    reason = f"needs root, and {INSTALL} (missing here: {', '.join(missing) or 'root'})"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class Host:
    """One host; it is there from the construction to :meth:`kill`."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        # The signal at the parent's death survives the exec, so that not even a killed test leaves a host.
        first = ["sh", "-c", _FIRST_PROCESS.format(name=name)]
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES, *first]
        self._holder = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True, stdin=subprocess.DEVNULL
        )
        assert self._holder.stdout.readline() == "ready\n", f"no namespaces: {' '.join(command)}"
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        self.first_pid = int(children.read_text())

    def command(self, words: Sequence[str]) -> list[str]:
        """The command that runs ``words`` on this host, in the checkout."""
        enter = ["nsenter", f"--target={self.first_pid}", "--net", "--uts", "--mount", "--pid"]
        return [*enter, f"--wdns={ROOT}", "--", *words]

    def run(self, *words: str, env: Mapping[str, str] | None = None, timeout: float = 60) -> str:
        """Run a command to its end and return its output. CalledProcessError for another status than 0."""
        done = subprocess.run(
            self.command(words), capture_output=True, text=True, timeout=timeout, env=env, check=False
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
        return done.stdout

    def processes(self) -> list[str]:
        """Command lines of all that runs here, zombies and the first process and its sleep excepted."""
        found = []
        for folder in Path("/proc", str(self.first_pid), "root", "proc").glob("[0-9]*"):
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
            if line and folder.name != "1" and line != "sleep infinity":
                found.append(line)
        return found

    def sent(self, device: str = DEVICE) -> int:
        """Bytes that the interface has sent, with the headers of Ethernet, IP and TCP."""
        [link] = json.loads(self.run("ip", "-s", "-j", "link", "show", device))
        return link["stats64"]["tx"]["bytes"]

    def set_cable(self, state: str) -> None:
        """``up`` or ``down``."""
        self.run("ip", "link", "set", DEVICE, state)

    def is_there(self) -> bool:
        return self._holder.poll() is None

    def kill(self) -> None:
        """The host vanishes, without a word to its peers."""
        self._holder.kill()
        self._holder.wait()


class Cluster:
    """Hosts ``node-1`` and so on, which reach each other by name; a context manager.

    Args:
        mounts: folder or file of this machine -> where all hosts see it in place of theirs.
    """

    def __init__(self, size: int, folder: Path, *, mounts: Mapping[Path, str] | None = None) -> None:
        self.folder, self.hosts = folder, []
        self._mounts = dict(mounts or {})
        self._switch: Host | None = None
        self._size = size

    def __enter__(self) -> "Cluster":
        try:
            self._switch = Host("switch", "")
            self._switch.run("ip", "link", "add", "bridge", "type", "bridge")
            self._switch.run("ip", "link", "set", "bridge", "up")
            names = self.folder / "hosts"
            lines = [f"{ADDRESS.format(n)} node-{n}" for n in range(1, self._size + 1)]
            names.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
            self._mounts = {names: "/etc/hosts", **self._mounts}
            for number in range(1, self._size + 1):
                self._add(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for host in [*self.hosts, *filter(None, [self._switch])]:
            host.kill()

    def replace(self, index: int) -> None:
        """A new host takes the place of one that was killed, with its name and address."""
        # What the old one still had to send keeps its network alive for minutes.
        self._switch.run("ip", "link", "del", f"port-{index + 1}")
        self.hosts[index : index + 1] = []
        self._add(index + 1)

    def _add(self, number: int) -> None:
        host = Host(f"node-{number}", ADDRESS.format(number))
        self.hosts.insert(number - 1, host)
        # Its card keeps the address: the others would look for a host that was replaced at the former one.
        near = [DEVICE, "address", f"02:00:00:00:00:{number:02x}", "netns", str(host.first_pid)]
        far = [f"port-{number}", "netns", str(self._switch.first_pid)]
        cable = ["ip", "link", "add", *near, "type", "veth", "peer", "name", *far]
        subprocess.run(cable, check=True, capture_output=True)
        self._switch.run("ip", "link", "set", f"port-{number}", "master", "bridge", "up")
        host.run("ip", "addr", "add", f"{host.address}/24", "dev", DEVICE)
        host.run("ip", "link", "set", DEVICE, "up")
        host.run("mount", "-t", "tmpfs", "run", "/run")
        for source, target in self._mounts.items():
            host.run("mount", "--bind", str(source), target)


def wait_until(condition, what: str, *, seconds: float) -> None:
    """Poll; AssertionError with ``what()`` or ``what`` when the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what() if callable(what) else what}"
        time.sleep(0.05)


def end_group(process: subprocess.Popen) -> None:
    """Kill a command that was started in a session of its own, with its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

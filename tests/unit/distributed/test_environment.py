"""What containers and shells leave out is supplied, and what is there stays."""

import getpass
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from inrank_megatron.distributed.environment import complete
from tests.harness import ROOT

CACHES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_HOME")


@pytest.fixture
def env(monkeypatch, tmp_path):
    """The environment of a user whose id has no name, and who has no home."""
    names = {"LOGNAME", "USER", "LNAME", "USERNAME", *CACHES}
    env = {name: value for name, value in os.environ.items() if name not in names} | {"HOME": "/"}
    monkeypatch.setattr(os, "environ", env)
    monkeypatch.setattr(os, "getuid", lambda: 3_000_000_000)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != Path("/"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return env


def test_a_user_without_a_name(env):
    """Libraries ask for it, to name a cache, and fail with a KeyError."""
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    complete()
    assert getpass.getuser() == "uid3000000000"


def test_a_name_stays(env):
    env["USER"] = "somebody"
    complete()
    assert getpass.getuser() == "somebody"


@pytest.mark.parametrize("home", ["/", "/no/such/folder", "not/absolute"])
def test_without_a_home_caches_go_to_the_temporary_folder(env, tmp_path, home):
    env |= {"HOME": home, "XDG_CACHE_HOME": "mine"}
    complete()
    lent = Path(env["TRITON_HOME"])
    assert lent.is_dir() and lent.parent == tmp_path and lent.stat().st_mode & 0o777 == 0o700
    assert env["XDG_CACHE_HOME"] == "mine" and env["XDG_CONFIG_HOME"] == str(lent)


def test_a_home_stays(env, tmp_path):
    env["HOME"] = str(tmp_path)
    complete()
    assert not env.keys() & set(CACHES)


CLOSED = """
import os, sys
from inrank_megatron.distributed.environment import complete

complete()
opened = open(sys.argv[1], "w")
print("lost")
print("lost too", file=sys.stderr)
sys.stdout.flush()
assert opened.fileno() > 2 and sys.stdin.read() == ""
opened.write("kept")
"""


def test_closed_streams_lead_nowhere(tmp_path):
    """Without them the records of a run got the number of standard output, and what was printed."""
    command = f"exec {sys.executable} -c '{CLOSED}' {tmp_path / 'file'} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=ROOT, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == "kept"


PRINTS = """
import sys
from inrank_megatron.distributed.environment import complete
complete()
for stream in (sys.stdout, sys.stderr):
    print("a line", file=stream)
"""


def test_lines_of_several_processes_do_not_mix():
    """A pipe of packets, which has what one write has sent in one."""
    reads, writes = os.pipe2(os.O_DIRECT)
    subprocess.run([sys.executable, "-u", "-c", PRINTS], cwd=ROOT, stdout=writes, stderr=writes, check=True)
    os.close(writes)
    assert [os.read(reads, 100) for _ in range(3)] == [b"a line\n", b"a line\n", b""]


IMPORTS = """
from inrank_megatron.distributed.environment import complete
complete()
import logging, peft
logging.getLogger("torchao").warning("said")
"""


def test_what_torchao_says_of_itself_is_no_line_and_the_rest_stays():
    """A tool that reads a model of transformers imports it before any other part of the project."""
    pytest.importorskip("torchao")
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "said\n")


COMPLETES = "from inrank_megatron.distributed.environment import complete; complete()"


def test_a_character_that_the_output_lacks_is_written_as_its_number():
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    code = f"{COMPLETES}; print('r\u00e9sum\u00e9')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, check=True)
    assert done.stdout == rb"r\xe9sum\xe9" + b"\n"


def test_arguments_that_are_no_text():
    """Libraries would fail on such a name when the first checkpoint is saved."""
    done = subprocess.run(
        [sys.executable, "-c", COMPLETES, b"run\xff"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: 'run\\udcff': is not UTF-8 text")


def test_a_working_directory_that_is_gone(tmp_path):
    (gone := tmp_path / "gone").mkdir()
    command = [sys.executable, "-c", f"import os; os.rmdir({str(gone)!r}); {COMPLETES}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=gone, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "error: the working directory: No such file or directory; change to a folder" in done.stderr

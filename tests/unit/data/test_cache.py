"""A cache serves other users, other machines and read-only mounts, and notices every change."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inrank_megatron.config.schema import DataConfig
from inrank_megatron.data import building, cache
from inrank_megatron.data.building import ABANDONED_SECONDS
from inrank_megatron.data.cache import ALWAYS_READ, FileHashes, file_sha256
from inrank_megatron.data.prepare import prepare
from inrank_megatron.errors import UserError
from tests.unit.data.children import as_nobody, in_child, mounted, readable_by_all
from tests.unit.data.texts import prose


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text(prose(20000, seed=1))
    assert (tmp_path / "corpus.txt").stat().st_size > ALWAYS_READ
    return tmp_path / "corpus.txt"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are old enough at once to be remembered."""
    monkeypatch.setattr(cache, "SETTLED_NS", -(10**9))


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder whose parents everybody may enter."""
    folder = Path(tempfile.mkdtemp(prefix="cache-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def change_in_place(path: Path) -> None:
    """Another content of the same size in the same file, with the time stamps of the old one."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


@pytest.mark.parametrize("size", [100, 2 * ALWAYS_READ])
def test_a_change_that_keeps_size_and_time_is_noticed(tmp_path: Path, settled: None, size: int) -> None:
    """As rsync -t, cp -p or git leave it."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    FileHashes(tmp_path / "hashes").sha256(path)
    change_in_place(path)
    assert FileHashes(tmp_path / "hashes").sha256(path) == file_sha256(path)


def test_other_content_of_the_same_size_and_time_is_other_data(settings, corpus: Path, settled: None) -> None:
    made = prepare(settings(data_path=[corpus]))
    change_in_place(corpus)
    assert prepare(settings(data_path=[corpus])).folder != made.folder


def test_a_large_file_is_read_once_unless_it_changed_just_now(tmp_path: Path, settled: None) -> None:
    path = tmp_path / "cache" / "file"
    path.parent.mkdir()
    path.write_bytes(bytes(2 * ALWAYS_READ))
    FileHashes(tmp_path / "cache" / "hashes").sha256(path)
    [note] = (tmp_path / "cache" / "hashes").iterdir()
    note.write_text(json.dumps(json.loads(note.read_text()) | {"sha256": "remembered"}))
    assert FileHashes(tmp_path / "cache" / "hashes").sha256(path) == "remembered"
    (tmp_path / "cache").rename(tmp_path / "moved")  # as a mount in another place
    assert FileHashes(tmp_path / "moved" / "hashes").sha256(tmp_path / "moved" / "file") == "remembered"
    note = tmp_path / "moved" / "hashes" / note.name
    for damaged in ("", "[]", '{"stamp": 3}', "\0" * 100):
        note.write_text(damaged)
        assert FileHashes(tmp_path / "moved" / "hashes").sha256(tmp_path / "moved" / "file") != "remembered"


def test_a_file_of_this_moment_is_not_remembered(tmp_path: Path) -> None:
    """A second change within the same tick of a coarse clock leaves the same time stamps."""
    (tmp_path / "file").write_bytes(bytes(2 * ALWAYS_READ))
    FileHashes(tmp_path / "hashes").sha256(tmp_path / "file")
    assert not list((tmp_path / "hashes").iterdir())


@pytest.mark.parametrize("stage", ["training the tokenizer", "tokenizing", "checking"])
def test_text_that_changes_while_it_is_read_is_refused(settings, corpus: Path, stage: str) -> None:
    config = settings(data_path=[corpus])

    def append(now: str, _tokens: int | None) -> None:
        if now.startswith(stage):
            with corpus.open("a") as stream:
                stream.write("one more line\n")

    with pytest.raises(UserError, match=r"corpus.txt changed while it was read; wait until nothing writes"):
        prepare(config, progress=append)
    entries = {path.suffix for path in Path(config.data_cache_path).iterdir() if path.name != "hashes"}
    assert entries == {".lock"}


def outcome(config: DataConfig) -> tuple[str, int, bool]:
    """Key and first tokens of the data, and whether they were made; or the refusal."""
    stages: list[str] = []
    try:
        data = prepare(config, progress=lambda stage, _: stages.append(stage))
    except UserError as error:
        return str(error), 0, False
    return data.folder.name, int(data.train[0][0].tokens(0, 100).sum()), bool(stages)


@pytest.mark.parametrize("hashes", ["kept", "gone"])
def test_complete_cache_on_a_read_only_mount_is_used(
    settings, corpus: Path, settled: None, hashes: str
) -> None:
    config = settings(data_path=[corpus])
    folder = Path(config.data_cache_path)
    key, tokens, made = outcome(config)
    assert made
    if hashes == "gone":
        for path in (*folder.glob("*.lock"), *folder.glob("hashes/*")):
            path.unlink()
        (folder / "hashes").rmdir()

    def work() -> tuple[object, object]:
        mounted("--bind", "-o", "ro", folder, folder)
        return outcome(config), outcome(config.model_copy(update={"vocab_size": 290}))

    whole, missing = in_child(work)
    assert whole == (key, tokens, False)
    assert "Read-only file system" in missing[0]
    assert "choose another --data-cache-path" in missing[0]
    assert (folder / "hashes").exists() == (hashes == "kept")


def test_complete_cache_of_another_user_is_used(public: Path, settled: None) -> None:
    (public / "corpus.txt").write_text(prose(20000, seed=1))
    config = DataConfig(data_path=[f"{public}/corpus.txt"], vocab_size=300, data_cache_path=f"{public}/cache")
    key, tokens, _ = outcome(config)
    readable_by_all(public)

    def work() -> tuple[object, object]:
        as_nobody()
        return outcome(config), outcome(config.model_copy(update={"vocab_size": 290}))

    for path in (public, *public.rglob("*")):  # a user is refused by the bits of his own files too
        path.chmod(path.stat().st_mode & ~0o222)
    whole, missing = in_child(work)
    assert whole == (key, tokens, False)
    assert "Permission denied" in missing[0]
    assert "choose another --data-cache-path" in missing[0]


def test_users_share_a_folder_that_all_may_write(public: Path) -> None:
    """The second may only read the lock files of the first, and makes what is missing."""
    (public / "corpus.txt").write_text(prose(20000, seed=1))
    config = DataConfig(data_path=[f"{public}/corpus.txt"], vocab_size=300, data_cache_path=f"{public}/cache")
    outcome(config)
    readable_by_all(public)
    (public / "cache").chmod(0o1777)

    def work() -> tuple[object, object]:
        as_nobody()
        other = config.model_copy(update={"vocab_size": 290})
        return outcome(other), outcome(other)

    made, found = in_child(work)
    assert (made[2], found[2]) == (True, False)
    assert made[:2] == found[:2]


def test_text_that_may_not_be_read_is_refused(public: Path) -> None:
    (public / "corpus.txt").write_text(prose(200, seed=1))
    (public / "corpus.txt").chmod(0)
    (public / "cache").mkdir(mode=0o777)
    (public / "cache").chmod(0o777)
    config = DataConfig(data_path=[f"{public}/corpus.txt"], vocab_size=300, data_cache_path=f"{public}/cache")

    def work() -> object:
        as_nobody()
        return outcome(config)

    message, *_ = in_child(work)
    assert "corpus.txt" in message
    assert "its files must be readable" in message


def test_a_full_disk_leaves_nothing(settings, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()

    def work() -> tuple[object, object]:
        mounted("-t", "tmpfs", "-o", "size=64k", "none", tmp_path / "disk")
        config = settings(data_path=[corpus], data_cache_path=f"{tmp_path}/disk/cache")
        return outcome(config), [path.suffix for path in (tmp_path / "disk" / "cache").glob("*.*")]

    (message, *_), left = in_child(work)
    assert "No space left on device" in message
    assert "make room there or choose another --data-cache-path" in message
    assert set(left) == {".lock"}


def test_two_builders_without_locks_use_the_same_folder(
    settings, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system without them: both build, the first to end publishes, both use that."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(building.fcntl, "flock", no_locks)
    config = settings(data_path=[corpus])
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2, timeout=60)

    def build() -> tuple[str, int]:
        def progress(stage: str, _tokens: int | None) -> None:
            if stage.startswith("checking"):
                barrier.wait()

        data = prepare(config, progress=progress)
        return data.folder.name, int(data.train[0][0].tokens(0, 100).sum())

    results = context.Queue()
    other = context.Process(target=lambda: results.put(build()))
    other.start()
    own = build()
    assert results.get(timeout=60) == own
    other.join()
    assert not list(Path(config.data_cache_path).glob("*.partial"))


def test_leftovers_of_a_killed_builder_are_removed(tmp_path: Path) -> None:
    """It goes when its builder is dead; that of another machine, whose locks are unseen here, by its age."""
    final = tmp_path / "key"
    own, dead, young, old = (building._unique(final) for _ in range(4))
    for folder in (own, dead):
        folder.mkdir()
    machine = building._machine()
    young, old = (path.with_name(path.name.replace(machine, "other")) for path in (young, old))
    for folder in (young, old):
        folder.mkdir()
        (folder / "train-00.bin").touch()
    for path in (old / "train-00.bin", old):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - ABANDONED_SECONDS - 60))
    descriptor = os.open(own, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with building.building(final) as partial:
            (partial / "content").touch()
    finally:
        os.close(descriptor)
    assert sorted(tmp_path.iterdir()) == sorted([final, own, young])


def test_the_first_to_publish_stays(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with building.building(tmp_path / "key") as partial:
            (partial / "content").write_text(content)
    assert (tmp_path / "key" / "content").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


FOLDERS: dict[str, Callable[[Path], object]] = {
    "a file": lambda path: path.touch(),
    "a file on the way": lambda path: path.parent.touch(),
    "a broken link": lambda path: (path.parent.mkdir(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_cache_path_that_is_not_a_folder_is_refused(
    settings, corpus: Path, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "way" / "cache"
    if kind == "a file":
        path.parent.mkdir()
    FOLDERS[kind](path)
    with pytest.raises(UserError, match=r"is a file or a broken link, not a folder; choose another --data-c"):
        prepare(settings(data_path=[corpus], data_cache_path=str(path)))


def test_cache_path_may_have_spaces_and_umlauts(settings, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "ein Ordner" / "für Tökens"
    assert prepare(settings(data_path=[corpus], data_cache_path=str(path))).folder.parent == path

"""Pointers of large-file storage: the small texts that a clone without its large files has in their place."""

from pathlib import Path

from inrank_megatron.errors import UserError

LARGEST_POINTER = 1024  # bytes; Git LFS's own limit
# What such a file begins with: whose pointer it is, and the command that fetches the file itself.
POINTERS = {
    b"version https://git-lfs.github.com/spec/": ("a Git LFS pointer", "git lfs pull"),
    b"version https://hawser.github.com/spec/": ("a Git LFS pointer", "git lfs pull"),
    b"/annex/objects/": ("a git-annex pointer", "git annex get"),
    b"# xet version ": ("a Xet pointer", "git xet checkout"),
}


def refuse_pointer(path: Path) -> None:
    """Raises UserError if the file, of any format, is a pointer in the place of its content.

    A path that is missing, no plain file or not readable is none; its reader says what is wrong with it.
    """
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_POINTER:
            return
        with open(path, "rb") as stream:
            content = stream.read(LARGEST_POINTER)
    except OSError:
        return
    for start, (kind, command) in POINTERS.items():
        if content.startswith(start):
            raise UserError(f"{path}: is {kind}, not the file itself; fetch it with `{command}`")

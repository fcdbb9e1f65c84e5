"""What the libraries expect around a process and containers, batch systems and shells may leave out."""

import io
import logging
import os
import pwd
import sys
import tempfile
from pathlib import Path

_USER_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # where Python looks before it asks the system
# Remarks of torchao, which transformers imports by way of peft where it is installed: of extensions for CUDA
# and other versions of Python, and of how it calls torch. By logger, the start of each.
_REMARKS = {"torchao": "Failed to load", "torch.utils._pytree": "<enum"}


def complete() -> None:
    """Call it first of all, before a library looks around: it supplies what is missing, and silences what a
    library says while it is imported.

    What cannot be supplied ends the process with one line: arguments that are UTF-8, and a working directory.
    """
    _open_streams()
    _write_whole_lines()
    _silence_imports()
    _write_any_text()
    _lend_name()
    _lend_home()
    _refuse_bytes(sys.argv[1:])
    _refuse_no_directory()


def _open_streams() -> None:
    """Standard streams that the shell has closed (``>&-``) lead nowhere: else the next file that is opened
    takes the number of one, and what is printed lands in it.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(opened, True)
            setattr(sys, name, open(number, mode))  # noqa: SIM115 - it stays open


def _write_whole_lines() -> None:
    """Under ``python -u``, which is how DeepSpeed starts ranks, `print` would write a line and its end apart,
    and the line of another rank may come between them.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.write_through:
            stream.reconfigure(write_through=False, line_buffering=True)


def _silence_imports() -> None:
    for logger in _REMARKS:
        logging.getLogger(logger).addFilter(_is_worth_a_line)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_REMARKS[record.name])


def _write_any_text() -> None:
    """A character that the encoding of an output lacks, as of a path or of a model's text in ASCII, is
    written as its number: it would end a run in the middle.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _lend_name() -> None:
    """A user id without an entry in the system's list (``docker run --user 12345``) has a name too."""
    if any(os.environ.get(name) for name in _USER_NAMES):
        return
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ["LOGNAME"] = f"uid{os.getuid()}"


def _lend_home() -> None:
    """Without a home folder that can be written the libraries keep their caches in the temporary one."""
    if _can_be_written(Path(os.path.expanduser("~"))):
        return
    folder = Path(tempfile.gettempdir()) / f"inrank-megatron-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():  # another user's, who could put anything there
            folder = Path(tempfile.mkdtemp(prefix="inrank-megatron-"))
    except OSError:
        return  # nothing can be written at all, which the run itself says of its own folders
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_HOME"):
        os.environ.setdefault(name, str(folder))


def _refuse_bytes(arguments: list[str]) -> None:
    """The libraries that write checkpoints and tokenizers take names in UTF-8 alone, and fail at the end."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            sys.exit(
                f"error: {argument!r}: is not UTF-8 text, as arguments must be; rename the file, or set "
                "LC_ALL=C.UTF-8 if the name is right"
            )


def _refuse_no_directory() -> None:
    """Libraries look for files in it when they are imported."""
    try:
        os.getcwd()
    except OSError as error:
        sys.exit(f"error: the working directory: {error.strerror}; change to a folder that exists")


def _can_be_written(home: Path) -> bool:
    return home.is_absolute() and home.is_dir() and os.access(home, os.W_OK | os.X_OK)

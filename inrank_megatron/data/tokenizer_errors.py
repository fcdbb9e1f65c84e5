"""What the tokenizer libraries raise, and what they write on their way, made fit for a user."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from inrank_megatron.errors import UserError


@contextmanager
def library_errors(name: str, what: str) -> Iterator[None]:
    """Whatever the libraries raise, a panic of Rust code too, becomes one line: the tokenizer ``what``."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic derives from nothing narrower
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"tokenizer {name} {what} ({type(error).__name__}: {reason}); give complete files"
        ) from error


@contextmanager
def muted() -> Iterator[None]:
    """Without standard error, to which Rust writes its stack before a panic can be caught."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)

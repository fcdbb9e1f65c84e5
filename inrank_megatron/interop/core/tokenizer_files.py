"""A model's tokenizer: from one folder to another, in a form that transformers and runs read."""

import shutil
from pathlib import Path

from inrank_megatron.data.tokenizer import load_tokenizer
from inrank_megatron.data.tokenizer_folder import FILES, FURTHER
from inrank_megatron.errors import UserError

NAMES = (*FILES, *FURTHER, "chat_template.jinja")


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` has a tokenizer that can be read here, maybe among other files."""
    return any(all((folder / name).is_file() for name in names) for names in ((FILES[0],), FILES[2:]))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Bring the tokenizer's files, and no others, into the folder ``target``, which is made if absent.

    Raises:
        UserError: the tokenizer cannot be read or has no end-of-text token.
    """
    tokenizer = load_tokenizer(str(source))
    target.mkdir(parents=True, exist_ok=True)
    copied = [name for name in NAMES if (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, target / name)
    if not all(name in copied for name in FILES[:2]) or not _is(tokenizer.identity, target):
        # What the files mean may depend on the model next to them, and that of the target is another one.
        for name in copied:
            (target / name).unlink()
        tokenizer.save(target)


def _is(identity: str, folder: Path) -> bool:
    try:
        return load_tokenizer(str(folder)).identity == identity
    except UserError:
        return False

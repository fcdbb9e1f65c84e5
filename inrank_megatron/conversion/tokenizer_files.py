"""A model's tokenizer: from one folder to another, in a form that transformers and runs read."""

import shutil
from pathlib import Path

from inrank_megatron.data.tokenizer import FILES, load_tokenizer

NAMES = (*FILES, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer that can be read here lies in ``folder``, maybe among other files."""
    return any(all((folder / name).is_file() for name in names) for names in ((FILES[0],), FILES[2:]))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Bring the tokenizer's files, and no others, into the folder ``target``, which is made if absent.

    Raises:
        UserError: the tokenizer cannot be read or has no end-of-text token.
    """
    tokenizer = load_tokenizer(str(source))
    if not all((source / name).is_file() for name in FILES[:2]):
        # A vocabulary alone is read as another kind of tokenizer by some models.
        tokenizer.save(target)
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)

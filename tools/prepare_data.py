"""Make the token files of a text before training. The flags are the data flags of training.

Example: ``python tools/prepare_data.py --data-path corpus.jsonl --tokenizer gpt2``. Without a source, the
text is the English documentation that comes with Python. Training with the same flags finds the files.
"""

import argparse
import sys
import warnings
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from inrank_megatron.config.flags import Parser, kebab
from inrank_megatron.config.schema import DataConfig
from inrank_megatron.distributed.environment import complete
from inrank_megatron.distributed.launcher import refuse_ranks
from inrank_megatron.errors import UserError
from inrank_megatron.reporting.stages import shown


def main(argv: list[str]) -> int:
    """Prepare and print; the exit status is 0, or 1 after one line about what the user can correct."""
    complete()
    # Megatron-Core mentions optional packages when it is imported
    warnings.filterwarnings("ignore", message="(Transformer Engine and Apex are|Apex is) not installed")
    console = Console()
    try:
        data = settings(argv)
        refuse_ranks("prepare_data.py")
        # Imported after the arguments were checked: Megatron-Core takes seconds, half of them for what the
        # patch leaves out.
        from inrank_megatron_patches import megatron_wandb

        megatron_wandb.apply()
        from inrank_megatron.data.prepare import prepare

        with shown(console) as progress:
            prepared = prepare(data, progress=progress)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table = Table("split", "tokens", "documents", "words")
    for split, counts in prepared.meta["splits"].items():
        numbers = (counts[name] for name in ("tokens", "documents", "words"))
        table.add_row(split, *("unknown" if number is None else f"{number:,}" for number in numbers))
    console.print(table)
    console.print(f"vocabulary: {prepared.tokenizer.vocab_size:,} tokens", highlight=False)
    console.print(f"token files: {prepared.folder}", highlight=False, soft_wrap=True)
    for note in prepared.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    return 0


def settings(argv: list[str]) -> DataConfig:
    """The data section from flags; raises UserError for a value of the wrong kind."""
    parser = Parser(prog="prepare_data.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, field in DataConfig.model_fields.items():
        several: dict[str, Any] = (
            {"nargs": "+"} if name.endswith("_path") and name != "data_cache_path" else {}
        )
        kind: dict[str, Any] = {"type": int} if name == "vocab_size" else {}
        kind |= {"action": argparse.BooleanOptionalAction} if field.annotation is bool else {}
        shown_default = "" if field.default is None else f" [{field.default}]"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            help=f"{field.description}{shown_default}",
            **several,
            **kind,
        )
    try:
        return DataConfig(**vars(parser.parse_args([kebab(word) for word in argv])))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{first['loc'][0]} = {first['input']!r}: {first['msg']}; --help lists the flags"
        ) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

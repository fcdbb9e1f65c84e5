"""The flags of a run, generated from the schema: a setting's name, type, default and line of help."""

import argparse
import functools
import sys
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from inrank_megatron.config.devices import DEVICES
from inrank_megatron.config.loading import PRESETS, SIZES, nearest, sections
from inrank_megatron.distributed.launcher import launcher_ranks
from inrank_megatron.lowrank.methods.inrank import InRankEfficient

MOST_WORDS = 90
"""Characters of a flag's possible values in the help."""


class Parser(argparse.ArgumentParser):
    """One line for a mistake, not the whole usage: every process of a job prints it."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; --help lists all flags", file=sys.stderr)
        raise SystemExit(2)

    def print_help(self, file=None) -> None:
        """Once in a job."""
        if launcher_ranks()[0] == 0:
            super().print_help(file)


def build_parser() -> argparse.ArgumentParser:
    """All flags: those of the launch, then one group for each section of the schema."""
    parser = Parser(
        prog="pretrain_gpt2.py",
        usage="deepspeed launch/%(prog)s [--inrank] [--config FILE.yaml] [flags]",
        description="Pre-trains GPT-2 or LLaMA, with InRank, another low-rank method, or dense. Flags and "
        "keys of the file have the same names; flags replace the file's values.",
        epilog="Sizes that are left out come from --model-preset: "
        + "; ".join(" ".join([name, *(str(sizes[key]) for key in SIZES)]) for name, sizes in PRESETS.items())
        + f" ({', '.join(SIZES)}).",
        allow_abbrev=False,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=36),
    )
    launch = parser.add_argument_group("launch")
    launch.add_argument(
        "--config", metavar="FILE.yaml", help="file with settings of the run [configs/quickstart.yaml]"
    )
    launch.add_argument("--inrank", action="store_true", help=f"short for --method {InRankEfficient.name}")
    launch.add_argument(
        "--dry-run", action="store_true", help="check the settings and print the plan; train nothing"
    )
    launch.add_argument(
        "--cluster",
        metavar="[NODESx]NxDEVICE|FILE.yaml",
        help=f"machines to plan for, with --dry-run: {', '.join(DEVICES)}, or described in a file",
    )
    launch.add_argument(
        "--deepspeed", action="store_true", help="has no effect: DeepSpeed runs every training"
    )
    launch.add_argument("--deepspeed-config", metavar="FILE.json", help="more settings for DeepSpeed")
    launch.add_argument("--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    for name, model in sections().items():
        group = parser.add_argument_group(name, model.__doc__)
        for field, info in model.model_fields.items():
            _add(group, field, info)
    return parser


def _add(group: argparse._ArgumentGroup, field: str, info: FieldInfo) -> None:
    kinds = _kinds(info.annotation)
    shown = "" if info.is_required() or info.default is None else f" [{info.default}]"
    options: dict[str, Any] = {
        "dest": field,
        "default": argparse.SUPPRESS,
        "help": f"{info.description}{shown}",
    }
    if bool in kinds:
        options["action"] = argparse.BooleanOptionalAction
    elif list in kinds:
        options |= {"nargs": "+", "metavar": "PATH"}
    else:
        options |= {"type": _reader(kinds), "metavar": _metavar(kinds)}
    group.add_argument("--" + field.replace("_", "-"), **options)


def _kinds(annotation: Any) -> list[Any]:
    """The types and literal words that a field allows: `Count | Literal["auto"] | None` -> int, "auto"."""
    origin = get_origin(annotation)
    if origin is Literal:
        return list(get_args(annotation))
    if origin is list:
        return [list]
    if origin in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    if hasattr(annotation, "__metadata__"):
        return _kinds(annotation.__origin__)
    return [] if annotation is type(None) else [annotation]


def _metavar(kinds: list[Any]) -> str:
    names = {int: "N", float: "X", str: "TEXT"}
    shown = "|".join(names.get(kind, str(kind)) for kind in kinds)
    return shown if len(shown) <= MOST_WORDS else "NAME"  # the presets, which the end of the help lists


def _reader(kinds: list[Any]) -> Any:
    """Text of a flag -> value. What is not a number stays text: the schema's message says what is wrong."""

    def read(text: str) -> Any:
        try:
            return int(text) if int in kinds else text
        except ValueError:
            return text

    return read


def kebab(word: str) -> str:
    """`--seq_length=64` -> `--seq-length=64`."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def unknown_flags(words: list[str], parser: argparse.ArgumentParser) -> str:
    if "--" in words:  # what follows it would be no flag, whatever its name
        return "--: this command takes the flags of a run directly; leave the -- out"
    names = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not names:
        return f"{' '.join(words)}: no flag comes before it; settings are given as --name value"
    options = [option for action in parser._actions for option in action.option_strings]
    return "; ".join(f"{name}: no such flag{nearest(name, options)}" for name in names)

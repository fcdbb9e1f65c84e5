"""Writes ``docs/reference/settings.md`` and ``command_line.md`` from the schema and the programs' own help.

``python docs/scripts/reference.py`` writes both; a test fails while either is out of date.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from inrank_megatron.benchmarks.command import NOTES as BENCHMARKS
from inrank_megatron.benchmarks.command import _parse as parse_bench
from inrank_megatron.config.flags import build_parser
from inrank_megatron.config.loading import PRESETS, SIZES, sections
from inrank_megatron.experiments.command import _parse as parse_reproduce
from inrank_megatron.experiments.registry import EXPERIMENTS
from inrank_megatron.lowrank.methods.growing_rank import INRANK_PRESETS
from inrank_megatron.lowrank.methods.registry import METHODS, idle_settings
from inrank_megatron_tools import (
    convert_checkpoint,
    evaluate,
    generate,
    inspect_ranks,
    plan,
    preflight,
    prepare_data,
    report,
    sweep,
)

REFERENCE = Path(__file__).parents[1] / "reference"
HELP_WIDTH = "100"
GENERATED = "<!-- Written by `python docs/scripts/reference.py`; change the schema, not this page. -->"
TITLES = {
    "model": "Model",
    "parallel": "Processes and ZeRO",
    "optimizer": "Optimizer and learning rate",
    "training": "Method, batch, evaluation, saving",
    "inrank": "Ranks",
    "data": "Text and tokenizer",
    "logging": "Watching a run",
}
SETTINGS_HEAD = f"""{GENERATED}

# Settings

A setting has the same name everywhere: `train_iters` in a YAML file, `--train-iters` on the command line,
`train_iters` in the `config.yaml` of the run folder. A flag replaces the file's value. An unknown name is an
error, and the message suggests the closest known name. On/off settings are written `--bf16` and `--no-bf16`.

The column *default* has the value without a file. Without `--config`, the launcher reads
`configs/quickstart.yaml`, so values in that file take the place of the defaults here. "-" means that the
setting has no value unless you give one, *derived* that it follows from other settings, and *required* that a
file, a preset or a flag must give it.
"""
COMMANDS_HEAD = f"""{GENERATED}

# Command line

The text of every program's `--help`. Flags of a run that are settings are in [Settings](settings.md).
"""


def main() -> None:
    """Write both pages."""
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """File name -> content of the generated pages."""
    return {
        "settings.md": "\n".join([SETTINGS_HEAD, *_sections(), *_presets()]),
        "command_line.md": "\n".join([COMMANDS_HEAD, *_programs()]),
    }


def _sections() -> Iterator[str]:
    for name, model in sections().items():
        yield f"## {TITLES[name]}\n\n{model.__doc__}\n"
        ranks = name == "inrank"
        heads = ["setting", "values", "default", "meaning", *(["read by"] if ranks else [])]
        yield _row(heads) + "\n" + _row(["---"] * len(heads))
        properties = model.model_json_schema()["properties"]
        for field, info in model.model_fields.items():
            cells = [f"`{field}`", _values(properties[field]), _default(info), info.description]
            yield _row([*cells, *([_readers(field)] if ranks else [])])
        yield ""
        if ranks:
            yield from _methods()


def _methods() -> Iterator[str]:
    yield "| `--method` | page |\n| --- | --- |"
    for name, method in METHODS.items():
        yield _row([f"`{name}`", f"[{method.page}](../{method.page})"])
    yield ""


def _values(schema: dict[str, Any]) -> str:
    """What a field takes, from its JSON schema."""
    options = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    return ", ".join(_option(part) for part in options)


def _option(schema: dict[str, Any]) -> str:
    if words := schema.get("enum", [schema["const"]] if "const" in schema else None):
        return ", ".join(f"`{word}`" for word in words)
    if schema["type"] == "boolean":
        return "on, off"
    if schema["type"] == "array":
        return "words"
    kind = {"integer": "integer", "number": "number", "string": "text"}[schema["type"]]
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[name]:,}" for name, sign in bounds.items() if name in schema]
    return " ".join([kind, " and ".join(limits)]).strip()


def _default(info: Any) -> str:
    if info.is_required():
        return "derived" if "left out" in info.description else "required"
    if info.default is None:
        return "-"
    return f"`{('off', 'on')[info.default] if isinstance(info.default, bool) else info.default}`"


def _readers(field: str) -> str:
    """Methods that read a setting; the others refuse its flag."""
    readers = [name for name in METHODS if field not in idle_settings(name)]
    others = [name for name in METHODS if name not in readers and name != "dense"]
    return ", ".join(readers) if others else "all but dense"


def _presets() -> Iterator[str]:
    yield "## Model presets\n"
    yield "`--model-preset NAME` gives these sizes; a size that you give yourself replaces the preset's.\n"
    names = [*SIZES, "ffn_hidden_size"]
    yield _row(["preset", *(f"`{name}`" for name in names)]) + "\n" + _row(["---"] * (len(names) + 1))
    for preset, sizes in PRESETS.items():
        yield _row([f"`{preset}`", *(str(sizes.get(name, "")) for name in names)])
    yield "\n## InRank presets\n"
    yield "`--inrank-preset NAME` gives these settings; one that you give yourself replaces the preset's.\n"
    names = list({name: None for preset in INRANK_PRESETS.values() for name in preset})
    yield (
        _row(["setting", *(f"`{preset}`" for preset in INRANK_PRESETS)])
        + "\n"
        + _row(["---"] * (len(INRANK_PRESETS) + 1))
    )
    for name in names:
        yield _row([f"`{name}`", *(_plain(preset.get(name)) for preset in INRANK_PRESETS.values())])
    yield ""


def _plain(value: Any) -> str:
    return "-" if value is None else ("off", "on")[value] if isinstance(value, bool) else str(value)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _programs() -> Iterator[str]:
    launch = _help(lambda words: build_parser().parse_args(words), [])
    yield _program("launch/pretrain_gpt2.py", launch.partition("\nmodel:")[0])
    tools: dict[str, Callable[[list[str]], Any]] = {
        "plan": plan.options,
        "sweep": sweep.options,
        "preflight": preflight.options,
        "prepare_data": prepare_data.settings,
        "evaluate": evaluate.parse,
        "generate": generate.parse,
        "inspect_ranks": inspect_ranks.parse,
        "convert_checkpoint": convert_checkpoint.parse,
        "report": report.parse,
    }
    for name, parse in tools.items():
        yield _program(f"tools/{name}.py", _help(parse, []))
    for name, parse, whats in (
        ("bench", parse_bench, list(BENCHMARKS)),
        ("reproduce", parse_reproduce, list(EXPERIMENTS)),
    ):
        text = "\n".join(_help(parse, words) for words in ([], *([what] for what in whats)))
        yield _program(f"tools/{name}.py", text)


def _program(name: str, text: str) -> str:
    return f"## `{name}`\n\n```text\n{text.strip()}\n```\n"


def _help(parse: Callable[[list[str]], Any], words: list[str]) -> str:
    """What a program prints for ``--help``."""
    shown = io.StringIO()
    width = mock.patch.dict(os.environ, {"COLUMNS": HELP_WIDTH})
    with width, contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        parse([*words, "--help"])
    return shown.getvalue()


if __name__ == "__main__":
    main()

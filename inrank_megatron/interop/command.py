"""What ``tools/convert_checkpoint.py`` does with its options."""

import argparse
import sys
from dataclasses import replace
from functools import partial

from inrank_megatron.config.folders import named_folder
from inrank_megatron.interop.convert import check_only, convert
from inrank_megatron.interop.core.options import options_of
from inrank_megatron.interop.hub import local_notes, readable


def run(arguments: argparse.Namespace) -> None:
    """Convert, or check an old conversion, and print how far both models are apart."""
    source, target = readable(arguments.source), named_folder(arguments.target, flag="TO")
    notify = partial(print, file=sys.stderr, flush=True)
    for note in local_notes(arguments.source):
        notify(note)
    options = replace(options_of(arguments), pad_ranks=arguments.pad_ranks, tolerance=arguments.tolerance)
    if arguments.check_only:
        found = check_only(source, target, options)
    else:
        found = convert(source, target, arguments.format, options, notify=notify)
    print(f"{target}: same model as {source}: {found}")

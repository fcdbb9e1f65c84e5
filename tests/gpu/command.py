"""What `tests/gpu.sh` does with its arguments once everything is installed."""

import argparse
import math
import sys
import time

from inrank_megatron.reporting.console import unless_nobody_reads
from tests.gpu.cases import Case, cases, chosen
from tests.gpu.machine import look, usable
from tests.gpu.pool import ROOT
from tests.gpu.results import GOOD, OtherMachineError, Results

UNUSABLE, LEFT, INTERRUPTED = 2, 75, 130
PATIENCE = 5.0
"""Of a rehearsal without a time limit: the CPU may have other work."""
REHEARSAL_GIB = 0.0


def run(options: argparse.Namespace) -> int:
    """The exit status, as ``__main__.py`` has them."""
    machine = look(hidden=options.rehearse is not None)
    gpus = options.rehearse or usable(len(machine["gpus"]))
    if not gpus:
        print(
            f"error: no GPU that torch can use ({machine['fault']}); `bash tests/gpu.sh --rehearse` runs the "
            "same cases on the CPU",
            file=sys.stderr,
        )
        return UNUSABLE
    memory = min((gpu["memory_gib"] for gpu in machine["gpus"]), default=REHEARSAL_GIB)
    everything = cases(gpus, memory_gib=memory, rehearse=options.rehearse is not None)
    wanted = chosen(everything, options.only)
    if options.list:
        with unless_nobody_reads():
            print(*(case.name for case in wanted), sep="\n")
        return 0
    if not wanted:
        print(f"error: --only {' '.join(options.only)}: names no case; --list shows all", file=sys.stderr)
        return UNUSABLE
    default = ROOT / (f"gpu_results/rehearsal-{gpus}" if options.rehearse else f"gpu_results/{gpus}-gpu")
    try:
        results = Results(options.results or default, machine)
    except OtherMachineError as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE
    return _run(wanted, everything, results, options)


def _run(wanted: list[Case], everything: list[Case], results: Results, options: argparse.Namespace) -> int:
    """Run what is left, as long as there is time, and show all of it."""
    from tests.gpu.runner import Runner
    from tests.gpu.table import failures, summary, table, write_report

    deadline = time.monotonic() + 60 * (options.minutes or math.inf)
    todo = [case for case in wanted if _is_left(results.find(case.name), again=options.again)]
    rehearse = options.rehearse is not None
    patience = PATIENCE if rehearse and options.minutes is None else 1.0
    interrupted = False
    with Runner(results.folder / "work", rehearse=rehearse, patience=patience) as runner:
        try:
            for case in todo:
                if deadline - time.monotonic() >= runner.seconds_for(case):
                    _run_one(case, runner, results)
        except KeyboardInterrupt:
            interrupted = True
    names = [case.name for case in wanted]
    records = results.of(names)
    path = write_report(results, [case.name for case in everything])
    print(
        f"\n{table(records)}\n\n{failures(records)}\n\n{summary(records, len(names))}; to send back: {path}"
    )
    if len(records) < len(names):
        print(f"{len(records)} of {len(names)} cases done; run it again")
        return INTERRUPTED if interrupted else LEFT
    return int(any(record["state"] not in GOOD for record in records))


def _run_one(case: Case, runner, results: Results) -> None:
    print(f"{case.name} ... ", end="", flush=True)
    began = time.monotonic()
    state, figures, error = runner.run(case)
    seconds = time.monotonic() - began
    results.add(case.name, state=state, figures=figures, error=error, seconds=seconds)
    print(f"{state}, {seconds:.0f} s", flush=True)


def _is_left(record: dict | None, *, again: bool) -> bool:
    return record is None or (again and record["state"] not in GOOD)

"""Find a learning rate: train one configuration at several rates and with several seeds, compare the runs.

    python tools/sweep.py --config FILE --rates 5e-3 1e-2 2e-2 --seeds 1 2 3 --output runs/sweep [flags]

Each run is a process of its own with a run folder in the output folder, on one GPU if there is any. Runs that
have finished are not run again, and one that was stopped goes on, so the same command continues a sweep; with
more rates or seeds it extends it. At the end there are a table, sweep.csv with a row for each run, and
sweep.png. The best rate is that of the lowest mean validation perplexity. All flags of the run are allowed
but --lr, --seed, --save and --resume.
"""

import argparse
import sys
from functools import partial

from inrank_megatron.config.tool_options import count, path, positive, tool_parser
from inrank_megatron.distributed.environment import complete
from inrank_megatron.distributed.launcher import refuse_ranks
from inrank_megatron.errors import UserError


def options(argv: list[str]) -> argparse.Namespace:
    """The options of this tool, and as ``flags`` those of the run."""
    parser = tool_parser("sweep.py", __doc__)
    parser.usage = (
        "python tools/sweep.py --rates LR ... --output DIR [options] [flags of launch/pretrain_gpt2.py]"
    )
    parser.add_argument(
        "--rates", type=positive, nargs="+", required=True, metavar="LR", help="learning rates to try"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1], metavar="N", help="seeds of each rate [1]"
    )
    parser.add_argument("--output", type=path, required=True, metavar="DIR", help="folder of the sweep")
    parser.add_argument("--jobs", type=count, metavar="N", help="runs at a time [one for each GPU, else 1]")
    arguments, flags = parser.parse_known_args(argv)
    arguments.flags = [flag for flag in flags if flag != "--"]
    return arguments


def main(argv: list[str]) -> int:
    """Run the sweep; the exit status is 1 after a mistake of the user, or if no rate finished."""
    given = options(argv)
    complete()
    try:
        refuse_ranks("sweep.py")
        return _run(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command continues the sweep", file=sys.stderr)
        return 130


def _run(given: argparse.Namespace) -> int:
    # Imported here: --help and mistakes in these options need none of it.
    from inrank_megatron.distributed.platform import device_count
    from inrank_megatron.experiments import sweep as sweeps
    from inrank_megatron.experiments.printing import print_table
    from inrank_megatron.reporting.files import write_atomically

    sweep = sweeps.Sweep(
        output=given.output,
        flags=tuple(given.flags),
        # A rate is what the flag of its run says, in six digits.
        rates=tuple(dict.fromkeys(float(f"{rate:g}") for rate in given.rates)),
        seeds=tuple(dict.fromkeys(given.seeds)),
    )
    found = sweeps.measure(
        sweep,
        jobs=given.jobs or max(1, device_count()),
        notify=partial(print, file=sys.stderr, flush=True),
    )
    write_atomically(sweep.output / sweeps.TABLE, sweeps.as_csv(sweeps.run_rows(found, sweep.seeds)).encode())
    print_table("Validation perplexity per token:", sweeps.rate_rows(found))
    best = sweeps.best_of(found)
    if best is not None:
        write_atomically(sweep.output / sweeps.PICTURE, sweeps.picture(found))
    print(f"\n{sweeps.verdict(found)}")
    return 0 if best is not None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

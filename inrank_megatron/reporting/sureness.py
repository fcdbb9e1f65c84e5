"""How sure the ranks of a run are: what they would be without training, and at other thresholds."""

from statistics import fmean

import numpy as np

from inrank_megatron.config.loading import from_flat
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import linear_shapes
from inrank_megatron.errors import UserError
from inrank_megatron.reporting.run import Record, Run, depth

LARGEST_WIDTH = 1600
"""Untrained ranks of wider linears take longer than the rest of a report: 15 s of a core at width 2,048."""
STEP = 0.05  # of the threshold


def config_of(run: Run) -> Config | None:
    """The settings of a run whose model has the layers on record; None where they do not say so."""
    try:
        config = from_flat(run.settings)
        blocks = config.model.num_layers or 0
    except UserError:
        return None
    return config if blocks == max(map(depth, run.ranks_by_layer()), default=-1) + 1 else None


def untrained_rank(run: Run) -> float | None:
    """The mean over layers of the ranks at which the authors' released criterion comes to a rest on factors
    that were never trained, of the run's shapes, buffer and threshold. None where ranks do not grow, where
    settings do not say it, and of linears wider than ``LARGEST_WIDTH``.
    """
    # Imported here: torch takes seconds.
    from inrank_megatron.reporting.untrained import untrained_ranks

    config = config_of(run)
    if config is None or not _last_checks(run):
        return None
    shapes = linear_shapes(config)
    if max(map(min, shapes.values())) > LARGEST_WIDTH or not run.ranks_by_layer().keys() <= shapes.keys():
        return None
    try:
        ranks = untrained_ranks(config)
    except UserError:
        return None
    return fmean(ranks[shapes[layer]] for layer in run.ranks_by_layer())


def mean_ranks_by_threshold(run: Run) -> dict[float, float]:
    """The mean over layers of the smallest ranks that the spectra of the last check ask for, at the run's
    threshold and at those ``STEP`` below and above. Thresholds at which a layer asks for more than the
    recorded singular values are left out; so are all with equation 7, which judges no rank below the present.
    """
    config, checks = config_of(run), _last_checks(run)
    if config is None or not checks or config.inrank.rank_criterion == "eq7":
        return {}
    shapes, middle, found = linear_shapes(config), config.inrank.threshold, {}
    for threshold in (middle - STEP, middle, middle + STEP):
        if not 0 < threshold < 1 or not checks.keys() <= shapes.keys():
            continue
        ranks = [rank_at(record, threshold, length=min(shapes[layer])) for layer, record in checks.items()]
        known = [rank for rank in ranks if rank is not None]
        if len(known) == len(ranks):
            found[round(threshold, 6)] = fmean(known)
    return found


def rank_at(record: Record, threshold: float, *, length: int) -> int | None:
    """The smallest rank whose ratio reaches ``threshold``, by ``update_ratio`` of
    ``lowrank/criteria/explained_ratio.py``, from the leading singular values and the sums of all.

    ``length``: min(O, I). None: it needs more values than were recorded, or their sums are not known.
    """
    values = np.array([value or 0.0 for value in record["singular_values"]])
    total, squares = record.get("singular_value_sum"), record.get("singular_value_square_sum")
    if total is None or squares is None:
        return None
    whole = squares / length - (total / length) ** 2
    if whole <= 0:
        return 1
    tails = (squares - np.cumsum(values**2)) / length - ((total - np.cumsum(values)) / length) ** 2
    [reached] = np.nonzero(1 - tails / whole >= threshold)
    return int(reached[0]) + 1 if reached.size else None


def _last_checks(run: Run) -> dict[str, Record]:
    """Per layer, the last check that recorded singular values."""
    checks = [record for record in run.ranks if record["event"] == "check" and record.get("singular_values")]
    return {record["layer"]: record for record in checks}

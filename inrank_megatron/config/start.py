"""What a new run takes from the model whose weights it starts from, where the user has not chosen."""

from collections.abc import Callable, Mapping
from typing import Any

from inrank_megatron.config.defaults import RUN_CONFIG, stored_config
from inrank_megatron.config.folders import named_folder
from inrank_megatron.config.loading import read_file, sections

StartSettings = Callable[[str, str | None], Mapping[str, Any]]
"""From the name and the revision of a model of another program to the settings of a run that starts from it;
see ``interop/start.py``.
"""
NAME, REVISION, TOKENIZER = "pretrained_checkpoint", "pretrained_revision", "tokenizer"
CONTINUED_LR = 1e-4
ADAM = {"matrix_optimizer": "adamw", "factor_optimizer": "adamw"}
"""Of weights that other programs trained, most of them with Adam: Muon continues such weights worse (Liu et
al., arXiv 2502.16982, section 3.5).
"""


def no_start(name: str, revision: str | None) -> Mapping[str, Any]:
    """Where only runs are known as starts."""
    return {}


def taken_from_start(
    file: Mapping[str, Any], chosen: Mapping[str, Any], others: StartSettings, *, named: bool
) -> tuple[dict[str, Any], list[str]]:
    """The settings that replace those of the file, and messages for the user. Of a file that the user has
    not named, architecture, tokenizer, optimizers and the learning rate's schedule; of another one a
    tokenizer that it lacks. The revision of a model of the hub is kept with the run in both cases.

    Args:
        file: settings of the configuration. chosen: of flags and the DeepSpeed JSON.
        others: reads the settings of models that are no runs. named: whether the user has named the file.
    """
    name, revision = (chosen.get(key, file.get(key)) for key in (NAME, REVISION))
    if not isinstance(name, str):
        return {}, []
    if (stored := stored_config(chosen)) is not None:  # it has started already
        return {REVISION: read_file(stored).get(REVISION)}, []
    found = _settings_of(name, revision, others)
    if named:
        kept = {REVISION} | ({TOKENIZER} - file.keys())
        return {key: value for key, value in found.items() if key in kept}, []
    if not found:
        return {}, []
    schedule = continued_schedule({**file, "lr": None, **chosen})
    what = "model settings, tokenizer and" if TOKENIZER in found else "model settings and"
    notes = [f"{what} optimizers from {name}, whose weights the run starts from"]
    if own := {key: value for key, value in schedule.items() if key not in chosen}:
        shown = ", ".join(f"{key} {value}" for key, value in own.items())
        notes.append(f"{shown}: a run that starts from trained weights warms up again, to a low rate")
    if REVISION in found and "seq_length" not in chosen:
        notes.append(
            f"seq_length {found['seq_length']}, the longest by default for a model with "
            f"{found['max_position_embeddings']} positions; a shorter --seq-length costs less"
        )
    return found | schedule, notes


def continued_schedule(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The learning rate of a run that starts from trained weights, where nobody chose it.

    It warms up again over 1 % of the steps and decays along a cosine to a tenth of its peak, as Ibrahim et
    al. (arXiv 2403.08763) recommend. Their peak is that of the first training. As that is not known here, and
    too high a rate undoes what was learnt, the peak is ``CONTINUED_LR``, a sixth of that for new weights.

    Args:
        settings: of the run; ``lr`` is None where the user has not chosen it.
    """
    lr, steps = settings["lr"], settings.get("lr_decay_iters") or settings.get("train_iters")
    steps = steps if isinstance(steps, int) else 1  # what is no number is refused elsewhere
    return {
        "lr": CONTINUED_LR,
        "min_lr": (lr if isinstance(lr, int | float) else CONTINUED_LR) / 10,
        "lr_decay_style": "cosine",
        "lr_warmup_iters": max(0, min(max(1, steps // 100), steps - 1)),
    }


def _settings_of(name: str, revision: str | None, others: StartSettings) -> dict[str, Any]:
    folder = named_folder(name, flag="--pretrained-checkpoint").resolve()
    runs = (folder, folder.parent.parent)  # of a run, or of a checkpoint in it
    run = next((run for run in runs if (run / RUN_CONFIG).is_file()), None)
    if run is None:
        found = dict(others(name, revision))
        return ADAM | found if found else {}
    stored = read_file(run / RUN_CONFIG)
    kept = sections()["model"].model_fields.keys() | ADAM.keys()
    found = {key: value for key, value in stored.items() if key in kept}
    tokenizer = run / TOKENIZER
    return found | ({TOKENIZER: str(tokenizer)} if tokenizer.is_dir() else {})

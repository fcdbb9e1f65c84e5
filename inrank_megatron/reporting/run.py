"""Reading a run folder back."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inrank_megatron.config.yaml_file import read_yaml
from inrank_megatron.errors import UserError
from inrank_megatron.reporting.files import SAMPLE, is_there, read_records
from inrank_megatron.reporting.sound import fault_of_summary, is_sound

Record = dict[str, Any]
PHASES = ("dense", "phase_1", "phase_2")
"""By the number that records of steps have."""
NOTICES = ("note", "straggler", "loss_spike")


@dataclass(frozen=True)
class Run:
    """The records of one run, in the order in which they were written; each part may be empty.

    Attributes:
        folder: the run folder.
        settings: ``config.yaml``, flat.
        summary: ``summary.json``. sample: ``sample.json``, text of the model.
        train, evaluations, switches, checkpoints: the lines of ``metrics.jsonl``, by kind.
        notices: lines of ``metrics.jsonl`` with a text: notes, stragglers, loss spikes. resumes: a line for
            each time that training went on from a checkpoint.
        ranks: the lines of ``ranks.jsonl``, one per layer and check.
    """

    folder: Path
    settings: Record
    summary: Record
    train: list[Record]
    evaluations: list[Record]
    switches: list[Record]
    checkpoints: list[Record]
    ranks: list[Record]
    sample: Record
    notices: list[Record] = field(default_factory=list)
    resumes: list[Record] = field(default_factory=list)

    @property
    def switch_step(self) -> int | None:
        """The optimizer step after which ``W0 + UV`` became ``U* V*``; None if it has not (yet)."""
        return self.switches[-1]["step"] if self.switches else None

    @property
    def last_step(self) -> int:
        """Completed optimizer steps on record; the last steps need not have a ``train`` line of their own."""
        records = self.train + self.evaluations + self.checkpoints
        return max((record["step"] for record in records), default=0)

    @property
    def elapsed_seconds(self) -> float | None:
        """Time in training; before the run has finished, up to its last record."""
        times = [record.get("elapsed_seconds") or 0.0 for record in self.train + self.evaluations]
        return self.summary.get("train_seconds") or max(times, default=None)

    def last_cost(self, name: str) -> float | None:
        """``parameters`` or ``flops_per_token`` of the last phase that has been reached, where known."""
        costs = self.summary.get(name) or {}
        return next((costs[phase] for phase in reversed(PHASES) if costs.get(phase)), None)

    def last_evaluation(self, split: str) -> Record | None:
        """The newest evaluation of ``"valid"`` or ``"test"``."""
        return next((record for record in reversed(self.evaluations) if record["split"] == split), None)

    def ranks_by_layer(self) -> dict[str, list[Record]]:
        """The rank records of each layer, layers in the order of depth."""
        layers: dict[str, list[Record]] = {}
        for record in self.ranks:
            layers.setdefault(record["layer"], []).append(record)
        return {layer: layers[layer] for layer in sorted(layers, key=lambda name: (depth(name), name))}


def read_run(run_dir: str | Path) -> Run:
    """Read a run folder: finished, unfinished, or cut off in the middle of a line.

    Raises:
        UserError: the folder does not exist, or ``config.yaml`` or ``summary.json`` cannot be parsed.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a run folder, and a report needs one: name the folder given to --save"
        )
    kinds: dict[str, list[Record]] = {"train": [], "eval": [], "switch": [], "checkpoint": [], "resume": []}
    notices = []
    for record in read_records(folder / "metrics.jsonl"):
        kind = record.get("kind")
        if isinstance(kind, str) and kind in kinds and is_sound(record, kind):
            kinds[kind].append(record)
        elif kind in NOTICES and is_sound(record, "notice"):
            notices.append(record)
    return Run(
        folder=folder,
        settings=_settings(folder / "config.yaml"),
        summary=_summary(folder / "summary.json"),
        train=kinds["train"],
        evaluations=kinds["eval"],
        switches=kinds["switch"],
        checkpoints=kinds["checkpoint"],
        ranks=[record for record in read_records(folder / "ranks.jsonl") if is_sound(record, "ranks")],
        sample=_mapping(folder / SAMPLE, parse=lambda text: json.loads(text or "{}")),
        notices=notices,
        resumes=kinds["resume"],
    )


def flops_spent(run: Run) -> list[float]:
    """FLOPs of the training up to each ``train`` record, forward and backward; empty where not known."""
    costs, spent, before = run.summary.get("flops_per_token") or {}, [0.0], 0
    for record in run.train:
        cost = costs.get(PHASES[record["phase"]])
        if not cost or not record.get("tokens"):
            return []
        spent.append(spent[-1] + cost * (record["tokens"] - before))
        before = record["tokens"]
    return spent[1:]


def depth(layer: str) -> int:
    """The index of the transformer block in a parameter name: 3 for ``decoder.layers.3.mlp.linear_fc1``."""
    match = re.search(r"\.(\d+)\.", f".{layer}.")
    return int(match.group(1)) if match else 0


def kind_of(layer: str) -> str:
    """Which linear of its block a name means: ``linear_fc1`` for ``decoder.layers.3.mlp.linear_fc1``,
    ``linear_qkv.q`` for the q of ``decoder.layers.3.self_attention.linear_qkv``.
    """
    return re.sub(r".*\.(?=linear_)", "", layer)


def _settings(path: Path) -> Record:
    return _named(path, read_yaml(path) or {}) if is_there(path) else {}


def _summary(path: Path) -> Record:
    summary = _mapping(path, parse=lambda text: json.loads(text or "{}"))
    if (name := fault_of_summary(summary)) is not None:
        shown = repr(summary[name])[:80]
        raise UserError(f"{path}: {name} = {shown} is not what a run writes: restore it or move it away")
    return summary


def _mapping(path: Path, *, parse: Any) -> Record:
    if not is_there(path):
        return {}
    try:
        return _named(path, parse(path.read_text(encoding="utf-8")) or {})
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be parsed ({reason}): restore it or move it away") from error


def _named(path: Path, content: Any) -> Record:
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path} holds a {kind} instead of names and values: restore it or move it away")
    return content

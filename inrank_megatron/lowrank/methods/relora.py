"""ReLoRA (arXiv 2307.05695): LoRA that is merged into W0 at intervals, so that the sum has a high rank."""

from typing import Literal

from inrank_megatron.errors import UserError
from inrank_megatron.fields import Count, Section, Share, Steps, setting
from inrank_megatron.lowrank.methods.changes import MergeAndReinitialise, Plan, Reset
from inrank_megatron.lowrank.methods.lora import LoRA


class ReLoRASettings(Section):
    """When ReLoRA merges, and what becomes of moments and learning rate."""

    relora_interval: Count = setting("steps between two merges of U V into W0 (relora)", 1000)
    relora_reset: Literal["full", "random", "magnitude"] = setting(
        "which Adam moments of the factors a merge sets to zero: all, a random part, or the smallest",
        "magnitude",
    )
    relora_reset_share: Share = setting(
        "fraction of the moments that is set to zero (random, magnitude)", 0.9
    )
    relora_warmup_iters: Steps = setting("steps of learning-rate warm-up after each merge", 50)


def _merges(asked):
    """Four intervals in a run too short for the default, with a tenth of each as warm-up."""
    inrank, steps = asked.config.inrank, asked.config.training.train_iters
    if steps < 2:
        return
    interval = inrank.relora_interval
    if interval >= steps and asked.free("relora_interval"):
        interval = max(1, steps // 4)
        yield "relora_interval", interval, f"train_iters = {steps}"
    if inrank.relora_warmup_iters > interval and asked.free("relora_warmup_iters"):
        yield "relora_warmup_iters", interval // 10, f"relora_interval = {interval}"


class ReLoRA(LoRA):
    """Merges after every ``interval`` completed steps.

    ``reset`` and ``share``: what becomes of the factors' Adam moments, see :class:`MergeAndReinitialise`.
    """

    name = "relora"
    page = "concepts/methods.md#relora"
    settings = (*LoRA.settings, ReLoRASettings)
    adaptations = (_merges, *LoRA.adaptations)

    def __init__(self, rank: int, *, interval: int, reset: Reset, share: float):
        super().__init__(rank)
        self.interval, self.reset, self.share = interval, reset, share

    @classmethod
    def from_config(cls, config, *, switch_step):
        inrank = config.inrank
        return cls(
            inrank.rank,
            interval=inrank.relora_interval,
            reset=inrank.relora_reset,
            share=inrank.relora_reset_share,
        )

    @classmethod
    def check_settings(cls, run, shapes):
        super().check_settings(run, shapes)
        interval, rising = run.inrank.relora_interval, run.inrank.relora_warmup_iters
        if interval >= run.training.train_iters:
            raise UserError(
                f"relora_interval = {interval}: must be less than train_iters = {run.training.train_iters}; "
                f"lower --relora-interval, or give --method {LoRA.name}, which never merges"
            )
        if rising > interval:
            raise UserError(
                f"relora_warmup_iters = {rising}: must not exceed relora_interval = {interval}; lower "
                "--relora-warmup-iters"
            )

    @classmethod
    def learning_rate(cls, step, run, schedule):
        """After each merge it rises from zero, over ``relora_warmup_iters`` steps, to where it would be."""
        interval, rising = run.inrank.relora_interval, run.inrank.relora_warmup_iters
        since = (step - 1) % interval  # completed steps since the last merge
        if step > interval and since < rising:
            return (since + 1) / rising * schedule(step - since + rising - 1)
        return schedule(step)

    def plan_step(self, step, layers):
        if step % self.interval:
            return None
        return Plan(lambda layers: [MergeAndReinitialise(reset=self.reset, share=self.share)])

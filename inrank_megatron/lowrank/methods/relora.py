"""ReLoRA (arXiv 2307.05695): LoRA that is merged into W0 at intervals, so that the sum has a high rank.

The learning rate's part, a short warm-up after each restart, is in ``training/schedule.py``.
"""

from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.changes import Plan, Reset, Restart
from inrank_megatron.lowrank.methods.lora import LoRA


class ReLoRA(LoRA):
    """Restarts after every ``interval`` completed steps.

    ``reset`` and ``share``: what becomes of the factors' Adam moments, see :class:`Restart`.
    """

    name = "relora"
    settings = LoRA.settings | {
        "relora_interval",
        "relora_reset",
        "relora_reset_share",
        "relora_warmup_iters",
    }

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

    def plan_step(self, step, layers):
        if step % self.interval:
            return None
        return Plan(lambda layers: [Restart(reset=self.reset, share=self.share)])

"""Weights & Biases, online or offline (``WANDB_MODE=offline``, then ``wandb sync``)."""

from collections.abc import Mapping

from inrank_megatron.reporting.sinks.base import RunFacts, Sink

STEP = "iteration"
WAIT = 20  # seconds, for a login, the first answer and the last; then it gives up


class WeightsAndBiases:
    """One run there, which later sessions of the run go on with."""

    def __init__(self, facts: RunFacts):
        import wandb

        project = facts.settings["wandb_project"]
        folder = facts.settings["wandb_save_dir"] or str(facts.folder)
        self._run = wandb.init(
            project=project,
            name=facts.settings["wandb_exp_name"] or facts.folder.resolve().name,
            dir=folder,
            id=facts.known_id,
            resume="allow",
            config=dict(facts.settings),
            # The console is the run's own: signals and its live display are left alone, and few lines added.
            settings=wandb.Settings(
                console="off", quiet=True, login_timeout=WAIT, init_timeout=WAIT, finish_timeout=WAIT
            ),
        )
        facts.keep_id(self._run.id)
        # Steps after a checkpoint are repeated on resume. As the service's own step, which only grows, they
        # would be refused.
        self._run.define_metric("*", step_metric=STEP)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, STEP: step})

    def close(self, *, finished: bool) -> None:
        self._run.finish()


def open_sink(facts: RunFacts) -> Sink:
    """The sink of a run, opened."""
    return WeightsAndBiases(facts)

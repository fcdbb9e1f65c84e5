"""MLflow: a tracking server, or a store that MLflow itself writes."""

import time
from collections.abc import Mapping

from inrank_megatron.reporting.sinks.base import RunFacts, Sink

LONGEST_VALUE = 500


class MLflow:
    """One run there, which later sessions of the run go on with."""

    def __init__(self, facts: RunFacts):
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=facts.settings["mlflow_tracking_uri"])
        if facts.known_id is not None:
            self._id = facts.known_id
            self._client.update_run(self._id, status="RUNNING")
            return
        name = facts.settings["mlflow_experiment"]
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        title = facts.settings["mlflow_run_name"] or facts.folder.resolve().name
        self._id = self._client.create_run(experiment, run_name=title).info.run_id
        facts.keep_id(self._id)
        params = [Param(key, str(value)[:LONGEST_VALUE]) for key, value in facts.settings.items()]
        self._client.log_batch(self._id, params=params)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(tag, value, now, step) for tag, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


def open_sink(facts: RunFacts) -> Sink:
    """The sink of a run, opened."""
    return MLflow(facts)

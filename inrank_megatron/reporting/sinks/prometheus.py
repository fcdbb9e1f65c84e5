"""Prometheus: the newest values, at ``http://<host of rank 0>:<port>/metrics``, while the run trains."""

import re
from collections.abc import Mapping
from typing import Any

from inrank_megatron.reporting.sinks.base import RunFacts, Sink

PREFIX = "inrank_"
LAYER = re.compile(r"rank/(.*\.\d+\..*)")


class Prometheus:
    """``lm loss`` becomes ``inrank_lm_loss``, the rank of a layer ``inrank_rank{layer="..."}``."""

    def __init__(self, facts: RunFacts):
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        self._gauge, self._registry = Gauge, CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._server, self._thread = start_http_server(
            facts.settings["prometheus_port"], registry=self._registry
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._of("iteration").set(step)
        for tag, value in values.items():
            if layer := LAYER.fullmatch(tag):
                self._of("rank", "layer").labels(layer[1]).set(value)
            else:
                self._of(tag).set(value)

    def close(self, *, finished: bool) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _of(self, tag: str, *labels: str) -> Any:
        name = PREFIX + re.sub(r"[^a-z0-9]+", "_", tag.lower())
        if name not in self._gauges:
            self._gauges[name] = self._gauge(name, tag, labels, registry=self._registry)
        return self._gauges[name]


def open_sink(facts: RunFacts) -> Sink:
    """The sink of a run, opened."""
    return Prometheus(facts)

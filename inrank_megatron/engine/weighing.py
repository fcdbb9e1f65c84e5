"""What a metric weighs the error of a truncation with, measured on the batches that were trained on last."""

from collections.abc import Iterator

from torch import Tensor

from inrank_megatron.config.switch_costs import weighed_at_a_time
from inrank_megatron.engine.activations import activation_moments, output_gradient_scales
from inrank_megatron.engine.fragments import finish_writes
from inrank_megatron.engine.gradients import at_a_loss_scale
from inrank_megatron.engine.live_model import Batches, LiveModel
from inrank_megatron.engine.truncation import Weighing
from inrank_megatron.lowrank.methods.changes import Metric


def weighing(live: LiveModel, metric: Metric, *, step: int, batches: Batches | None) -> Weighing:
    """By ``metric``, over the last batches that the steps up to ``step`` trained on; empty for ``plain``.

    The model keeps it until its weights change: the switch truncates by what the ranks were chosen with.
    Collective.
    """
    if live.last_weighing is None or live.last_weighing[:2] != (metric, step):
        live.last_weighing = metric, step, _measured(live, metric, step, batches)
    return live.last_weighing[2]


def _measured(live: LiveModel, metric: Metric, step: int, batches: Batches | None) -> Weighing:
    if metric.kind == "plain":
        return Weighing()
    if batches is None:
        raise ValueError(f"the metric {metric.kind} is measured on batches; none are given")
    finish_writes()  # of changes just before, as ranks that grow
    recent = range(max(0, step - metric.batches), step)

    def losses() -> Iterator[Tensor]:
        return (live.loss(live.model, batch) for index in recent for batch in batches(index))

    def scales(loss_scale: float) -> dict[str, Tensor]:
        live.parallel.seed_random(seed=live.config.training.seed, step=step)
        return output_gradient_scales(live.model, live.linears, losses(), live.parallel, scale=loss_scale)

    at_a_time = weighed_at_a_time(live.config, live.parallel.dp_size)
    moments = activation_moments(live.model, live.linears, losses, live.parallel, at_a_time=at_a_time)
    outputs = {}
    if metric.kind == "fisher":
        scale = live.loss_scaling.scale
        outputs = at_a_loss_scale(scales, scale=scale, parallel=live.parallel, device=live.device)
    return Weighing(moments, outputs)

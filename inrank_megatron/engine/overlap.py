"""Reductions of gradients that go on while the device computes the backward pass, in ZeRO stages 1 and 2.

DeepSpeed does that (``overlap_comm``) on a stream of its own and in two buffers by turns: the bucket that
is being filled waits until the reduction before the last one has read it. Stage 3 needs nothing of this file.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import BFLOAT16, ZERO_OPTIMIZATION, DeepSpeedEngine


@contextmanager
def bf16_as_other_precisions(settings: Mapping) -> Iterator[None]:
    """Within it DeepSpeed takes its optimizer of stages 1 and 2 for BF16 in stage 1 too, if ``settings``,
    the section on ZeRO, ask for overlap.

    The other one that it has for this case alone reduces everything after the backward pass. Both accumulate
    in FP32 and reduce in BF16.
    """
    original = DeepSpeedEngine._do_optimizer_sanity_check

    def chosen(self, basic_optimizer):
        kind = original(self, basic_optimizer)
        return ZERO_OPTIMIZATION if kind == BFLOAT16 else kind

    try:
        if settings["stage"] == 1 and settings.get("overlap_comm"):
            DeepSpeedEngine._do_optimizer_sanity_check = chosen
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = original


def await_reductions_on_the_device(optimizer) -> None:
    """After a backward pass the stream of DeepSpeed's ``optimizer`` waits for that of its reductions, and
    the host does not.

    That is enough. The buffers that DeepSpeed then drops were allocated on the stream that waits, so whatever
    takes their memory comes later. What the reductions allocated goes to later reductions alone, and these
    wait for the gradients of the next backward pass, which come after the optimizer's step. With offload the
    host itself reads what was reduced.
    """
    stream = getattr(optimizer, "reduction_stream", None)
    if stream is None or not optimizer.overlap_comm or optimizer.cpu_offload:
        return
    accelerator, epilogue = get_accelerator(), optimizer.independent_gradient_partition_epilogue

    def without_the_host() -> None:
        accelerator.synchronize = lambda: accelerator.current_stream().wait_stream(stream)
        try:
            epilogue()
        finally:
            del accelerator.synchronize

    optimizer.independent_gradient_partition_epilogue = without_the_host

"""What the benchmark counts of a step, against what a step must send."""

from inrank_megatron.benchmarks.blocks import DENSE, preset_config
from inrank_megatron.benchmarks.counts import VOCABULARY, Counts, count_step
from inrank_megatron.config.costs import parameters
from tests.forked import server


def counted(pipe) -> None:
    from inrank_megatron.distributed.platform import prepare_process

    prepare_process()
    pipe.send(count_step("tiny", DENSE, stage=0, tensor_parallel=1))


def test_replicas_without_zero_send_each_gradient_once():
    """Of two replicas each sends as much as it has, by the ring rule; the rest are a few numbers."""
    here, there = server().Pipe()
    process = server().Process(target=counted, args=(there,), daemon=True)
    process.start()
    there.close()
    counts: Counts = here.recv()
    process.join()
    gradients = 4 * parameters(preset_config("tiny"), VOCABULARY).trainable
    assert gradients < counts.sent < 1.001 * gradients
    assert counts.operators > 0 and counts.collectives < 10
    assert counts.kernels is counts.waits is None

"""What LoRA and ReLoRA ask for."""

from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.changes import InitialiseFactors, MergeAndReinitialise
from inrank_megatron.lowrank.methods.lora import LoRA
from inrank_megatron.lowrank.methods.relora import ReLoRA


def test_lora_keeps_w0_and_its_rank():
    method = LoRA(48)
    assert method.structure({"wide": 64, "narrow": 32}) == {
        "wide": FactorSpec(capacity=48, active_columns=48, rank=48),
        "narrow": FactorSpec(capacity=32, active_columns=32, rank=32),
    }
    assert method.initialisation() == [InitialiseFactors(source="zero-product")]
    assert not any(method.plan_step(step, []) for step in range(1, 100))


def test_relora_restarts_at_its_interval():
    method = ReLoRA(8, interval=5, reset="random", share=0.7)
    assert [step for step in range(1, 21) if method.plan_step(step, [])] == [5, 10, 15, 20]
    plan = method.plan_step(5, [])
    assert (plan.spectrum, plan.decide([])) == (None, [MergeAndReinitialise(reset="random", share=0.7)])

"""What LoRA and ReLoRA ask for."""

from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.changes import InitialiseFactors, Restart
from inrank_megatron.lowrank.methods.lora import LoRA
from inrank_megatron.lowrank.methods.relora import ReLoRA


def test_lora_stands_beside_w0_and_never_changes():
    method = LoRA(48)
    assert method.structure({"wide": 64, "narrow": 32}) == {
        "wide": FactorSpec(columns=48, active=48, rank=48),
        "narrow": FactorSpec(columns=32, active=32, rank=32),
    }
    assert method.start() == [InitialiseFactors(source="lora")]
    assert not any(method.acts_at(step) for step in range(1, 100))


def test_relora_restarts_at_its_interval():
    method = ReLoRA(8, interval=5, reset="random", share=0.7)
    assert [step for step in range(1, 21) if method.acts_at(step)] == [5, 10, 15, 20]
    assert method.changes(5, []) == [Restart(reset="random", share=0.7)]
    assert method.changes(6, []) == []
    assert method.spectrum_at(5, []) is None

"""A training's state as whole tensors: it goes on from there on any layout of ranks."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inrank_megatron.engine.state import whole_tensors
from inrank_megatron.errors import UserError
from tests.contract.sessions import CHECK, LAYOUTS, build, leave_and_go_on, resume
from tests.harness import run_ranks

MORE = 3
PHASES = {"phase 1": CHECK + 1, "phase 2": CHECK + 3}
"""Steps: past the first growth, and past the switch two steps later."""
OTHERS = {
    "dense before the switch": ("warm-start", CHECK + 1, "TP2 SP", "DP2"),
    "before patience runs out": ("inrank-efficient-patience", 3 * CHECK - 1, "DP2", "TP2 SP"),
    "after the check that ends it": ("inrank-efficient-patience", 3 * CHECK, "TP2 SP", "DP2"),
}
"""Method, step, and where it goes from and to; the switch comes within the three steps that follow."""

EXACT = {
    "0": {"zero_stage": 0},
    "2": {"zero_stage": 2},
    "3": {"zero_stage": 3},
    "2 offloaded": {"zero_stage": 2, "offload_optimizer": True},
}
"""Beside the default, stage 1, that the tests of a method have."""


def round_trip(
    method: str, here: str, there: str, step: int, *, settings: tuple[dict, dict] = ({}, {})
) -> tuple[dict, list[dict]]:
    """What is left ``here`` under the first settings; what goes on ``there`` under the second."""
    source, target = LAYOUTS[here], LAYOUTS[there]
    left = run_ranks(leave_and_go_on, source.world_size, method, source, step, MORE, settings[0])[0]
    return left, run_ranks(resume, target.world_size, method, target, step, MORE, left, settings[1])


@pytest.mark.parametrize(
    ("here", "there"),
    [("TP2 SP", "DP2"), ("DP2", "TP2 SP DP2"), ("TP2 SP DP2", "TP1 DP1"), ("TP1 DP1", "TP2 without SP")],
)
@pytest.mark.parametrize("phase", PHASES)
def test_training_goes_on_elsewhere(phase, here, there):
    """The tensors come back to the bit, the losses to rounding.

    The story of checkpoints loaded onto another number of ranks that brought the weights and lost the
    optimizer's moments: no error, only a loss that rose (DeepSpeed issues 6503 and 7786). Here every
    moment is there, not zero, and the same as before.
    """
    goes_on_elsewhere("inrank-efficient", here, there, PHASES[phase])


@pytest.mark.parametrize("phase", PHASES)
def test_a_llama_goes_on_elsewhere(phase):
    """Gate and up lie in shares of each on every rank; the state does not know."""
    goes_on_elsewhere("llama-inrank-efficient", "TP2 SP", "TP1 DP1", PHASES[phase])


@pytest.mark.parametrize("step", [2 * CHECK - 2, 2 * CHECK + 1])
@pytest.mark.parametrize("method", ["relora", "llama-relora"])
def test_restarts_come_elsewhere_as_they_would_have_come_here(method, step):
    """Before the restart after ten steps, which then draws the same new V and resets the same moments, and
    past it, where the learning rate warms up again.
    """
    goes_on_elsewhere(method, "TP2 SP", "DP2", step)


@pytest.mark.parametrize("phase", PHASES)
def test_apex_goes_on_elsewhere(phase):
    """Its step lies in the parameter group."""
    apex = {"optimizer": "apex-fused-adam"}
    goes_on_elsewhere("inrank-efficient", "DP2", "TP2 SP", PHASES[phase], settings=(apex, apex))


def test_lora_goes_on_elsewhere():
    goes_on_elsewhere("lora", "DP2", "TP2 SP", CHECK)


def goes_on_elsewhere(
    method: str, here: str, there: str, step: int, *, settings: tuple[dict, dict] = ({}, {})
) -> None:
    left, resumed = round_trip(method, here, there, step, settings=settings)
    moments = [name for name in left["tensors"] if name.endswith(("exp_avg", "exp_avg_sq"))]
    assert moments and all(left["tensors"][name].any() for name in moments)
    assert left["tensors"].keys() == resumed[0]["tensors"].keys()
    for name, tensor in left["tensors"].items():
        assert torch.equal(resumed[0]["tensors"][name], tensor), name
    for result in resumed:
        assert result["record"] == left["record"]
        assert result["fixed"] == pytest.approx(left["fixed"], rel=1e-6)
        assert result["losses"] == pytest.approx(left["losses"], rel=1e-6)


@pytest.mark.parametrize("case", OTHERS)
def test_switch_comes_elsewhere_as_it_would_have_come_here(case):
    """The same step, ranks and losses: of the past the switch needs nothing but what the record holds."""
    method, step, here, there = OTHERS[case]
    left, resumed = round_trip(method, here, there, step)
    assert left["switched"] == (False, True)
    for result in resumed:
        assert result["switched"] == left["switched"]
        assert result["last record"] == left["last record"]
        assert result["losses"] == pytest.approx(left["losses"], rel=1e-6)


@pytest.mark.parametrize("method", ["dense", "fixed-rank", "inrank", "relora"])
def test_training_goes_on_exactly_on_the_same_layout(method):
    left, resumed = round_trip(method, "TP2 SP", "TP2 SP", CHECK + 1)
    assert all((result["fixed"], result["losses"]) == (left["fixed"], left["losses"]) for result in resumed)


@pytest.mark.parametrize("stage", EXACT)
def test_training_goes_on_exactly_at_every_zero_stage(stage):
    """Past the first growth and over the switch, where each stage keeps masters and moments elsewhere."""
    settings = EXACT[stage]
    left, resumed = round_trip("inrank-efficient", "DP2", "DP2", CHECK + 1, settings=(settings, settings))
    assert left["switched"] == (False, True)
    for result in resumed:
        assert (result["fixed"], result["losses"]) == (left["fixed"], left["losses"])


def test_state_of_another_model_is_refused():
    """A tensor too few or of another shape ends the resume with a message, before anything is half loaded."""
    left = run_ranks(leave_and_go_on, 1, "dense", LAYOUTS["TP1 DP1"], 1, 1)[0]
    missing = {
        **left,
        "tensors": {k: v for k, v in left["tensors"].items() if k != "decoder.final_layernorm.weight"},
    }
    wrong = {
        **left,
        "tensors": left["tensors"] | {"embedding.position_embeddings.weight": torch.zeros(31, 64)},
    }
    differ = "step_00000001: tensors that differ from those of this run's model and optimizer: "
    assert run_ranks(refusal, 1, missing)[0].startswith(
        f"{differ}1 (decoder.final_layernorm.weight is absent there, [64] here); resume with"
    )
    assert run_ranks(refusal, 1, wrong)[0].startswith(
        f"{differ}1 (embedding.position_embeddings.weight is [31, 64] there, [32, 64] here); resume with"
    )


def test_all_shapes_that_differ_are_counted():
    """The first few with both shapes, those that the model lacks among them; nothing has been filled."""
    left = run_ranks(leave_and_go_on, 1, "dense", LAYOUTS["TP1 DP1"], 1, 1)[0]
    narrow = {
        name: tensor[:-1] if "mlp.linear" in name else tensor for name, tensor in left["tensors"].items()
    }
    narrow["decoder.layers.9.mlp.linear_fc1.weight"] = torch.zeros(2)
    count = sum("mlp.linear" in name for name in narrow)
    message = run_ranks(refusal, 1, {**left, "tensors": narrow})[0]
    assert f"optimizer: {count} (" in message and message.count(" there, ") == 4 and "\n" not in message
    assert "decoder.layers.0.mlp.linear_fc1.weight is [255, 64] there, [256, 64] here" in message


def refusal(rank: int, world_size: int, left: dict) -> str:
    try:
        resume(rank, world_size, "dense", LAYOUTS["TP1 DP1"], 1, 1, left)
    except UserError as error:
        return str(error)
    return "accepted"


STAGES = {
    "1 to 3": ({"zero_stage": 1}, {"zero_stage": 3}),
    "3 to 0": ({"zero_stage": 3}, {"zero_stage": 0}),
    "2 to 1 offloaded": ({"zero_stage": 2}, {"zero_stage": 1, "offload_optimizer": True}),
    "3 offloaded to 2": ({"zero_stage": 3, "offload_optimizer": True}, {"zero_stage": 2}),
}
"""Settings of the session that leaves its state, and of the one that goes on."""
MOVES = {"1 to 3": ("TP2 SP", "DP2"), "3 to 0": ("DP2", "TP2 SP"), "2 to 1 offloaded": ("DP2", "TP1 DP1")}


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("phase", PHASES)
def test_the_zero_stage_may_change_with_the_layout(phase, stages):
    """Masters, W0, initial values and moments come back to the bit, wherever ZeRO kept them."""
    here, there = MOVES.get(stages, ("TP2 SP DP2", "DP2"))
    goes_on_elsewhere("inrank-efficient", here, there, PHASES[phase], settings=STAGES[stages])


class Live(TorchDispatchMode):
    """The most storages of ``size`` bytes that operations have made and that were in use at a time."""

    def __init__(self, size: int):
        super().__init__()
        self._size, self._made, self.most = size, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() == self._size:
                reference = StorageWeakRef(tensor.untyped_storage())
                self._made[reference.cdata] = reference
        self.most = max(self.most, sum(not made.expired() for made in self._made.values()))
        return result


def most_copies(rank: int, world_size: int) -> int:
    """Copies of the embedding's size while the whole state is gone through, beside what trains."""
    session = build("dense", LAYOUTS["TP1 DP1"], num_layers=1, zero_stage=1, bf16=True)
    embedding = dict(session.engine.parameters())["embedding.word_embeddings.weight"]
    with Live(4 * embedding.numel()) as live:
        for _, tensor in whole_tensors(session.engine):
            del tensor
    return live.most


def test_a_checkpoint_takes_the_memory_of_one_tensor():
    """It comes long after a run has begun, and a state at once would be three of the largest."""
    assert run_ranks(most_copies, 1) == [1]

"""A training's state as full tensors: it goes on from there on any layout of ranks."""

from dataclasses import dataclass

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inrank_megatron.checkpoint.slices import Slice
from inrank_megatron.engine.held import held_slices
from inrank_megatron.errors import UserError
from tests.contract.cases import CHECK
from tests.contract.checkpoints import leave_and_go_on, resume
from tests.contract.gathered import assembled
from tests.contract.layouts import LAYOUTS
from tests.contract.sessions import build
from tests.harness import run_ranks

MORE = 3


@dataclass(frozen=True)
class Resume:
    """A training that leaves its state and one that goes on from there.

    Args:
        method: row of ``CASES``.
        step: at which it is left.
        here, there: layouts.
        settings: of the engine, here and there.
        switches: whether the switch comes within the three steps that follow.
    """

    method: str
    step: int
    here: str
    there: str
    settings: tuple[dict, dict] = ({}, {})
    switches: bool = False

    @property
    def exact(self) -> bool:
        """Where nothing changes, the losses are the same to the bit."""
        return self.here == self.there and self.settings[0] == self.settings[1]

    def __str__(self) -> str:
        settings = [" ".join(map(str, _flat(one))) or "ZeRO 1" for one in self.settings]
        return f"{self.method} step {self.step}: {self.here}, {settings[0]} to {self.there}, {settings[1]}"


def _flat(settings: dict) -> list:
    return [f"{name} {value}" for name, value in settings.items()]


PHASES = (CHECK + 1, CHECK + 3)
"""Steps: past the first growth, and past the switch two steps later."""
EFFICIENT, PATIENCE = "inrank-efficient", "inrank-efficient-patience"
SPECTRON = "inrank-efficient-spectron"
APEX = {"optimizer": "apex-fused-adam"}
OFFLOAD = {"offload_optimizer": True}
ZERO = [{"zero_stage": stage} for stage in range(4)]

RESUMES = (
    # On another layout, in either phase; gate and up of a LLaMA lie in shards of each on every rank; Apex's
    # step lies in the parameter group.
    *(
        Resume(method, step, here, there, settings)
        for step in PHASES
        for method, here, there, settings in (
            (EFFICIENT, "TP2 SP", "DP2", ({}, {})),
            (EFFICIENT, "DP2", "TP2 SP DP2", ({}, {})),
            (EFFICIENT, "TP2 SP DP2", "TP1 DP1", ({}, {})),
            (EFFICIENT, "TP1 DP1", "TP2 without SP", ({}, {})),
            ("llama-inrank-efficient", "TP2 SP", "TP1 DP1", ({}, {})),
            (EFFICIENT, "DP2", "TP2 SP", (APEX, APEX)),
            # At another ZeRO stage: wherever that keeps master weights and moments.
            (EFFICIENT, "TP2 SP", "DP2", (ZERO[1], ZERO[3])),
            (EFFICIENT, "DP2", "TP2 SP", (ZERO[3], ZERO[0])),
            (EFFICIENT, "DP2", "TP1 DP1", (ZERO[2], ZERO[1] | OFFLOAD)),
            (EFFICIENT, "TP2 SP DP2", "DP2", (ZERO[3] | OFFLOAD, ZERO[2])),
        )
    ),
    Resume("lora", CHECK, "DP2", "TP2 SP"),
    # Before the restart after six steps, which then draws the same new V and resets the same moments, and
    # past it, where the learning rate warms up again.
    *(
        Resume(method, step, "TP2 SP", "DP2")
        for method in ("relora", "llama-relora")
        for step in (2 * CHECK - 2, 2 * CHECK + 1)
    ),
    # Of the past the switch needs nothing but what the record holds: dense before it, before patience runs
    # out, after the check that ends it.
    Resume("warm-start", CHECK + 1, "TP2 SP", "DP2", switches=True),
    Resume(PATIENCE, 3 * CHECK - 1, "DP2", "TP2 SP", switches=True),
    Resume(PATIENCE, 3 * CHECK, "TP2 SP", "DP2", switches=True),
    # Muon has one moment, Adam's parameters in the same model have two.
    Resume(SPECTRON, PHASES[0], "DP2", "TP2 SP", (ZERO[3], ZERO[1]), switches=True),
    Resume(SPECTRON, PHASES[0], "DP2", "DP2", (ZERO[2], ZERO[2]), switches=True),
    # On the same layout: exactly.
    *(
        Resume(method, CHECK + 1, "TP2 SP", "TP2 SP")
        for method in ("dense", "fixed-rank", "inrank", "relora")
    ),
    # At every ZeRO stage, over the switch, where each keeps master weights and moments elsewhere.
    *(
        Resume(EFFICIENT, CHECK + 1, "DP2", "DP2", (settings, settings), switches=True)
        for settings in (ZERO[0], ZERO[2], ZERO[3], ZERO[2] | OFFLOAD)
    ),
)


@pytest.mark.parametrize("case", RESUMES, ids=str)
def test_training_resumes_with_its_whole_state(case):
    """The tensors come back to the bit, the losses to rounding, and to the bit where nothing changes; the
    switch comes at the same step to the same ranks.

    The story of checkpoints loaded onto another number of ranks that brought the weights and lost the
    optimizer's moments: no error, only a loss that rose (DeepSpeed issues 6503 and 7786). Here every
    moment is there, not zero, and the same as before.
    """
    here, there = LAYOUTS[case.here], LAYOUTS[case.there]
    ranks = run_ranks(leave_and_go_on, here.world_size, case.method, here, case.step, MORE, case.settings[0])
    left, slices = ranks[0], [rank.pop("slices") for rank in ranks]
    check_slices(slices, left["tensors"])
    resumed = run_ranks(resume, there.world_size, case.method, there, case.step, MORE, left, case.settings[1])
    moments = [
        name for name in left["tensors"] if name.endswith(("exp_avg", "exp_avg_sq", "momentum_buffer"))
    ]
    assert moments and all(left["tensors"][name].any() for name in moments)
    assert left["tensors"].keys() == resumed[0]["tensors"].keys()
    for name, tensor in left["tensors"].items():
        assert torch.equal(resumed[0]["tensors"][name], tensor), name
    relative = 0 if case.exact else 1e-6
    for result in resumed:
        assert result["record"] == left["record"]
        assert result["fixed"] == pytest.approx(left["fixed"], rel=relative, abs=0)
        assert result["losses"] == pytest.approx(left["losses"], rel=relative, abs=0)
        assert result["switched"] == left["switched"]
        assert result["last record"] == left["last record"]
        if case.switches:
            assert result["switched"] == (False, True)


def check_slices(slices: list[list[Slice]], tensors: dict[str, torch.Tensor]) -> None:
    """What the ranks would write is each entry of the gathered tensors once, and about as much for each."""
    written = assembled(piece for own in slices for piece in own)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    sizes = [sum(piece.values.nbytes for piece in own) for own in slices]
    assert max(sizes) < 1.5 * sum(sizes) / len(sizes), f"a rank has much more to write: {sizes}"


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


def test_shape_mismatches_are_counted():
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
    """Copies of the embedding's size while all slices are gone through, next to what trains."""
    session = build("dense", LAYOUTS["TP1 DP1"], num_layers=1, zero_stage=1, bf16=True)
    embedding = dict(session.engine.parameters())["embedding.word_embeddings.weight"]
    with Live(4 * embedding.numel()) as live:
        for piece in held_slices(session.engine):
            del piece
    return live.most


def test_slices_to_save_take_no_memory_of_the_device():
    """A save comes long after a run has begun, and what ranks hold needs no copy next to it."""
    assert run_ranks(most_copies, 1) == [0]

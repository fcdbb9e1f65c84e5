"""Cases as their ranks run them; ``oracle.py`` judges what they return. Tensors come back on the CPU."""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from inrank_megatron.engine.decisions import Decisions
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.megatron import checkpoint as megatron
from tests.contract import sessions
from tests.contract.cases import ACCUMULATION, STEPS, SWITCH
from tests.contract.layouts import LAYOUTS, Layout
from tests.contract.overlapped_checks import OneStepLater
from tests.distributed import layer_parity, megatron_folders
from tests.distributed.gpt_parity import configuration
from tests.gpu.profiling import counts_of


def losses(rank: int, world_size: int, settings: dict) -> dict:
    """A training of 50 steps: checks every 3, the switch after 12, restarts every 6."""
    layout = Layout(**settings["layout"])
    return sessions.run(rank, world_size, settings["method"], layout, settings["changes"], STEPS)


def rank_checks(rank: int, world_size: int, settings: dict) -> dict:
    """As :func:`losses`; checks are made and carried out as ``--overlap-rank-check`` has it or not."""
    layout = Layout(**settings["layout"])
    session = sessions.build(settings["method"], layout, **settings["changes"]).start()
    overlap = settings["overlap"]
    return _followed(
        session, Decisions(session.engine, session.method, batches=session.batch, overlap=overlap)
    )


def _followed(session: sessions.Session, decisions: Decisions | OneStepLater) -> dict:
    changes = []
    for step in range(1, STEPS + 1):
        session.train_step()
        changes.append([])
        for decision in decisions.after(step, is_last=step == STEPS):
            session.engine.apply(decision.changes, step=decision.step, batches=session.batch)
            changes[-1] += decision.changes
        session.ranks.append(dict(session.engine.ranks))
    return {
        "losses": session.losses,
        "grad_norms": session.grad_norms,
        "ranks": session.ranks,
        "changes": changes,
    }


def layer(rank: int, world_size: int, settings: dict) -> dict[str, Tensor]:
    """20 steps of one factorised linear, with columns added midway."""
    seen = layer_parity.train_shards(rank, world_size, layer_case(settings), optimizer_of(settings))
    return {name: tensor.cpu() for name, tensor in seen.items()}


def tiles(rank: int, world_size: int, settings: dict) -> tuple[list[int], list[list[Tensor]]]:
    """Products over whole tiles and over the columns in use, of numbers whose sums are exact."""
    widths, found = layer_parity.exact_products(rank, world_size, layer_case(settings))
    return widths, [[tensor.cpu() for tensor in tensors] for tensors in found]


def optimizer_of(settings: dict) -> str:
    """Adam's epsilon is nothing in FP16, and without masters its steps would not be finite."""
    return "AdamW" if settings["dtype"] == "float64" else "SGD"


def layer_case(settings: dict) -> layer_parity.Case:
    return layer_parity.Case(**settings | {"dtype": getattr(torch, settings["dtype"])})


def megatron_checkpoints(rank: int, world_size: int, settings: dict) -> dict:
    """A model that Megatron-Core saves sharded, and one written here that it loads sharded."""
    folder = [tempfile.mkdtemp(prefix="torch-dist-") if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    saved = os.path.join(folder[0], "saved")
    tensors = megatron_folders.save(rank, world_size, world_size, settings, None, None, saved)
    if rank == 0:
        written = Path(folder[0], "written")
        written.mkdir()
        megatron.write(megatron_folders.drawn(configuration(1, **settings), None), written, Options())
    dist.barrier()
    loaded = os.path.join(folder[0], "written", "iter_0000012")
    logits = megatron_folders.load(rank, world_size, world_size, settings, None, loaded)
    return {"folder": folder[0], "saved": tensors, "logits": logits}


def counts(rank: int, world_size: int, settings: dict) -> dict[str, dict[str, int]]:
    """Of one step in either phase."""
    layout = Layout(**settings["layout"])
    changes = settings["changes"]
    session = sessions.build(settings["method"], layout, switch=SWITCH, **changes).start()
    session.train(SWITCH - 2)
    found = {"first phase": counts_of(session)}
    session.train(3)
    return found | {"second phase": counts_of(session)}


def serial(method: str, sizes: dict, given: list | None = None, *, later: bool = False) -> dict:
    """What a case of :func:`losses` is judged by: one process, FP32, ZeRO 1; with ``given`` these changes are
    carried out instead of the method's, and with ``later`` its checks one step later, without a thread.
    """
    micro_batch = sizes["global_batch_size"] // ACCUMULATION
    changes = sizes | {"micro_batch_size": micro_batch}
    if later and given is None:
        session = sessions.build(method, LAYOUTS["TP1 DP1"], **changes).start()
        return _followed(session, OneStepLater(session))
    return sessions.run(0, 1, method, LAYOUTS["TP1 DP1"], changes, STEPS, given)


CASES = {
    "losses": losses,
    "rank checks": rank_checks,
    "layer": layer,
    "tiles": tiles,
    "megatron": megatron_checkpoints,
    "counts": counts,
}

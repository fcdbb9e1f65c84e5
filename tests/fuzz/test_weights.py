"""Models in every format: runs, exports, and checkpoints of other programs."""

import pytest

from tests.fuzz import models
from tests.fuzz.mutate import HEADER, JSON, YAML, damages
from tests.fuzz.pickles import LIST, OBJECT, ZIP
from tests.fuzz.readers import Reader, attack, intact

PLAIN, TORCH = damages(JSON, HEADER), damages(JSON, OBJECT, ZIP)
DISTRIBUTED = damages(JSON, OBJECT, ZIP, LIST, LIST)
READERS = (
    Reader("run", models.run, models.read, damages(JSON, YAML, HEADER), 21),
    Reader("signed run", models.run, models.read, damages(JSON, YAML, HEADER), 42, settle=models.signed),
    Reader("hf-dense GPT-2", models.dense, models.read, PLAIN, 28),
    Reader("hf-dense LLaMA", models.llama, models.read, PLAIN, 14),
    Reader("hf-factorised", models.factorised, models.read, PLAIN, 28),
    Reader("megatron", models.distributed, models.read, DISTRIBUTED, 28),
    Reader("megatron with arguments", models.with_arguments, models.read, DISTRIBUTED, 28),
    Reader("megatron with pickles", models.with_arguments, models.read_with_pickles, DISTRIBUTED, 7),
    Reader("deepspeed", models.engine, models.read, TORCH, 35),
    Reader("deepspeed with pickles", models.engine, models.read_with_pickles, TORCH, 7),
    Reader("reference", models.authors, models.read, TORCH, 28),
    Reader("hf-dense computed", models.dense, models.compute, PLAIN, 6),
    Reader("hf-factorised computed", models.factorised, models.compute, PLAIN, 4),
    Reader("peft computed", models.adapter, models.compute, PLAIN, 6),
    Reader("megatron computed", models.distributed, models.compute, DISTRIBUTED, 4),
)


@pytest.mark.parametrize("reader", READERS, ids=str)
def test_damaged_models_are_read_or_refused(reader, tmp_path):
    tally = attack(reader, intact(reader, tmp_path / "made"), tmp_path / "scratch", examples=reader.examples)
    assert tally.refused

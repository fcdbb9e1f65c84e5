"""From a checkpoint that an engine saved to every format, and from Hugging Face's back into training.

What random weights have not: a vocabulary that was padded for tensor parallelism, columns of factors out of
use, a buffer in use, moments.
"""

import math
from pathlib import Path

import pytest

from inrank_megatron.checkpoint.folder import Checkpoint
from inrank_megatron.generation.command import run as generate
from inrank_megatron.interop.command import run as convert
from inrank_megatron.interop.formats import writable
from tests.distributed.evaluate_runs import evaluations
from tests.distributed.hugging_face_losses import first_loss
from tests.distributed.launches import ADAMW, TINY, data_flags, launch, records
from tests.harness import run_ranks
from tools.convert_checkpoint import parse as parse_conversion
from tools.generate import parse as parse_generation

VOCABULARY = 301
"""Padded to 512 rows at tensor-parallel size 2, to 384 at 1."""
MODEL = [*TINY[1 : TINY.index("--rank-check-interval")], "--vocab-size", str(VOCABULARY)]
# Large weights: few steps leave a model whose greedy text is varied.
MODEL += [*ADAMW, "--init-method-std", "0.4", "--lr-warmup-iters", "2"]
STEPS = {"first phase": 6, "second phase": 12}
INRANK = ["--inrank", "--rank-check-interval", "4"]
STARTS = {
    "lora": ["--method", "lora", "--rank", "8"],
    "relora": ["--method", "relora", "--rank", "8", "--relora-interval", "2", "--relora-warmup-iters", "1"],
    "inrank": [*INRANK, "--switch-iters", "4"],
}
PROMPT = "The parser of the arguments"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return data_flags(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> Path:
    """InRank-Efficient on two ranks, with a checkpoint and an evaluation on both sides of its switch."""
    run = tmp_path_factory.mktemp("trained") / "run"
    flags = [*MODEL, *data, *INRANK, "--tensor-model-parallel-size", "2", "--save", str(run)]
    first, last = STEPS.values()
    course = ["--train-iters", str(last), "--switch-iters", str(first + 2)]
    ended = launch(
        [*flags, *course, "--save-interval", str(first), "--eval-interval", str(first)], num_procs=2
    )
    assert ended.process.returncode == 0, ended.stderr
    return run


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


@pytest.fixture(scope="module", params=STEPS)
def exported(request, trained, tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """A checkpoint, and what the tool makes of it: every format that its phase allows."""
    checkpoint = checkpoint_of(trained, STEPS[request.param])
    folder = tmp_path_factory.mktemp("exported")
    kinds = [kind for kind in writable() if kind != "peft" or request.param == "first phase"]
    for kind in kinds:
        convert(parse_conversion([str(checkpoint), str(folder / kind), "--format", kind]))
    return checkpoint, {kind: folder / kind for kind in kinds}


def test_checkpoints_have_moments_padding_and_unused_columns(trained):
    first, second = (Checkpoint(checkpoint_of(trained, step), verify=False) for step in STEPS.values())
    for checkpoint in (first, second):
        assert any(name.rpartition(".")[0] in checkpoint.names for name in checkpoint.names), "moments"
    before, after = ([*saved.state["engine"]["factors"].values()] for saved in (first, second))
    assert all(spec["base"] and spec["rank"] < spec["active"] < spec["columns"] for spec in before)
    assert not any(spec["base"] for spec in after)


def test_exports_match_the_perplexity_of_their_checkpoint(exported, trained, data, tmp_path):
    """And that is what the ranks found when they saved it."""
    checkpoint, exports = exported
    (tmp_path / "text.txt").write_text(Path(data[1]).read_text()[:6000])
    text = ["--data", str(tmp_path / "text.txt"), "--data-cache-path", str(tmp_path), "--seq-length", "64"]
    models = [checkpoint, *(path for kind, path in exports.items() if kind != "peft")]
    calls = [[str(checkpoint)], *([str(model), *text] for model in models)]
    [[own, expected, *found]] = run_ranks(evaluations, 1, calls)
    [recorded] = [r for r in records(trained, "eval") if (r["step"], r["split"]) == (own["step"], "valid")]
    assert own["perplexity"] == pytest.approx(recorded["perplexity"], rel=1e-5)
    assert [record["format"] for record in found] == [kind for kind in exports if kind != "peft"]
    assert [r["perplexity"] for r in found] == pytest.approx([expected["perplexity"]] * len(found), rel=1e-4)


def test_exports_match_the_greedy_text_of_their_checkpoint(exported, capsys):
    def text(model: Path) -> str:
        generate(parse_generation([str(model), "--greedy", "--prompt", PROMPT, "--max-new-tokens", "24"]))
        return capsys.readouterr().out

    checkpoint, exports = exported
    expected = text(checkpoint)
    assert len(set(expected.removeprefix(PROMPT))) > 8, "a text that says little of its model"
    assert {kind: text(path) for kind, path in exports.items() if kind != "peft"} == {
        kind: expected for kind in exports if kind != "peft"
    }


@pytest.fixture(scope="module")
def returned(trained, tmp_path_factory) -> tuple[Path, Path]:
    """A dense export of the second phase, and the run that is made of it."""
    folder = tmp_path_factory.mktemp("returned")
    source = checkpoint_of(trained, STEPS["second phase"])
    for target, kind in (("dense", "hf-dense"), ("run", "run")):
        convert(parse_conversion([str(source), str(folder / target), "--format", kind]))
        source = folder / target
    return folder / "dense", folder / "run"


@pytest.mark.parametrize("method", STARTS)
def test_training_starts_from_a_hugging_face_round_trip(method, returned, data, tmp_path):
    """No method changes the function at its start, so the first loss is that of transformers' model."""
    dense, start = returned
    run = tmp_path / "run"
    flags = [*MODEL, *data, *STARTS[method], "--tokenizer", str(start / "tokenizer")]
    course = ["--pretrained-checkpoint", str(start), "--train-iters", "6", "--save", str(run)]
    ended = launch([*flags, *course])
    assert ended.process.returncode == 0, ended.stderr
    losses = [record["loss"] for record in records(run, "train")]
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    assert losses[0] == pytest.approx(first_loss(dense, run), rel=1e-4)

"""What every conversion promises: proof, nothing half done, and memory for a tensor and not for a model."""

import gc
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inrank_megatron.errors import UserError
from inrank_megatron.interop import command, formats
from inrank_megatron.interop.convert import check_only, convert
from inrank_megatron.interop.core import run as run_format
from inrank_megatron.interop.core.verify import Difference, difference
from inrank_megatron.interop.formats import format_of, writable
from inrank_megatron.interop.hub import located
from inrank_megatron.interop.huggingface import dense as hf_dense
from tests.forked import run_forked
from tests.runs import random_weights
from tests.unit.interop.models import OPTIONS, VOCABULARY, make_weights, write_run
from tools.convert_checkpoint import parse

TOOL = Path(__file__).resolve().parents[3] / "tools" / "convert_checkpoint.py"
# Has malloc give freed memory back at once: what it would keep differs from run to run.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
# Prints by how many bytes the process's memory grows while it writes, and the sizes of what it writes.
STREAM = """
import ctypes, re, sys
from dataclasses import replace
from pathlib import Path
import torch
from inrank_megatron.interop import formats
from inrank_megatron.interop.core import weights
from tests.unit.interop.models import OPTIONS, make_weights
torch.set_num_threads(1)
kind, out = formats.writable()[sys.argv[1]], Path(sys.argv[4])
for folder in ("first", "second"):
    (out / folder).mkdir()
kind.write(make_weights(sys.argv[2], sys.argv[3]), out / "first", OPTIONS)  # libraries are loaded then
small = make_weights(sys.argv[2], sys.argv[3], num_layers=24, hidden_size=384, ffn_hidden_size=1536)
def now(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def read(name):
    return torch.full(shapes[name], 0.5)
# Adapters are a good part of what is written.
wide = {"capacity": 192, "active_columns": 192, "rank": 192}
factors = {name: replace(spec, **wide) for name, spec in small.factors.items()}
model = weights.Weights("generated", small.config, small.vocab_size, factors, read)
del small
shapes = model.shapes
sizes = [4 * torch.Size(shape).numel() for shape in shapes.values()]
ctypes.CDLL(None).malloc_trim(0)  # what the small model left behind is not there to be used again
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = now("VmRSS")
kind.write(model, out / "second", OPTIONS)
written = sum(path.stat().st_size for path in (out / "second").rglob("*") if path.is_file())
print(now("VmHWM") - before, max(sizes), written)
"""


def ignore(_line: str) -> None:
    pass


@pytest.fixture
def run(tmp_path, tokenizer) -> Path:
    return write_run(make_weights("gpt2", "first phase", tokenizer=tokenizer), tmp_path / "run")


def perturb(folder: Path, name: str, by: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] += by
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["hf-dense", "hf-factorised"])
def test_one_altered_number_fails_the_check(run, tmp_path, kind):
    target = tmp_path / "exported"
    convert(run, target, kind, OPTIONS, notify=ignore)
    assert check_only(run, target, OPTIONS).is_rounding
    perturb(target, "transformer.h.1.mlp.c_fc.bias", 0.05)
    with pytest.raises(UserError, match=r"exported: does not compute the same as .*run \(largest logit"):
        check_only(run, target, OPTIONS)


def test_models_of_two_vocabularies_are_not_compared(run, tmp_path):
    weights = random_weights(vocab_size=VOCABULARY + 1, tokenizer=None, ranks=None)
    other = write_run(weights, tmp_path / "other")
    with pytest.raises(UserError, match=r"other: knows .* tokens, and .*run .*; name two folders"):
        check_only(run, other, OPTIONS)


def test_a_conversion_that_computes_something_else_leaves_nothing(run, tmp_path, monkeypatch):
    """As if the map of the names were wrong in one place."""
    write = hf_dense.write

    def wrong(weights, folder, options) -> None:
        write(weights, folder, options)
        perturb(folder, "transformer.h.0.attn.c_attn.weight", 1.0)

    monkeypatch.setattr(hf_dense, "write", wrong)
    with pytest.raises(UserError, match="does not compute the same as"):
        convert(run, tmp_path / "exported", "hf-dense", OPTIONS, notify=ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "fault", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("?")]
)
def test_a_conversion_that_breaks_off_leaves_nothing(run, tmp_path, monkeypatch, fault):
    write = hf_dense.write

    def breaks(weights, folder, options) -> None:
        write(weights, folder, options)
        raise fault

    monkeypatch.setattr(hf_dense, "write", breaks)
    with pytest.raises(UserError if isinstance(fault, OSError) else type(fault)):
        convert(run, tmp_path / "exported", "hf-dense", OPTIONS, notify=ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_target_that_exists_is_left_alone(run, tmp_path):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported/mine").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        convert(run, tmp_path / "exported", "hf-dense", OPTIONS, notify=ignore)
    assert (tmp_path / "exported/mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("kind", "family", "structure"),
    [
        ("hf-dense", "llama", "first phase, QKV fused"),
        ("hf-factorised", "gpt2", "first phase, QKV separate"),
        ("run", "gpt2", "first phase"),
        ("megatron", "gpt2", "first phase"),
        ("peft", "gpt2", "first phase, QKV fused"),
    ],
)
def test_writing_needs_memory_for_a_few_tensors(tmp_path, kind, family, structure):
    command = [sys.executable, "-c", STREAM, kind, family, structure, str(tmp_path)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=TOOL.parents[1], env=os.environ | GIVEN_BACK
    )
    grown, largest, written = map(int, done.stdout.split())
    assert written > 35 * largest
    assert grown < 6 * largest, f"{grown / 1e6:.1f} MB for tensors of at most {largest / 1e6:.1f} MB"


@pytest.mark.parametrize("pair", ["run to megatron", "run to peft", "deepspeed to run"])
def test_pairs_that_the_tool_converts(run, tmp_path, capsys, pair):
    source, kind = run, pair.split()[-1]
    options = []
    if pair.startswith("deepspeed"):
        # As an engine without ZeRO saves it; the tests of its folders read what DeepSpeed itself wrote.
        weights = run_format.open_weights(run, OPTIONS)
        (source := tmp_path / "saved").mkdir()
        module = {name: weights.read(name) for name in weights.shapes}
        torch.save({"module": module, "global_steps": 7}, source / "mp_rank_00_model_states.pt")
        options = ["--model-config", str(run / "config.yaml"), "--vocab-size", str(VOCABULARY)]
    target = tmp_path / "to"
    command.run(parse([str(source), str(target), "--format", kind, *options]))
    out, output = capsys.readouterr()
    assert re.fullmatch(
        rf"{target}: same model as {source}: largest logit difference \S+ \(at most 0\.0001\), "
        r"KL \S+ nats per token \(at most 0\.0002\)\n",
        out,
    )
    assert f"({pair.split()[0]}, step 7) -> {target} ({kind})\n" in output
    assert format_of(target) is writable()[kind]


def test_convert_tool_prints_the_proof(run, tmp_path):
    """Its lines, its exit status, and errors without a traceback."""
    target = tmp_path / "exported"
    command = [sys.executable, str(TOOL), str(run), str(target), "--format", "hf-factorised"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{target}: same model as {run}: largest logit difference ")
    perturb(target, "transformer.h.0.mlp.c_fc.U", 1.0)
    failed = run_forked(TOOL, run, target, "--check-only")
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    unknown = run_forked(TOOL, "a-name/that-nobody-has", tmp_path / "new", "--format", "run")
    assert unknown.returncode == 1 and unknown.stderr.startswith(
        "error: a-name/that-nobody-has: is not a folder"
    )
    assert unknown.stderr.count("\n") == 1


def test_a_name_of_the_hub_is_what_was_downloaded_before(tmp_path, monkeypatch):
    """Offline, from the cache, as the hub's library lays it out."""
    import huggingface_hub

    cache = tmp_path / "cache"
    snapshot = cache / "models--someone--tiny/snapshots/0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0123")
    hf_dense.write(make_weights("llama", "dense"), snapshot, OPTIONS)
    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **more: download(name, cache_dir=cache, **more)
    )
    assert located("someone/tiny") == snapshot
    assert located(str(tmp_path)) == tmp_path
    for absent in ("./someone/tiny", "/no/such/folder"):
        assert located(absent) == Path(absent)
    with pytest.raises(
        UserError, match=r"^someone/else: is not a folder here and cannot be loaded from the hub"
    ):
        located("someone/else")


def test_a_run_takes_the_tokenizer_and_not_the_model_beside_it(run, tmp_path):
    convert(run, tmp_path / "exported", "hf-dense", OPTIONS, notify=ignore)
    convert(tmp_path / "exported", tmp_path / "new", "run", OPTIONS, notify=ignore)
    assert not list((tmp_path / "new/tokenizer").glob("*.safetensors"))
    assert (tmp_path / "new/tokenizer/tokenizer.json").is_file()


def test_rounding_tolerance():
    assert Difference(9e-5, 0.0).is_rounding and not Difference(1.1e-4, 0.0).is_rounding
    assert not Difference(1.1e-4, 0.0, magnitude=150.0).is_rounding, "the bound is one that a user can see"
    assert Difference(1.1e-4, 0.0, tolerance=2e-4).is_rounding
    assert Difference(0.0, 1.9e-4).is_rounding and not Difference(0.0, 2.1e-4).is_rounding
    assert not Difference(float("nan"), 0.0).is_rounding and not Difference(0.0, float("nan")).is_rounding
    assert str(Difference(1.5e-7, 2e-13)) == (
        "largest logit difference 1.50e-07 (at most 0.0001), KL 2.00e-13 nats per token (at most 0.0002)"
    )


@pytest.mark.parametrize("by", [1e-3, 0.1, 1.0, 20.0])
def test_no_kl_is_beyond_what_the_logits_allow(by):
    generator = torch.Generator().manual_seed(0)
    first = 5 * torch.randn(50, 3, 7, generator=generator)
    second = first + by * (2 * torch.rand(50, 3, 7, generator=generator).round() - 1)
    found = difference(first, second, tolerance=1.001 * by)
    assert found.kl > 0 and found.is_rounding


def test_a_tolerance_that_is_given(run, tmp_path):
    convert(run, tmp_path / "exported", "hf-dense", OPTIONS, notify=ignore)
    perturb(tmp_path / "exported", "transformer.h.1.mlp.c_fc.bias", 0.05)
    with pytest.raises(UserError, match=r"0\.0001\), KL .* 0\.0002\); largest logit .*--tolerance"):
        check_only(run, tmp_path / "exported", OPTIONS)
    assert check_only(run, tmp_path / "exported", replace(OPTIONS, tolerance=1.0)).is_rounding


def test_verification_holds_one_model_at_a_time(run, tmp_path, monkeypatch):
    """Seen from this project's model, which both sides are computed with here."""
    from megatron.core.models.gpt import GPTModel

    alive, forward = [], formats.gpt_forward

    def seen(weights):
        alive.append(sum(issubclass(type(thing), GPTModel) for thing in gc.get_objects()))
        return forward(weights)

    monkeypatch.setattr(formats, "gpt_forward", seen)
    gc.collect()
    gc.disable()  # that no collection of its own hides what stays
    try:
        convert(run, tmp_path / "again", "run", OPTIONS, notify=ignore)
    finally:
        gc.enable()
    assert len(alive) == 2 and alive[1] == alive[0]


def test_a_source_is_opened_once(run, tmp_path, monkeypatch):
    """Opening a run's checkpoint reads every byte of it, for the sums in its manifest."""
    opened, open_weights = [], run_format.open_weights

    def seen(path, options):
        opened.append(path)
        return open_weights(path, options)

    monkeypatch.setattr(run_format, "open_weights", seen)
    convert(run, tmp_path / "exported", "hf-dense", OPTIONS, notify=ignore)
    assert opened == [run]


def test_of_a_model_s_folder_only_the_tokenizer_goes_on(run, tmp_path):
    """An export's weights lie next to its tokenizer."""
    convert(run, tmp_path / "exported", "hf-dense", OPTIONS, notify=ignore)
    convert(tmp_path / "exported", tmp_path / "to", "megatron", OPTIONS, notify=ignore)
    kept = {path.name for path in (tmp_path / "to" / "tokenizer").iterdir()}
    assert "tokenizer.json" in kept and not any("model" in name or name == "config.json" for name in kept)

"""Tools on a machine with a GPU: what computes on it, and what stays on the CPU."""

import json

import pytest

from tests.emulated import tools
from tests.emulated.device import run_emulated
from tests.unit.interop.models import make_tokenizer, make_weights, write_run


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_both_models_of_a_conversion_stay_on_the_cpu(tmp_path, family):
    """Megatron moves the angles of a LLaMA to the GPU that it sees, wherever the model is: every conversion
    of one failed there.
    """
    source = write_run(make_weights(family, "dense"), tmp_path / "run")
    status, printed = run_emulated(tools.converted, str(source), str(tmp_path / "exported"))
    assert status == 0 and "same model as" in printed, printed


def test_an_evaluation_computes_on_the_device(tmp_path):
    run = write_run(make_weights("llama", "first phase"), tmp_path / "run")
    make_tokenizer().save(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 50)
    words = ["--data", str(tmp_path / "text.txt"), "--data-cache-path", str(tmp_path / "cache"), "--json"]
    words += ["--tokenizer", str(tmp_path / "tokenizer"), "--stride", "8"]
    printed = run_emulated(tools.evaluated, str(run), *words)
    assert json.loads(printed.output)["stride"] == 8
    assert printed.products == {"gpu"}


@pytest.mark.parametrize("how", ["--greedy", "--num-return-sequences=2"])
def test_text_is_made_on_the_device(tmp_path, how):
    """Prompt, cache, logits and the draw of a token: nothing of the host meets them."""
    run = write_run(make_weights("llama", "first phase"), tmp_path / "run")
    make_tokenizer().save(tmp_path / "tokenizer")
    words = [
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--prompt",
        "The quick",
        "--num-return-sequences",
        "2",
    ]
    printed = run_emulated(tools.generated, str(run), *words)
    assert printed.output.startswith("The quick") and printed.products == {"gpu"}

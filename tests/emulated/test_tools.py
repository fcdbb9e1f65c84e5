"""Tools on a machine with a GPU: what computes on it, and what stays on the CPU."""

import json
from collections import Counter

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


TOKENS = 12
"""More than anything that is asked once."""


@pytest.mark.parametrize(
    ("family", "how", "rows"), [("llama", "--greedy", 1), ("gpt2", "--num-return-sequences=2", 2)]
)
def test_text_is_made_on_the_device(tmp_path, family, how, rows):
    """Prompt, cache, logits and the draw of a token: nothing of the host meets them, and it waits for each
    token once. After the prompt each pass is of the last token alone.
    """
    run = write_run(make_weights(family, "first phase"), tmp_path / "run")
    make_tokenizer().save(tmp_path / "tokenizer")
    words = [
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--prompt",
        "The quick",
    ]
    printed = run_emulated(tools.generated, TOKENS, str(run), *words, how)
    assert printed.output.startswith("The quick") and printed.products == {"gpu"}
    waits = Counter(wait.place for wait in printed.waits)
    print(waits)
    assert {place: count for place, count in waits.items() if count >= TOKENS} == {tools.STOPS: TOKENS}
    passes = [shape for shape in printed.looked_up if shape[0] == rows]
    assert passes.count((rows, 1)) >= TOKENS - 1 and len({shape for shape in passes if shape[1] > 1}) == 1

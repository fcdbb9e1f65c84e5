"""The commands of ``docs/guides/use_a_model.md`` and the script of ``convert.md`` on a tiny run, offline."""

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.run import open_weights
from tests.distributed.launches import TINY, data_flags, launch
from tests.forked import run_forked
from tests.harness import ROOT, free_port
from tests.runs import random_weights, write_run

PAGE = (ROOT / "docs" / "guides" / "use_a_model.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SHOWN = {"", "yaml"}
"""Blocks that are not run: what tools print, and a task for lm-eval."""
RUN_HERE = {"python", "torchrun", "cat"}
MARKED = re.findall(r'^```bash title="(.*)"$', PAGE, re.MULTILINE)
"""lm-eval, the server of transformers (it needs fastapi and uvicorn) with its client, and llama.cpp."""
LINES = [
    line
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
]
SCRIPTS = [block for language, block in BLOCKS if language == "python"]
CONVERT = (ROOT / "docs" / "guides" / "convert.md").read_text()
SCRIPTS += re.findall(r"^```python\n(.*?)^```$", CONVERT, re.MULTILINE | re.DOTALL)
CONVERSIONS = [line for line in LINES if "tools/convert_checkpoint.py" in line]
OTHERS = [line for line in LINES if line not in CONVERSIONS and line.split()[0] in RUN_HERE]
# As the page's own text says of WikiText: a folder in the place of the hub's dataset.
DATASET = """---
configs:
- config_name: wikitext-103-raw-v1
  data_files:
  - split: test
    path: test.txt
---
"""


def execute(line: str, folder: Path) -> str:
    """What a line prints: a tool in a fork, which saves the start of an interpreter, all else in bash."""
    words = shlex.split(line, comments=True)
    with contextlib.chdir(folder):
        if words[0] == "python" and "|" not in words:
            done = run_forked(Path(words[1]), *words[2:])
        else:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "PET_MASTER_PORT": str(free_port())}
            command = ["bash", "-euo", "pipefail", "-c", line]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The page's run and LoRA run, its texts, and what its conversions and its script make of them."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "tools").symlink_to(ROOT / "tools")
    flags = [*TINY, *data_flags(folder / "data"), "--save", str(folder / "runs" / "wikitext")]
    ended = launch([*flags, "--train-iters", "12", "--switch-iters", "8"])
    assert ended.process.returncode == 0, ended.stderr
    trained = open_weights(folder / "runs" / "wikitext", Options())
    lora = random_weights(vocab_size=trained.vocab_size, tokenizer=trained.tokenizer, ranks=6)
    write_run(folder / "runs" / "lora", lora)
    text = Path(argparse.__file__).read_text()[:6000]
    (folder / "Salesforce" / "wikitext").mkdir(parents=True)
    for name, content in {
        "wiki.valid.tokens": text,
        "prompt.txt": "The castle",
        "Salesforce/wikitext/README.md": DATASET,
        "Salesforce/wikitext/test.txt": text,
    }.items():
        (folder / name).write_text(content)
    for line in CONVERSIONS:
        execute(line, folder)
    for number, script in enumerate(SCRIPTS):
        (folder / f"script{number}.py").write_text(script)
        execute(f"python script{number}.py", folder)
    return folder


def test_every_block_of_the_page_is_run():
    assert {language for language, _ in BLOCKS} == {"bash", "python", *SHOWN}
    assert {line.split()[0] for line in LINES} == RUN_HERE
    assert MARKED == ["Needs lm-eval", "Needs a server", "Needs llama.cpp"]


@pytest.mark.parametrize("line", OTHERS)
def test_command_of_the_page_runs(line, folder):
    printed = execute(line, folder)
    assert printed.strip()
    if "--json" in line:  # once, on however many ranks
        json.loads(printed)


@pytest.mark.parametrize(
    ("exports", "run"), [(("exported", "small"), "runs/wikitext"), (("merged",), "runs/lora")]
)
def test_exports_match_the_perplexity_of_their_run(exports, run, folder):
    def perplexity(name: str) -> float:
        data = "--data wiki.valid.tokens --seq-length 32 --json"
        return json.loads(execute(f"python tools/evaluate.py {name} {data}", folder))["perplexity"]

    assert [perplexity(name) for name in exports] == pytest.approx([perplexity(run)] * len(exports), rel=1e-5)

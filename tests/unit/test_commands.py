"""Every shipped configuration and every command of the documents names what exists today.

A launch is checked and planned, a tool's call is parsed, and any other line must be a known script or shell
command, or lie in a block whose title says what it needs: ``bash title="Needs two nodes"``.
"""

import contextlib
import functools
import io
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from inrank_megatron.benchmarks.command import NOTES as BENCHMARKS
from inrank_megatron.benchmarks.command import _parse as parse_bench
from inrank_megatron.config.checks import check
from inrank_megatron.config.cli import Launch, parse
from inrank_megatron.config.cluster import parse_cluster
from inrank_megatron.config.flags import build_parser
from inrank_megatron.config.plan import make_plan, render
from inrank_megatron.config.topology import topology_of
from inrank_megatron.data.vocabulary import planned_vocabulary
from inrank_megatron.experiments.command import _parse as parse_reproduce
from inrank_megatron.experiments.registry import EXPERIMENTS
from tests.gpu.__main__ import _parse as parse_gpu_tests
from tools import (
    convert_checkpoint,
    evaluate,
    generate,
    inspect_ranks,
    plan,
    preflight,
    prepare_data,
    report,
    sweep,
)

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PROGRAM = ("launch/pretrain_gpt2.py", "inrank_megatron_launch.pretrain_gpt2")
TOOLS = {
    "convert_checkpoint": convert_checkpoint.parse,
    "evaluate": evaluate.parse,
    "generate": generate.parse,
    "inspect_ranks": inspect_ranks.parse,
    "plan": plan.options,
    "preflight": preflight.options,
    "prepare_data": prepare_data.settings,
    "bench": parse_bench,
    "reproduce": parse_reproduce,
    "sweep": sweep.options,
    "report": report.parse,
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def bash_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(title of the block, command) of a page's bash blocks, with the variables that a block sets."""
    variables: dict[str, str] = {}
    for title, block in re.findall(
        r'^```bash(?: title="([^"]*)")?\n(.*?)^```',
        path.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    ):
        for line in block.replace("\\\n", " ").splitlines():
            if assigned := re.fullmatch(r'(\w+)=("[^"]*"|\S*)', line.strip()):
                variables[assigned[1]] = " ".join(shlex.split(assigned[2]))
            else:
                yield title, re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line)


def commands() -> list[tuple[str, str, list[str]]]:
    """(page, title of the block, words) of each command in a bash block."""
    found = []
    for page in PAGES:
        for title, line in bash_lines(page):
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&")
            lexer.whitespace_split = True
            for separator, words in itertools.groupby(lexer, lambda word: set(word) <= set("|;&")):
                words = list(itertools.dropwhile(lambda word: re.fullmatch(r"\w+=.*", word), words))
                if not separator and words:
                    found.append((name_of(page), title, words))
    return found


COMMANDS = commands()
OWN = [(page, words) for page, _, words in COMMANDS if set(words) & set(PROGRAM)]
TOOL_CALLS = [
    (page, words) for page, _, words in COMMANDS if any(word.startswith("tools/") for word in words)
]
OTHER_CALLS = [
    (page, words)
    for page, title, words in COMMANDS
    if not title.startswith("Needs ") and (page, words) not in [*OWN, *TOOL_CALLS]
]
SHELL = {"cat", "grep", "head", "mkdocs", "mypy", "ruff", "source", "tail"}


def planned(launch: Launch) -> str:
    """The page of a dry run, as ``training/run.py`` makes it; no network is there for it."""
    vocab_size, vocabulary = planned_vocabulary(launch.config.data)
    with launch.naming_origins():
        check(launch.config, world_size=launch.world_size)
    topology = topology_of(launch.config, world_size=launch.world_size, vocab_size=vocab_size)
    device = launch.cluster.device if launch.cluster else "cpu"
    options = {"device": device, "cluster": launch.cluster, "vocabulary": vocabulary}
    return render(make_plan(launch.config, topology, vocab_size=topology.vocab_size, **options))


def test_the_documents_have_commands():
    assert len(OWN) > 10 and len(TOOL_CALLS) > 15


@pytest.mark.parametrize(("page", "words"), OWN, ids=lambda value: value if isinstance(value, str) else None)
def test_a_launch_of_the_documents_is_accepted(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    start = next(index for index, word in enumerate(words) if word in PROGRAM)
    processes = next(
        (int(n) for name, n in itertools.pairwise(words) if name in ("--num_gpus", "--nproc-per-node")), 1
    )
    assert "$" not in " ".join(words)
    launch = parse(words[start + 1 :], world_size=processes)
    assert "parameters" in planned(launch)
    check_dataset(launch)


@pytest.mark.parametrize(
    ("page", "words"), TOOL_CALLS, ids=lambda value: value if isinstance(value, str) else None
)
def test_a_tool_of_the_documents_is_called_as_it_is(page, words):
    start = next(index for index, word in enumerate(words) if word.startswith("tools/"))
    assert (ROOT / words[start]).is_file()
    options = TOOLS[Path(words[start]).stem](words[start + 1 :])
    dataset = getattr(options, "dataset", None)
    assert dataset is None or "/" in dataset
    flags = getattr(options, "flags", None)
    if flags is not None:  # of the launches that a comparison makes
        parse(flags, world_size=1)


@pytest.mark.parametrize("call", OTHER_CALLS, ids=lambda call: f"{call[0]}-{call[1][0]}")
def test_a_line_that_is_no_call_of_ours_is_a_script_or_marked_with_what_it_needs(call):
    _, words = call
    assert (ROOT / words[1]).is_file() if words[0] == "bash" else words[0] in SHELL


def check_dataset(launch: Launch) -> None:
    """The hub's data sets are all OWNER/NAME."""
    dataset = launch.config.data.dataset
    assert dataset is None or re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", dataset)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_states_a_cluster_that_it_fits(path):
    """In its head; the plan needs no network, and only known tokenizers are named."""
    head = "".join(itertools.takewhile(lambda line: line.startswith("#"), path.open()))
    [cluster] = re.findall(r"--dry-run --cluster (\S+?)\.\s", head)
    launch = parse(["--config", str(path), "--dry-run", "--cluster", cluster], world_size=1)
    page = planned(launch)
    assert launch.notes == () and launch.world_size == parse_cluster(cluster).world_size
    assert "planned for  1 node of " in page and "not on this machine" not in page
    assert ("memory       fits: " in page) == (cluster != "2xcpu")
    check_dataset(launch)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_and_files_in_the_text_exist(page):
    text = page.read_text(encoding="utf-8")
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    flags = {flag.replace("_", "-") for code in inline for flag in re.findall(r"(?<!\S)--[a-z][\w-]+", code)}
    assert flags - all_flags() == set()
    files = {
        file for code in inline for file in re.findall(r"^(?:configs|tools|launch|docs|tests)/[\w/.]+$", code)
    }
    files -= {"configs/model/gpt2.yaml"}  # of InRank's authors
    assert {file for file in files if not (ROOT / file).exists()} == set()
    links = {link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link}
    assert {link for link in links if not (page.parent / link).exists()} == set()
    places = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text)
    assert {
        (link, at) for link, at in places if at not in anchors(page.parent / link if link else page)
    } == set()


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as the site and repository browsers make them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


# Flags of other programs: launchers, batch systems, containers, the installation, transformers, Megatron-LM.
OTHERS = {
    *(
        "--num-gpus",
        "--nproc-per-node",
        "--master-port",
        "--module",
        "--log-level",
        "--hostfile",
        "--include",
    ),
    "--use-rope-scaling",
    *("--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--signals-to-handle"),
    *("--gpus-per-node", "--gpus-per-task", "--ntasks-per-node", "--signal", "--ipc", "--shm-size"),
    *("--torch-index", "--strict", "--check", "--logdir"),
    *("--trust-remote-code", "--ckpt-format", "--no-pipeline-parallel", "--finetune", "--swiglu"),
    *("--position-embedding-type", "--disable-bias-linear", "--normalization"),
    *("--untie-embeddings-and-output-weights",),
}


@functools.cache
def all_flags() -> set[str]:
    """Of the launcher, the tools and `tests/gpu.sh`, as their help shows them."""
    calls = [(build_parser().parse_args, [])]
    calls += [(TOOLS[name], []) for name in TOOLS if name not in ("bench", "reproduce")]
    calls += [(parse_bench, [what]) for what in BENCHMARKS]
    calls += [(parse_gpu_tests, [])]
    calls += [(parse_reproduce, [what]) for what in EXPERIMENTS]
    shown = io.StringIO()
    for read, words in calls:
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
            read([*words, "--help"])
    return set(re.findall(r"--[a-z][\w-]*", shown.getvalue())) | OTHERS

"""Generated pages and figures are current, the site builds, and evidence agrees with its rows."""

import csv
import hashlib
import os
import re
import runpy
import subprocess
import sys

import pytest
import yaml

from tests.harness import ROOT

DOCS = ROOT / "docs"
ROWS_OF_THE_COMPARISON = {
    "dense": "dense",
    "warm start, budget 0.3": "warm start, budget",
    "**InRank-Efficient, the default**": "InRank-Efficient, grown: the default",
    "InRank-Efficient, budget 0.3": "InRank-Efficient, output, budget",
    "InRank, no switch": "InRank",
    "fixed rank of InRank's size": "fixed rank, random, found rank",
    "fixed rank of InRank's size, x 4": "fixed rank, random, found rank, x 4",
    "fixed rank, budget 0.3": "fixed rank, random, budget",
    "ReLoRA, budget 0.3": "ReLoRA, budget",
    "LoRA, budget 0.3": "LoRA, budget",
}


def test_the_reference_is_generated_from_the_schema_as_it_is():
    pages = runpy.run_path(str(DOCS / "scripts" / "reference.py"))["pages"]()
    stale = [name for name, text in pages.items() if (DOCS / "reference" / name).read_text() != text]
    assert not stale, "run python docs/scripts/reference.py"


def test_figures_are_those_that_the_script_draws():
    drawn = runpy.run_path(str(DOCS / "scripts" / "figures.py"))["DRAWN"]
    stale = [name for name, draw in drawn.items() if (DOCS / "figures" / name).read_text() != draw()]
    assert not stale, "run python docs/scripts/figures.py"


def test_every_page_is_in_the_navigation_of_the_site_once():
    def pages(entries: list) -> list[str]:
        return [page for e in entries for page in ([e] if isinstance(e, str) else pages(*e.values()))]

    listed = pages(yaml.safe_load((ROOT / ".mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_site_builds_without_a_warning(tmp_path):
    """A link or an anchor that leads nowhere is a warning, and so is a page that the navigation lacks."""
    words = ["build", "--strict", "-f", ".mkdocs.yml", "-d", str(tmp_path / "site")]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *words],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert (tmp_path / "site/tutorial/first_run.html").is_file()


@pytest.mark.parametrize("page", sorted((DOCS / "evidence").glob("*.md")), ids=lambda path: path.stem)
def test_a_page_of_evidence_has_a_claim_and_limits(page):
    text = page.read_text()
    if page.stem != "index":
        assert re.search(r"^\*\*Claim\.\*\*", text, re.MULTILINE) and "\n## Limits\n" in text


@pytest.mark.parametrize("plot", sorted((DOCS / "evidence").glob("*.svg")), ids=lambda path: path.stem)
def test_a_plot_of_evidence_is_of_the_rows_as_they_are(plot):
    [(data, rows_hash)] = re.findall(r">(\w+\.csv) ([0-9a-f]{64})<", plot.read_text())
    current = hashlib.sha256((DOCS / "evidence/data" / data).read_bytes()).hexdigest()
    assert rows_hash == current, "run python docs/scripts/plots.py"


def test_the_table_of_the_comparison_has_the_means_of_its_rows():
    with (DOCS / "evidence/data/comparison.csv").open(newline="") as file:
        means = {
            (row["arm"], row["model"], row["budget"]): sum(float(row[f"seed_{n}"]) for n in (1, 2, 3)) / 3
            for row in csv.DictReader(file)
        }
    columns = [
        (m, b) for m in ("width 192", "12 layers", "width 128") for b in ("equal steps", "equal FLOPs")
    ]
    text = (DOCS / "evidence/comparison.md").read_text()
    for label, arm in ROWS_OF_THE_COMPARISON.items():
        [line] = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", text, re.MULTILINE)
        shown = [cell.strip(" *") for cell in line.split("|")]
        for (model, budget), cell in zip(columns, shown, strict=True):
            mean = means.get(
                (arm, model, budget), means.get((arm, model, "equal steps")) if arm == "dense" else None
            )
            assert cell == "" if mean is None else float(cell) == pytest.approx(mean, abs=0.1)

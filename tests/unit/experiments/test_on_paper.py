"""Pictures name the file of rows that they were drawn with."""

import hashlib
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from inrank_megatron.experiments.on_paper import save

EVIDENCE = Path(__file__).parents[3] / "docs" / "evidence"
PICTURES = sorted(path.stem.removeprefix("paper_") for path in EVIDENCE.glob("paper_*.png"))


def source(picture: Path) -> str:
    with Image.open(picture) as image:
        return image.text["Source"]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_of_the_page_is_of_the_run_whose_rows_lie_beside_it(name):
    rows = (EVIDENCE / "data" / f"{name}.jsonl").read_bytes()
    assert source(EVIDENCE / f"paper_{name}.png") == hashlib.sha256(rows).hexdigest()


def test_a_saved_picture_tells_changed_rows(tmp_path):
    rows, picture = tmp_path / "rows.jsonl", tmp_path / "picture.png"
    rows.write_text('{"rank": 4}\n')
    save(Figure(), picture, rows=rows)
    assert source(picture) == hashlib.sha256(b'{"rank": 4}\n').hexdigest()

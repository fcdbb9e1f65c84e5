"""Figure 3 on data in the layout of the hub's Fashion-MNIST, of random pictures."""

import json
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image

from inrank_megatron.experiments.command import main

CARD = """---
configs:
- config_name: fashion_mnist
  data_files:
  - {split: train, path: fashion_mnist/train-*}
  - {split: test, path: fashion_mnist/test-*}
---
"""


def copy_of_the_hub(folder: Path) -> None:
    (folder / "fashion_mnist").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    features, generator = Features({"image": Image(), "label": ClassLabel(10)}), np.random.default_rng(0)
    for part, size in (("train", 100), ("test", 20)):
        pictures = generator.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        rows = {"image": list(pictures), "label": [place % 10 for place in range(size)]}
        file = folder / "fashion_mnist" / f"{part}-00000-of-00001.parquet"
        Dataset.from_dict(rows, features).to_parquet(file)


def test_it_runs_on_a_copy_in_the_working_directory(tmp_path, monkeypatch, capsys):
    copy_of_the_hub(tmp_path / "zalando-datasets" / "fashion_mnist")
    monkeypatch.chdir(tmp_path)
    main(["figure3_fashion_mnist", "--quick", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["layer"], row["values"]) for row in rows] == [("0.weight", 128), ("2.weight", 10)] * 4
    assert (tmp_path / "reproduced" / "figure3_fashion_mnist.png").stat().st_size > 10_000

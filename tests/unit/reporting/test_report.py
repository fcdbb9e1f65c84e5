"""The page: self-contained, escaped, and made from whatever a run has left."""

import base64
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from inrank_megatron.errors import UserError
from inrank_megatron.reporting.report import write_report

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Collects text, tags and references, and fails on tags that do not match."""

    def __init__(self, path: Path):
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self._open: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")
        ]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append(data.strip())

    def after(self, text: str) -> str:
        return self.text[self.text.index(text) + 1]


def test_the_page_is_self_contained(make_run: Callable[..., Path]) -> None:
    run_dir = make_run()
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path)
    assert len(page.references) == 5
    for reference in page.references:
        head, data = reference.split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) in {plot.read_bytes() for plot in (run_dir / "plots").iterdir()}
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in page.source and "@import" not in page.source
    assert sorted(plot.name for plot in (run_dir / "plots").iterdir()) == [
        "cost.png",
        "loss.png",
        "ranks.png",
        "spectrum.png",
        "throughput.png",
    ]
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in (run_dir / "plots").iterdir())


def test_the_headline_and_the_tables(make_run: Callable[..., Path]) -> None:
    page = Page(write_report(make_run()))
    assert "It has learnt: validation perplexity 62.75 (unigram 402, uniform 4,096); " in "".join(page.text)
    assert page.after("validation perplexity") == "62.75"
    assert page.after("62.75") == "unigram 402, uniform 4,096"
    assert page.after("test perplexity") == "63.43"
    assert page.after("test perplexity (word)") == "220.3"
    assert page.after("mean rank") == "12.5"
    assert page.after("parameters") == "1.61 M"
    assert page.after("1.61 M") == "62% of dense"
    assert page.after("training time") == "1:12"
    phases = page.text.index("Phases")
    assert page.text[page.text.index("phase 1: W0 + UV", phases) + 1] == "1 - 60"
    assert page.text[page.text.index("phase 2: U*V*", phases) + 1] == "61 - 120"
    layer = page.text.index("decoder.layers.3.mlp.linear_fc2", phases)
    assert page.text[layer + 1 : layer + 7] == ["2", "16", "0.9700", "41", "96", "yes"]
    assert page.after("model_preset") == "tiny" and page.after("data_path") == "none"
    assert page.after("deepspeed") == "0.19.8"
    assert "not finished" not in page.source


def test_a_dense_run(make_run: Callable[..., Path]) -> None:
    page = Page(write_report(make_run(method="dense")))
    assert "mean rank" not in page.text and "Ranks" not in page.text
    assert page.after("parameters") == "2.61 M"
    assert len(page.references) == 2


def test_an_unfinished_run_with_torn_lines(make_run: Callable[..., Path]) -> None:
    run_dir = make_run(steps=47)
    for name in ("metrics.jsonl", "ranks.jsonl"):
        with (run_dir / name).open("ab") as stream:
            stream.write('{"kind": "train", "step": 48, "layer": "é'.encode()[:-1])
    page = Page(write_report(run_dir))
    assert "This run has not finished: its last recorded step is 47." in page.text
    assert "47 of 120 steps; 48,128 tokens" in page.text
    assert "test perplexity" not in page.text


@pytest.mark.parametrize("content", [None, ""])
def test_a_run_without_records(tmp_path: Path, content: str | None) -> None:
    for name in ("config.yaml", "metrics.jsonl", "ranks.jsonl", "summary.json"):
        if content is not None:
            (tmp_path / name).write_text(content)
    page = Page(write_report(tmp_path))
    assert page.references == [] and "0 steps" in page.text


def test_everything_from_outside_is_escaped(make_run: Callable[..., Path]) -> None:
    hostile = '<script>alert("x")</script><img src=http://example.org/x>'
    run_dir = make_run("a<b>&c")
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"method": hostile, hostile: [hostile]}))
    summary = json.loads((run_dir / "summary.json").read_text())
    summary.update(method=hostile, versions={hostile: hostile}, data={hostile: {"tokens": 1}})
    summary["world"]["device"] = hostile
    (run_dir / "summary.json").write_text(json.dumps(summary))
    ranks = (run_dir / "ranks.jsonl").read_text().replace("decoder", json.dumps(hostile)[1:-1])
    (run_dir / "ranks.jsonl").write_text(ranks)
    page = Page(write_report(run_dir))
    assert "script" not in page.tags
    assert page.tags.count("img") == 5
    assert all(reference.startswith("data:") for reference in page.references)
    assert f"{hostile}: a<b>&c" in page.text, "it is shown, as text"


def test_a_report_replaces_the_last_one_whole(make_run: Callable[..., Path]) -> None:
    run_dir = make_run()
    write_report(run_dir)
    first = set(run_dir.rglob("*"))
    write_report(run_dir)
    assert set(run_dir.rglob("*")) == first


def test_what_cannot_be_read_is_one_clear_line(make_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path / "absent")
    run_dir = make_run()
    for name, content in (
        ("summary.json", '{"method": '),
        ("summary.json", "[1]"),
        ("config.yaml", "a: [\nb: {"),
    ):
        (run_dir / "summary.json").write_text("{}")
        (run_dir / name).write_text(content)
        with pytest.raises(UserError, match=name) as caught:
            write_report(run_dir)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["plots", "report.html"])
def test_what_cannot_be_written_is_one_clear_line(make_run: Callable[..., Path], name: str) -> None:
    run_dir = make_run()
    if name == "plots":
        (run_dir / name).write_text("")
    else:
        (run_dir / name).mkdir()
    with pytest.raises(UserError, match=f"{name}: the report cannot be written .*correct that, then run"):
        write_report(run_dir)


def test_peaks_of_memory_stand_in_the_page(make_run: Callable[..., Path]) -> None:
    page = Page(write_report(make_run()))
    table = page.text[page.text.index("Peak memory") :]
    assert table[1:10] == [
        "part",
        "allocated",
        "reserved",
        "phase 1",
        "3.00 GiB",
        "4.00 GiB",
        "switch",
        "5.00 GiB",
        "8.00 GiB",
    ]

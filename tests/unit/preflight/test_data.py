"""Other texts on a host are found by their sizes and samples, without reading them whole."""

import pytest

from inrank_megatron.preflight.data import DATA, SAMPLE_BYTES, Data
from tests.unit.preflight.several_hosts import brief, hosts_with, places

CHECK = Data()


def described(*flags: str):
    return CHECK.gather(places(*flags)[0])[DATA]


@pytest.mark.parametrize("at", [0, 5 * SAMPLE_BYTES, 10 * SAMPLE_BYTES - 1])
def test_another_byte_is_seen_where_it_is_sampled(tmp_path, at):
    file = tmp_path / "text.txt"
    content = bytearray(b"x" * 10 * SAMPLE_BYTES)
    file.write_bytes(content)
    before = described("--data-path", str(file))
    assert before["files"] == 1 and before["bytes"] == len(content)
    content[at] = ord("y")
    file.write_bytes(content)
    assert described("--data-path", str(file)) != before
    found = brief(CHECK, hosts_with(DATA, before, before, described("--data-path", str(file)), texts=str))
    assert [finding[:2] for finding in found] == [("error", "c")]


def test_blends_and_pairs_are_looked_at(tmp_path):
    for name in ("a.bin", "a.idx", "b.txt"):
        (tmp_path / name).write_text(name)
    found = described("--train-data-path", "0.5", str(tmp_path / "a"), "0.5", str(tmp_path / "b.txt"))
    assert found["files"] == 3 and found["bytes"] == 15


def test_a_text_that_is_missing_on_one_host_or_on_all(tmp_path):
    there = tmp_path / "text.txt"
    there.write_text("text")
    fault = described("--data-path", str(tmp_path / "no.txt"))
    assert fault.startswith("cannot be read: ")
    whole = described("--data-path", str(there))
    assert brief(CHECK, hosts_with(DATA, whole, fault)) == [("error", "b", fault)]
    assert [host for _, host, _ in brief(CHECK, hosts_with(DATA, fault, fault))] == ["a", "b"]


def test_names_that_stand_for_content():
    assert described("--dataset", "owner/name") == "dataset name"
    assert described().startswith("the texts of Python 3.")

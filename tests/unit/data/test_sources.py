"""Which text goes into which split."""

from pathlib import Path

import pytest

from inrank_megatron.data.sources import MOST_WEIGHTS, cut, parse_blend, parse_split, select, split_bounds
from inrank_megatron.errors import UserError


def test_split_fractions_are_parsed() -> None:
    assert parse_split("969,30,1") == (0.969, 0.03, 0.001)
    assert parse_split("9,1") == (0.9, 0.1, 0.0)
    for faulty in ("", "a,b,c", "0,1,1", "9,-1,1", "1,1,1,1", "inf,1,1", "nan,1,1"):
        with pytest.raises(UserError, match="must be up to three parts"):
            parse_split(faulty)


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (1000, (0.969, 0.03, 0.001), [0, 969, 999, 1000]),
        (70, (0.969, 0.03, 0.001), [0, 68, 69, 70]),
        (3, (0.969, 0.03, 0.001), [0, 1, 2, 3]),
        (2, (0.969, 0.03, 0.001), [0, 1, 2, 2]),
        (1, (0.969, 0.03, 0.001), [0, 1, 1, 1]),
        (5, (1.0, 0.0, 0.0), [0, 5, 5, 5]),
        (10, (0.999, 0.0, 0.001), [0, 9, 9, 10]),
        (10, (0.9, 0.1, 0.0), [0, 9, 10, 10]),
        (100, (0.01, 0.01, 0.98), [0, 1, 2, 100]),
    ],
)
def test_split_bounds_cover_every_document(
    count: int, shares: tuple[float, float, float], expected: list[int]
) -> None:
    assert split_bounds(count, shares) == expected


def test_blend_weights_are_parsed() -> None:
    assert parse_blend(["a"]) == [("a", None)]
    assert parse_blend(["a", "b"]) == [("a", None), ("b", None)]
    assert parse_blend(["0.3", "a", "7", "b"]) == [("a", 0.3), ("b", 7.0)]
    with pytest.raises(UserError, match="weights for some paths only"):
        parse_blend(["0.3", "a", "b", "c"])
    for weight in ("0", "-1", "inf", "nan"):
        with pytest.raises(UserError, match="not above 0"):
            parse_blend([weight, "a"])


def test_number_that_is_also_a_path_is_refused_as_a_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of years were taken for weights, and their texts left out without a word."""
    monkeypatch.chdir(tmp_path)
    for year in ("2023", "2024", "2025"):
        (tmp_path / year).mkdir()
    with pytest.raises(UserError, match=r"2023: is a number and also a path .*\./2023 .*\+2023 if .* 2024"):
        parse_blend(["2023", "2024"])
    assert parse_blend(["2023", "2024", "2025"]) == [("2023", None), ("2024", None), ("2025", None)]
    assert parse_blend(["./2023", "2024"]) == [("./2023", None), ("2024", None)]
    assert parse_blend(["+2023", "2024"]) == [("2024", 2023.0)]


def test_more_weights_than_a_blend_can_count_are_refused() -> None:
    words = ["1", "a"] * (MOST_WEIGHTS + 1)
    assert len(parse_blend(words[2:])) == MOST_WEIGHTS
    with pytest.raises(UserError, match="a blend has at most 32767: give files of one weight as a folder"):
        parse_blend(words)


@pytest.mark.parametrize("count", [1, 2, 3, 70, 1000])
@pytest.mark.parametrize("split", ["969,30,1", "9,1", "1", "1,0,1"])
def test_one_file_is_divided_as_in_earlier_versions(count: int, split: str) -> None:
    shares = parse_split(split)
    assert cut([count], shares) == [split_bounds(count, shares)]


@pytest.mark.parametrize("split", ["969,30,1", "8,1,1", "1,0,0", "98,0,2"])
@pytest.mark.parametrize("counts", [[1] * 50, [1000, 10, 1, 1, 500], [0, 3, 0, 1], [100] * 30])
def test_files_are_divided_together_as_one(counts: list[int], split: str) -> None:
    shares = parse_split(split)
    cuts = cut(counts, shares)
    assert all(0 == b[0] <= b[1] <= b[2] <= b[3] == count for b, count in zip(cuts, counts, strict=True))
    total = split_bounds(sum(counts), shares)
    assert [sum(bounds[index] for bounds in cuts) for index in range(4)] == total


def test_each_file_gives_its_share() -> None:
    assert cut([1000, 2000], (0.9, 0.07, 0.03)) == [[0, 900, 970, 1000], [0, 1800, 1940, 2000]]
    held_out = [number for number, bounds in enumerate(cut([1] * 100, (0.9, 0.1, 0.0))) if bounds[1] == 0]
    assert held_out == list(range(4, 100, 10))


def test_files_without_weights_are_one_component(settings, tmp_path: Path) -> None:
    for name in ("a", "f/b", "f/c", "g/d", "v"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    paths = [tmp_path / name for name in ("a", "f", "g")]
    assert select(settings(data_path=paths)).components() == [[0, 1, 2, 3]]
    weighted = settings(
        train_data_path=["3", paths[0], "1", f"{tmp_path}/f/*", "2", paths[2]],
        valid_data_path=[tmp_path / "v"],
    )
    selection = select(weighted)
    assert selection.components() == [[0], [1, 2], [3]]
    assert [part.weight for part in selection.parts] == [3, 1, 1, 2, None]
    assert [part.split for part in selection.parts] == ["train"] * 4 + ["valid"]
    assert selection.blended().components() == selection.components()
    assert select(settings(data_path=paths)).blended().components() == [[0], [1], [2], [3]]


def test_paths_that_the_system_refuses_are_named(settings) -> None:
    """Also in a dry run, which looks at the paths alone."""
    with pytest.raises(UserError, match="File name too long"):
        select(settings(data_path=["x" * 5000]))
    with pytest.raises(UserError, match="does not exist"):
        select(settings(data_path=["a\0b"]))


def test_two_names_for_the_training_text_are_refused(settings) -> None:
    with pytest.raises(UserError, match="data_path, dataset: each names the training text"):
        select(settings(data_path=["a"], dataset="b"))
    with pytest.raises(UserError, match="valid_data_path: needs train_data_path"):
        select(settings(data_path=["a"], valid_data_path=["b"]))


def test_a_share_with_a_path_of_its_own_goes_to_train(settings, tmp_path) -> None:
    for name in "ab":
        (tmp_path / name).write_text("text")
    selection = select(
        settings(train_data_path=[tmp_path / "a"], test_data_path=[tmp_path / "b"], split="8,1,1")
    )
    assert [part.split for part in selection.parts] == ["train", "test"]
    assert selection.shares == pytest.approx((0.9, 0.1, 0.0))

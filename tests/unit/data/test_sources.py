"""Which text goes into which split."""

import pytest

from inrank_megatron.data.sources import parse_blend, parse_split, select, split_bounds
from inrank_megatron.errors import UserError


def test_split() -> None:
    assert parse_split("969,30,1") == (0.969, 0.03, 0.001)
    assert parse_split("9,1") == (0.9, 0.1, 0.0)
    for faulty in ("", "a,b,c", "0,1,1", "9,-1,1", "1,1,1,1", "inf,1,1", "nan,1,1"):
        with pytest.raises(UserError, match="shares"):
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
def test_bounds(count: int, shares: tuple[float, float, float], expected: list[int]) -> None:
    assert split_bounds(count, shares) == expected


def test_blend() -> None:
    assert parse_blend(["a"]) == [("a", None)]
    assert parse_blend(["a", "b"]) == [("a", None), ("b", None)]
    assert parse_blend(["0.3", "a", "7", "b"]) == [("a", 0.3), ("b", 7.0)]
    with pytest.raises(UserError, match="weights for some paths only"):
        parse_blend(["0.3", "a", "b", "c"])
    for weight in ("0", "-1", "inf", "nan"):
        with pytest.raises(UserError, match="not above 0"):
            parse_blend([weight, "a"])


def test_contradictions(settings) -> None:
    with pytest.raises(UserError, match="data_path, dataset: each names the training text"):
        select(settings(data_path=["a"], dataset="b"))
    with pytest.raises(UserError, match="valid_data_path: belongs to train_data_path"):
        select(settings(data_path=["a"], valid_data_path=["b"]))


def test_a_share_with_a_path_of_its_own_goes_to_train(settings, tmp_path) -> None:
    for name in "ab":
        (tmp_path / name).write_text("text")
    selection = select(
        settings(train_data_path=[tmp_path / "a"], test_data_path=[tmp_path / "b"], split="8,1,1")
    )
    assert [part.split for part in selection.parts] == ["train", "test"]
    assert selection.shares == pytest.approx((0.9, 0.1, 0.0))

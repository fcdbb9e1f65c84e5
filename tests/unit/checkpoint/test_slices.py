"""Boxes of full tensors: what of a tensor a flattened run is, and whether slices make up a tensor."""

import math
import random

import pytest
import torch

from inrank_megatron.checkpoint.slices import boxes, common_box, fill, key, runs, within


def shapes(seed, count):
    rng = random.Random(seed)
    for _ in range(count):
        shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(0, 3)))
        start = rng.randint(0, math.prod(shape))
        yield shape, start, rng.randint(start, math.prod(shape))


def entries(shape, box):
    region = tuple(slice(at, at + size) for at, size in zip(*box, strict=True))
    return torch.arange(math.prod(shape)).view(shape)[region].flatten().tolist()


def test_a_run_is_its_boxes_in_order():
    for shape, start, stop in shapes(0, 500):
        found = [entry for box in boxes(shape, start, stop) for entry in entries(shape, box)]
        assert found == list(range(start, stop)), (shape, start, stop)
    assert list(boxes((4, 5), 3, 17)) == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]
    assert list(boxes((4, 5), 5, 15)) == [((1, 0), (2, 5))], "full rows are one box"


def some_boxes(shape, rng):
    ends = [sorted(rng.choices(range(size + 1), k=2)) for size in shape]
    return tuple(a for a, _ in ends), tuple(b - a for a, b in ends)


def test_a_box_is_its_runs_in_order():
    rng = random.Random(2)
    for shape, _, _ in shapes(2, 300):
        box, other = some_boxes(shape, rng), some_boxes(shape, rng)
        found = [entry for start, count in runs(shape, box) for entry in range(start, start + count)]
        assert found == entries(shape, box), (shape, box)
        both = sorted(set(entries(shape, box)) & set(entries(shape, other)))
        common = common_box(box, other)
        assert both == ([] if common is None else entries(shape, common)), (shape, box, other)
    assert list(runs((4, 5), ((1, 0), (2, 5)))) == [(5, 10)], "full rows are one run"
    assert torch.arange(20).view(4, 5)[2:, 1:][within(((3, 2), (1, 2)), (2, 1))].tolist() == [[17, 18]]


def test_slices_make_up_a_tensor_if_each_entry_is_in_one():
    for shape, start, stop in shapes(1, 300):
        end = math.prod(shape)
        parts = [list(boxes(shape, *run)) for run in ((0, start), (start, stop), (stop, end))]
        assert fill(shape, [*parts[0], *parts[1], *parts[2]])
        if start < stop:
            assert not fill(shape, parts[0] + parts[2]), "a part is missing"
            assert not fill(shape, [*parts[0], *parts[1], *parts[1], *parts[2]]), "a part is there twice"


@pytest.mark.parametrize(
    "placed",
    [
        [((0, 0), (2, 3)), ((0, 3), (2, 3))],  # beyond the columns
        [((0, 0), (1, 4)), ((0, 0), (1, 4))],  # as many entries as there are, half of them twice
        [((0,), (8,))],  # of other axes
        [((0, 0), (1, 4))],
        [],
    ],
)
def test_other_slices_do_not(placed):
    assert not fill((2, 4), placed)


def test_a_slice_has_the_name_of_its_tensor_where_it_is_all_of_it():
    assert key("w", ((0, 0), (2, 3)), (2, 3)) == "w"
    assert key("w", ((0, 1), (2, 2)), (2, 3)) == "w[0:2,1:3]"
    assert key("s", ((), ()), ()) == "s"

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdiag_opt import lay_out, merge, partition
from blockdiag_opt.layout import GROUPINGS, Layout


def ragged(shape, kind, size):
    """Lists of flat indices, by loops: the definition."""
    numel = math.prod(shape)
    if kind == "output":
        lines = [list(range(r * (numel // shape[0]), (r + 1) * (numel // shape[0]))) for r in range(shape[0])]
    elif kind == "input":
        rest = numel // shape[0]
        lines = [[r * rest + c for r in range(shape[0])] for c in range(rest)]
    elif kind == "filter":
        taps = math.prod(shape[2:])
        lines = [list(range(f * taps, (f + 1) * taps)) for f in range(shape[0] * shape[1])]
        size = taps if taps <= 32 else size
    elif kind == "row":
        rest = numel // shape[0]
        lines, size = [list(range(r * rest, (r + 1) * rest)) for r in range(shape[0])], rest
    else:
        lines, size = [list(range(numel))], numel
    found = []
    for line in lines:
        parts = math.ceil(len(line) / size)
        each = math.ceil(len(line) / parts)
        found += [line[k * each : (k + 1) * each] for k in range(parts)]
    return found


def indices(layout):
    """The coordinates of each block as :func:`partition` gathers them; numbers from 1, so that 0 is padding."""
    numbers = torch.arange(1, layout.numel + 1).view(layout.shape)
    return [[int(i) - 1 for i in block if i > 0] for block in partition(numbers, layout)]


def by_formula(layout):
    found = []
    for j in range(layout.blocks):
        at = (j % layout.chunks) * layout.n
        found.append(
            [
                (j // layout.chunks) * layout.line_stride + (at + i) * layout.stride
                for i in range(layout.n)
                if at + i < layout.length
            ]
        )
    return found


@pytest.mark.parametrize("kind", ["output", "input", "row", "full"])
@pytest.mark.parametrize(
    ("shape", "size"), [((3, 7), 3), ((7, 3), 4), ((4, 10), 5), ((5, 2, 3), 4), ((2, 3, 2, 2), 10)]
)
def test_dense_groupings_cut_lines_as_a_loop_does(kind, shape, size):
    layout = lay_out(shape, kind, size)
    assert layout.kind == kind
    assert indices(layout) == by_formula(layout) == ragged(shape, kind, size)


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (2, 4, 5), (2, 2, 2, 3, 4), (2, 1, 7, 7)])
def test_filters_are_whole_up_to_32_taps(shape):
    layout = lay_out(shape, "filter", 10)
    assert indices(layout) == by_formula(layout) == ragged(shape, "filter", 10)
    assert layout.n == (math.prod(shape[2:]) if math.prod(shape[2:]) <= 32 else 10)


def test_input_wise_is_a_column_of_the_weight():
    assert indices(lay_out((4, 3), "input", 2))[:2] == [[0, 3], [6, 9]]
    assert indices(lay_out((4, 3), "output", 2))[:2] == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("shape", "grouping", "kind"),
    [
        ((5, 4), "auto", "output"),
        ((5, 4, 1, 1), "auto", "output"),
        ((5, 4, 3, 3), "auto", "filter"),
        ((5, 4, 7), "auto", "filter"),
        ((5,), "auto", "diag"),
        ((), "auto", "diag"),
        ((5, 4), "paper", "input"),
        ((5, 4, 1, 1), "paper", "diag"),
        ((5, 4, 3, 3), "paper", "filter"),
        ((5, 4, 7, 7), "paper", "diag"),
        ((5,), "paper", "diag"),
        ((5, 4), "filter", "diag"),
        ((5, 4), "diag", "diag"),
        ((5,), "full", "full"),
        ((1,), "full", "diag"),
        ((), "full", "diag"),
        ((5, 1), "output", "diag"),
        ((1, 5), "input", "diag"),
        ((0, 4), "output", "diag"),
        ((4, 0), "full", "diag"),
    ],
)
def test_names_resolve(shape, grouping, kind):
    assert lay_out(shape, grouping).kind == kind


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(1, 6), min_size=0, max_size=5),
    st.sampled_from(GROUPINGS),
    st.integers(1, 12),
)
def test_every_coordinate_is_in_exactly_one_block_and_merge_undoes_partition(shape, grouping, size):
    layout = lay_out(shape, grouping, size)
    assert sorted(itertools.chain(*indices(layout))) == list(range(math.prod(shape)))
    assert layout.diagonal == (layout.n == 1) == (layout.kind == "diag")
    x = torch.arange(1.0, math.prod(shape) + 1).view(tuple(shape))
    blocks = partition(x, layout)
    assert blocks.shape == (layout.blocks, layout.n)
    assert torch.equal(merge(blocks, layout), x)
    if grouping in {"output", "input"}:
        assert layout.n <= size
        assert layout.blocks * layout.n - x.numel() <= max(x.numel() // max(layout.length, 1), 1) * layout.n
    assert layout.tiles * layout.width >= layout.blocks > (layout.tiles - 1) * layout.width
    assert layout.floats >= layout.blocks * layout.packed


def test_no_block_is_padding_only():
    for length, size in itertools.product(range(1, 60), range(1, 30)):
        layout = lay_out((2, length), "output", size)
        assert (layout.chunks - 1) * layout.n < max(layout.length, 1)


def test_partition_of_a_transposed_and_of_a_channels_last_tensor():
    x = torch.arange(12.0).view(3, 4)
    assert torch.equal(partition(x.T, lay_out((4, 3), "output", 3)), x.T)
    y = torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5)
    layout = lay_out(y.shape, "filter", 10)
    assert torch.equal(partition(y.to(memory_format=torch.channels_last), layout), partition(y, layout))


def test_explicit_partition_and_its_padding():
    blocks = torch.tensor([[5, 0, -1], [-1, 3, 2], [4, 1, -1]])
    layout = lay_out((2, 3), blocks=blocks)
    assert layout.kind == "blocks"
    x = torch.arange(10.0, 16.0).view(2, 3)
    assert partition(x, layout).tolist() == [[15, 10, 0], [0, 13, 12], [14, 11, 0]]
    assert torch.equal(merge(partition(x, layout), layout), x)
    assert torch.equal(partition(x, lay_out((2, 3), blocks=blocks.int())), partition(x, layout))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([[0, 1], [1, 2]], r"parameter 'w': index 1 appears twice"),
        ([[0, 1], [1, 1]], r"index 1 appears often"),
        ([[0, 1], [2, -1]], r"index 3 is missing"),
        ([[0, 1], [2, 4]], r"index 4 is not one of its elements 0\.\.3"),
        ([[0, 1], [2, -2]], r"index -2"),
        ([[0.0, 1.0], [2.0, 3.0]], r"integer tensor"),
        ([0, 1, 2, 3], r"integer tensor"),
    ],
)
def test_partitions_that_are_none(blocks, message):
    with pytest.raises(ValueError, match=message) as caught:
        lay_out((2, 2), blocks=torch.tensor(blocks), name="w")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, -3])
def test_block_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="block_size must be an integer >= 1"):
        lay_out((2, 2), "output", size)


@pytest.mark.parametrize("size", [2.5, True, "4"])
def test_block_sizes_of_another_type(size, unchecked):
    with pytest.raises(ValueError, match="block_size must be an integer >= 1"):
        lay_out((2, 2), "output", size)


def test_unknown_grouping():
    with pytest.raises(ValueError, match="unknown grouping 'rows': choose auto"):
        lay_out((2, 2), "rows")


def test_layout_is_immutable():
    with pytest.raises(AttributeError):
        setattr(lay_out((2, 2)), "n", 3)  # noqa: B010


def test_default_layout_of_a_scalar():
    assert Layout("diag", (), 1, 1).numel == 1

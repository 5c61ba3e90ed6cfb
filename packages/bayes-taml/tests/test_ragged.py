"""Tasks of any size: padding, what is no task, and the best division into groups by brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_taml.ragged import EmptyClassError, NeedTwoClassesError, Tasks, UnknownLabelError, group_by_size
from shared_core.errors import InputError


def made(*sizes, ways=2):
    rows = [
        (torch.rand(n, 2), torch.arange(n).remainder(ways), torch.rand(m, 2), torch.arange(m).remainder(ways))
        for n, m in sizes
    ]
    return rows, Tasks.collate(rows, ways)


def test_collating_pads_and_the_masks_give_back_what_went_in():
    rows, tasks = made((3, 2), (5, 4), (2, 1))
    assert len(tasks) == 3
    assert tasks.support.shape == (3, 5, 2)
    assert tasks.query.shape == (3, 4, 2)
    assert tasks.sizes().tolist() == [3, 5, 2]
    assert tasks.counts().tolist() == [[2, 1], [3, 2], [1, 1]]
    for k, (x, y, q, yq) in enumerate(rows):
        assert torch.equal(tasks.support[k, tasks.support_mask[k]], x)
        assert torch.equal(tasks.support_labels[k, tasks.support_mask[k]], y)
        assert torch.equal(tasks.query[k, tasks.query_mask[k]], q)
        assert torch.equal(tasks.query_labels[k, tasks.query_mask[k]], yq)


def test_a_part_is_some_of_the_tasks():
    rows, tasks = made((3, 2), (5, 4), (2, 1))
    part = tasks.part(1, 2).to("cpu")
    assert len(part) == 2
    assert torch.equal(part.support[0, part.support_mask[0]], rows[1][0])
    assert torch.equal(part.query[1, part.query_mask[1]], rows[2][2])


def test_labels_in_the_padding_are_never_read():
    """Padding is left out by row, not by its label: an empty label would be the first class."""
    _, tasks = made((3, 2), (5, 4))
    labels, asked = tasks.support_labels.clone(), tasks.query_labels.clone()
    labels[~tasks.support_mask] = 10**12
    asked[~tasks.query_mask] = -5
    strange = Tasks(tasks.support, labels, tasks.support_mask, tasks.query, asked, tasks.query_mask, 2)
    assert torch.equal(strange.counts(), tasks.counts())


def test_what_is_no_task_is_refused():
    x, y = torch.rand(4, 2), torch.tensor([0, 0, 2, 2])
    with pytest.raises(EmptyClassError, match="task 1: class 1 has no support example"):
        Tasks.collate([(x[:3], torch.arange(3), x[:1], y[:1]), (x, y, x, y)], 3)
    with pytest.raises(NeedTwoClassesError, match="at least two classes, got 1"):
        Tasks.collate([(x, torch.zeros(4, dtype=torch.int64), x, torch.zeros(4, dtype=torch.int64))], 1)
    with pytest.raises(UnknownLabelError, match=r"query: labels 0..3 in a task of 2 classes; they are 0..1"):
        Tasks.collate([(x, torch.tensor([0, 1, 0, 1]), x, torch.arange(4))], 2)
    with pytest.raises(InputError, match=r"support: labels -1..1 in a task of 2"):
        Tasks.collate([(x, torch.tensor([0, 1, -1, 1]), x, torch.tensor([0, 1, 0, 1]))], 2)
    with pytest.raises(EmptyClassError, match="task 0: class 0"):
        Tasks.collate([(x[:0], y[:0], x, torch.tensor([0, 1, 0, 1]))], 2)


def test_shapes_must_go_together(unchecked):
    _, tasks = made((3, 2))
    with pytest.raises(InputError, match="must agree in their first two axes"):
        Tasks(tasks.support, tasks.support_labels[:, :2], tasks.support_mask, *(tasks.query, tasks.query_labels),
              tasks.query_mask, 2)  # fmt: skip
    with pytest.raises(InputError, match="query: inputs"):
        Tasks(tasks.support, tasks.support_labels, tasks.support_mask, tasks.query, tasks.query_labels,
              tasks.query_mask[:, :1], 2)  # fmt: skip


def partitions(items):
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for k, group in enumerate(smaller):
            yield [*smaller[:k], [first, *group], *smaller[k + 1 :]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 40), st.integers(1, 100))
def test_groups_are_the_cheapest_of_all_partitions(sizes, overhead, most):
    def cost(groups):
        return sum(overhead + max(sizes[k] for k in group) * len(group) for group in groups)

    def allowed(group):
        return len(group) == 1 or max(sizes[k] for k in group) * len(group) <= most

    found = group_by_size(sizes, float(overhead), most)
    assert sorted(k for group in found for k in group) == list(range(len(sizes)))
    assert all(allowed(group) for group in found)
    best = min(cost(p) for p in partitions(list(range(len(sizes)))) if all(map(allowed, p)))
    assert cost(found) == best


def test_groups_at_the_extremes():
    assert group_by_size([7, 1, 4], 1e15) == [[1, 2, 0]]
    assert group_by_size([7, 1, 4], 0.0) == [[1], [2], [0]]
    assert group_by_size([], 5.0) == []
    assert group_by_size([100], 5.0, most=10) == [[0]]

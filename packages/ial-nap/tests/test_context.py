"""Counts of verdicts against counting anew, undo to the bit, and what no annotation means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ial_nap.context import Context, check_masks, counts, preference
from shared_core.errors import InputError

T, R = 3, 4


def random_masks(k, seed=0):
    return torch.randint(-1, 2, (k, T, R), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def recounted(context):
    one, zero = counts(context.masks)
    return one, zero


marks = st.tuples(
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(["", "x"]),
    st.lists(st.tuples(st.integers(0, T - 1), st.integers(0, R - 1), st.integers(-1, 1)), max_size=6),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(marks, max_size=8))
def test_counts_are_those_of_counting_anew_and_undo_goes_all_the_way_back(changes):
    context, seen = Context(T, R), []
    for instance, annotator, cells in changes:
        seen.append((context.one.clone(), context.zero.clone(), context.digest, context.keys))
        context.mark(instance, cells, annotator=annotator, allow_empty=True)
        one, zero = recounted(context)
        assert torch.equal(context.one, one)
        assert torch.equal(context.zero, zero)
    for one, zero, digest, keys in reversed(seen):
        context.undo()
        assert torch.equal(context.one, one)
        assert torch.equal(context.zero, zero)
        assert (context.digest, context.keys) == (digest, keys)
    assert len(context) == 0


def test_no_annotation_is_one_mask_of_nothing_known():
    empty, unknown = Context(T, R), Context.of(torch.full((1, T, R), -1))
    assert torch.equal(empty.masks, unknown.masks)
    assert torch.equal(empty.preference, unknown.preference)
    assert torch.equal(empty.preference, torch.zeros(T, R))


def test_preference_grows_to_one_with_what_is_repeated():
    masks = random_masks(5)
    one = Context.of(masks).preference
    before = one
    for times in (2, 4, 16, 256):
        now = Context.of(masks.repeat(times, 1, 1)).preference
        assert (now.abs() >= before.abs()).all()
        assert torch.equal(now.sign(), one.sign())
        before = now
    agreed = Context.of(torch.ones(2000, T, R, dtype=torch.int8)).preference
    assert float(agreed.min()) > 0.999
    assert float(agreed.max()) < 1


def test_conflicting_annotators_leave_it_open():
    context = Context(1, 2)
    context.mark("a", [(0, 0, 1)], annotator="x")
    context.mark("a", [(0, 0, 0)], annotator="y")
    assert len(context) == 2
    assert context.preference[0, 0] == 0
    same = Context.of(context.masks, ids=["a", "a"], annotators=["x", "y"])
    assert same.keys == context.keys
    assert same.digest == context.digest


def test_order_of_masks_changes_neither_counts_nor_digest():
    masks = random_masks(6)
    one, two = Context.of(masks), Context.of(masks.flip(0))
    assert torch.equal(one.preference, two.preference)
    assert one.digest == two.digest
    assert one.digest != Context.of(masks, schema="other").digest


def test_a_later_mask_of_an_instance_replaces_what_it_saw():
    context = Context(1, 3)
    context.add(np.array([[[1, 0, -1]]]), ids=["a"])
    shift = context.add(np.array([[[-1, 1, 1]]]), ids=["a"])
    assert context.masks.tolist() == [[[1, 1, 1]]]
    assert shift.cells == ((0, 1), (0, 2))
    assert shift.verdicts == 2
    copied = context.copy()
    context.undo()
    assert context.masks.tolist() == [[[1, 0, -1]]]
    assert copied.masks.tolist() == [[[1, 1, 1]]]
    assert (context.depth, copied.depth) == (1, 0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.mark("a", [(3, 0, 1)]), r"step 3, feature 0.*3 steps and 4 features"),
        (lambda c: c.mark("a", [(0, 0, 2)]), "verdict 2"),
        (lambda c: c.add(torch.zeros(2, 4, 3)), r"expected \(K, 3, 4\)"),
        (lambda c: c.add(torch.full((1, T, R), 3)), r"masks\[0, 0, 0\] = 3"),
        (lambda c: c.add(random_masks(2), ids=["a"]), "give one each"),
        (lambda c: c.add(torch.zeros(1, T, R)), "every cell is marked 0"),
        (lambda c: c.undo(), "nothing to undo"),
        (lambda c: check_masks(torch.full((1, T, R), 0.5), T, R), "= 0.5"),
        (lambda c: preference(c.one, c.zero, 0.0), "kappa"),
        (lambda c: Context.of(torch.zeros(T, R)), "K, T, r"),
        (lambda c: Context(0, 3), "needs steps"),
    ],
)
def test_wrong_input_is_refused_and_changes_nothing(unchecked, change, match):
    context = Context(T, R)
    with pytest.raises(InputError, match=match):
        change(context)
    assert (len(context), context.depth) == (0, 0)
    assert torch.equal(context.one, torch.zeros(T, R))


def test_a_refused_mask_takes_those_before_it_back():
    context = Context(T, R)
    with pytest.raises(InputError, match="instance '#1'"):
        context.add(torch.stack([torch.ones(T, R), torch.zeros(T, R)]))
    assert len(context) == 0
    context.add(torch.zeros(1, T, R), allow_empty=True)
    assert float(context.preference.max()) == -0.5


people = st.tuples(
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(["", "x"]),
    st.integers(0, T - 1),
    st.integers(0, R - 1),
    st.integers(-1, 1),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.lists(people, max_size=8)), max_size=6))
def test_verdicts_given_at_once_are_those_of_a_dictionary(changes):
    context, past = Context(T, R), []
    expected: dict[tuple[str, str, int, int], int] = {}
    for exactly, verdicts in changes:
        past.append((dict(expected), context.keys, context.digest))
        if exactly:
            expected = {}
        expected |= {(*key, t, d): v for *key, t, d, v in verdicts}
        expected = {cell: v for cell, v in expected.items() if v >= 0}
        before = past[-1][0]
        shift = context.give(verdicts, exactly=exactly, allow_empty=True)
        moved = {cell for cell in before.keys() | expected.keys() if before.get(cell, -1) != expected.get(cell, -1)}
        assert shift.verdicts == len(moved)
        assert set(shift.keys) == {cell[:2] for cell in moved}
        assert shift.cells == tuple(sorted({cell[2:] for cell in moved}))
        assert set(context.keys) == {cell[:2] for cell in expected}
        said = {
            (*key, t, d): int(mask[t, d])
            for key, mask in zip(context.keys, context.masks, strict=False)
            for t, d in (mask >= 0).nonzero().tolist()
        }
        assert said == expected
        assert context.verdicts == len(expected)
        one, zero = recounted(context)
        assert torch.equal(context.one, one)
        assert torch.equal(context.zero, zero)
    for before, keys, digest in reversed(past):
        context.undo()
        assert (context.keys, context.digest, context.verdicts) == (keys, digest, len(before))


def test_only_the_steps_that_an_instance_has_count_as_left():
    context = Context(T, R, lengths={"short": 1, "middle": 2})
    first = [(0, d, 0) for d in range(R)]
    with pytest.raises(InputError, match="instance 'short': every cell is marked 0"):
        context.mark("short", first)
    with pytest.raises(InputError, match="instance 'short'"):
        context.give([("middle", "", *cell) for cell in first] + [("short", "", *cell) for cell in first])
    assert (len(context), context.depth, context.verdicts) == (0, 0, 0)
    context.mark("middle", first)
    context.mark("long", first + [(1, d, 0) for d in range(R)])
    with pytest.raises(InputError, match="instance 'middle'"):
        context.mark("middle", [(1, d, 0) for d in range(R)])
    assert context.mark("middle", [(1, d, 0) for d in range(R - 1)]).verdicts == R - 1
    # Beyond its length nothing counts, and a verdict 1 there leaves nothing.
    with pytest.raises(InputError, match="instance 'middle'"):
        context.give([("middle", "", 1, R - 1, 0), ("middle", "", 2, 0, 1)])
    assert context.mark("middle", [(1, R - 1, 0)], allow_empty=True).verdicts == 1
    assert context.copy().lengths == context.lengths


def test_a_mask_without_a_verdict_is_none():
    context = Context(T, R)
    context.mark("a", [(0, 0, -1)])
    assert (len(context), context.depth) == (0, 1)
    context.mark("a", [(0, 0, 1)])
    context.mark("b", [(0, 0, 1)])
    context.mark("a", [(0, 0, -1)])
    assert context.keys == (("b", ""),)
    context.mark("c", [(1, 1, 0)])
    context.undo()
    context.undo()
    assert context.keys == (("a", ""), ("b", ""))
    assert context.masks[:, 0, 0].tolist() == [1, 1]
    assert context.new_names(2) == ["#2", "#3"]


def test_a_context_that_was_handed_out_does_not_change_under_one_s_hands():
    context = Context.of(random_masks(4))
    masks, one = context.masks, context.one
    kept = masks.clone(), one.clone()
    context.mark("new", [(0, 0, 1)])
    context.mark("#0", [(t, d, 1) for t in range(T) for d in range(R)])
    assert torch.equal(masks, kept[0])
    assert torch.equal(one, kept[1])

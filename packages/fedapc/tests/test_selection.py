"""Rows, means and who gets what, against sorting and counting by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapc.selection import KnowledgeBase, aggregate, rows_to_send, top_rows
from shared_core.errors import InputError


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.5]), min_size=1, max_size=30), st.floats(1e-6, 1))
def test_the_highest_rows_are_chosen_and_of_equal_ones_the_first(scores, fraction):
    chosen = top_rows(torch.tensor(scores), fraction)
    count = max(1, round(fraction * len(scores)))
    expected = sorted(range(len(scores)), key=lambda row: (-scores[row], row))[:count]
    assert chosen.nonzero().squeeze(1).tolist() == sorted(expected)


def test_scores():
    base = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 1.0]])
    assert rows_to_send(base, None, 1 / 3).tolist() == [False, True, False]
    assert rows_to_send(base, torch.tensor([0.0, -9.0, 9.0]), 1 / 3).tolist() == [True, False, False]
    assert rows_to_send(base, torch.tensor([0.0, -9.0, 8.0]), 1 / 3, "abs-raw-mask").tolist() == [False, True, False]
    assert rows_to_send(base, None, 1.0).all()


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, float("nan")])
def test_other_fractions_are_refused(fraction):
    with pytest.raises(InputError, match="upload_fraction"):
        top_rows(torch.ones(3), fraction)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(0, 5))
def test_means_are_those_of_the_clients_that_sent_a_row(seed, clients):
    random = torch.Generator().manual_seed(seed)
    previous = torch.randn(6, 3, 2, generator=random)
    whole = [torch.randn(6, 3, 2, generator=random) for _ in range(clients)]
    sent = [torch.rand(6, generator=random) < 0.5 for _ in range(clients)]
    merged, somebody = aggregate(previous, [(rows, value[rows]) for rows, value in zip(sent, whole, strict=True)])
    for row in range(6):
        mine = [value[row].double() for value, rows in zip(whole, sent, strict=True) if rows[row]]
        expected = (sum(mine) / len(mine)).float() if mine else previous[row]
        assert torch.equal(merged[row], expected)
        assert somebody[row] == bool(mine)


def test_a_row_of_one_client_is_that_row():
    rows = torch.tensor([True, False])
    merged, _ = aggregate(torch.zeros(2, 1), [(rows, torch.tensor([[0.1]])), (~rows, torch.tensor([[0.7]]))])
    assert torch.equal(merged, torch.tensor([[0.1], [0.7]]))


def stored(policy, seed=0):
    base = KnowledgeBase(policy, seed)
    for client in "abc":
        for task in range(3 if client != "c" else 1):
            base.add(client, task, (f"{client}{task}".encode(),))
    return base


def test_policies():
    assert stored("none").choose("a", 2) == []
    assert stored("last").choose("a", 0) == []
    assert stored("last").choose("a", 2) == [("b", 1), ("c", 0)]
    assert stored("last+self").choose("a", 2) == [("a", 1), ("b", 1), ("c", 0)]
    assert stored("all").choose("a", 2) == [("b", 0), ("b", 1), ("c", 0)]
    assert stored("all").choose("d", 9) == list(stored("all"))
    drawn = [tuple(stored("sample:2", seed).choose("a", 2)) for seed in range(60)]
    assert {len(set(keys)) for keys in drawn} == {2}
    assert set().union(*drawn) == {("b", 0), ("b", 1), ("c", 0)}
    assert stored("sample:2", 7).choose("a", 2) == stored("sample:2", 7).choose("a", 2)
    assert stored("sample:9").choose("a", 2) == stored("all").choose("a", 2)


def test_a_part_is_stored_once():
    base = stored("last")
    base.add("a", 0, (b"other",))
    assert base["a", 0] == (b"a0",)
    assert len(base) == 7
    assert ("a", 2) in base
    assert ("c", 1) not in base


@pytest.mark.parametrize("policy", ["", "first", "sample", "sample:0", "sample:-1", "sample:x", "all "])
def test_other_policies_are_refused(policy):
    with pytest.raises(InputError, match="kb_policy"):
        KnowledgeBase(policy)

"""The loop with annotators who know: what they say, how much of it, and that every method goes through it."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from ial_nap.ranking import Ranked
from ial_nap.series import make_series
from ial_nap.simulation import Method, Oracle, Setting, score, simulate
from ial_nap.toys import shift_mask, shift_task
from shared_core.errors import InputError

SETTING = Setting(rounds=2, k=4, f=3, epochs=2, batch=60, hidden=5, latent=2, steps=3, samples=3)


@pytest.fixture(scope="module")
def data():
    train = shift_task(60, shift=1.2, seed=0)
    return train, *(shift_task(40, shift=s, seed=k, like=train) for k, s in ((1, 1.2), (2, 0.0)))


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_goes_through_its_rounds(data, method):
    found = simulate(method, *data, Oracle(shift_mask()), SETTING, seed=1)
    assert [r.round for r in found] == [0, 1, 2]
    assert [r.cells for r in found] == [0, 48, 96]
    assert all(0 <= r.score <= 1 for r in found)
    if method == "none":
        assert len({r.score for r in found}) == 1
    again = simulate(method, *data, Oracle(shift_mask()), SETTING, seed=1)
    assert [r.score for r in again] == [r.score for r in found]


def item(series, index=2):
    return Ranked(index, series.ids[index], 0.0, "", ("f8", "f1"), (1.0, 0.5))


def test_what_an_oracle_says(data):
    train = replace(data[0], lengths=torch.full((60,), 2))
    assert Oracle(shift_mask()).judge(item(train), train) == [(0, 8, 0), (0, 1, 1), (1, 8, 0), (1, 1, 1)]
    assert {v for _, _, v in Oracle(shift_mask(), unsure=1.0).judge(item(train), train)} == {-1}
    assert Oracle(shift_mask(), flip=1.0).judge(item(train), train)[:2] == [(0, 8, 1), (0, 1, 0)]
    own = shift_mask().repeat(60, 1, 1)
    own[2] = 1
    assert {v for _, _, v in Oracle(own).judge(item(train), train)} == {1}
    noisy = [Oracle(shift_mask(), flip=0.3, seed=5).judge(item(data[0], k), data[0]) for k in range(60)]
    wrong = sum(v != (d != 8) for said in noisy for _, d, v in said)
    assert 0.22 < wrong / (60 * 8) < 0.38


def test_scores():
    x = torch.zeros(4, 1, 1)
    binary = make_series(x, [0, 1, 0, 1])
    assert score(torch.tensor([[0.1], [0.9], [0.2], [0.15]]), binary) == 0.75
    classes = make_series(x, [0, 1, 2, 1])
    assert score(torch.eye(3)[[0, 1, 0, 1]], classes) == 0.75
    labels = make_series(x, [[0, 1], [1, 0], [0, 1], [1, 1]])
    assert score(torch.tensor([[0.0, 1], [1, 0], [0, 1], [0, 0]]), labels) == 0.75
    number = make_series(x, [0.5, 1.0, 2.0, 3.0])
    truth = torch.tensor([[0.5], [1.0], [2.0], [3.0]])
    shifted = (truth + 2 - number.scaling.target_mean) / number.scaling.target_deviation
    assert score(shifted, number) == pytest.approx(2.0, abs=1e-5)


def test_wrong_arguments(unchecked, data):
    with pytest.raises(InputError, match="unknown method 'magic'"):
        simulate("magic", *data, Oracle(shift_mask()))
    with pytest.raises(InputError, match="rounds"):
        simulate("none", *data, Oracle(shift_mask()), Setting(rounds=0))
    with pytest.raises(InputError, match="flip"):
        Oracle(shift_mask(), flip=2.0)

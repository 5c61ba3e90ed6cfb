"""The loop with annotators who know: what they say, how much of it, and that every method goes through it."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, get_args

import pytest
import torch

from ial_nap.attention import Retain
from ial_nap.baselines import Annotated, MaskedPlain, masked_logits
from ial_nap.ranking import Ranked
from ial_nap.series import make_series
from ial_nap.simulation import Method, Oracle, Setting, Trained, score, simulate, tuned
from ial_nap.toys import shift_mask, shift_task
from ial_nap.training import Plain, losses
from shared_core.errors import InputError

SETTING = Setting(rounds=2, k=4, f=3, epochs=2, batch_size=60, hidden=5, latent=2, steps=3, step_lr=1e-2, samples=3)
TRAINED: Trained = {}


@pytest.fixture(scope="module")
def data():
    train = shift_task(60, shift=1.2, seed=0)
    return train, *(shift_task(40, shift=s, seed=k, like=train) for k, s in ((1, 1.2), (2, 0.0)))


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_goes_through_its_rounds(data, method):
    told = []
    found = simulate(method, *data, Oracle(shift_mask()), SETTING, seed=1, on_round=told.append, trained=TRAINED)
    assert told == found
    assert [r.round for r in found] == [0, 1, 2]
    assert [r.cells for r in found] == [0, 48, 96]
    assert all(0 <= r.score <= 1 for r in found)
    assert all(r.seconds > 0 for r in found[:1])
    if method == "retain":
        assert len({r.score for r in found}) == 1
    if method in {"random-ua", "aila", "ial-nap", "ial-nap-finetuned"}:
        assert len({r.score for r in found}) > 1
        again = simulate(method, *data, Oracle(shift_mask()), SETTING, seed=1)
        assert [r.score for r in again] == [r.score for r in found]


def test_methods_that_begin_alike_share_a_training(data):
    own: Trained = {}
    pair = [simulate(method, *data, Oracle(shift_mask()), SETTING, trained=own) for method in ("random-nap", "ial-nap")]
    assert list(own) == ["nap:0"]
    assert pair[0][0].score == pair[1][0].score
    assert pair[0][0].seconds == pair[1][0].seconds == own["nap:0"][1]


class Recording(Oracle):
    """An oracle that remembers what it was asked."""

    asked: ClassVar[list[tuple[int, tuple[str, ...]]]] = []

    def judge(self, item, series):
        self.asked.append((item.index, item.features))
        return super().judge(item, series)


def asked(data, method, **changed):
    Recording.asked.clear()
    setting = replace(SETTING, **changed)
    simulate(method, *data, Recording(shift_mask()), setting, seed=1, trained=TRAINED if not changed else None)
    return list(Recording.asked)


def test_random_methods_of_a_seed_ask_the_same_and_influence_asks_other_instances(data):
    first = asked(data, "random-retain")
    assert all(asked(data, method) == first for method in ("random-ua", "random-nap", "aila", "drop"))
    influenced = asked(data, "if-retain")
    assert [features for _, features in influenced] == [features for _, features in first]
    assert {k for k, _ in influenced} != {k for k, _ in first}
    assert len({k for k, _ in influenced}) == len({k for k, _ in first}) == 8


def test_influence_of_retain_finds_wrong_labels(data):
    train, validation, test = data
    wrong = replace(train, y=torch.where(torch.arange(60) < 8, 1 - train.targets, train.targets))
    found = asked((wrong, validation, test), "if-retain", epochs=15, batch_size=20, lr=1e-2, rounds=1, k=15)
    assert sum(k < 8 for k, _ in found) >= 5


def test_instances_annotated_with_zeros_train_retain_without_what_is_marked(data):
    train = data[0]
    model = Retain(12, 1, hidden=5, keep=1.0)
    off = torch.full((60, 4, 12), -1, dtype=torch.int8)
    off[:, :, [8, 9]] = 0
    masked = MaskedPlain(model, Annotated(train, off), l2=0.0)
    expected = losses(masked_logits(model, train, off, torch.Generator()), train.targets, "binary").mean()
    torch.testing.assert_close(masked(train, torch.Generator(), 0.0), expected)
    free = Plain(model, l2=0.0)
    torch.testing.assert_close(masked(train, None, 0.0), free(train, None, 0.0))
    assert not torch.equal(expected, free(train, None, 0.0))
    half = MaskedPlain(model, Annotated(train.part(range(30)), off[:30]), l2=0.0)
    one, two = train.part(range(30)), train.part(range(30, 60))
    mixed = (masked(one, torch.Generator(), 0.0) + free(two, None, 0.0)) / 2
    torch.testing.assert_close(half(train, torch.Generator(), 0.0), mixed)


def test_tuning_takes_what_does_best_and_leaves_methods_without_a_knob_alone(data):
    train, validation, _ = data
    once = replace(SETTING, rounds=1)
    oracle = Oracle(shift_mask())
    assert tuned("ial-nap", train, validation, oracle, once, 1, 3) is once
    found = tuned("aila", train, validation, oracle, once, 1, 4, trained=TRAINED)
    tries = {}
    deprived = replace(validation, x=validation.x * (shift_mask() != 0))
    for weight, rate in ((1.0, 1e-3), (0.1, 1e-3), (10.0, 1e-3), (1.0, 3e-3)):
        setting = replace(once, weight=weight, step_lr=rate)
        rounds = simulate("aila", train, validation, deprived, oracle, setting, seed=1, trained=TRAINED)
        tries[weight, rate] = rounds[-1].score
    assert tries[found.weight, found.step_lr] == max(tries.values())
    assert replace(found, weight=once.weight, step_lr=once.step_lr) == once
    assert tuned("random-ua", train, validation, oracle, once, 1, 2, trained=TRAINED).step_lr in {1e-3, 3e-3}


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
    with pytest.raises(InputError, match="no method 'magic'"):
        simulate("magic", *data, Oracle(shift_mask()))
    with pytest.raises(InputError, match="rounds"):
        simulate("retain", *data, Oracle(shift_mask()), Setting(rounds=0))
    with pytest.raises(InputError, match="flip"):
        Oracle(shift_mask(), flip=2.0)
    with pytest.raises(InputError, match="trials must be within 1 and 9"):
        tuned("aila", *data[:2], Oracle(shift_mask()), SETTING, 0, 0)

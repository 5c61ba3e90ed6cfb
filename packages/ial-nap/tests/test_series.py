"""Series: what is standardised comes back, padding is never read, and wrong input is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ial_nap.annotations import feature_set_hash
from ial_nap.series import find_name, make_series
from shared_core.errors import InputError


def arrays(n=6, t=4, r=3, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(n, t, r)) * 3 + 5, np.arange(n) % 2


def test_values_are_standardised_and_come_back():
    x, y = arrays()
    series = make_series(x, y)
    torch.testing.assert_close(series.x.mean((0, 1)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(series.x.std((0, 1), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    np.testing.assert_allclose(series.scaling.raw(series.x).numpy(), x, atol=1e-4)
    again = make_series(x + 1, y, like=series)
    np.testing.assert_allclose(again.scaling.raw(again.x).numpy(), x + 1, atol=1e-4)


def test_what_is_padded_counts_nowhere():
    x, y = arrays()
    lengths = [4, 3, 2, 1, 4, 2]
    other = x.copy()
    for k, length in enumerate(lengths):
        other[k, length:] = np.nan
    one, two = (make_series(values, y, lengths=lengths) for values in (x, other))
    assert torch.equal(one.x, two.x)
    assert torch.equal(one.scaling.mean, two.scaling.mean)
    assert not one.observed[3, 1:].any()


def test_missing_cells_read_as_the_mean():
    x, y = arrays()
    x[2, 1, 0] = np.nan
    series = make_series(x, y, missing="mask")
    assert series.x[2, 1, 0] == 0
    assert not series.observed[2, 1, 0]
    assert abs(float(series.scaling.mean[0]) - np.nanmean(x[:, :, 0])) < 1e-5


@pytest.mark.parametrize(
    ("y", "kind", "outputs"),
    [
        ([0, 1, 0, 1, 0, 1], "binary", 1),
        ([[0], [1], [0], [1], [0], [1]], "binary", 1),
        ([0, 1, 2, 0, 1, 2], "multiclass", 3),
        (np.tile([[0, 1], [1, 0]], (3, 1)), "multilabel", 2),
        ([0.5, 1, 2, 3, 4, 5], "regression", 1),
    ],
)
def test_the_kind_of_task_is_read_from_labels(y, kind, outputs):
    series = make_series(arrays()[0], y)
    assert (series.kind, series.outputs) == (kind, outputs)


def test_targets_of_a_regression_are_standardised_too():
    y = np.arange(6) * 10.0 + 0.5
    series = make_series(arrays()[0], y)
    assert abs(float(series.targets.mean())) < 1e-6
    np.testing.assert_allclose(series.scaling.raw_target(series.targets).numpy(), y, rtol=1e-6)


def test_parts_and_fewer_features():
    x, y = arrays()
    series = make_series(x, y, features=["a", "b", "c"])
    part = series.part([4, 1])
    assert part.ids == ("4", "1")
    assert torch.equal(part.x, series.x[[4, 1]])
    assert series.part(series.targets == 1).ids == ("1", "3", "5")
    less = series.without(["b"])
    assert less.features == ("a", "c")
    assert torch.equal(less.x, series.x[:, :, [0, 2]])
    assert less.schema != series.schema == feature_set_hash(["a", "b", "c"], 4)


def nan_at(x):
    x = x.copy()
    x[1, 2, 0] = np.nan
    return x


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x, y: {"x": x[0], "y": y}, "three axes"),
        (lambda x, y: {"x": x[:0], "y": y[:0]}, "empty"),
        (lambda x, y: {"x": nan_at(x), "y": y}, r"x\[1, 2, 0\].*missing='mask'"),
        (lambda x, y: {"x": x * np.inf, "y": y, "missing": "mask"}, "infinite"),
        (lambda x, y: {"x": x, "y": y, "lengths": [4, 4, 5, 1, 1, 1]}, r"lengths\[2\] = 5 is not in 1..4"),
        (lambda x, y: {"x": x, "y": y, "lengths": [0, 4, 4, 1, 1, 1]}, r"lengths\[0\] = 0"),
        (lambda x, y: {"x": x, "y": y, "lengths": [1.5, 4, 4, 1, 1, 1]}, "whole numbers"),
        (lambda x, y: {"x": x, "y": y, "lengths": [4]}, "6 whole numbers"),
        (lambda x, y: {"x": x, "y": y, "features": ["a", "b", "a"]}, "'a' is there twice"),
        (lambda x, y: {"x": x, "y": y, "features": ["a"]}, "1 feature names for 3"),
        (lambda x, y: {"x": x, "y": y * 0}, "every label is 0"),
        (lambda x, y: {"x": x, "y": y * 0 + 0.5, "kind": "regression"}, "every target"),
        (lambda x, y: {"x": x, "y": y[:4]}, "6 instances"),
        (lambda x, y: {"x": x, "y": y * np.nan}, r"y\[0\] is not finite"),
        (lambda x, y: {"x": x, "y": y + 1, "kind": "binary"}, "must be 0 or 1"),
        (lambda x, y: {"x": x, "y": y + 0.5, "kind": "multiclass"}, "classes 0, 1"),
        (lambda x, y: {"x": x, "y": y, "kind": "multilabel"}, "is not that of a multilabel"),
        (lambda x, y: {"x": x, "y": y, "kind": "ranking"}, "no kind"),
        (lambda x, y: {"x": x}, "kind="),
        (lambda x, y: {"x": [["a"]], "y": y}, "numbers"),
    ],
)
def test_wrong_input_is_refused_by_name(unchecked, change, match):
    with pytest.raises(InputError, match=match):
        make_series(**change(*arrays()))


def test_series_that_are_not_like_the_training(unchecked):
    x, y = arrays()
    train = make_series(x, y, features=["a", "b", "c"])
    with pytest.raises(InputError, match="trained on 3: a, b, c"):
        make_series(x[:, :, :2], y, like=train)
    with pytest.raises(InputError, match="trained on 4"):
        make_series(x[:, :2], y, like=train)
    with pytest.raises(InputError, match="not those of the training"):
        make_series(x, y, features=["a", "c", "b"], like=train)
    with pytest.raises(InputError, match="no labels"):
        _ = make_series(x, like=train).targets
    classes = make_series(x, [0, 1, 2, 0, 1, 2])
    with pytest.raises(InputError, match="trained on 3"):
        make_series(x, [0, 1, 2, 3, 1, 2], like=classes)
    assert make_series(x, [0] * 6, like=train).kind == "binary"


def test_a_name_that_is_not_known_is_answered_with_the_closest():
    with pytest.raises(InputError, match="no feature 'LDK'; did you mean 'LDL'"):
        find_name("LDK", ["HDL-x", "LDL"], "feature")


def test_units_belong_to_what_verdicts_are_about():
    x, y = arrays()
    plain = make_series(x, y, features=["a", "b", "c"])
    series = make_series(x, y, features=["a", "b", "c"], units=["mg", "", "m"])
    assert series.units == ("mg", "", "m")
    assert series.schema == feature_set_hash(["a", "b", "c"], 4, ["mg", "", "m"]) != plain.schema
    assert make_series(x, y, features=["a", "b", "c"], units=["", "", ""]).schema == plain.schema
    assert series.without(["b"]).units == ("mg", "m")
    assert series.part([1]).units == make_series(x, like=series.part([])).units == series.units
    with pytest.raises(InputError, match="2 units for 3 features"):
        make_series(x, y, units=["mg", "m"])


def test_series_of_no_instance_hold_names_and_scaling_for_others():
    x, y = arrays()
    empty = make_series(x, y, features=["a", "b", "c"]).part([])
    assert len(empty) == 0
    assert torch.equal(make_series(x, like=empty).x, make_series(x, y).x)
    assert make_series(x, like=empty).features == ("a", "b", "c")


def test_joined_series_are_their_parts():
    x, y = arrays()
    series = make_series(x, y)
    both = type(series).joined([series.part([4, 1]), series.part([0])])
    assert both.ids == ("4", "1", "0")
    assert torch.equal(both.x, series.x[[4, 1, 0]])
    assert torch.equal(both.targets, series.targets[[4, 1, 0]])
    assert type(series).joined([make_series(x, like=series), series]).y is None

"""Imagined annotators: what they leave out, how often, and that something is always left."""

from __future__ import annotations

import pytest
import torch

from ial_nap.episodes import Episodes
from shared_core.errors import InputError


def test_without_noise_masks_say_exactly_what_is_left_out():
    episodes = Episodes(4, 6, empty=0.0, most_hidden=0.0, most_flipped=0.0)
    drawn = episodes.draw(200, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.masks == 0, drawn.off.unsqueeze(1).expand_as(drawn.masks))
    assert not (drawn.masks == -1).any()
    assert torch.equal(episodes.again(drawn, torch.Generator().manual_seed(1)), drawn.masks)


def test_empty_episodes_leave_nothing_out_and_say_nothing_wrong():
    drawn = Episodes(3, 4, empty=1.0, most_flipped=1.0).draw(400, torch.Generator().manual_seed(0))
    assert not drawn.off.any()
    assert not (drawn.masks == 0).any()
    nothing_known = (drawn.masks == -1).flatten(1).all(1).double().mean()
    assert 0.42 < float(nothing_known) < 0.62


def test_shares_are_those_asked_for():
    random = torch.Generator().manual_seed(0)
    episodes = Episodes(5, 8, empty=0.3, most_off=0.4, whole=0.7, most_hidden=0.6, most_flipped=0.2)
    draws = [episodes.draw(50, random) for _ in range(80)]
    off = torch.cat([drawn.off for drawn in draws])
    feature_off = off.any(1)
    assert abs(float(feature_off.double().mean()) - 0.7 * 0.2) < 0.015
    # A span is the whole series in 2 of 25 cases.
    whole = float((off.all(1).sum() / feature_off.sum()).double())
    assert abs(whole - (0.7 + 0.3 * 2 / 25)) < 0.03
    told = [drawn for drawn in draws if (drawn.masks != -1).any()]
    seen = torch.cat([(d.masks != -1)[d.off.flatten(1).any(1)].double().flatten() for d in told])
    assert abs(float(seen.mean()) - 0.7) < 0.02
    wrong = (
        torch.cat([((d.masks == 1) & d.off.unsqueeze(1)).sum((1, 2, 3)) / d.masks.shape[1] for d in told]).sum()
        / torch.cat([((d.masks >= 0) & d.off.unsqueeze(1)).sum((1, 2, 3)) / d.masks.shape[1] for d in told]).sum()
    )
    assert abs(float(wrong) - 0.1) < 0.02
    assert {d.masks.shape[1] for d in draws} <= set(range(1, 21))


def test_spans_are_contiguous():
    drawn = Episodes(6, 5, empty=0.0, whole=0.0, most_off=1.0).draw(100, torch.Generator().manual_seed(0))
    edges = drawn.off.to(torch.int8).diff(dim=1, prepend=torch.zeros(100, 1, 5, dtype=torch.int8))
    assert int((edges == 1).sum(1).max()) == 1


def test_something_is_always_left():
    drawn = Episodes(2, 2, empty=0.0, whole=1.0, most_off=1.0).draw(500, torch.Generator().manual_seed(0))
    assert not drawn.off.flatten(1).all(1).any()
    assert drawn.off.flatten(1).any(1).double().mean() > 0.5


def test_a_second_draw_is_of_the_same_episode():
    episodes = Episodes(3, 4, most_flipped=0.0)
    drawn = episodes.draw(100, torch.Generator().manual_seed(2))
    other = episodes.again(drawn, torch.Generator().manual_seed(3))
    assert not torch.equal(other, drawn.masks)
    off = drawn.off.unsqueeze(1).expand_as(other)
    assert not (other[off] == 1).any()
    assert not (other[~off] == 0).any()


def test_the_generator_alone_decides():
    one, two = (Episodes(3, 4).draw(5, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one.masks, two.masks)


@pytest.mark.parametrize("options", [{"steps": 0}, {"empty": 1.2}, {"most_masks": 0}, {"whole": -0.1}])
def test_wrong_numbers(unchecked, options):
    with pytest.raises(InputError, match=next(iter(options)).split("_", maxsplit=1)[-1]):
        Episodes(**{"steps": 3, "features": 4, **options})

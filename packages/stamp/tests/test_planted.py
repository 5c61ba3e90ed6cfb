"""The network of which the right mask is known, and the study of masks on it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from shared_core.errors import InputError
from shared_core.runs import Run
from stamp.examples import Examples
from stamp.experiments import FREE, Protocol, Target
from stamp.groups import trace
from stamp.meta import MetaConfig
from stamp.networks import smallconv
from stamp.planted import in_channel, merged, numbered_from, precision, study
from stamp.surgery import cut


def stripes(name: str, seed: int, ways: int = 3, each: int = 12, *, upright: bool) -> Examples:
    """Images of stripes, wider from class to class."""
    random = np.random.default_rng(seed)
    y = np.repeat(np.arange(ways), each)
    phase = random.integers(0, 8, len(y))
    wave = (np.arange(8) + phase[:, None]) // (y[:, None] + 1) % 2
    x = np.repeat(wave[:, None, :], 8, axis=1) if upright else np.repeat(wave[:, :, None], 8, axis=2)
    x = x[:, None] * 200 + random.integers(0, 40, (len(y), 1, 8, 8))
    return Examples(torch.from_numpy(x.astype(np.uint8)), torch.from_numpy(y), tuple("abcdef"[:ways]), name)


def target(name: str, seed: int = 0, **options) -> Target:
    return Target(*(stripes(name, 10 * seed + part, **options) for part in range(3)))


@pytest.fixture(scope="module")
def two():
    """Specialists whose norms have seen something, and what they are merged into."""
    specialists = [smallconv(ways, 1, channels=(4, 6, 8), seed=seed) for seed, ways in ((1, 3), (2, 5))]
    for k, network in enumerate(specialists):
        with torch.no_grad():
            for norm in (network[1], network[5], network[9]):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
            network.train()(torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(k)))
        network.eval()
    return specialists, *merged(specialists, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("place", [0, 1])
def test_the_merged_network_says_what_each_specialist_says_of_its_own_channel(two, place):
    specialists, model, _ = two
    x = torch.rand(7, 2, 8, 8)
    wanted = specialists[place](x[:, place : place + 1])
    outputs = (slice(0, 3), slice(3, 8))[place]
    torch.testing.assert_close(model(x)[:, outputs], wanted)


@pytest.mark.parametrize("place", [0, 1])
def test_the_right_mask_cuts_the_specialist_out(two, place):
    specialists, model, owners = two
    groups = trace(model, torch.rand(2, 2, 8, 8))
    keep = {name: owner == place for name, owner in zip(groups.widths(), owners, strict=True)}
    x = torch.rand(5, 2, 8, 8)
    small = cut(model, groups, keep)
    assert sum(p.numel() for p in small[0].parameters()) == 4 * 2 * 9
    outputs = (slice(0, 3), slice(3, 8))[place]
    torch.testing.assert_close(small(x)[:, outputs], specialists[place](x[:, place : place + 1]))
    assert [precision(keep[name], owner, place) for name, owner in zip(keep, owners, strict=True)] == [1.0] * 3
    assert [precision(keep[name], owner, 1 - place) for name, owner in zip(keep, owners, strict=True)] == [0.0] * 3


def test_every_layer_holds_the_channels_of_all_in_an_order_by_the_generator(two):
    specialists, _, owners = two
    assert [owner.bincount().tolist() for owner in owners] == [[4, 4], [6, 6], [8, 8]]
    again = merged(specialists, torch.Generator().manual_seed(0))[1]
    other = merged(specialists, torch.Generator().manual_seed(1))[1]
    assert all(torch.equal(a, b) for a, b in zip(owners, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(owners, other, strict=True))


def test_what_cannot_be_merged():
    networks = [smallconv(2, 1, channels=channels) for channels in ((4, 4), (4, 6))]
    with pytest.raises(InputError, match="same widths"):
        merged(networks, torch.Generator())
    with pytest.raises(InputError, match="two or more"):
        merged(networks[:1], torch.Generator())
    with pytest.raises(InputError, match="smallconv made"):
        merged([torch.nn.Linear(2, 2)] * 2, torch.Generator())


def test_data_get_a_channel_and_a_place_among_all_classes():
    data = stripes("a", 0, upright=True)
    moved = numbered_from(in_channel(data, 1, 3), 4, tuple("ABCDEFG"))
    assert moved.shape == (3, 8, 8)
    assert torch.equal(moved.x[:, 1], data.x[:, 0])
    assert int(moved.x[:, [0, 2]].max()) == 0
    assert torch.equal(moved.y, data.y + 4)
    colour = Examples(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), ("a", "b"))
    with pytest.raises(InputError, match="images of one channel"):
        in_channel(colour, 0, 2)


PROTOCOL = Protocol(
    size=8, pretrain_steps=10, sets=1, set_size=16,
    meta=MetaConfig(iters=2, tasks=2, ways=(2, 3), inner="slice", jitter=False),
)  # fmt: skip
OPTIONS = {"protocol": PROTOCOL, "budget": 0.3, "channels": (4, 4, 4), "draws": 1}


def run_in(folder, **more) -> Run:
    return Run(folder, package="stamp", version="0", command="adaptivity", config={}, **more)


def domains(seed: int) -> dict[str, Target]:
    return {
        "upright": target("upright", seed, upright=True),
        "lying": target("lying", seed + 5, ways=4, upright=False),
    }


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A study of two seeds that was interrupted in the second one, and continued; and the seeds that were asked for."""
    asked: list[int] = []

    def watched(seed: int) -> dict[str, Target]:
        asked.append(seed)
        if seed == 1 and asked.count(1) == 1:
            raise KeyboardInterrupt
        return domains(seed)

    folder, options = tmp_path_factory.mktemp("planted"), {**OPTIONS, "control": False}
    with pytest.raises(KeyboardInterrupt):
        study(run_in(folder), "planted", watched, seeds=(0, 1), **options)
    return study(run_in(folder, resume=True), "planted", watched, seeds=(0, 1), **options), asked


@pytest.fixture(scope="module")
def planted(interrupted):
    return interrupted[0]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return study(run_in(tmp_path_factory.mktemp("shared")), "shared", domains, seeds=(0,), **OPTIONS)


def test_a_study_measures_every_mask_for_every_set(planted, shared):
    masks = ["dense", "own", "other", "random", "l1", "bn", "act", "snip"]
    for kind, found in (("planted", planted), ("shared", shared)):
        rows = [row for row in found.results if row.metric == "accuracy" and row.dataset == f"lying, {kind} network"]
        assert [row.method for row in rows] == [*masks, *([FREE] if kind == "shared" else [])]
        for row in rows:
            values = [100 * seen["recalibrated"]["lying"][row.method] for seen in found.seen.values()]
            assert row.mean == pytest.approx(np.mean(values))
            assert row.n == len(found.seen)
        precise = [row for row in found.results if row.metric.startswith("precision")]
        assert len(precise) == (6 if kind == "planted" else 0)
        assert all(1 <= kept <= width == 8 for kept, width in found.seen[0]["widths"]["upright"].values())


def test_claims_are_about_the_worst_data_set(planted, shared):
    seen = list(planted.seen.values())

    def mean(name: str, mask: str) -> float:
        return 100 * float(np.mean([each["recalibrated"][name][mask] for each in seen]))

    other, label_free, precise = planted.claims
    ahead = min(mean(name, "own") - mean(name, "other") for name in ("upright", "lying"))
    assert (other.value, other.threshold) == (pytest.approx(ahead), 30)
    assert other.holds == (ahead >= 30)
    rivals = ("random", "l1", "bn", "act")
    ahead = min(mean(name, "own") - max(mean(name, mask) for mask in rivals) for name in ("upright", "lying"))
    assert (label_free.value, label_free.threshold) == (pytest.approx(ahead), 20)
    groups = seen[0]["precision"]["lying"]
    worst = min(np.mean([each["precision"][name][g] for each in seen]) for name in ("upright", "lying") for g in groups)
    assert (precise.value, precise.threshold) == (pytest.approx(worst), 0.9)
    rows = shared.seen[0]["recalibrated"].values()
    assert shared.claims[1].value == pytest.approx(min(100 * (row["own"] - row[FREE]) for row in rows))
    assert [claim.threshold for claim in shared.claims] == [10, 0]


def test_in_a_plain_network_all_sets_come_in_by_the_same_channel(tmp_path):
    found = study(run_in(tmp_path), "plain", domains, seeds=(0,), **{**OPTIONS, "control": False})
    assert set(found.seen[0]["recalibrated"]) == {"upright", "lying"}
    assert not found.seen[0]["precision"]
    rows = found.seen[0]["recalibrated"].values()
    better, best = found.claims
    assert better.value == pytest.approx(min(100 * (row["own"] - row["other"]) for row in rows))
    assert better.holds == (better.value > 0)
    ahead = min(100 * (row["own"] - max(row[m] for m in ("random", "l1", "bn", "act"))) for row in rows)
    assert best.value == pytest.approx(ahead)


def test_sets_that_nothing_was_trained_on_are_judged_alone_and_by_class_means(tmp_path):
    others = {"new": target("new", 7, ways=5, upright=True), "more": target("more", 8, upright=False)}
    given = {"seeds": (0,), "unseen": lambda seed: others, "min_channels": 0.25, **OPTIONS}
    found = study(run_in(tmp_path / "a"), "plain", domains, **given)
    rows = found.seen[0]["recalibrated"]
    assert set(rows) == {"new", "more"}
    assert all({"own", "other", "random", FREE} <= set(row) for row in rows.values())
    assert {row.dataset for row in found.results} == {
        f"{name}unseen by a plain network" for name in ("new, ", "more, ", "")
    }
    assert all("unseen by a plain network" in claim.text for claim in found.claims)
    for kept in found.seen[0]["widths"].values():
        assert all(number >= math.ceil(0.25 * width) for number, width in kept.values())
    with pytest.raises(InputError, match="unseen: in a planted network each set has a channel of its own"):
        study(run_in(tmp_path / "b"), "planted", domains, **given)
    with pytest.raises(InputError, match="unseen: 'upright' is one of the sets to train on"):
        study(run_in(tmp_path / "c"), "plain", domains, **{**given, "unseen": domains})


def test_a_study_that_was_interrupted_repeats_only_what_it_had_not_done(interrupted):
    found, asked = interrupted
    assert asked == [0, 1, 1]
    assert set(found.seen) == {0, 1}


def test_a_study_needs_two_sets_of_one_kind(tmp_path):
    options = {"seeds": (0,), **OPTIONS}
    one = {"upright": target("upright", upright=True)}
    with pytest.raises(InputError, match="two or more, got upright"):
        study(run_in(tmp_path / "a"), "planted", lambda seed: one, **options)
    floats = [replace(part, x=part.inputs()) for part in (one["upright"].train,) * 3]
    with pytest.raises(InputError, match="must be bytes, or none"):
        study(run_in(tmp_path / "b"), "shared", lambda seed: {**one, "other": Target(*floats)}, **options)

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shared_core.episodes import EpisodeSampler, TooFewItemsError
from shared_core.errors import InputError


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(8, 20), min_size=5, max_size=9),
    ways=st.integers(2, 5),
    shots=st.integers(1, 4) | st.tuples(st.integers(1, 2), st.integers(2, 4)),
    queries=st.integers(0, 4),
    seed=st.integers(0, 2**31),
    number=st.integers(0, 10**9),
)
def test_every_episode_is_sound(sizes, ways, shots, queries, seed, number):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)) * 10, sizes))
    sampler = EpisodeSampler(labels, ways=ways, shots=shots, queries=queries, seed=seed)
    episode = sampler[number]
    assert len(set(episode.classes.tolist())) == ways
    np.testing.assert_array_equal(labels[episode.support], episode.classes[episode.support_labels])
    np.testing.assert_array_equal(labels[episode.query], episode.classes[episode.query_labels])
    assert len({*episode.support.tolist(), *episode.query.tolist()}) == len(episode.support) + len(episode.query)
    low, high = (shots, shots) if isinstance(shots, int) else shots
    assert ((episode.shots >= low) & (episode.shots <= high)).all()
    assert (np.bincount(episode.query_labels, minlength=ways) == queries).all()
    again = EpisodeSampler(labels, ways=ways, shots=shots, queries=queries, seed=seed)[number]
    np.testing.assert_array_equal(again.support, episode.support)


def test_items_and_classes_are_drawn_uniformly():
    labels = np.repeat(np.arange(8), 10)
    sampler = EpisodeSampler(labels, ways=4, shots=2, queries=1, seed=3)
    episodes = list(sampler.episodes(4000))
    counts = np.bincount(np.concatenate([e.support for e in episodes]), minlength=80)
    # 8 fixed draws an episode: counts are slightly more even than multinomial, so the test is on the safe side.
    assert stats.chisquare(counts).pvalue > 1e-3
    first_class = np.bincount([int(e.classes[0]) for e in episodes], minlength=8)
    assert stats.chisquare(first_class).pvalue > 1e-3


def test_imbalance_modes():
    labels = np.repeat(np.arange(10), 80)

    def equal(mode):
        sampler = EpisodeSampler(labels, ways=5, shots=(1, 50), queries=15, seed=1, imbalance=mode)
        return np.mean([len(set(e.shots.tolist())) == 1 for e in sampler.episodes(400)])

    assert equal("task") == 1
    assert equal("class") < 0.01
    assert 0.4 < equal("mixed") < 0.6


def test_shrinking_takes_what_a_small_class_has():
    labels = np.repeat([0, 1, 2], [4, 30, 30])
    with pytest.raises(TooFewItemsError, match=r"class 0 has 4 items, episodes need 13 \(10 support \+ 3 query\)"):
        EpisodeSampler(labels, ways=3, shots=10, queries=3)
    episode = EpisodeSampler(labels, ways=3, shots=10, queries=3, shrink=True)[0]
    assert dict(zip(episode.classes.tolist(), episode.shots.tolist(), strict=True)) == {0: 1, 1: 10, 2: 10}
    with pytest.raises(TooFewItemsError, match=r"need 5 \(1 support"):
        EpisodeSampler(labels, ways=3, shots=10, queries=4, shrink=True)


def test_string_labels_and_seeds_matter():
    labels = np.repeat(["a", "b", "c"], 5)
    one, two = (EpisodeSampler(labels, ways=2, shots=1, queries=1, seed=seed) for seed in (0, 1))
    assert one[0].classes.dtype.kind == "U"
    assert any(not np.array_equal(one[i].support, two[i].support) for i in range(5))
    assert any(not np.array_equal(one[0].support, one[i].support) for i in range(1, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 1}, "ways >= 2"),
        ({"ways": 9}, "9-way episodes need 9 classes, the data set has 4"),
        ({"shots": 0}, "1 <= shots"),
        ({"shots": (3, 2)}, "1 <= shots"),
        ({"queries": -1}, "queries >= 0"),
        ({"imbalance": "none"}, "class, task or mixed"),
    ],
)
def test_bad_requests(unchecked, options, message):
    with pytest.raises(InputError, match=message):
        EpisodeSampler(np.repeat(np.arange(4), 9), **{"ways": 2, "shots": 1, "queries": 1, **options})
    with pytest.raises(InputError, match="shape"):
        EpisodeSampler(np.zeros((2, 2)), ways=2, shots=1, queries=1)
    with pytest.raises(IndexError):
        EpisodeSampler(np.repeat(np.arange(4), 9), ways=2, shots=1, queries=1)[-1]

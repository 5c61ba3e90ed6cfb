"""Any-shot tasks: who is drawn, how many, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_taml.data import AnyShotSource, ClassImages, WayError
from shared_core.episodes import TooFewItemsError
from shared_core.errors import InputError


def numbered(*sizes, kind=np.uint8):
    """Images whose first two pixels say which image it is."""
    n = sum(sizes)
    pixels = np.zeros((n, 1, 4, 4), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.arange(n) % 256, np.arange(n) // 256
    labels = np.repeat(np.arange(len(sizes)), sizes)
    pixels = pixels if kind == np.uint8 else (pixels / 255).astype(kind)
    return ClassImages("numbered", pixels, labels, tuple("abcdefghij"[: len(sizes)]))


EVEN = numbered(*[24] * 6)


def source(images=EVEN, **options) -> AnyShotSource:
    return AnyShotSource(images, **{"ways": 4, "shots": (1, 9), "queries": 3, **options})


def identities(x):
    codes = torch.round(x[..., 0, 0, :2] * 255).long()
    return codes[..., 0] + 256 * codes[..., 1]


@pytest.mark.parametrize("mode", ["mixed", "class", "task", "step"])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_support_and_query_are_different_images_of_the_same_classes(mode, kind):
    images = numbered(*[24] * 6, kind=kind)
    tasks = source(images, mode=mode, seed=3).batch(0, 12)
    assert tasks.support.dtype == torch.float32
    assert tasks.query.shape == (12, 12, 1, 4, 4)
    assert tasks.query_mask.all()
    for k in range(12):
        seen, asked = identities(tasks.support[k, tasks.support_mask[k]]), identities(tasks.query[k])
        assert len({*seen.tolist(), *asked.tolist()}) == len(seen) + len(asked)
        labels = tasks.support_labels[k, tasks.support_mask[k]]
        classes = [{*(seen[labels == c] // 24).tolist()} for c in range(4)]
        assert all(len(own) == 1 for own in classes)
        assert len(set.union(*classes)) == 4
        assert classes == [{*(asked[tasks.query_labels[k] == c] // 24).tolist()} for c in range(4)]
        assert torch.bincount(tasks.query_labels[k]).tolist() == [3] * 4


def counts(made, tasks=60):
    return made.batch(0, tasks).counts().numpy()


def test_shots_are_drawn_for_each_class_or_for_the_task():
    by_class = counts(source(mode="class"))
    assert by_class.min() == 1
    assert by_class.max() == 9
    assert np.abs(np.bincount(by_class.ravel(), minlength=10)[1:] / by_class.size - 1 / 9).max() < 0.06
    by_task = counts(source(mode="task"))
    assert (by_task == by_task[:, :1]).all()
    assert set(by_task[:, 0]) == set(range(1, 10))
    mixed = counts(source(mode="mixed"), 200)
    assert 0.4 < (mixed == mixed[:, :1]).all(1).mean() < 0.62
    assert (counts(source(shots=(5, 5))) == 5).all()


@pytest.mark.parametrize(("ways", "many"), [(4, 2), (5, 2), (2, 1)])
def test_a_step_is_the_most_for_half_of_the_classes_and_the_fewest_for_the_rest(ways, many):
    found = counts(source(mode="step", ways=ways))
    assert set(found.ravel()) == {1, 9}
    assert ((found == 9).sum(1) == many).all()
    assert len({tuple(row) for row in found.tolist()}) > 1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 100), st.sampled_from(["mixed", "class", "task", "step"]))
def test_a_task_depends_on_seed_and_number_alone(seed, number, mode):
    one, two = source(seed=seed, mode=mode), source(seed=seed, mode=mode)
    for other in (0, 7):
        two.episode(other)
    a, b = one.episode(number), two.episode(number)
    assert np.array_equal(a.support, b.support)
    assert np.array_equal(a.query, b.query)
    assert not np.array_equal(a.query, source(seed=seed + 1, mode=mode).episode(number).query)
    assert not np.array_equal(a.query, one.episode(number + 1).query)


def test_batches_are_cut_from_one_sequence():
    made = source(seed=5)
    whole = made.batch(0, 6)
    for count in (1, 2, 3):
        parts = [made.batch(k, count) for k in reversed(range(6 // count))][::-1]
        found = [identities(p.support[k, p.support_mask[k]]).tolist() for p in parts for k in range(count)]
        assert found == [identities(whole.support[k, whole.support_mask[k]]).tolist() for k in range(6)]


@pytest.mark.parametrize("mode", ["class", "task", "step"])
def test_small_classes_give_what_they_have(mode):
    images = numbered(4, 24, 6, 24)
    made = source(images, mode=mode, shots=(2, 9))
    for number in range(40):
        episode = made.episode(number)
        for name, shots in zip(episode.classes, episode.shots, strict=True):
            most = {0: 1, 2: 3}.get(int(name), 9)
            assert 1 <= shots <= most
            assert name == 0 or shots >= 2


@pytest.mark.parametrize("count", [3, 4])
def test_buckets_use_every_task_once_and_put_like_sizes_together(count):
    plain, made = source(mode="task", seed=1), source(mode="task", seed=1, bucket=24)
    asked: list[int] = []
    episode = made.episode
    batches = 24 // count
    for window in range(2):
        numbers = [made._numbers(window * batches + k, count) for k in range(batches)]
        first = window * batches * count
        assert sorted(k for part in numbers for k in part) == list(range(first, first + batches * count))
        sizes = [[len(episode(k).support) for k in part] for part in numbers]
        before = [[len(episode(first + k * count + j).support) for j in range(count)] for k in range(batches)]
        assert sum(max(s) - min(s) for s in sizes) < 0.5 * sum(max(s) - min(s) for s in before)
        assert [max(s) for s in sizes] != sorted(max(s) for s in sizes)
        asked += [k for part in numbers for k in part]
    assert len(asked) == len(set(asked))
    one = made.batch(1, count)
    for place, number in enumerate(made._numbers(1, count)):
        alone = plain.batch(number, 1)
        assert torch.equal(one.query[place], alone.query[0])
    again = source(mode="task", seed=1, bucket=24)
    assert torch.equal(again.batch(1, count).query, one.query)


def test_a_bucket_of_less_than_two_batches_is_none():
    plain, made = source(seed=1), source(seed=1, bucket=5)
    assert torch.equal(plain.batch(2, 3).query, made.batch(2, 3).query)


def test_images_that_may_not_be_written_to_are_read_all_the_same():
    pixels = EVEN.images.copy()
    pixels.flags.writeable = False
    frozen = ClassImages("frozen", pixels, EVEN.labels, EVEN.class_names)
    assert torch.equal(source(frozen).batch(0, 2).query, source().batch(0, 2).query)


def test_what_cannot_be_drawn_is_refused_with_its_class():
    with pytest.raises(WayError, match="numbered: has 6 classes, and tasks of 7 need 7"):
        source(ways=7)
    with pytest.raises(TooFewItemsError, match="class 'b' has 3 images; 3 queries and at least one of support need 4"):
        source(numbered(24, 3, 24, 24))
    assert issubclass(WayError, TooFewItemsError)
    for options, message in (
        ({"queries": 0}, "queries: must be at least 1"),
        ({"bucket": -1}, "bucket: must be at least 0"),
        ({"shots": (0, 3)}, "1 <= shots"),
        ({"shots": (3, 2)}, "1 <= shots"),
        ({"ways": 1}, "ways >= 2"),
    ):
        with pytest.raises(InputError, match=message):
            source(**options)
    for number, count in ((-1, 2), (0, 0)):
        with pytest.raises(InputError, match="batch number >= 0 and at least 1 task"):
            source().batch(number, count)


def test_an_unknown_mode_is_refused(unchecked):
    with pytest.raises(InputError, match="mode: one of mixed, class, task, step, got 'tail'"):
        source(mode="tail")

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stamp.examples import DataError, Examples
from stamp.tasks import TaskSampler, jittered


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(counts, first=0, name="data", width=1):
    """Examples whose one feature is their own number, in mixed order; `counts` of each class."""
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    y = y[torch.randperm(len(y), generator=seeded(99))]
    x = (first + torch.arange(len(y), dtype=torch.float64))[:, None].expand(-1, width)
    return Examples(x, y, tuple(map(str, range(len(counts)))), name)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=2, max_size=8).filter(lambda c: sum(n > 1 for n in c) >= 2),
    ways=st.tuples(st.integers(2, 6), st.integers(0, 5)),
    shots=st.integers(1, 6),
    queries=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_a_task_is_one(counts, ways, shots, queries, seed):
    data = numbered(counts)
    fewest, most = ways[0], ways[0] + ways[1]
    usable = {k for k, n in enumerate(counts) if n > 1}
    for task in TaskSampler([data], ways=(fewest, most), shots=shots, queries=queries).draw(3, seeded(seed)):
        assert min(fewest, len(usable)) <= task.ways <= min(most, len(usable))
        assert len(set(task.classes)) == task.ways
        assert set(task.classes) <= usable
        parts = [x[:, 0].long().tolist() for x in (task.support, task.query)]
        assert not set(parts[0]) & set(parts[1])
        for rows, labels, wanted in ((parts[0], task.support_y, shots), (parts[1], task.query_y, queries)):
            assert len(set(rows)) == len(rows)
            assert labels.dtype == torch.int64
            # The label is the place of the example's class among the task's classes.
            assert [task.classes[k] for k in labels.tolist()] == data.y[rows].tolist()
            found = Counter(labels.tolist())
            assert set(found) == set(range(task.ways))
            assert max(found.values()) <= wanted
        for label, k in enumerate(task.classes):
            support, query = (int((y == label).sum()) for y in (task.support_y, task.query_y))
            if counts[k] >= shots + queries:
                assert (support, query) == (shots, queries)
            else:
                # Of too few examples none is left over, unless one part has its fill.
                assert support + query == counts[k] or query == queries or support == shots


def test_ways_are_uniform_and_classes_alike():
    data = numbered([4] * 8)
    tasks = TaskSampler([data], ways=(2, 5), shots=2, queries=2).draw(2000, seeded())
    ways = Counter(task.ways for task in tasks)
    assert set(ways) == {2, 3, 4, 5}
    assert all(abs(n - 500) <= 4 * (2000 * 0.25 * 0.75) ** 0.5 for n in ways.values())
    classes = Counter(k for task in tasks for k in task.classes)
    total = sum(classes.values())
    assert all(abs(n - total / 8) <= 5 * (total / 8) ** 0.5 for n in classes.values())
    rows = Counter(row for task in tasks for row in task.support[:, 0].long().tolist())
    assert len(rows) == 32


def test_all_references_take_their_turn():
    sets = [numbered([5] * 4, 1000 * k, f"set {k}", 2) for k in range(3)]
    sampler = TaskSampler(sets, ways=(2, 3))
    random = seeded()
    for number in (3, 6, 7, 2):
        tasks = sampler.draw(number, random)
        assert len(tasks) == number
        counts = Counter(task.source for task in tasks)
        assert max(counts.values()) - min(counts[k] for k in range(3)) <= 1
        for task in tasks:
            values = torch.cat([task.support, task.query])
            assert bool((values // 1000 == task.source).all())
    first = Counter(sampler.draw(1, random)[0].source for _ in range(600))
    assert all(abs(first[k] - 200) <= 4 * (600 * 2 / 9) ** 0.5 for k in range(3))
    stream = sampler.stream(random)
    for _ in range(4):
        assert {next(stream).source for _ in range(3)} == {0, 1, 2}


def test_a_generator_decides_everything():
    data = Examples(torch.rand(40, 1, 8, 8, generator=seeded()), torch.arange(40) % 4, tuple("abcd"))
    for jitter in (False, True):
        sampler = TaskSampler([data], ways=(2, 4), jitter=jitter)
        before = torch.random.get_rng_state()
        first, second, third = (sampler.draw(3, seeded(seed)) for seed in (1, 1, 2))
        assert torch.equal(before, torch.random.get_rng_state())
        for a, b in zip(first, second, strict=True):
            assert a.classes == b.classes
            assert torch.equal(a.support, b.support)
            assert torch.equal(a.query, b.query)
        assert any(a.support.shape != b.support.shape or not torch.equal(a.support, b.support)
                   for a, b in zip(first, third, strict=True))  # fmt: skip


def test_jitter_is_one_transform_of_the_whole_task():
    # All examples are one image: whatever is done to it is done to all.
    image = torch.rand(1, 2, 9, 9, generator=seeded())
    data = Examples(image.expand(24, 2, 9, 9).clone(), torch.arange(24) % 3, tuple("abc"))
    tasks = TaskSampler([data], ways=(2, 3), jitter=True).draw(8, seeded())
    seen = []
    for task in tasks:
        everything = torch.cat([task.support, task.query])
        assert torch.equal(everything, everything[:1].expand_as(everything))
        assert not torch.allclose(everything[0], image[0], atol=1e-3)
        seen.append(everything[0])
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in pairwise(seen))
    plain = TaskSampler([data], ways=(2, 3)).draw(1, seeded())[0]
    assert torch.equal(plain.support[0], image[0])


def test_jitter_of_features_is_a_scale_and_a_shift():
    x = torch.randn(30, 5, generator=seeded())
    scales, shifts = [], []
    for seed in range(300):
        y = jittered(x, seeded(seed))
        scale = float((y[1, 0] - y[0, 0]) / (x[1, 0] - x[0, 0]))
        shift = float(y[0, 0] - scale * x[0, 0])
        assert torch.allclose(y, scale * x + shift, atol=1e-4)
        scales.append(scale)
        shifts.append(shift)
    assert min(scales) >= 0.5 - 1e-4
    assert max(scales) <= 1.3 + 1e-4
    assert abs(sum(scales) / 300 - 0.9) < 4 * 0.8 / math.sqrt(12 * 300)
    assert all(abs(shift) <= 0.2 + 1e-4 for shift in shifts)
    moved = sum(abs(shift) > 1e-4 for shift in shifts)
    assert abs(moved - 150) < 4 * math.sqrt(75)


@pytest.mark.parametrize(("height", "width"), [(41, 41), (31, 61)])
def test_jitter_of_images_turns_and_scales_about_the_middle(height, width):
    """Pictures of a smooth bump: where its middle went tells the angle and the scale."""
    ends = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in (height, width)]
    rows, columns = torch.meshgrid(*ends, indexing="ij")
    image = torch.exp(-((columns - 8) ** 2 + rows**2) / 4)[None, None]
    angles, radii, turned_over = [], [], 0
    for seed in range(200):
        y = jittered(image, seeded(seed))[0, 0]
        edge = float(y[0, 0])
        turned_over += float((y - edge).sum()) < 0
        weights = (y - edge).abs()
        where = torch.stack([(weights * columns).sum(), (weights * rows).sum()]) / weights.sum()
        radii.append(float(where.norm()) / 8)
        angles.append(math.atan2(float(where[1]), float(where[0])))
    assert max(map(abs, angles)) <= 0.5 + 0.03
    assert max(map(abs, angles)) > 0.4
    assert abs(sum(angles) / 200) < 4 * 1.0 / math.sqrt(12 * 200)
    assert min(radii) >= 0.7 - 0.05
    assert max(radii) <= 1.3 + 0.05
    assert max(radii) - min(radii) > 0.5
    assert abs(turned_over - 40) < 4 * math.sqrt(32)


def test_bytes_and_transforms_are_as_the_network_takes_them():
    data = Examples(
        torch.full((8, 1, 4, 4), 51, dtype=torch.uint8), torch.arange(8) % 2, ("a", "b"), transform=lambda x: x + 1
    )
    task = TaskSampler([data], ways=(2, 2)).draw(1, seeded())[0]
    assert torch.allclose(torch.cat([task.support, task.query]), torch.tensor(1.2))


@pytest.mark.usefixtures("unchecked")
def test_what_makes_no_task_is_refused():
    data = numbered([4, 4, 4])
    with pytest.raises(DataError, match="reference: give at least one"):
        TaskSampler([])
    for ways in ((1, 3), (4, 3), (0, 0)):
        with pytest.raises(DataError, match="ways: must be two numbers"):
            TaskSampler([data], ways=ways)
    for sizes in ({"shots": 0}, {"queries": 0}, {"shots": -1}):
        with pytest.raises(DataError, match="shots and queries: must be at least 1"):
            TaskSampler([data], **sizes)
    with pytest.raises(DataError, match="lonely: 1 classes have two examples"):
        TaskSampler([data, numbered([3, 1, 1, 0], name="lonely")])

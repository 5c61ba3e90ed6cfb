from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import meta_dropout
from meta_dropout import data
from meta_dropout.data import ClassImages, TaskSource, load, read_labelled, read_unlabelled
from shared_core import classes
from shared_core.episodes import TooFewItemsError
from shared_core.errors import InputError


def one_line(caught, *words):
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, text


def numbered(classes=6, each=8, side=16, channels=1):
    """Images whose every pixel says which image it is."""
    n = classes * each
    pixels = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, channels, side, side)).copy()
    return ClassImages("numbered", pixels, np.repeat(np.arange(classes), each), tuple("abcdefghij"[:classes]))


def identities(images):
    return torch.round(images[..., 0, 0, 0] * 255).long()


class TestTaskSource:
    def test_a_task_has_its_ways_shots_and_queries(self):
        source = TaskSource(numbered(), 4, 2, 3, seed=1)
        tasks = source.batch(0, 5)
        assert tasks.support.shape == (5, 8, 1, 16, 16)
        assert tasks.query.shape == (5, 12, 1, 16, 16)
        assert tasks.support.dtype == torch.float32
        assert tasks.support_labels[2].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert tasks.query_labels[4].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        for task in range(5):
            support, query = identities(tasks.support)[task], identities(tasks.query)[task]
            assert len({*support.tolist(), *query.tolist()}) == 20
            by_label = [set((support[tasks.support_labels[task] == way] // 8).tolist()) for way in range(4)]
            assert [len(classes) for classes in by_label] == [1] * 4
            assert len(set.union(*by_label)) == 4
            assert by_label == [set((query[tasks.query_labels[task] == way] // 8).tolist()) for way in range(4)]

    def test_an_episode_depends_on_seed_and_number_alone(self):
        source = TaskSource(numbered(), 3, 1, 2, seed=5)
        together = source.batch(0, 6)
        for count in (1, 2, 3):
            parts = [source.batch(number, count) for number in reversed(range(6 // count))][::-1]
            assert torch.equal(torch.cat([part.support for part in parts]), together.support)
            assert torch.equal(torch.cat([part.query for part in parts]), together.query)
        again = TaskSource(numbered(), 3, 1, 2, seed=5).batch(0, 6)
        other = TaskSource(numbered(), 3, 1, 2, seed=6).batch(0, 6)
        assert torch.equal(again.support, together.support)
        assert not torch.equal(other.support, together.support)

    def test_shared_classes_are_one_ordered_set_a_batch(self):
        source = TaskSource(numbered(10, 8), 4, 1, 3, seed=2, shared_classes=True)
        sets = []
        for number in range(4):
            tasks = source.batch(number, 5)
            classes = identities(tasks.support) // 8
            assert (classes == classes[0]).all()
            assert (identities(tasks.query) // 8 == classes[0].repeat_interleave(3)).all()
            assert len(torch.unique(identities(tasks.support), dim=0)) > 1
            everything = torch.cat([identities(tasks.support), identities(tasks.query)], 1)
            assert all(len(set(row.tolist())) == 16 for row in everything)
            sets.append(tuple(classes[0].tolist()))
        assert len(set(sets)) > 1
        independent = identities(TaskSource(numbered(10, 8), 4, 1, 3, seed=2).batch(0, 5).support) // 8
        assert independent[0].tolist() == list(sets[0])
        assert len(torch.unique(independent, dim=0)) > 1

    def test_every_class_and_image_gets_its_turn(self):
        tasks = TaskSource(numbered(), 3, 1, 2).batch(0, 300)
        counts = torch.bincount(identities(tasks.query).ravel(), minlength=48)
        assert counts.min() > 10

    def test_floats_come_as_they_are_and_read_only_arrays_work(self):
        whole = numbered()
        floats = ClassImages("f", whole.float_images(slice(None)), whole.labels, whole.class_names)
        locked = whole.images.copy()
        locked.flags.writeable = False
        for other in (floats, ClassImages("l", locked, whole.labels, whole.class_names)):
            found = TaskSource(other, 3, 1, 2).batch(1, 2)
            assert torch.equal(found.query, TaskSource(whole, 3, 1, 2).batch(1, 2).query)

    def test_says_which_class_is_too_small(self):
        whole = numbered(3, 20)
        small = whole.rows(np.concatenate([np.arange(27), np.arange(40, 60)]))
        with pytest.raises(TooFewItemsError) as caught:
            TaskSource(small, 3, 1, 15)
        one_line(caught, "class 'b' has 7 images, needs 16 (1 support + 15 query)")

    def test_says_how_many_classes_there_are(self):
        with pytest.raises(TooFewItemsError) as caught:
            TaskSource(numbered(3), 5, 1, 2)
        one_line(caught, "numbered", "has 3 classes", "5-way")

    def test_refuses_no_ways_shots_queries_or_tasks(self):
        for numbers in ((1, 1, 1), (2, 0, 1), (2, 1, 0)):
            with pytest.raises(InputError, match="need ways >= 2"):
                TaskSource(numbered(), *numbers)
        for number, count in ((-1, 2), (0, 0)):
            with pytest.raises(InputError, match="batch number"):
                TaskSource(numbered(), 2, 1, 1).batch(number, count)


# ---- support and query from different groups


def grouped(counts: list[int], classes: int = 4) -> ClassImages:
    """Classes whose groups have so many images; an image's first pixel is its group, its second its class."""
    groups = np.tile(np.repeat(np.arange(len(counts)), counts), classes).astype(np.int64)
    labels = np.repeat(np.arange(classes), sum(counts)).astype(np.int64)
    images = np.zeros((len(labels), 1, 16, 16), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = groups, labels
    names = tuple("abcdefgh"[:classes])
    return ClassImages("grouped", images, labels, names, groups, tuple(map(str, range(len(counts)))), "face")


def test_disjoint_queries_are_from_other_groups_than_the_support():
    tasks = TaskSource(grouped([2, 2, 3, 1]), 3, 2, 3, seed=0, disjoint=True).batch(0, 40)
    seen = set()
    for t in range(40):
        for label in range(3):
            mine, asked = tasks.support_labels[t] == label, tasks.query_labels[t] == label
            support = (255 * tasks.support[t][mine][:, 0, 0]).round().int()
            query = (255 * tasks.query[t][asked][:, 0, 0]).round().int()
            assert not set(support[:, 0].tolist()) & set(query[:, 0].tolist())
            assert len(set(support[:, 1].tolist()) | set(query[:, 1].tolist())) == 1
            seen |= set(support[:, 0].tolist())
    assert seen == {0, 1, 2, 3}


def test_disjoint_episodes_do_not_depend_on_the_batch():
    source = TaskSource(grouped([2, 2, 3, 1]), 2, 1, 3, seed=5, disjoint=True)
    assert torch.equal(source.batch(1, 2).query[0], source.batch(2, 1).query[0])
    assert not torch.equal(source.batch(0, 1).query, source.batch(1, 1).query)


def test_disjoint_needs_groups_that_can_be_divided():
    with pytest.raises(InputError, match="class 'a' has 8 images in 3 groups; with 2 in the support, other groups may"):
        TaskSource(grouped([4, 2, 2]), 2, 2, 4, disjoint=True)
    with pytest.raises(InputError, match="says no group"):
        TaskSource(replace(grouped([4, 4]), groups=None), 2, 1, 1, disjoint=True)
    with pytest.raises(InputError, match="use one of the two"):
        TaskSource(grouped([4, 4]), 2, 1, 1, disjoint=True, shared_classes=True)


# ---- what is of the core and has its names here too


def test_the_names_of_the_core_are_here_too():
    assert meta_dropout.load is load is classes.load_classes
    assert meta_dropout.ClassImages is ClassImages is classes.ClassImages
    assert data.NAMES == ("glyphs", "omniglot", "mini-imagenet", "cifar-fs")
    for name in data.__all__:
        assert getattr(data, name) is not None


def test_loads_draws_and_reads(tmp_path):
    tasks = TaskSource(load("glyphs", split="test", classes=6, instances=4, size=20), 5, 1, 3).batch(0, 2)
    assert tasks.query.shape == (2, 15, 1, 20, 20)
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("L", (20, 20), 7).save(tmp_path / name / "0.png")
    assert read_labelled(tmp_path, 20, 1).class_names == ("a", "b")
    assert read_unlabelled(tmp_path / "a", 20, 1).files == ("0.png",)

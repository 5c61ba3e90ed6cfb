from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from shared_core.classes import ClassImages
from stamp.examples import DataError, Examples, as_examples, check_fits


def toy(n=12, classes=3, shape=(2,)):
    x = torch.arange(float(n)).reshape(n, *[1] * len(shape)) / n + torch.zeros(n, *shape)
    return Examples(x, torch.arange(n) % classes, tuple("abcdefgh"[:classes]))


class Items(Dataset):
    def __init__(self, items, **attributes):
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, k):
        return self.items[k]


def test_bytes_are_divided_and_transformed_when_read_and_floats_are_not():
    x = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8)
    data = Examples(x, torch.tensor([0, 1]), ("a", "b"), transform=lambda batch: batch + 1)
    assert torch.equal(data.inputs(), x.float() / 255 + 1)
    assert torch.equal(data.inputs(torch.tensor([1])), x[1:].float() / 255 + 1)
    assert data.x.dtype == torch.uint8
    half = Examples(torch.rand(2, 3, dtype=torch.float64), torch.tensor([0, 1]), ("a", "b"))
    assert torch.equal(half.inputs(slice(1)), half.x[:1].float())


def test_batches_cover_all_examples_once_and_a_generator_decides_their_order():
    data = toy(11)
    plain = list(data.batches(4))
    assert [len(y) for _, y in plain] == [4, 4, 3]
    assert torch.equal(torch.cat([x for x, _ in plain]), data.inputs())
    one, same, other = (
        torch.cat([x for x, _ in data.batches(4, generator=torch.Generator().manual_seed(s))])[:, 0] for s in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(one.sort().values, data.inputs()[:, 0])
    shuffled = list(data.batches(4, generator=torch.Generator().manual_seed(0), drop_last=True))
    assert [len(y) for _, y in shuffled] == [4, 4]
    for x, y in shuffled:
        assert torch.equal((x[:, 0] * 11).round().long() % 3, y)


def test_select_numbers_the_classes_anew():
    data = toy()
    part = data.select([2, 0])
    assert part.class_names == ("c", "a")
    assert torch.equal(part.x, data.x[(data.y == 2) | (data.y == 0)])
    assert [part.class_names[k] for k in part.y] == [data.class_names[k] for k in data.y if k != 1]
    with pytest.raises(DataError, match="no class 3"):
        data.select([3])
    with pytest.raises(DataError, match="different"):
        data.select([1, 1])


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.8, 0.99])
def test_a_split_divides_each_class_and_loses_nothing(fraction):
    y = torch.tensor([0] * 2 + [1] * 10 + [3] * 30)
    data = Examples(torch.arange(42.0)[:, None], y, tuple("abcd"))
    first, second = data.split(fraction, 0)
    assert sorted([*first.x[:, 0].tolist(), *second.x[:, 0].tolist()]) == data.x[:, 0].tolist()
    assert all((first.counts > 0) == (data.counts > 0))
    assert all((second.counts > 0) == (data.counts > 0))
    assert abs(int(first.counts[3]) - fraction * 30) <= 1
    assert torch.equal(first.x, data.split(fraction, 0)[0].x)
    if fraction == 0.3:
        assert not torch.equal(first.x, data.split(fraction, 1)[0].x)


def test_a_split_refuses_what_it_cannot_divide():
    data = Examples(torch.rand(3, 2), torch.tensor([0, 0, 1]), ("a", "b"))
    with pytest.raises(DataError, match="class 'b' has 1 example"):
        data.split(0.5, 0)
    with pytest.raises(DataError, match="fraction"):
        toy().split(1.0, 0)


def test_every_kind_of_data_becomes_the_same_examples():
    x = torch.rand(7, 1, 4, 4)
    y = torch.arange(7) % 3
    whole = TensorDataset(x, y)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(x.numpy(), y.tolist(), strict=True))

    kinds = [
        (x, y), [x.numpy().astype(np.float64), y.numpy().astype(np.uint8)], (x.numpy(), y.tolist()), whole,
        DataLoader(whole, batch_size=3), Items([(x[k], int(y[k])) for k in range(7)]), Stream(),
        ClassImages("toy", x.numpy(), y.numpy(), ("0", "1", "2")), Examples(x, y, ("0", "1", "2")),
    ]  # fmt: skip
    for data in kinds:
        found = as_examples(data)
        assert torch.equal(found.inputs(), x)
        assert torch.equal(found.y, y)
        assert found.class_names == ("0", "1", "2")


def test_pictures_and_class_names_of_a_data_set_are_kept():
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    found = as_examples(Items([(image.fromarray(p), k) for k, p in enumerate(pixels)], classes=["cat", "dog", "eel"]))
    assert found.class_names == ("cat", "dog", "eel")
    assert np.array_equal(found.x.numpy(), pixels.transpose(0, 3, 1, 2))
    grey = as_examples(Items([(image.fromarray(p[..., 0]), k) for k, p in enumerate(pixels)]))
    assert grey.shape == (1, 5, 6)


def test_a_class_without_examples_needs_a_name():
    x = torch.rand(4, 2)
    with pytest.raises(DataError, match=r"labels are 0\.\.4, and 1, 3 are missing"):
        as_examples((x, torch.tensor([0, 2, 4, 4])))
    assert as_examples((x, torch.tensor([0, 2, 4, 4])), class_names="abcde").counts.tolist() == [1, 0, 1, 0, 2]


BAD = {
    "no examples": ((torch.rand(0, 3), torch.zeros(0, dtype=torch.int64)), "no examples"),
    "one example": ((torch.rand(1, 3), torch.tensor([0])), "1 example; give at least 2"),
    "float labels": ((torch.rand(3, 3), torch.tensor([0.0, 1.0, 0.0])), "y is float32"),
    "text labels": ((torch.rand(2, 3), np.array(["a", "b"])), "class numbers"),
    "negative labels": ((torch.rand(3, 3), torch.tensor([-1, 0, 1])), "start at -1"),
    "a label missing": ((torch.rand(3, 3), torch.tensor([1, 2, 1])), "0 is missing"),
    "labels of people": ((torch.rand(3, 3), torch.tensor([0, 10**12, 1])), "without a gap"),
    "NaN": ((torch.tensor([[0.0], [float("nan")], [1.0]]), torch.tensor([0, 1, 1])), r"x\[1\] \(class '1'\)"),
    "infinity": ((torch.tensor([[0.0], [1.0], [float("inf")]]), torch.tensor([0, 1, 1])), r"x\[2\]"),
    "lengths": ((torch.rand(4, 3), torch.tensor([0, 1, 0])), r"shape \(3,\) for 4 inputs"),
    "two columns": ((torch.rand(3, 3), torch.zeros(3, 1, dtype=torch.int64)), r"must be \(3,\)"),
    "integers": ((torch.ones(3, 3, dtype=torch.int64), torch.tensor([0, 1, 0])), "x is int64"),
    "one dimension": ((torch.rand(3), torch.tensor([0, 1, 0])), r"must be \(n, features\)"),
    "a file name": ("data.npz", "cannot make examples of str"),
    "three parts": ((torch.rand(2, 2), torch.tensor([0, 1]), 3), "cannot make examples of tuple"),
    "no pairs": (Items([torch.rand(2), torch.rand(2)]), "item 0 is a Tensor"),
    "shapes that differ": (Items([(torch.rand(2), 0), (torch.rand(3), 1)]), r"item 1 has shape \(3,\)"),
    "an empty data set": (Items([]), "no examples"),
    "lists of lists": (([[1.0, 2.0], [1.0]], [0, 1]), "x cannot become a tensor"),
    "few names": (Items([(torch.rand(2), 0), (torch.rand(2), 3)], classes=["a", "b"]), r"y\[1\] is 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_in_one_line(name, unchecked):
    data, words = BAD[name]
    with pytest.raises(DataError, match=words) as caught:
        as_examples(data, name="mine")
    assert str(caught.value).startswith("mine: ")
    assert "\n" not in str(caught.value)


def test_bytes_as_floats_are_warned_of_and_small_floats_are_not():
    y = torch.tensor([0, 1])
    with pytest.warns(UserWarning, match="divide images by 255"):
        as_examples((torch.full((2, 1, 4, 4), 255.0), y))
    with pytest.warns(UserWarning, match="standardise"):
        as_examples((torch.full((2, 4), 255.0), y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_examples((torch.full((2, 4), 16.0), y))
        as_examples((torch.full((2, 4), 255, dtype=torch.uint8), y))


def test_inputs_that_a_network_cannot_take_are_refused():
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    statistics = conv[1].running_mean.clone()
    check_fits(conv, toy(shape=(3, 6, 6)))
    with pytest.raises(DataError, match="takes 3 channels; repeat the channel 3 times"):
        check_fits(conv, toy(shape=(1, 6, 6)))
    with pytest.raises(DataError, match="put channels first"):
        check_fits(conv, toy(shape=(6, 6, 3)))
    with pytest.raises(DataError, match=r"takes \(channels, height, width\)"):
        check_fits(conv, toy(shape=(6,)))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    check_fits(flat, toy(shape=(12,)))
    check_fits(flat, toy(shape=(3, 2, 2)))
    with pytest.raises(DataError, match="takes 12 features"):
        check_fits(flat, toy(shape=(13,)))
    check_fits(nn.ReLU(), toy())
    assert conv.training
    assert torch.equal(conv[1].running_mean, statistics)


def test_a_network_that_reshapes_its_input_is_not_refused():
    check_fits(nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, 3)), toy(shape=(16,)))

"""What optimizers are compared on: small, seeded problems, from a regression with a known optimum to a recurrent net.

A task's data are fixed. A seed governs the initial weights, the order of the batches and any noise, and is the same for
every optimizer, so that differences between optimizers can be taken seed by seed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional

from shared_core.data import ImageData, TableData, load
from shared_core.device import seeded
from shared_core.errors import InputError, no_such

__all__ = ["TASKS", "Batch", "Metric", "Task", "english_text", "make_task"]

Batch: TypeAlias = tuple[Tensor, ...]

_TRAIN_LOSS = "train loss"


@dataclass(frozen=True)
class Metric:
    """A quantity that a trained model is judged by.

    Parameters
    ----------
    name : as it appears in tables
    unit : "1" when it has none
    better : which direction is better
    """

    name: str
    unit: str = "1"
    better: Literal["lower", "higher"] = "lower"


@dataclass(frozen=True)
class Task:
    """A training problem, the same for every optimizer.

    Parameters
    ----------
    name : in tables and on the command line
    description : one line: the model, the data, the loss
    build : seed -> a fresh model
    batches : (seed, steps) -> that many batches
    loss : (model, batch) -> scalar
    evaluate : trained model -> metric name -> value in the metric's unit; the test part of the data is looked at here
        only
    metrics : what ``evaluate`` returns, the headline first
    steps : training steps of the full task
    batch_size : examples in a step
    tuned_by : what learning rates are chosen by: ``train loss``, or a metric that involves no test data
    warmup : steps over which the learning rate rises from 0
    loss_unit : unit of the loss
    """

    name: str
    description: str
    build: Callable[[int], nn.Module]
    batches: Callable[[int, int], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module], dict[str, float]]
    metrics: tuple[Metric, ...]
    steps: int
    batch_size: int
    tuned_by: str = _TRAIN_LOSS
    warmup: int = 20
    loss_unit: str = "nats"

    @property
    def headline(self) -> Metric:
        """The metric the task is about."""
        return self.metrics[0]


def _drawn(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """Give layers, which draw their weights from the global state, a seed without touching that state."""

    def build(seed: int) -> nn.Module:
        with seeded(seed):
            return make()

    return build


def _shuffled(arrays: Sequence[Tensor], batch_size: int, seed: int, steps: int) -> Iterator[Batch]:
    """Yield batches of all arrays together, epoch after epoch in a new order, no example twice in an epoch."""
    random = torch.Generator().manual_seed(seed)
    n = len(arrays[0])
    size = min(batch_size, n)
    order = torch.randperm(n, generator=random)
    start = 0
    for _ in range(steps):
        if start + size > n:
            order, start = torch.randperm(n, generator=random), 0
        rows = order[start : start + size]
        start += size
        yield tuple(array[rows] for array in arrays)


# ---- A: correlated regression


def _group_covariance(random: np.random.Generator, groups: int, size: int) -> Float[np.ndarray, "groups size size"]:
    """Draw a mixing matrix for each group; the covariance A Aᵀ has condition 1e3."""
    scales = np.logspace(0, -1.5, size)
    factors = np.linalg.qr(random.normal(size=(groups, size, size))).Q
    return np.einsum("gij,j,gkj->gik", factors, scales, factors)


def correlated(*, permuted: bool = False, groups: int = 20, size: int = 10, outputs: int = 10) -> Task:
    """Regress on features that are correlated in groups of ten; the negative control scatters the groups.

    Fresh samples at every step, so the excess risk is known exactly: tr(E S Eᵀ) / tr(W* S W*ᵀ), E = W - W*,
    S the covariance of the features.

    Parameters
    ----------
    permuted : put the features in a random order, which takes each group apart
    groups, size : d = groups * size features
    outputs : rows of W*
    """
    random = np.random.default_rng(1905)
    mixing = torch.from_numpy(_group_covariance(random, groups, size)).float()
    optimum = torch.from_numpy(random.normal(size=(outputs, groups * size))).float()
    order = torch.from_numpy(random.permutation(groups * size)) if permuted else torch.arange(groups * size)
    covariance = torch.block_diag(*(mixing @ mixing.mT).double())[order][:, order]
    optimum = optimum[:, order]
    batch_size = 64

    def build(seed: int) -> nn.Module:
        del seed
        model = nn.utils.skip_init(nn.Linear, groups * size, outputs, bias=False)
        nn.init.zeros_(next(model.parameters()))
        return model

    def batches(seed: int, steps: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            latent = torch.randn(batch_size, groups, size, generator=generator)
            x = torch.einsum("bgj,gij->bgi", latent, mixing).flatten(1)[:, order]
            yield x, x @ optimum.T + 0.1 * torch.randn(batch_size, outputs, generator=generator)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return 0.5 * (model(batch[0]) - batch[1]).square().sum(dim=1).mean()

    scale = _energy(optimum.double(), covariance)

    def evaluate(model: nn.Module) -> dict[str, float]:
        weight = next(model.parameters()).detach().double()
        return {"relative excess risk": _energy(weight - optimum.double(), covariance) / scale}

    return Task(
        name="correlated-permuted" if permuted else "correlated",
        description=f"linear regression on {groups * size} features correlated in groups of {size}"
        + (", in random order" if permuted else ""),
        build=build,
        batches=batches,
        loss=loss,
        evaluate=evaluate,
        metrics=(Metric("relative excess risk"),),
        steps=400,
        batch_size=batch_size,
        # The exact expectation of the training loss, less its irreducible part: no test data are involved.
        tuned_by="relative excess risk",
        loss_unit="1",
    )


def _energy(weight: Float[Tensor, "outputs d"], covariance: Float[Tensor, "d d"]) -> float:
    return float(((weight @ covariance) * weight).sum())


# ---- B: autoencoders


@dataclass(frozen=True, eq=False)
class _Images:
    """Images as (n, 1, h, w) in [0, 1] with labels, a training and a test part."""

    train: Float32[Tensor, "train 1 h w"]
    train_labels: Int64[Tensor, " train"]
    test: Float32[Tensor, "test 1 h w"]
    test_labels: Int64[Tensor, " test"]


@functools.cache
def _digits(train: int | None = None) -> _Images:
    data = load("digits")
    assert isinstance(data, ImageData)
    order = np.random.default_rng(0).permutation(len(data))
    images = torch.from_numpy(data.images[order]).float().unsqueeze(1) / data.peak
    labels = torch.from_numpy(data.labels[order])
    held = 360
    rest = slice(held, None if train is None else held + train)
    return _Images(images[rest], labels[rest], images[:held], labels[:held])


@functools.cache
def _mnist(train: int = 10_000, test: int = 5_000) -> _Images:
    """MNIST pooled to 14 x 14, the first images of each split."""
    parts: list[Tensor] = []
    for split, count in (("train", train), ("test", test)):
        data = load("mnist", split=split)
        assert isinstance(data, ImageData)
        images = torch.from_numpy(data.images[:count]).float().unsqueeze(1) / data.peak
        parts += [functional.avg_pool2d(images, 2), torch.from_numpy(data.labels[:count])]
    return _Images(*parts)


def _autoencoder(name: str, description: str, images: _Images, sizes: Sequence[int], steps: int) -> Task:
    train, test = images.train.flatten(1), images.test.flatten(1)
    batch_size = 128

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        widths = [train.shape[1], *sizes, *reversed(sizes[:-1]), train.shape[1]]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return functional.binary_cross_entropy_with_logits(model(batch[0]), batch[0], reduction="sum") / len(batch[0])

    def evaluate(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            error = (torch.sigmoid(model(test)) - test).square().sum(dim=1).mean()
        return {"test squared error": float(error)}

    return Task(
        name=name,
        description=description,
        build=_drawn(make),
        batches=lambda seed, steps: _shuffled([train], batch_size, seed, steps),
        loss=loss,
        evaluate=evaluate,
        metrics=(Metric("test squared error"),),
        steps=steps,
        batch_size=batch_size,
    )


def autoencoder() -> Task:
    """Make the deep autoencoder of MNIST pooled to 14 x 14: 196-60-16-60-196, tanh, Bernoulli loss."""
    text = "autoencoder 196-60-16-60-196 of 10,000 MNIST images pooled to 14 x 14, Bernoulli loss"
    return _autoencoder("autoencoder", text, _mnist(), (60, 16), 400)


def autoencoder_digits() -> Task:
    """Make the same autoencoder, smaller, of scikit-learn's embedded digits: 64-40-12-40-64."""
    text = "autoencoder 64-40-12-40-64 of scikit-learn's 8 x 8 digits, Bernoulli loss"
    return _autoencoder("autoencoder-digits", text, _digits(), (40, 12), 300)


# ---- C, D, E: classifiers


def _classifier(
    name: str,
    description: str,
    make: Callable[[], nn.Module],
    parts: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    steps: int,
    batch_size: int,
    penalty: float = 0.0,
) -> Task:
    x, y, test_x, test_y = parts

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        fit = functional.cross_entropy(model(batch[0]), batch[1])
        if not penalty:
            return fit
        return fit + 0.5 * penalty * sum(
            (weight.square().sum() for weight in model.parameters()), torch.zeros(()).to(fit)
        )

    def evaluate(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            logits = model(test_x)
            return {
                "test accuracy": 100 * float((logits.argmax(dim=1) == test_y).double().mean()),
                "test loss": float(functional.cross_entropy(logits, test_y)),
            }

    return Task(
        name=name,
        description=description,
        build=_drawn(make),
        batches=lambda seed, steps: _shuffled([x, y], batch_size, seed, steps),
        loss=loss,
        evaluate=evaluate,
        metrics=(Metric("test accuracy", "%", "higher"), Metric("test loss", "nats")),
        steps=steps,
        batch_size=batch_size,
    )


def _parts(images: _Images, *, flat: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train, test = (part.flatten(1) if flat else part for part in (images.train, images.test))
    return train, images.train_labels, test, images.test_labels


def _small_cnn(side: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (side // 4) ** 2, 10),
    )


def cnn() -> Task:
    """Make the small convolutional classifier of MNIST pooled to 14 x 14."""
    text = "conv 8, conv 16, linear on 10,000 MNIST images pooled to 14 x 14"
    parts = _parts(_mnist(), flat=False)
    return _classifier("cnn", text, lambda: _small_cnn(14), parts, steps=400, batch_size=128)


def _mlp_of(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def mlp() -> Task:
    """Make the classifier 196-50-10, tanh, of MNIST pooled to 14 x 14."""
    text = "network 196-50-10 on 10,000 MNIST images pooled to 14 x 14"
    parts = _parts(_mnist(), flat=True)
    return _classifier("mlp", text, lambda: _mlp_of(196, 50, 10), parts, steps=400, batch_size=128)


def digits() -> Task:
    """Make the classifier 64-40-10, tanh, of scikit-learn's digits."""
    text = "network 64-40-10 on scikit-learn's 8 x 8 digits"
    parts = _parts(_digits(), flat=True)
    return _classifier("digits", text, lambda: _mlp_of(64, 40, 10), parts, steps=300, batch_size=128)


def digits_clip() -> Task:
    """Make the convolutional classifier of 500 digits, few enough that generalisation is in question."""
    text = "conv 8, conv 16, linear on 500 of scikit-learn's 8 x 8 digits"
    parts = _parts(_digits(500), flat=False)
    return _classifier("digits-clip", text, lambda: _small_cnn(8), parts, steps=1500, batch_size=64)


def breast_cancer() -> Task:
    """Make the classifier 30-16-2, tanh, of standardised, strongly correlated cell measurements."""
    data = load("breast-cancer")
    assert isinstance(data, TableData)
    order = np.random.default_rng(0).permutation(len(data))
    x, y = np.asarray(data.x)[order], torch.from_numpy(np.asarray(data.y)[order].astype(np.int64))
    held = len(data) // 5
    train = x[held:]
    x = torch.from_numpy((x - train.mean(axis=0)) / train.std(axis=0)).float()
    return _classifier(
        "breast-cancer",
        "network 30-16-2 on scikit-learn's breast cancer table, standardised, L2 penalty 1e-4; a fifth is held out",
        lambda: _mlp_of(30, 16, 2),
        (x[held:], y[held:], x[:held], y[:held]),
        steps=300,
        batch_size=64,
        # The classes are separable: without a penalty the loss has no minimum to compare the way to.
        penalty=1e-4,
    )


# ---- F: characters


def english_text() -> str:
    """Return real English that every installation has: scikit-learn's data set descriptions and Python's reference.

    The second part is the language reference behind Python's ``help()``. Both are technical prose with some code, and
    differ a little between versions: figures on it hold for one installation.
    """
    from pydoc_data.topics import topics  # pyright: ignore[reportMissingImports]

    from sklearn import datasets

    names = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
    descriptions = [str(getattr(datasets, f"load_{name}")().DESCR) for name in names]
    return "\n\n".join([*descriptions, *(topics[name] for name in sorted(topics))])


def _read_text(path: str | Path) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; give a text file to learn characters from") from error
    if len(text) < _SHORTEST_TEXT:
        raise InputError(f"{path}: {len(text):,} characters are too few to learn from; give {_SHORTEST_TEXT:,} or more")
    return text


_SHORTEST_TEXT = 20_000
_LONGEST_TEXT = 400_000


class _CharacterModel(nn.Module):
    def __init__(self, characters: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.lstm = nn.LSTM(32, hidden, batch_first=True)
        self.head = nn.Linear(hidden, characters)

    def forward(self, codes: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch length characters"]:
        return self.head(self.lstm(self.embedding(codes))[0])


def char_lstm(text: str | Path | None = None, *, hidden: int = 64, length: int = 50) -> Task:
    """Make a character model: an LSTM that predicts the next character.

    Parameters
    ----------
    text : file to learn from, such as gensim's ``lee_background.cor``; None takes :func:`english_text`
    hidden : units of the LSTM
    length : characters in a training window

    Raises
    ------
    InputError
        For a file that cannot be read or is too short.
    """
    written = (english_text() if text is None else _read_text(text))[:_LONGEST_TEXT]
    alphabet = sorted(set(written))
    # What occurs less than once in 10,000 characters shares one code: it is not what is compared here.
    common = [letter for letter in alphabet if written.count(letter) * 10_000 >= len(written)]
    code = {letter: place + 1 for place, letter in enumerate(common)}
    codes = torch.tensor([code.get(letter, 0) for letter in written])
    cut = len(codes) * 9 // 10
    train = codes[:cut]
    test = codes[cut:]
    windows = test[: (len(test) - 1) // length * length].view(-1, length)[:400]
    following = test[1 : windows.numel() + 1].view(-1, length)
    batch_size = 32

    def batches(seed: int, steps: int) -> Iterator[Batch]:
        random = torch.Generator().manual_seed(seed)
        span = torch.arange(length + 1)
        for _ in range(steps):
            start = torch.randint(len(train) - length, (batch_size, 1), generator=random)
            window = train[start + span]
            yield window[:, :-1], window[:, 1:]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def evaluate(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"test bits per character": float(loss(model, (windows, following))) / math.log(2)}

    source = "English reference texts on this machine" if text is None else Path(text).name
    return Task(
        name="char-lstm",
        description=f"LSTM with {hidden} units on {len(written):,} characters of {source}",
        build=_drawn(lambda: _CharacterModel(len(code) + 1, hidden)),
        batches=batches,
        loss=loss,
        evaluate=evaluate,
        metrics=(Metric("test bits per character", "bits"),),
        steps=400,
        batch_size=batch_size,
    )


@dataclass(frozen=True)
class _Entry:
    make: Callable[[], Task]
    summary: str
    needs: str = field(default="")


TASKS: Mapping[str, _Entry] = {
    "correlated": _Entry(correlated, "regression on features correlated in groups of ten"),
    "correlated-permuted": _Entry(lambda: correlated(permuted=True), "its negative control: groups taken apart"),
    "breast-cancer": _Entry(breast_cancer, "small network on a table of correlated measurements"),
    "digits": _Entry(digits, "small network on 8 x 8 digits"),
    "digits-clip": _Entry(digits_clip, "small CNN on 500 digits"),
    "autoencoder-digits": _Entry(autoencoder_digits, "deep autoencoder of 8 x 8 digits"),
    "autoencoder": _Entry(autoencoder, "deep autoencoder of MNIST at 14 x 14", "mnist"),
    "cnn": _Entry(cnn, "small CNN on MNIST at 14 x 14", "mnist"),
    "mlp": _Entry(mlp, "small network on MNIST at 14 x 14", "mnist"),
    "char-lstm": _Entry(char_lstm, "character LSTM on English text"),
}
"""Tasks by name; those with ``needs`` read that data set from the data folder."""


def make_task(name: str, *, text: str | Path | None = None, steps: int | None = None) -> Task:
    """Make a task by name.

    Parameters
    ----------
    name : a name in :data:`TASKS`
    text : text file of ``char-lstm``
    steps : train for that many steps instead of the task's own number

    Raises
    ------
    UnknownKeyError
        For a task that does not exist.
    InputError
        When the data are missing (with the place to get them) or do not fit.

    Examples
    --------
    >>> make_task("breast-cancer").headline.name
    'test accuracy'
    """
    if name not in TASKS:
        raise no_such("task", name, TASKS)
    if text is not None and name != "char-lstm":
        raise InputError(f"task '{name}' does not read a text; only char-lstm does")
    task = char_lstm(text) if name == "char-lstm" else TASKS[name].make()
    if steps is not None:
        if steps < 1:
            raise InputError(f"task '{name}': steps = {steps}; give 1 or more")
        task = replace(task, steps=steps)
    return task

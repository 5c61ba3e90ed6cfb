"""Labelled examples as every other file takes them: bytes or floats with class numbers, checked once.

:func:`as_examples` makes them of what users have: arrays, a torch data set or loader, classes of images.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from shared_core.classes import ClassImages
from shared_core.errors import InputError
from stamp.axes import CONVS

__all__ = ["DataError", "Examples", "Transform", "as_examples", "check_fits"]

Transform = Callable[[Tensor], Tensor]

_UNSCALED = 20.0


class DataError(InputError):
    """Examples that cannot be used; the message is one line that says why and what to do."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs with the class of each.

    Parameters
    ----------
    x : ``(n, ...)`` bytes, which are divided by 255 when they are read, or floats, which are taken as they are
    y : ``(n,)`` positions in `class_names`; a class may have no example here
    class_names : a name a class
    name : what to call them in results
    transform : applied to every batch of inputs when it is read, after the division

    Raises
    ------
    DataError
        When there are none, lengths differ, labels are no positions in the names, or an input is NaN or infinite.

    Examples
    --------
    >>> data = Examples(torch.full((4, 1, 8, 8), 51, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), ("a", "b"))
    >>> len(data), data.num_classes, data.shape, data.counts.tolist(), round(data.inputs().mean().item(), 4)
    (4, 2, (1, 8, 8), [2, 2], 0.2)
    """

    x: Shaped[Tensor, "n ..."]
    y: Int64[Tensor, " n"]
    class_names: tuple[str, ...]
    name: str = "data"
    transform: Transform | None = None

    def __post_init__(self) -> None:
        x, y, name = self.x, self.y, self.name
        if x.dim() < 2:
            raise DataError(f"{name}: x has shape {tuple(x.shape)}; it must be (n, features) or (n, channels, ...)")
        if not len(x) or not x.numel():
            raise DataError(f"{name}: x has shape {tuple(x.shape)}, no examples; give at least 2")
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise DataError(
                f"{name}: x is {_type(x)}; give uint8 0..255, or floats of the scale that the network knows"
            )
        if y.dtype != torch.int64:
            hint = "class numbers 0, 1, ... as int64" if y.is_floating_point() else "y.long()"
            raise DataError(f"{name}: y is {_type(y)}; give {hint}")
        if y.shape != (len(x),):
            raise DataError(f"{name}: y has shape {tuple(y.shape)} for {len(x)} inputs; it must be ({len(x)},)")
        low, high = (int(value) for value in torch.aminmax(y))
        if low < 0 or high >= len(self.class_names):
            row = int(((y < 0) | (y >= len(self.class_names))).nonzero()[0])
            raise DataError(
                f"{name}: y[{row}] is {int(y[row])}, and there are {len(self.class_names)} classes; number them from 0"
            )
        # One pass, and none of its results is as large as the inputs; both are NaN as soon as one input is.
        if x.is_floating_point() and not all(math.isfinite(value) for value in torch.aminmax(x.detach())):
            row = int((~torch.isfinite(x).flatten(1).all(1)).nonzero()[0])
            raise DataError(
                f"{name}: x[{row}] (class '{self.class_names[int(y[row])]}') holds NaN or infinity; mend it"
            )

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.y)

    @property
    def num_classes(self) -> int:
        """Number of classes, those without an example included."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.x.shape[1:])

    @property
    def counts(self) -> Int64[Tensor, " classes"]:
        """Examples of each class."""
        return torch.bincount(self.y, minlength=self.num_classes)

    def inputs(self, index: Tensor | slice | None = None) -> Float32[Tensor, "k ..."]:
        """Return inputs as a network takes them: scaled and transformed.

        Parameters
        ----------
        index : positions, True for those to take, or a slice; None for all
        """
        chosen = self.x if index is None else self.x[index]
        scaled = chosen.to(torch.float32)
        if chosen.dtype == torch.uint8:
            scaled = scaled / 255
        return scaled if self.transform is None else self.transform(scaled)

    def batches(
        self, size: int, *, generator: torch.Generator | None = None, drop_last: bool = False
    ) -> Iterator[tuple[Float32[Tensor, "k ..."], Int64[Tensor, " k"]]]:
        """Iterate once over all examples.

        Parameters
        ----------
        size : examples of a batch; the last one may have fewer
        generator : shuffles; without it batches are in the order of the examples
        drop_last : leave out a last batch of fewer examples

        Raises
        ------
        DataError
            For a size below 1.
        """
        if size < 1:
            raise DataError(f"batch size: must be at least 1, got {size}")
        return self._batches(size, generator, len(self) - len(self) % size if drop_last else len(self))

    def _batches(self, size: int, generator: torch.Generator | None, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = None
        if generator is not None:
            order = torch.randperm(len(self), generator=generator, device=generator.device).to(self.x.device)
        for start in range(0, end, size):
            index = slice(start, min(start + size, end))
            chosen = index if order is None else order[index]
            yield self.inputs(chosen), self.y[chosen]

    def rows(self, index: Tensor | slice) -> Examples:
        """Return only some examples, with all the class names.

        Parameters
        ----------
        index : positions, True for those to take, or a slice

        Raises
        ------
        DataError
            When none is left.
        """
        return replace(self, x=self.x[index], y=self.y[index])

    def select(self, classes: Sequence[int]) -> Examples:
        """Return only some classes, numbered anew in the order given.

        Parameters
        ----------
        classes : different ones

        Raises
        ------
        DataError
            For a class that does not exist or is given twice, or when no example is left.

        Examples
        --------
        >>> data = Examples(torch.rand(6, 2), torch.tensor([0, 1, 2, 0, 1, 2]), ("a", "b", "c"))
        >>> part = data.select([2, 0])
        >>> part.class_names, part.y.tolist()
        (('c', 'a'), [1, 0, 1, 0])
        """
        chosen = [int(k) for k in classes]
        if wrong := [k for k in chosen if not 0 <= k < self.num_classes]:
            raise DataError(f"{self.name}: has no class {wrong[0]}; they are 0..{self.num_classes - 1}")
        if len(set(chosen)) != len(chosen) or not chosen:
            raise DataError(f"{self.name}: classes must be different and at least one, got {chosen}")
        number = torch.full((self.num_classes,), -1, dtype=torch.int64, device=self.y.device)
        number[chosen] = torch.arange(len(chosen), device=self.y.device)
        kept = number[self.y] >= 0
        names = tuple(self.class_names[k] for k in chosen)
        return replace(self, x=self.x[kept], y=number[self.y[kept]], class_names=names)

    def split(self, fraction: float, seed: int) -> tuple[Examples, Examples]:
        """Divide into two parts without a common example, each class by itself.

        Parameters
        ----------
        fraction : share of the first part, in (0, 1); of each class at least one example is in each part
        seed : of the division

        Raises
        ------
        DataError
            For a fraction outside (0, 1), or a class of a single example.
        """
        if not 0 < fraction < 1:
            raise DataError(f"fraction: must be between 0 and 1, got {fraction:g}")
        generator = torch.Generator().manual_seed(seed)
        labels = self.y.cpu()
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for number, name in enumerate(self.class_names):
            members = (labels == number).nonzero().flatten()
            if len(members) == 1:
                raise DataError(f"{self.name}: class '{name}' has 1 example, and a split needs 2 of each; add one")
            if len(members):
                members = members[torch.randperm(len(members), generator=generator)]
                cut = min(max(round(fraction * len(members)), 1), len(members) - 1)
                parts[0].append(members[:cut])
                parts[1].append(members[cut:])
        first, second = (torch.cat(part).sort().values.to(self.y.device) for part in parts)
        return self.rows(first), self.rows(second)


def as_examples(data: object, *, name: str = "data", class_names: Sequence[str] | None = None) -> Examples:
    """Make examples of what users have.

    Parameters
    ----------
    data : examples (returned as they are), classes of images, a pair ``(x, y)`` of tensors or arrays, a torch data set
        of pairs ``(input, label)``, or a loader of batches of such. Data sets and loaders are read once, so that random
        augmentation in them is frozen; give `Examples` with a `transform` to have one
    name : what to call them in results
    class_names : a name a class; needed only when a class has no example. Default: those the data have, else numbers

    Raises
    ------
    DataError
        For fewer than 2 examples, labels that are not 0..n-1 (each present, unless named), NaN or infinity, shapes that
        differ, or data of another kind.

    Warns
    -----
    UserWarning
        For floats above 20: bytes that nobody divided by 255, most likely.

    Examples
    --------
    >>> as_examples((np.zeros((4, 3, 8, 8), np.uint8), np.array([0, 1, 2, 0]))).class_names
    ('0', '1', '2')
    """
    if isinstance(data, Examples):
        return data
    if isinstance(data, ClassImages):
        x, y, found = torch.from_numpy(_writable(data.images)), torch.from_numpy(_writable(data.labels)), None
        name, class_names = data.name if name == "data" else name, class_names or data.class_names
    elif isinstance(data, tuple | list) and len(cast("Sequence[object]", data)) == 2:
        pair = cast("Sequence[object]", data)
        (x, y), found = (_tensor(part, name, label) for part, label in zip(pair, "xy", strict=True)), None
    elif isinstance(data, DataLoader):
        x, y = _read_batches(cast("Iterable[object]", data), name)
        found = getattr(cast("Any", data).dataset, "classes", None)
    elif isinstance(data, TensorDataset) and len(data.tensors) == 2:
        (x, y), found = data.tensors, None
    elif isinstance(data, Dataset):
        x, y = _read_items(cast("Any", data), name)
        found = getattr(cast("Any", data), "classes", None)
    else:
        raise DataError(
            f"{name}: cannot make examples of {type(data).__name__}; give (x, y), a torch data set or loader"
        )
    names = class_names if class_names is not None else found
    y = _labels(y, name)
    x = x.to(torch.float32) if x.dtype == torch.float64 else x
    if names is None:
        names = _numbered(y, name)
    if len(x) == 1:
        raise DataError(f"{name}: 1 example; give at least 2")
    examples = Examples(x, y, tuple(map(str, names)), name)
    if x.is_floating_point() and (high := float(x.max())) > _UNSCALED:
        fix = "divide images by 255 or give them as uint8" if x.dim() > 2 else "standardise the features"
        warnings.warn(f"{name}: x is {_type(x)} up to {high:g}; {fix}", UserWarning, stacklevel=2)
    return examples


def check_fits(model: nn.Module, data: Examples) -> None:
    """Say in one line when the network cannot take such inputs.

    Parameters
    ----------
    model : whose first convolution or linear layer is looked at; run on one example only when that seems not to fit
    data : to be given to it

    Raises
    ------
    DataError
        For another number of channels or features, or inputs of another kind.

    Examples
    --------
    >>> check_fits(nn.Conv2d(3, 8, 3), Examples(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), ("a", "b")))
    """
    first = next((item for item in model.named_modules() if isinstance(item[1], (*CONVS, nn.Linear))), None)
    if first is None:
        return
    name, layer = first
    shape = data.shape
    where = f"{data.name}: inputs have shape {shape}, and the network's first layer"
    where += f" '{name}'" if name else ""
    if isinstance(layer, nn.Linear):
        if layer.in_features in (shape[-1], math.prod(shape)):
            return
        problem = f"{where} takes {layer.in_features} features"
    else:
        conv = cast("nn.Conv2d", layer)
        if len(shape) == 1 + len(conv.kernel_size) and shape[0] == conv.in_channels:
            return
        if len(shape) == 1 + len(conv.kernel_size):
            hint = f"repeat the channel {conv.in_channels} times, or give" if shape[0] == 1 else "give"
            problem = f"{where} takes {conv.in_channels} channels; {hint} a network for {shape[0]} channels"
            if shape[-1] == conv.in_channels:
                problem = f"{where} takes {conv.in_channels} channels; put channels first: x.permute(0, 3, 1, 2)"
        else:
            sides = (
                ("length",) if len(conv.kernel_size) == 1 else ("depth", "height", "width")[-len(conv.kernel_size) :]
            )
            problem = f"{where} takes ({', '.join(('channels', *sides))}); reshape x"
    # A network may reshape its input first, so only one that fails is refused.
    if not _runs(model, data):
        raise DataError(problem)


def _runs(model: nn.Module, data: Examples) -> bool:
    modes = [(module, module.training) for module in model.modules()]
    like = next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(data.inputs(slice(0, 1)).to(like))
    except Exception:  # a forward pass can raise anything
        return False
    finally:
        for module, training in modes:
            module.training = training
    return True


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _writable(array: np.ndarray) -> np.ndarray:
    contiguous = np.ascontiguousarray(array)
    return contiguous if contiguous.flags.writeable else contiguous.copy()


def _tensor(part: object, name: str, label: str) -> Tensor:
    if isinstance(part, Tensor):
        return part
    try:
        array = np.asarray(part)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"values are {array.dtype}")
        return torch.from_numpy(_writable(array.astype(array.dtype.newbyteorder("="), copy=False)))
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        hint = "an array of numbers" if label == "x" else "class numbers 0, 1, ..."
        raise DataError(f"{name}: {label} cannot become a tensor ({reason}); give {hint}") from error


def _labels(y: Tensor, name: str) -> Tensor:
    """Return labels as int64; what else is wrong with them is for `Examples` to say."""
    if y.is_floating_point() or y.dtype == torch.bool or y.is_complex():
        raise DataError(f"{name}: y is {_type(y)}; give class numbers 0, 1, ... as integers")
    return y.to(torch.int64)


def _numbered(y: Tensor, name: str) -> list[str]:
    """Return the numbers as names once each class has an example."""
    if not y.numel():
        return []
    present = torch.unique(y).tolist()
    if present[0] < 0:
        raise DataError(f"{name}: labels start at {present[0]}; number the classes 0, 1, ...")
    missing = sorted(set(range(present[-1] + 1 if present[-1] < 1 << 16 else 0)) - set(present))
    if present[-1] >= 1 << 16 or missing:
        some = ", ".join(map(str, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        absent = f"{some} {'is' if len(missing) == 1 else 'are'} missing" if missing else "most are missing"
        raise DataError(
            f"{name}: labels are {present[0]}..{present[-1]}, and {absent}; number the classes 0..n-1 without a gap"
            " (or give class_names)"
        )
    return [str(k) for k in present]


def _pair(item: object, name: str, place: str) -> tuple[object, object]:
    if not isinstance(item, tuple | list) or len(cast("Sequence[object]", item)) != 2:
        kind = type(item).__name__
        raise DataError(f"{name}: {place} is a {kind}, expected a pair (input, label)")
    first, second = cast("Sequence[object]", item)
    return first, second


def _picture(part: object) -> object:
    """Return a picture of the PIL as bytes, channels first; anything else as it is."""
    if not hasattr(part, "getbands"):
        return part
    pixels = np.asarray(part)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _read_items(data: Any, name: str) -> tuple[Tensor, Tensor]:
    """Read a data set whose items are single examples."""
    items = data if hasattr(data, "__iter__") else (data[k] for k in range(len(data)))
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    for place, item in enumerate(items):
        first, second = _pair(item, name, f"item {place}")
        inputs.append(_tensor(_picture(first), name, "x"))
        labels.append(_tensor(second, name, "y").reshape(-1))
        if len(labels[-1]) != 1:
            raise DataError(f"{name}: item {place} has {len(labels[-1])} labels; give one class number an example")
    return _stacked(inputs, name, "item", torch.stack), _stacked(labels, name, "item", torch.cat)


def _read_batches(data: Iterable[object], name: str) -> tuple[Tensor, Tensor]:
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    for place, item in enumerate(data):
        first, second = _pair(item, name, f"batch {place}")
        inputs.append(_tensor(first, name, "x"))
        labels.append(_tensor(second, name, "y"))
    return _stacked(inputs, name, "batch", torch.cat), _stacked(labels, name, "batch", torch.cat)


def _stacked(parts: list[Tensor], name: str, kind: str, join: Callable[[list[Tensor]], Tensor]) -> Tensor:
    if not parts:
        raise DataError(f"{name}: no examples; give at least 2")
    start = 1 if kind == "batch" else 0
    for place, part in enumerate(parts):
        if part.shape[start:] != parts[0].shape[start:]:
            raise DataError(
                f"{name}: {kind} {place} has shape {tuple(part.shape)}, and {kind} 0 has {tuple(parts[0].shape)};"
                " resize them to one shape"
            )
    return join(parts)

"""How the coordinates of a tensor are grouped into blocks (Yun, Lozano and Yang, section "coordinate partition").

A dense weight ``W`` of shape (out, in) is cut along its rows (output-wise: the weights into one unit; their block is
the covariance of inputs) or along its columns (input-wise: the weights out of one unit; the covariance of output
errors); a convolution's weight into its filters. A line of length L becomes ``ceil(L / b)`` parts of equal size
``ceil(L / ceil(L / b))``; the last is padded with zeros, which is exact: a padded coordinate never has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["GROUPINGS", "Layout", "lay_out", "merge", "partition"]

GROUPINGS = ("auto", "paper", "output", "input", "filter", "row", "diag", "full")
"""Names of the groupings :func:`lay_out` knows."""

# Filters up to this size are one block whatever the block size: LAPACK on GPUs, and memory, speak against more.
LARGEST_FILTER = 32
_LARGEST_PAPER_KERNEL = 5

Kind = Literal["output", "input", "filter", "row", "diag", "full", "blocks"]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each block of a tensor lies.

    Coordinate i of block j is element ``(j // chunks) * line_stride + ((j % chunks) * n + i) * stride`` of the
    tensor in row-major order, if ``(j % chunks) * n + i < length``; with an explicit partition it is ``index[j, i]``.

    Parameters
    ----------
    kind : the grouping it came from, resolved: never "auto" or "paper"
    shape : shape of the tensor
    n : coordinates of a block, padding included
    blocks : number of blocks
    chunks : blocks a line is cut into
    length : coordinates of a line
    line_stride : distance between lines
    stride : distance between coordinates of a line
    index : explicit partition (blocks, n) with -1 as padding, or None
    """

    kind: Kind
    shape: tuple[int, ...]
    n: int
    blocks: int
    chunks: int = 1
    length: int = 1
    line_stride: int = 1
    stride: int = 1
    index: Int[Tensor, "blocks n"] | None = None

    @property
    def numel(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)

    @property
    def diagonal(self) -> bool:
        """Whether every coordinate is its own block."""
        return self.n == 1

    @property
    def packed(self) -> int:
        """Entries of a block's lower triangle."""
        return self.n * (self.n + 1) // 2

    @property
    def width(self) -> int:
        """Blocks that lie together in memory, 16 unless there are fewer."""
        return min(16, self.blocks)

    @property
    def tiles(self) -> int:
        """Groups of `width` blocks."""
        return -(-self.blocks // self.width)

    @property
    def floats(self) -> int:
        """Numbers that second moments take."""
        return self.numel if self.diagonal else self.tiles * self.width * self.packed


def _lines(kind: Kind, shape: tuple[int, ...], lines: int, length: int, size: int, by_column: bool = False) -> Layout:
    chunks = -(-length // size)
    n = -(-length // chunks)
    if n == 1:
        return _diagonal(shape)
    strides = (1, lines) if by_column else (length, 1)
    return Layout(kind, shape, n, lines * chunks, chunks, length, *strides)


def _diagonal(shape: tuple[int, ...]) -> Layout:
    return Layout("diag", shape, 1, math.prod(shape))


def lay_out(
    shape: Sequence[int], grouping: str = "auto", block_size: int = 10, blocks: Tensor | None = None, name: str = ""
) -> Layout:
    """Cut a tensor into blocks.

    Parameters
    ----------
    shape : shape of the tensor
    grouping : ``"output"`` rows, ``"input"`` columns, ``"row"`` whole rows, ``"filter"`` one block a filter,
        ``"full"`` one block, ``"diag"`` every coordinate alone. ``"auto"``: dense and 1 x 1 convolutions output-wise,
        other convolutions filter-wise, vectors and scalars diagonal. ``"paper"``: dense input-wise, convolutions with
        kernels of 2 to 5 filter-wise, everything else diagonal (arXiv:1905.10757 and the authors' code).
    block_size : largest size of a block, >= 1; a filter of up to 32 taps stays whole
    blocks : explicit partition (blocks, n) of the flat indices of the tensor, each exactly once, -1 as padding;
        overrides `grouping`
    name : the tensor's name for messages

    Returns
    -------
    The layout.

    Raises
    ------
    ValueError
        For an unknown grouping, a wrong block size, or a partition that is none.

    Examples
    --------
    >>> lay_out((64, 784)).blocks, lay_out((64, 784)).n
    (5056, 10)
    >>> lay_out((32, 16, 3, 3)).kind, lay_out((32, 16, 3, 3)).n
    ('filter', 9)
    """
    dims = tuple(int(size) for size in shape)
    if grouping not in GROUPINGS:
        raise ValueError(f"unknown grouping '{grouping}': choose {', '.join(GROUPINGS)}")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"block_size must be an integer >= 1, got {block_size!r}")
    if blocks is not None:
        return _explicit(dims, blocks, name)
    numel = math.prod(dims)
    kernel = math.prod(dims[2:])
    if grouping == "full":
        return _lines("full", dims, 1, max(numel, 1), max(numel, 1))
    if len(dims) < 2 or numel == 0 or grouping == "diag":
        return _diagonal(dims)
    if grouping == "auto":
        grouping = "filter" if kernel > 1 else "output"
    elif grouping == "paper":
        small = len(dims) > 2 and kernel > 1 and max(dims[2:]) <= _LARGEST_PAPER_KERNEL
        grouping = "input" if len(dims) == 2 else "filter" if small else "diag"
    if grouping == "filter":
        if kernel == 1:
            return _diagonal(dims)
        whole = kernel if kernel <= LARGEST_FILTER else block_size
        return _lines("filter", dims, dims[0] * dims[1], kernel, whole)
    rest = numel // dims[0]
    if grouping == "row":
        return _lines("row", dims, dims[0], rest, rest)
    if grouping == "output":
        return _lines("output", dims, dims[0], rest, block_size)
    if grouping == "input":
        return _lines("input", dims, rest, dims[0], block_size, by_column=True)
    return _diagonal(dims)


def _explicit(shape: tuple[int, ...], blocks: Tensor, name: str) -> Layout:
    whose = f"parameter '{name}'" if name else f"a parameter of shape {shape}"
    if blocks.ndim != 2 or blocks.dtype not in {torch.int64, torch.int32} or blocks.numel() == 0:
        raise ValueError(
            f"{whose}: blocks must be an integer tensor (blocks, n) of flat indices, got {tuple(blocks.shape)} of"
            f" {blocks.dtype}"
        )
    index = blocks.detach().to("cpu", torch.int64).contiguous()
    numel = math.prod(shape)
    used = index[index >= 0]
    if bool((index < -1).any()) or bool((used >= numel).any()):
        bad = int(index[(index < -1) | (index >= numel)][0])
        raise ValueError(f"{whose}: index {bad} is not one of its elements 0..{numel - 1} (-1 pads)")
    counts = torch.bincount(used, minlength=numel)
    if bool((counts != 1).any()):
        first = int((counts != 1).nonzero()[0])
        times = "is missing" if counts[first] == 0 else "appears twice" if counts[first] == 2 else "appears often"
        raise ValueError(f"{whose}: index {first} {times}; every index must appear exactly once")
    return Layout("blocks", shape, index.shape[1], index.shape[0], index=index)


def partition(tensor: Tensor, layout: Layout) -> Tensor:
    """Gather a tensor's blocks.

    Parameters
    ----------
    tensor : of the layout's shape
    layout : how it is cut

    Returns
    -------
    Blocks (blocks, n), zeros where padded.

    Examples
    --------
    >>> partition(torch.arange(6).view(2, 3), lay_out((2, 3), "output", 2))
    tensor([[0, 1],
            [2, 0],
            [3, 4],
            [5, 0]])
    """
    flat = tensor.reshape(-1)
    if layout.index is not None:
        index = layout.index.to(flat.device)
        return torch.where(index >= 0, flat[index.clamp(min=0)], torch.zeros((), dtype=flat.dtype, device=flat.device))
    lines = flat.view(-1, layout.length) if layout.stride == 1 else flat.view(layout.length, -1).T
    missing = layout.chunks * layout.n - layout.length
    if missing:
        lines = torch.nn.functional.pad(lines, (0, missing))
    return lines.reshape(layout.blocks, layout.n)


def merge(blocks: Tensor, layout: Layout) -> Tensor:
    """Put blocks back into a tensor: the inverse of :func:`partition`.

    Parameters
    ----------
    blocks : (blocks, n); padding is dropped
    layout : how the tensor is cut

    Returns
    -------
    A contiguous tensor of the layout's shape.

    Examples
    --------
    >>> x, layout = torch.randn(5, 7), lay_out((5, 7), "input", 3)
    >>> torch.equal(merge(partition(x, layout), layout), x)
    True
    """
    if layout.index is not None:
        flat = torch.empty(layout.numel, dtype=blocks.dtype, device=blocks.device)
        kept = layout.index.to(blocks.device)
        flat[kept[kept >= 0]] = blocks[kept >= 0]
        return flat.view(layout.shape)
    lines = blocks.reshape(-1, layout.chunks * layout.n)[:, : layout.length]
    return (lines if layout.stride == 1 else lines.T).reshape(layout.shape).contiguous()

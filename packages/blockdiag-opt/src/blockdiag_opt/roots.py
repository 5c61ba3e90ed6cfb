"""Matrix functions of many small symmetric blocks, and how their lower triangles are stored.

Second moments of N blocks of size n are stored as tiles: ``(tiles, n (n + 1) / 2, width)``, the k-th entry of `width`
neighbouring blocks side by side, because that is how both vector units and elementwise operations like to read them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from blockdiag_opt.layout import Layout

__all__ = [
    "Spectrum",
    "decompose",
    "inverse_root",
    "positive_part",
    "tile",
    "to_full",
    "to_packed",
    "untile",
]

# Relative jitter added when an eigen-decomposition fails, weakest first.
_JITTERS = (1e-12, 1e-9, 1e-6)


@functools.cache
def triangle(n: int) -> tuple[Int[Tensor, " packed"], Int[Tensor, " packed"], Int[Tensor, " full"]]:
    """Return rows and columns of the lower triangle by rows, and each full entry's place in it."""
    row, column = torch.tril_indices(n, n)
    place = torch.empty(n, n, dtype=torch.int64)
    place[row, column] = place[column, row] = torch.arange(len(row))
    return row, column, place.reshape(-1)


@functools.cache
def triangle_on(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of :func:`triangle` on a device."""
    row, column, place = triangle(n)
    return row.to(device), column.to(device), place.to(device)


def diagonal_places(n: int) -> list[int]:
    """Return the places of the diagonal in a packed lower triangle of size n."""
    return [k * (k + 3) // 2 for k in range(n)]


def tile(blocks: Tensor, layout: Layout) -> Tensor:
    """Lay rows (blocks, k) of numbers out as tiles (tiles, k, width); blocks that fill the last tile up are zero."""
    missing = layout.tiles * layout.width - layout.blocks
    if missing:
        blocks = torch.nn.functional.pad(blocks, (0, 0, 0, missing))
    return blocks.view(layout.tiles, layout.width, -1).transpose(1, 2).contiguous()


def untile(tiles: Tensor, layout: Layout) -> Tensor:
    """Return the rows (blocks, k) of tiles (tiles, k, width)."""
    return tiles.transpose(1, 2).reshape(layout.tiles * layout.width, -1)[: layout.blocks]


def to_full(packed: Float[Tensor, "blocks packed"], n: int) -> Float[Tensor, "blocks n n"]:
    """Expand lower triangles into symmetric matrices.

    Parameters
    ----------
    packed : lower triangles by rows (blocks, n (n + 1) / 2)
    n : size of the matrices

    Returns
    -------
    Matrices (blocks, n, n).

    Examples
    --------
    >>> to_full(torch.tensor([[1.0, 2.0, 3.0]]), 2)
    tensor([[[1., 2.],
             [2., 3.]]])
    """
    return packed[:, triangle_on(n, packed.device)[2]].view(-1, n, n)


def to_packed(full: Float[Tensor, "blocks n n"]) -> Float[Tensor, "blocks packed"]:
    """Take the lower triangles of the symmetric part of matrices.

    Parameters
    ----------
    full : matrices (blocks, n, n)

    Returns
    -------
    Lower triangles by rows (blocks, n (n + 1) / 2).

    Examples
    --------
    >>> to_packed(torch.tensor([[[1.0, 2.0], [2.0, 3.0]]]))
    tensor([[1., 2., 3.]])
    """
    row, column, _ = triangle_on(full.shape[-1], full.device)
    return (full[:, row, column] + full[:, column, row]) / 2


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of symmetric blocks.

    Attributes
    ----------
    values : (blocks, n), negative ones that rounding made are 0
    vectors : (blocks, n, n), a column each
    fallen : (blocks,) whether the decomposition failed and the block's diagonal stands in for it
    """

    values: Float[Tensor, "blocks n"]
    vectors: Float[Tensor, "blocks n n"]
    fallen: Bool[Tensor, " blocks"]


def _two_by_two(full: Tensor) -> tuple[Tensor, Tensor]:
    # One Jacobi rotation; the small eigenvalue from the large one, without cancellation.
    scale = full.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=torch.finfo(full.dtype).tiny)
    full = full / scale[:, None, None]
    a, b, c = full[:, 0, 0], full[:, 1, 0], full[:, 1, 1]
    angle = 0.5 * torch.atan2(2 * b, a - c)
    large = (a + c) / 2 + torch.hypot((a - c) / 2, b)
    small = torch.where(large > 0, (a * c - b * b) / large, large)
    # Diagonal blocks stay exactly diagonal: the cosine of pi / 2 is not 0 in floating point.
    straight, first = b == 0, (a >= c).to(full.dtype)
    cos, sin = torch.where(straight, first, angle.cos()), torch.where(straight, 1 - first, angle.sin())
    vectors = torch.stack([torch.stack([-sin, cos], -1), torch.stack([cos, sin], -1)], -2).mT
    return torch.stack([small, large], -1) * scale[:, None], vectors


def decompose(full: Float[Tensor, "blocks n n"], *, symmetric: bool = False) -> Spectrum:
    """Decompose blocks, whatever they hold, as long as it is finite.

    On CPU in double precision, whatever the blocks' type: LAPACK takes the same time, and single precision loses the
    small eigenvalues. A batch whose decomposition fails is tried again with growing jitter, block by block where need
    be; what still fails falls back to its diagonal.

    Parameters
    ----------
    full : symmetric blocks (blocks, n, n); the lower triangle is read
    symmetric : keep negative eigenvalues: the blocks are not covariances

    Returns
    -------
    The spectrum, in double precision on CPU and in the blocks' precision elsewhere.

    Examples
    --------
    >>> decompose(torch.diag(torch.tensor([4.0, 9.0]))[None]).values
    tensor([[4., 9.]], dtype=torch.float64)
    """
    n = full.shape[-1]
    work = full.double() if full.device.type == "cpu" else full
    fallen = torch.zeros(full.shape[0], dtype=torch.bool, device=full.device)
    if n == 1:
        values, vectors = work[:, 0], torch.ones_like(work)
    elif n == 2 and not symmetric:
        values, vectors = _two_by_two(work)
    else:
        values, vectors = _eigh(work)
        bad = ~(values.isfinite().all(-1) & vectors.isfinite().all(-1).all(-1))
        if bool(bad.any()):
            values, vectors = values.clone(), vectors.clone()
            for block in bad.nonzero().flatten().tolist():
                found = _retry(work[block])
                fallen[block] = found is None
                if found is None:
                    found = work[block].diagonal(), torch.eye(n, dtype=work.dtype, device=work.device)
                values[block], vectors[block] = (part.to(work.device, work.dtype) for part in found)
    return Spectrum(values if symmetric else values.clamp(min=0), vectors, fallen)


def _eigh(work: Tensor) -> tuple[Tensor, Tensor]:
    # Blocks of equal scale: a batch spans many orders of magnitude, and squares of tiny gradients underflow.
    scale = work.diagonal(dim1=-2, dim2=-1).abs().amax(-1).clamp(min=torch.finfo(work.dtype).tiny)[:, None, None]
    before = torch.get_num_threads()
    # LAPACK's threads get in each other's way from 32 on (pytorch/pytorch#65512).
    single = work.device.type == "cpu" and work.shape[-1] >= 32 and before > 1
    if single:
        torch.set_num_threads(1)
    try:
        values, vectors = torch.linalg.eigh(work / scale)
    except RuntimeError:
        return torch.full_like(work[..., 0], torch.nan), torch.full_like(work, torch.nan)
    finally:
        if single:
            torch.set_num_threads(before)
    return values * scale[..., 0], vectors


def _retry(block: Tensor) -> tuple[Tensor, Tensor] | None:
    exact = block.double().cpu()
    size = float(exact.diagonal().abs().amax())
    for jitter in (0.0, *_JITTERS):
        try:
            values, vectors = torch.linalg.eigh(exact + jitter * size * torch.eye(len(exact), dtype=exact.dtype))
        except RuntimeError:
            continue
        if bool(values.isfinite().all()) and bool(vectors.isfinite().all()):
            return values, vectors
    return None


def inverse_root(
    blocks: Float[Tensor, "*batch n n"], eps: float = 0.0, floor: float | None = None
) -> Float[Tensor, "*batch n n"]:
    """Return (V^{1/2} + eps I)^{-1} of symmetric positive semi-definite blocks: the damping is added after the root.

    Parameters
    ----------
    blocks : a matrix (n, n) or a batch (batch, n, n) of any dimensions
    eps : the paper's delta, >= 0
    floor : eigenvalues are raised to this share of their block's largest; default ``n`` times the machine precision
        of the blocks. It bounds what rounding errors in the null space are amplified by. A block of zeros gives
        ``I / eps``, or zeros without damping.

    Returns
    -------
    Blocks of the same shape and type.

    Examples
    --------
    >>> inverse_root(torch.diag(torch.tensor([4.0, 16.0])), eps=1.0)
    tensor([[0.3333, 0.0000],
            [0.0000, 0.2000]])
    """
    n = blocks.shape[-1]
    rtol = n * torch.finfo(blocks.dtype).eps if floor is None else floor
    spectrum = decompose(blocks.reshape(-1, n, n))
    values = spectrum.values.maximum(rtol * spectrum.values.amax(-1, keepdim=True))
    below = values.sqrt() + eps
    inverse = torch.where(below > 0, 1 / below, torch.zeros_like(below))
    root = (spectrum.vectors * inverse[:, None]) @ spectrum.vectors.mT
    return root.to(blocks.dtype).reshape(blocks.shape)


def positive_part(blocks: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """Return [A]_+, the part of symmetric blocks in the span of eigenvectors with positive eigenvalues.

    ``M + positive_part(V - M)`` is a Loewner upper bound of both V and M, and their elementwise maximum where both are
    diagonal: what AMSGrad's maximum becomes for matrices.

    Parameters
    ----------
    blocks : a matrix (n, n) or a batch (batch, n, n) of any dimensions

    Returns
    -------
    Blocks of the same shape and type.

    Examples
    --------
    >>> positive_part(torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
    tensor([[1., 0.],
            [0., 0.]])
    """
    n = blocks.shape[-1]
    spectrum = decompose(blocks.reshape(-1, n, n), symmetric=True)
    part = (spectrum.vectors * spectrum.values.clamp(min=0)[:, None]) @ spectrum.vectors.mT
    return part.to(blocks.dtype).reshape(blocks.shape)

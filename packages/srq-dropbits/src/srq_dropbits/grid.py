"""Integer grids: which multiples of a step a quantized tensor may take, and their bit levels."""

from __future__ import annotations

from dataclasses import dataclass, replace

from srq_dropbits.errors import InvalidBitsError

__all__ = ["Grid", "check_bits", "level_of", "levels_of"]


def check_bits(bits: int, *, signed: bool = True, what: str = "bits") -> int:
    """Return `bits` if a grid of this width exists.

    Parameters
    ----------
    bits : width of a code
    signed : whether the grid has negative values; such grids need 2 bits at least
    what : name used in the message

    Raises
    ------
    InvalidBitsError
        For a width outside 2..8 (signed) or 1..8.
    """
    low = 2 if signed else 1
    if isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= 8:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidBitsError(f"{what} is {bits!r}; give a whole number from {low} to 8")
    return bits


@dataclass(frozen=True)
class Grid:
    """The integers ``n_lo, n_lo + stride, .., n_hi``; a quantized value is a step times one of them.

    Parameters
    ----------
    bits : width of a stored code, 0..8; 0 is the grid {0} of a layer that is pruned away
    n_lo : smallest integer
    n_hi : largest integer
    stride : distance of neighbours: 1, or 2 for grids of odd integers

    Examples
    --------
    >>> Grid.signed(3), Grid.unsigned(3)
    (Grid(bits=3, n_lo=-3, n_hi=3, stride=1), Grid(bits=3, n_lo=0, n_hi=7, stride=1))
    """

    bits: int
    n_lo: int
    n_hi: int
    stride: int = 1

    @staticmethod
    def signed(bits: int, symmetric: bool = True) -> Grid:
        """Make -(2^(b-1)-1) .. 2^(b-1)-1, or from -2^(b-1) on (RQ, Eq 1) where not symmetric."""
        top = 2 ** (check_bits(bits) - 1) - 1
        return Grid(bits, -top if symmetric else -top - 1, top)

    @staticmethod
    def unsigned(bits: int) -> Grid:
        """Make 0 .. 2^b-1, for activations after a ReLU (RQ, section 4)."""
        return Grid(check_bits(bits, signed=False), 0, 2**bits - 1)

    @staticmethod
    def odd(bits: int) -> Grid:
        """Make the odd integers of magnitude at most 2^b-1: DoReFa's weights, which have no zero."""
        top = 2 ** check_bits(bits, signed=False) - 1
        return Grid(bits, -top, top, 2)

    @property
    def size(self) -> int:
        """Number of grid points K."""
        return (self.n_hi - self.n_lo) // self.stride + 1

    @property
    def is_signed(self) -> bool:
        """Whether the grid has negative values."""
        return self.n_lo < 0

    @property
    def levels(self) -> int:
        """Highest bit level. The lone point -2^(b-1) of a full grid has no partner and joins the top level."""
        return level_of(self.n_hi)

    def upto(self, level: int) -> Grid:
        """Return the grid that is left when all levels above `level` are dropped.

        Examples
        --------
        >>> Grid.signed(4).upto(2), Grid.signed(4).upto(0)
        (Grid(bits=3, n_lo=-3, n_hi=3, stride=1), Grid(bits=0, n_lo=0, n_hi=0, stride=1))
        """
        if level >= self.levels:
            return self
        top = 2**level - 1
        low, high = max(self.n_lo, -top), min(self.n_hi, top)
        return replace(self, bits=level + (low < 0), n_lo=low, n_hi=high)


def level_of(n: int) -> int:
    """Give the bit level of a grid point: ceil(log2(|n| + 1)).

    Parameters
    ----------
    n : grid point

    Examples
    --------
    >>> [level_of(n) for n in (0, 1, -1, 2, 3, 4, -7)]
    [0, 1, 1, 2, 2, 3, 3]
    """
    return abs(n).bit_length()


def levels_of(grid: Grid) -> list[tuple[int, int, int]]:
    """List the grid's levels with the magnitudes that each has below and above zero.

    Parameters
    ----------
    grid : with stride 1

    Returns
    -------
    For each level from 1 on ``(low, high_below, high_above)``: the level's points are -high_below .. -low and
    low .. high_above; a side without points has a high of 0.

    Examples
    --------
    >>> levels_of(Grid.signed(3)), levels_of(Grid.signed(3, symmetric=False)), levels_of(Grid.unsigned(2))
    ([(1, 1, 1), (2, 3, 3)], [(1, 1, 1), (2, 4, 3)], [(1, 0, 1), (2, 0, 3)])
    """
    found: list[tuple[int, int, int]] = []
    for level in range(1, grid.levels + 1):
        low, high = 2 ** (level - 1), 2**level - 1
        below = 0 if -low < grid.n_lo else min(high, -grid.n_lo)
        if level == grid.levels and -grid.n_lo == 2**level:
            below = high + 1
        found.append((low, below, min(high, grid.n_hi) if grid.n_hi >= low else 0))
    return found

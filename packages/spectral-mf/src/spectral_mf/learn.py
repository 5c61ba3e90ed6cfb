"""Learning Ising models from data, scikit-learn style, with log-likelihoods that say how sure they are.

Parameters minimise a mean loss a row plus ½ l2 (Σ_{i<j} A_ij² + Σ b_i²). The loss is minus the log pseudo-likelihood,
Σ_i log p(x_i | others) with one symmetric A for all conditionals (Besag, The Statistician 1975; Höfling and Tibshirani,
JMLR 2009), or minus the log-likelihood itself, whose gradient is model moments minus data moments.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from scipy.stats import norm
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from shared_core.errors import InputError, no_such
from spectral_mf._inputs import as_problem
from spectral_mf.baselines.ais import anneal
from spectral_mf.baselines.exact import exact_sample
from spectral_mf.estimate import METHODS, log_partition
from spectral_mf.result import LogPartition

__all__ = ["IsingModel", "LikelihoodInterval", "pseudo_likelihood"]

Array = NDArray[np.float64]
Number = float | int
Coding = Literal["auto", "01", "pm1"]
_ENUMERATED = 20
_MISSING = 15
_CHAINS = 1000
_RATE = 0.1
# Entries of the largest temporary of the conditionals.
_BLOCK = 1 << 21


@dataclass(frozen=True)
class LikelihoodInterval:
    """A mean log-likelihood a row and what is certain about it; unpacks as (mean, low, high).

    Attributes
    ----------
    mean : nats a row, with the estimated log Z
    low, high : the interval
    """

    mean: float
    low: float
    high: float

    def __iter__(self) -> Iterator[float]:
        """Unpack as (mean, low, high)."""
        return iter((self.mean, self.low, self.high))


class IsingModel(BaseEstimator):
    """An Ising model p(x) ∝ exp(½ xᵀAx + bᵀx) of binary columns.

    Parameters
    ----------
    l2 : penalty, above 0; ½ l2 times the squares of all couplings and fields is added to the mean loss a row
    loss : ``pseudo``: pseudo-likelihood, fast at any size; ``likelihood``: maximum likelihood, which matches the means
        and pair moments of the data
    logz : method for log Z (``auto`` or a name in :data:`spectral_mf.estimate.METHODS`). With ``loss="likelihood"``,
        ``auto`` fits with the exact log Z up to 20 columns and with moments from persistent Gibbs chains beyond. Any
        other must have gradients (``modes``, say, up to about 100 columns), and its own value is put in the likelihood:
        the fit then seeks out where it is too low, and may end below the pseudo-likelihood's.
    budget_s : seconds that ``logz="auto"`` may spend on sampling
    max_iter : most L-BFGS iterations; steps of the persistent chains, where they are used
    tol : fitting ends when the largest entry of the gradient falls below this
    coding : of the data: ``01``, ``pm1`` (-1/+1), or ``auto``: told from the values
    random_state : seed of what is random (sampling, log Z); None means 0. A NumPy generator gives one.

    Attributes
    ----------
    A_ : (n, n) couplings, symmetric, zero diagonal, each pair counted once
    b_ : (n,) fields
    log_partition_ : log Z with its bounds, a :class:`LogPartition`; computed when first asked for
    coding_ : ``01`` or ``pm1``
    n_features_in_, feature_names_in_ : as scikit-learn has them
    n_iter_ : iterations of the (last) fit
    gradient_ : largest entry of the gradient of the penalised loss at the end; with ``loss="likelihood"`` how far the
        moments are from matching, less the penalty's part

    Notes
    -----
    Spec section 6. A column that is constant gets a large but finite field, thanks to the penalty. A `logz` that is not
    exact gives log-likelihoods that are off by its error, the same for every row; `log_likelihood_interval` says by how
    much at most.

    Examples
    --------
    >>> X = np.array([[0, 0], [0, 0], [1, 1], [1, 1], [1, 1], [0, 1]])
    >>> model = IsingModel(l2=0.1).fit(X)
    >>> bool(model.A_[0, 1] > 0), round(float(np.exp(model.score_samples([[0, 0], [0, 1], [1, 0], [1, 1]])).sum()), 9)
    (True, 1.0)
    """

    def __init__(
        self,
        l2: Number = 1e-2,
        loss: str = "pseudo",
        logz: str = "auto",
        *,
        budget_s: Number = 10.0,
        max_iter: int = 1000,
        tol: Number = 1e-6,
        coding: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.l2 = l2
        self.loss = loss
        self.logz = logz
        self.budget_s = budget_s
        self.max_iter = max_iter
        self.tol = tol
        self.coding = coding
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> IsingModel:  # noqa: ARG002
        """Fit couplings and fields.

        Parameters
        ----------
        X : (rows, n) array or data frame of 0/1, -1/+1 or booleans
        y : ignored
        sample_weight : (rows,) weights, not negative; None means one each

        Returns
        -------
        IsingModel

        Raises
        ------
        InputError
            For a value that is missing or of another coding (row and column are named), a parameter out of range, or a
            `logz` without gradients with ``loss="likelihood"``.
        """
        self._check_parameters()
        table = self._table(X, reset=True)
        self.coding_: str = self._coding_of(table)
        x = self._spins(table, missing=False)
        weight = _weights(sample_weight, len(x))
        states, share = _distinct(x, weight)
        theta, result = self._minimise(pseudo_likelihood(states, share, float(self.l2)), np.zeros(_size(x.shape[1])))
        self.n_iter_, self.gradient_ = max(1, int(result.nit)), float(np.abs(result.jac).max())
        if self.loss == "likelihood":
            # From there few steps are left, and no mode is missed for having started at zero.
            if self.logz == "auto" and x.shape[1] > _ENUMERATED:
                self.n_iter_ = self.max_iter
                theta, self.gradient_ = _stochastic_fit(
                    states, share, float(self.l2), self.max_iter, theta, self._generator()
                )
            else:
                theta, result = self._minimise(self._likelihood(states, share), theta)
                self.n_iter_, self.gradient_ = max(1, int(result.nit)), float(np.abs(result.jac).max())
        self.A_, self.b_ = _couplings(theta, x.shape[1])
        self._known: tuple[Any, LogPartition] | None = None
        return self

    @property
    def log_partition_(self) -> LogPartition:
        """Log Z by the method `logz`, with certified bounds, into which an estimate is clipped."""
        check_is_fitted(self, "A_")
        asked = (self.logz, self.budget_s, self.random_state)
        if self._known is None or self._known[0] != asked:
            found = log_partition(
                self.A_,
                self.b_,
                method=self.logz,
                bounds=True,
                budget_s=float(self.budget_s),
                generator=self._generator(),
            )
            self._known = asked, found
        return self._known[1]

    def score_samples(self, X: Any) -> Array:
        """Log-likelihood of each row.

        Parameters
        ----------
        X : (rows, n) in the coding of the data the model was fitted to

        Returns
        -------
        (rows,) nats
        """
        x = self._checked(X)
        return self._energies(x) - float(self.log_partition_.value)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:  # noqa: ARG002
        """Mean log-likelihood a row.

        Parameters
        ----------
        X : (rows, n)
        y : ignored
        sample_weight : (rows,) weights; None means one each

        Returns
        -------
        nats a row
        """
        values = self.score_samples(X)
        weight = _weights(sample_weight, len(values))
        return float(weight @ values)

    def log_likelihood_interval(self, X: Any, *, statistical: bool = False, level: float = 0.95) -> LikelihoodInterval:
        """Mean log-likelihood a row, with what the bounds of log Z make certain.

        Parameters
        ----------
        X : (rows, n)
        statistical : widen the interval by that of a mean over a sample of rows: then it speaks of further rows from
            the same source, at `level`, in place of these rows
        level : coverage of the statistical part, in (0, 1)

        Returns
        -------
        LikelihoodInterval, which unpacks as (mean, low, high)

        Raises
        ------
        InputError
            Where `level` is out of range, or a statistical interval is asked of one row.
        """
        if not 0 < level < 1:
            raise InputError(f"level must be in (0, 1), got {level:g}")
        energies = self._energies(self._checked(X))
        found = self.log_partition_
        mean = float(energies.mean())
        margin = 0.0
        if statistical:
            if len(energies) < 2:
                raise InputError("a statistical interval needs two rows at least, got 1")
            margin = float(norm.ppf(0.5 + level / 2) * energies.std(ddof=1)) / math.sqrt(len(energies))
        return LikelihoodInterval(
            mean - float(found.value), mean - float(found.upper) - margin, mean - float(found.lower) + margin
        )

    def bic(self, X: Any) -> float:
        """Bayesian information criterion, -2 log-likelihood + parameters · log rows; lower is better.

        Parameters
        ----------
        X : (rows, n), the data the model was fitted to

        Returns
        -------
        nats, twice; n (n + 1) / 2 parameters are counted, which a strong penalty makes too many
        """
        values = self.score_samples(X)
        return float(-2 * values.sum() + _size(len(self.b_)) * math.log(len(values)))

    def sample(self, k: int = 1, *, generator: torch.Generator | None = None) -> Array:
        """Draw rows from the model: exactly up to 20 columns, beyond by annealing, resampling and Gibbs sweeps.

        Parameters
        ----------
        k : number of rows
        generator : source of randomness; None means one seeded with `random_state`, the same rows every time

        Returns
        -------
        (k, n) in the coding of the data

        Raises
        ------
        InputError
            Where `k` is not positive.
        """
        check_is_fitted(self, "A_")
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}")
        random = generator or self._generator()
        n = len(self.b_)
        if n <= _ENUMERATED:
            return self._coded(exact_sample(self.A_, self.b_, k, generator=random))
        run = anneal(as_problem(self.A_, self.b_), levels=200, chains=max(500, 2 * k), generator=random)
        chosen = torch.multinomial(run.weight[0], k, replacement=True, generator=random)
        x = run.states[0][:, chosen]
        # Rows drawn twice must part ways.
        _gibbs(*self._tensors(), x, 50, random)
        return self._coded(x.T.numpy())

    def conditional(self, X: Any, *, chains: int = 32, sweeps: int = 200) -> Array:
        """Fill missing entries with their means given the other entries of the row.

        Parameters
        ----------
        X : (rows, n), NaN where missing
        chains, sweeps : of the Gibbs sampler for rows with more than 15 missing entries (the first quarter of the
            sweeps is not counted); others are summed exactly

        Returns
        -------
        (rows, n) in the coding of the data: probabilities of a 1 with ``01``, means in [-1, 1] with ``pm1``

        Raises
        ------
        InputError
            For an entry that is neither missing nor of the coding, or where `chains` or `sweeps` is not positive.

        Examples
        --------
        >>> model = IsingModel(l2=0.01).fit([[0, 0], [0, 0], [1, 1], [1, 1]] * 10)
        >>> (model.conditional([[1, np.nan], [0, np.nan]])[:, 1] > 0.5).tolist()
        [True, False]
        """
        check_is_fitted(self, "A_")
        if chains < 1 or sweeps < 1:
            raise InputError(f"chains and sweeps must be at least 1, got {chains} and {sweeps}")
        x = self._spins(self._table(X, reset=False), missing=True)
        missing = np.isnan(x)
        count = missing.sum(1)
        few = np.flatnonzero((count > 0) & (count <= _MISSING))
        patterns, which = np.unique(missing[few], axis=0, return_inverse=True)
        for number, pattern in enumerate(patterns):
            rows = few[which.ravel() == number]
            x[np.ix_(rows, pattern)] = _conditional_means(self.A_, self.b_, x[rows], pattern)
        many = np.flatnonzero(count > _MISSING)
        random = self._generator()
        step = max(1, _BLOCK // (chains * x.shape[1]))
        for first in range(0, len(many), step):
            rows = many[first : first + step]
            free = torch.from_numpy(missing[rows].T).repeat_interleave(chains, 1)
            given = torch.from_numpy(np.nan_to_num(x[rows].T)).repeat_interleave(chains, 1)
            begin = 2.0 * torch.randint(0, 2, given.shape, generator=random) - 1.0
            spins = torch.where(free, begin.to(given), given)
            means = _gibbs(*self._tensors(), spins, sweeps, random, free)
            means = means.view(-1, len(rows), chains).mean(2).T.numpy()
            x[rows] = np.where(missing[rows], means, x[rows])
        return self._coded(x)

    def predict_missing(self, X: Any, *, chains: int = 32, sweeps: int = 200) -> Array:
        """Fill each missing entry with its more probable value given the other entries of the row.

        Parameters
        ----------
        X : (rows, n), NaN where missing
        chains, sweeps : as in :meth:`conditional`

        Returns
        -------
        (rows, n) in the coding of the data
        """
        means = self.conditional(X, chains=chains, sweeps=sweeps)
        middle = 0.5 if self.coding_ == "01" else 0.0
        return self._coded(np.where(means >= middle, 1.0, -1.0))

    def to_ising(self) -> tuple[Array, Array]:
        """Give couplings and fields, as every method of the package takes them.

        Returns
        -------
        A : (n, n); b : (n,); of spins in {-1, +1}, whatever the coding of the data
        """
        check_is_fitted(self, "A_")
        return self.A_.copy(), self.b_.copy()

    def _tensors(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.A_), torch.from_numpy(self.b_)

    def _check_parameters(self) -> None:
        for name, choices in (("loss", ("pseudo", "likelihood")), ("coding", ("auto", "01", "pm1"))):
            if getattr(self, name) not in choices:
                raise InputError(f"unknown {name} '{getattr(self, name)}': choose {' or '.join(choices)}")
        if self.logz != "auto" and self.logz not in METHODS:
            raise no_such("method", self.logz, ("auto", *METHODS), where="logz")
        for name in ("l2", "tol", "budget_s", "max_iter"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name} must be positive, got {getattr(self, name):g}")

    def _generator(self) -> torch.Generator:
        state = self.random_state
        if isinstance(state, np.random.RandomState):
            state = state.randint(2**31)
        elif isinstance(state, np.random.Generator):
            state = state.integers(2**31)
        return torch.Generator().manual_seed(int(state or 0))

    def _table(self, X: Any, *, reset: bool) -> Array:
        try:
            table = validate_data(self, X, reset=reset, dtype=np.float64, ensure_all_finite=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"X: {str(error).splitlines()[0]}") from error
        return cast("Array", table)

    def _checked(self, X: Any) -> Array:
        check_is_fitted(self, "A_")
        return self._spins(self._table(X, reset=False), missing=False)

    def _coding_of(self, table: Array) -> str:
        if self.coding != "auto":
            return self.coding
        zero, minus = bool((table == 0).any()), bool((table == -1).any())
        if not zero and not minus and bool((table == 1).all()):
            raise InputError("every entry of X is 1, which leaves the coding open: pass coding='01' or 'pm1'")
        if zero and minus:
            raise InputError(
                f"X holds 0 ({self._place(table == 0)}) and -1 ({self._place(table == -1)}); use one coding"
            )
        return "pm1" if minus else "01"

    def _place(self, chosen: NDArray[np.bool_]) -> str:
        row, column = np.argwhere(chosen)[0].tolist()
        names = getattr(self, "feature_names_in_", None)
        return f"row {row}, column {column}" + ("" if names is None else f" '{names[column]}'")

    def _spins(self, table: Array, *, missing: bool) -> Array:
        low = 0.0 if self.coding_ == "01" else -1.0
        lacking = np.isnan(table)
        if not missing and lacking.any():
            raise InputError(
                f"X is missing (NaN) at {self._place(lacking)}; drop such rows, or fill them with conditional()"
            )
        wrong = (table != 1) & (table != low) & ~lacking
        if wrong.any():
            at = tuple(np.argwhere(wrong)[0])
            raise InputError(f"X is {table[at]:g} at {self._place(wrong)}; every entry must be {low:g} or 1")
        return np.where(lacking, np.nan, np.where(table == 1, 1.0, -1.0))

    def _coded(self, x: Array) -> Array:
        return 0.5 * (1 + x) if self.coding_ == "01" else x

    def _energies(self, x: Array) -> Array:
        return 0.5 * ((x @ self.A_) * x).sum(1) + x @ self.b_

    def _minimise(self, objective: Callable[[Array], tuple[float, Array]], start: Array) -> tuple[Array, Any]:
        best: tuple[float, Array] = (math.inf, start)

        def remember(theta: Array) -> tuple[float, Array]:
            nonlocal best
            value, gradient = objective(theta)
            if value < best[0]:
                best = value, theta.copy()
            return value, gradient

        # A log Z by modes has jumps, at which a line search may give up: the best point seen is what counts.
        result = optimize.minimize(
            remember,
            start,
            jac=True,
            method="L-BFGS-B",
            options={
                "maxiter": self.max_iter,
                "maxfun": 4 * self.max_iter,
                "gtol": float(self.tol),
                "ftol": 1e-15,
                "maxcor": 20,
            },
        )
        if result.status == 1:
            warnings.warn(
                f"L-BFGS has not converged after {self.max_iter} iterations (largest gradient"
                f" {float(np.abs(result.jac).max()):.2g}): raise max_iter, tol or l2",
                ConvergenceWarning,
                stacklevel=3,
            )
        return best[1], result

    def _likelihood(self, states: Array, share: Array) -> Callable[[Array], tuple[float, Array]]:
        n = states.shape[1]
        method = "exact_enumeration" if self.logz == "auto" else self.logz
        options: dict[str, Any] = {"roundings": False} if method == "modes" else {}
        upper = torch.triu_indices(n, n, 1)
        pairs = torch.from_numpy((states * share[:, None]).T @ states)[upper[0], upper[1]]
        moments = torch.cat([pairs, torch.from_numpy(share @ states)])
        seed = self._generator().initial_seed()

        def objective(theta: Array) -> tuple[float, Array]:
            values = torch.from_numpy(theta)
            weights, fields = (part.clone().requires_grad_() for part in (values[: len(pairs)], values[len(pairs) :]))
            half = torch.zeros(n, n, dtype=torch.float64).index_put((upper[0], upper[1]), weights)
            if method == "modes":
                # The same starts at every step, so that the objective is a function.
                options["generator"] = torch.Generator().manual_seed(seed)
            log_z = cast("Tensor", METHODS[method](half + half.T, fields, **options).value)
            slopes = (
                torch.autograd.grad(log_z, (weights, fields), allow_unused=True) if log_z.requires_grad else (None,)
            )
            # A sampler's value still hangs on the couplings' diagonal, but not on the fields.
            if any(slope is None for slope in slopes):
                raise InputError(f"logz='{method}' has no gradients to fit with: use loss='pseudo', or logz='auto'")
            value = float(log_z.detach()) + float((0.5 * float(self.l2) * values - moments) @ values)
            return value, (torch.cat(cast("list[Tensor]", slopes)) - moments + float(self.l2) * values).numpy()

        return objective


def pseudo_likelihood(x: Array, weight: Array, l2: float) -> Callable[[Array], tuple[float, Array]]:
    """Make the penalised negative log pseudo-likelihood of spins, with its gradient.

    Parameters
    ----------
    x : (states, n) of -1 and +1
    weight : (states,) shares that sum to one
    l2 : penalty; ½ l2 |θ|² is added

    Returns
    -------
    A function of θ = (A_ij for i < j, row by row; b), (n (n + 1) / 2,), giving value (nats a row) and gradient

    Notes
    -----
    Σ_i log p(x_i | others) = Σ_i [x_i h_i - log 2cosh h_i] with h = Ax + b. The first part is linear in θ, so only the
    second is computed row by row.

    Examples
    --------
    >>> value, gradient = pseudo_likelihood(np.array([[1.0, -1.0]]), np.ones(1), 0.0)(np.zeros(3))
    >>> round(value / math.log(2), 9), gradient.tolist()
    (2.0, [2.0, -1.0, 1.0])
    """
    n = x.shape[1]
    rows, columns = np.triu_indices(n, 1)
    X, w = torch.from_numpy(x), torch.from_numpy(weight)
    weighted = X * w[:, None]
    second = (weighted.T @ X).numpy()
    moments = np.concatenate([2 * second[rows, columns], weight @ x])

    def objective(theta: Array) -> tuple[float, Array]:
        A, b = _couplings(theta, n)
        h = torch.addmm(torch.from_numpy(b), X, torch.from_numpy(A))
        size = h.abs()
        small = torch.exp(-2 * size)
        # log 2cosh h = |h| + log(1 + e^(-2|h|)), and tanh from the same exponential.
        value = float(w @ (size + torch.log1p(small)).sum(1))
        slope = torch.copysign((1 - small) / (1 + small), h)
        products = (weighted.T @ slope).numpy()
        gradient = np.concatenate([(products + products.T)[rows, columns], (w @ slope).numpy()])
        return value - float(moments @ theta) + 0.5 * l2 * float(theta @ theta), gradient - moments + l2 * theta

    return objective


def _size(n: int) -> int:
    return n * (n + 1) // 2


def _couplings(theta: Array, n: int) -> tuple[Array, Array]:
    A = np.zeros((n, n))
    A[np.triu_indices(n, 1)] = theta[: len(theta) - n]
    return A + A.T, theta[len(theta) - n :].copy()


def _weights(sample_weight: Any, rows: int) -> Array:
    """Weights that sum to one."""
    if sample_weight is None:
        return np.full(rows, 1 / rows)
    weight = np.asarray(sample_weight, dtype=np.float64)
    if weight.shape != (rows,):
        raise InputError(f"sample_weight must have one number a row, ({rows},), got {weight.shape}")
    if not np.isfinite(weight).all() or (weight < 0).any() or not weight.any():
        raise InputError("sample_weight must be finite, not negative, and not all zero")
    return weight / weight.sum()


def _distinct(x: Array, weight: Array) -> tuple[Array, Array]:
    """Return the distinct rows and their shares."""
    packed = np.packbits(x > 0, axis=1)
    _, first, which = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    return x[first], np.bincount(which.ravel(), weights=weight).astype(np.float64)


def _conditional_means(A: Array, b: Array, x: Array, missing: NDArray[np.bool_]) -> Array:
    """Means of the missing spins of rows that lack the same ones, (rows, missing)."""
    count = int(missing.sum())
    bits = np.arange(1 << count)[:, None] >> np.arange(count)
    states = 2.0 * (bits & 1) - 1.0
    inner = 0.5 * ((states @ A[np.ix_(missing, missing)]) * states).sum(1)
    fields = b[missing] + x[:, ~missing] @ A[np.ix_(~missing, missing)]
    means = np.empty_like(fields)
    step = max(1, _BLOCK // len(states))
    for first in range(0, len(x), step):
        logits = fields[first : first + step] @ states.T + inner
        share = np.exp(logits - logits.max(1, keepdims=True))
        means[first : first + step] = (share @ states) / share.sum(1, keepdims=True)
    return means


def _gibbs(A: Tensor, b: Tensor, x: Tensor, sweeps: int, random: torch.Generator, free: Tensor | None = None) -> Tensor:
    """Sweep over spins (n, chains) in place, or over the free ones; return their conditional means, averaged.

    The first quarter of the sweeps is not averaged.
    """
    spins = range(len(x)) if free is None else free.any(1).nonzero().flatten().tolist()
    total, skip = torch.zeros_like(x), sweeps // 4
    for sweep in range(sweeps):
        noise = 0.5 * torch.logit(torch.rand(x.shape, generator=random, dtype=torch.float64), eps=1e-16)
        for i in spins:
            h = A[i] @ x + b[i]
            if sweep >= skip:
                total[i] += torch.tanh(h)
            new = torch.sign(h + noise[i])
            x[i] = new if free is None else torch.where(free[i], new, x[i])
    return total / (sweeps - skip)


def _stochastic_fit(
    states: Array, share: Array, l2: float, steps: int, start: Array, random: torch.Generator
) -> tuple[Array, float]:
    """Climb the likelihood with model moments from persistent chains (Younes, Stochastics 1999).

    Returns the average of the second half of the path, and the largest entry of the gradient there.
    """
    n = states.shape[1]
    x = torch.from_numpy(states)
    w = torch.from_numpy(share)
    moments = torch.cat([(x.T * w) @ x, (w @ x)[None]])
    theta = torch.from_numpy(np.vstack(_couplings(start, n)))
    chosen = torch.multinomial(w, _CHAINS, replacement=True, generator=random)
    chains = x[chosen].T.contiguous()
    mean, slope = torch.zeros_like(theta), torch.zeros_like(theta)
    late = 0
    for step in range(steps):
        _gibbs(theta[:n], theta[n], chains, 1, random)
        gradient = moments - torch.cat([chains @ chains.T, chains.sum(1)[None]]) / _CHAINS - l2 * theta
        gradient[:n].fill_diagonal_(0)
        theta = theta + _RATE / (1 + 10 * step / steps) * gradient
        if 2 * step >= steps - 1:
            late += 1
            mean += (theta - mean) / late
            slope += (gradient - slope) / late
    found = mean.numpy()
    return np.concatenate([found[:n][np.triu_indices(n, 1)], found[n]]), float(slope.abs().max())

"""Restricted Boltzmann machines: their likelihood with an honest log Z, and a plain trainer.

Units are 0/1, p(v, h) ∝ exp(vᵀWh + bvᵀv + bhᵀh). log Z is exact where one side has up to 20 units; beyond, it comes
from annealed importance sampling over the visible units alone, with the hidden ones summed out at every temperature.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import special
from torch import Tensor
from torch.nn.functional import softplus

from shared_core.errors import InputError, no_such
from spectral_mf._inputs import is_a
from spectral_mf.baselines.ais import Annealed
from spectral_mf.estimate import METHODS, log_partition
from spectral_mf.formats import rbm_to_ising
from spectral_mf.result import LogPartition

__all__ = ["RBM", "RBMLikelihood", "rbm_ais", "rbm_log_likelihood", "train_rbm"]

Number = float | int
_EXACT_SIDE = 20
_MAX_LEVELS = 100_000
_GOOD_ENOUGH = 0.01


@dataclass(frozen=True, eq=False, init=False, repr=False)
class RBM:
    """A restricted Boltzmann machine with 0/1 units.

    Attributes
    ----------
    W : (visible, hidden) weights, float64
    bv : (visible,) biases
    bh : (hidden,) biases

    Raises
    ------
    InputError
        Shapes that do not fit together (W transposed, above all), or entries that are not finite.

    Examples
    --------
    >>> RBM([[1.0], [2.0]], [0.0, 0.0], [0.5])
    RBM(visible=2, hidden=1)
    """

    W: np.ndarray
    bv: np.ndarray
    bh: np.ndarray

    def __init__(self, W: ArrayLike, bv: ArrayLike, bh: ArrayLike) -> None:
        """Check the arrays and keep them as float64."""
        arrays = {name: _array(name, value) for name, value in (("W", W), ("bv", bv), ("bh", bh))}
        arrays |= {name: arrays[name].ravel() for name in ("bv", "bh") if 1 in arrays[name].shape}
        shape, visible, hidden = arrays["W"].shape, arrays["bv"].shape, arrays["bh"].shape
        if len(shape) != 2 or 0 in shape or len(visible) != 1 or len(hidden) != 1:
            raise InputError(
                f"W must be (visible, hidden), bv (visible,), bh (hidden,), got {shape}, {visible}, {hidden}"
            )
        if shape != visible + hidden:
            advice = "W is transposed: pass W.T" if shape == hidden + visible else "W must be (visible, hidden)"
            raise InputError(f"W is {shape} but there are {visible[0]} visible and {hidden[0]} hidden biases; {advice}")
        for name, array in arrays.items():
            object.__setattr__(self, name, array)

    def __repr__(self) -> str:
        """Say the sizes only."""
        return f"RBM(visible={self.visible}, hidden={self.hidden})"

    @property
    def visible(self) -> int:
        """Number of visible units."""
        return self.W.shape[0]

    @property
    def hidden(self) -> int:
        """Number of hidden units."""
        return self.W.shape[1]

    @classmethod
    def from_arrays(cls, W: ArrayLike, bv: ArrayLike, bh: ArrayLike) -> RBM:
        """Make a machine of its arrays.

        Parameters
        ----------
        W : (visible, hidden) weights
        bv : (visible,) biases; a row or a column will do
        bh : (hidden,) biases

        Raises
        ------
        InputError
            As the class does.
        """
        return cls(W, bv, bh)

    @classmethod
    def from_sklearn(cls, estimator: Any) -> RBM:
        """Take the parameters of a fitted ``sklearn.neural_network.BernoulliRBM``.

        Parameters
        ----------
        estimator : fitted, with ``components_``, ``intercept_visible_`` and ``intercept_hidden_``

        Raises
        ------
        InputError
            Where those are missing.
        """
        names = ("components_", "intercept_visible_", "intercept_hidden_")
        if lacking := [name for name in names if not hasattr(estimator, name)]:
            raise InputError(f"{type(estimator).__name__} has no {lacking[0]}: pass a BernoulliRBM after its fit")
        return cls(estimator.components_.T, estimator.intercept_visible_, estimator.intercept_hidden_)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], *, visible: int | None = None, transposed: bool | None = None
    ) -> RBM:
        """Find weights and biases among the tensors of a torch ``state_dict``, by their shapes.

        Parameters
        ----------
        state : named tensors: one matrix and two vectors of its two sizes (others of no dimension are ignored)
        visible : number of visible units; None: told from names of the biases that begin with ``v`` and ``h``
            (``v_bias``, ``bh``, ``hidden_bias``, ...)
        transposed : whether the matrix is (hidden, visible); None: told from the sizes, where they differ

        Raises
        ------
        InputError
            Where that leaves a choice; it names the tensors.

        Examples
        --------
        >>> RBM.from_state_dict({"W": torch.zeros(2, 3), "v_bias": torch.zeros(3), "h_bias": torch.zeros(2)})
        RBM(visible=3, hidden=2)
        """
        arrays = {
            name: tensor.detach().to("cpu", torch.float64).numpy() if isinstance(tensor, Tensor) else np.asarray(tensor)
            for name, tensor in state.items()
        }
        told = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "nothing"
        matrices = [name for name, array in arrays.items() if array.ndim == 2 and 1 not in array.shape]
        vectors = [name for name, a in arrays.items() if a.ndim == 1 or (a.ndim == 2 and 1 in a.shape)]
        others = [name for name, array in arrays.items() if array.ndim > 2]
        if len(matrices) != 1 or len(vectors) != 2 or others:
            raise InputError(f"expected one matrix and two vectors, found {told}; use RBM.from_arrays(W, bv, bh)")
        W = arrays[matrices[0]]
        first, second = vectors
        sizes = arrays[first].size, arrays[second].size
        if sorted(sizes) != sorted(W.shape):
            raise InputError(f"the vectors do not have the sizes of the matrix: {told}; use RBM.from_arrays(W, bv, bh)")
        if sizes[0] != sizes[1] and visible in sizes:
            swap = visible == sizes[1]
        elif visible is not None and visible not in sizes:
            raise InputError(f"visible = {visible} is not a size of {told}")
        elif {_side(first), _side(second)} == {"v", "h"}:
            swap = _side(first) == "h"
        else:
            raise InputError(
                f"which bias is the visible one? found {told}; pass visible=, or use RBM.from_arrays(W, bv, bh)"
            )
        bv, bh = (arrays[name] for name in ((second, first) if swap else (first, second)))
        if transposed is None:
            if bv.size == bh.size:
                raise InputError(f"{matrices[0]} {W.shape} is square: pass transposed=True if it is (hidden, visible)")
            transposed = W.shape == (bh.size, bv.size)
        return cls(W.T if transposed else W, bv, bh)

    def free_energy(self, v: ArrayLike) -> np.ndarray:
        """Free energy F(v) of visible states: p(v) = exp(-F(v)) / Z.

        Parameters
        ----------
        v : (rows, visible) of 0 and 1, or booleans

        Returns
        -------
        (rows,) nats

        Raises
        ------
        InputError
            Where v has another width or other values.
        """
        x = _binary(v, self.visible)
        return -x @ self.bv - np.logaddexp(0.0, x @ self.W + self.bh).sum(1)

    def to_ising(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Give couplings, fields and constant of the Ising model with the same log Z, visible spins first.

        Returns
        -------
        A : (visible + hidden,) squared; b : (visible + hidden,); const : what to add to log Z
        """
        return rbm_to_ising(self.W, self.bv, self.bh)


@dataclass(frozen=True, eq=False)
class RBMLikelihood:
    """Log-likelihood of data under a machine, in nats.

    Attributes
    ----------
    mean : per row, with the estimated log Z
    low, high : what the uncertainty of log Z leaves of `mean`: its rounding where it is exact, a 95 % interval where it
        has a standard error, else its certified bounds (infinite where the method has none)
    sampling_low, sampling_high : 95 % interval of the mean over further rows from the same source, log Z as it is
    log_partition : log Z of the machine
    per_row : (rows,) log-likelihoods
    n : number of rows
    """

    mean: float
    low: float
    high: float
    sampling_low: float
    sampling_high: float
    log_partition: LogPartition
    per_row: np.ndarray
    n: int


def rbm_log_likelihood(
    rbm: RBM,
    X: ArrayLike,
    *,
    method: str = "auto",
    budget_s: float = 30.0,
    generator: torch.Generator | None = None,
) -> RBMLikelihood:
    """Evaluate the log-likelihood of data under a machine.

    Parameters
    ----------
    rbm : the machine
    X : (rows, visible) of 0 and 1, or booleans
    method : ``auto``: exact where one side has up to 20 units, else ``ais``; ``exact``; ``ais`` (:func:`rbm_ais`, from
        the base rates of X, more levels as long as the budget lasts); or a name in
        :data:`spectral_mf.estimate.METHODS`
    budget_s : seconds that ``ais`` may take
    generator : source of randomness; None means one seeded with 0

    Raises
    ------
    InputError
        Where X does not fit, the method is unknown, or ``exact`` is asked of a machine too large for it.

    Notes
    -----
    Spec sections 6 and 8, experiment 5; Salakhutdinov and Murray, ICML 2008, for the way of evaluation.

    Examples
    --------
    >>> coin = RBM(np.zeros((3, 2)), np.zeros(3), np.zeros(2))
    >>> round(rbm_log_likelihood(coin, [[0, 1, 1]]).mean / math.log(0.5), 9)
    3.0
    """
    if not is_a(rbm, RBM):
        if not hasattr(rbm, "components_"):
            raise InputError(f"rbm must be an RBM (RBM.from_arrays, RBM.from_sklearn), got {type(rbm).__name__}")
        rbm = RBM.from_sklearn(rbm)
    data = _binary(X, rbm.visible)
    if len(data) == 0:
        raise InputError("X has no rows: a mean log-likelihood needs one at least")
    if not budget_s > 0:
        raise InputError(f"budget_s must be positive, got {budget_s:g}")
    small = min(rbm.W.shape) <= _EXACT_SIDE
    if method == "ais" or (method == "auto" and not small):
        found = _within_budget(rbm, data.mean(0), budget_s, generator or torch.Generator().manual_seed(0))
    else:
        name = "exact_rbm" if method in ("auto", "exact") else method
        if name not in METHODS:
            raise no_such("method", method, dict.fromkeys(("auto", "exact", "ais", *METHODS)))
        A, b, const = rbm.to_ising()
        found = _shifted(log_partition(A, b, method=name, generator=generator), const)
    per_row = -rbm.free_energy(data) - float(found.value)
    mean = float(per_row.mean())
    low, high = float(found.lower), float(found.upper)
    if found.std_error is not None:
        within = 1.96 * float(found.std_error)
        low, high = float(found.value) - within, float(found.value) + within
    spread = 1.96 * float(per_row.std(ddof=1)) / math.sqrt(len(data)) if len(data) > 1 else math.inf
    return RBMLikelihood(
        mean=mean,
        low=mean + float(found.value) - high,
        high=mean + float(found.value) - low,
        sampling_low=mean - spread,
        sampling_high=mean + spread,
        log_partition=found,
        per_row=per_row,
        n=len(data),
    )


def rbm_ais(
    rbm: RBM,
    *,
    levels: int = 1000,
    chains: int = 200,
    base_rates: ArrayLike | None = None,
    generator: torch.Generator | None = None,
) -> LogPartition:
    """Estimate log Z of a machine by annealed importance sampling with the hidden units summed out.

    Parameters
    ----------
    rbm : the machine
    levels : temperatures, equally spaced
    chains : independent chains, at least 2
    base_rates : (visible,) means of the visible units in the data: chains begin at independent units with these means,
        smoothed (any will do, closer is better); None means one half each
    generator : source of randomness; None means one seeded with 0

    Returns
    -------
    Value and standard error. Each weight has mean Z; the logarithm of their mean errs downwards. No certified bounds.

    Raises
    ------
    InputError
        Where `levels`, `chains` or `base_rates` are out of range.

    Notes
    -----
    Salakhutdinov and Murray, "On the quantitative analysis of deep belief networks", ICML 2008, section 4.1: the path
    f_β(v) = exp((1 - β) aᵀv + β bvᵀv) Π_j (1 + exp(β (bh_j + W_jᵀv))).

    Examples
    --------
    >>> machine = RBM([[1.0], [-1.0]], [0.5, 0.0], [0.2])
    >>> exact = rbm_log_likelihood(machine, [[0, 1]]).log_partition.value
    >>> abs(rbm_ais(machine).value - exact) < 0.05
    True
    """
    if levels < 1 or chains < 2:
        raise InputError(f"levels must be at least 1 and chains at least 2, got {levels} and {chains}")
    rates = np.full(rbm.visible, 0.5) if base_rates is None else np.asarray(base_rates, dtype=np.float64)
    if rates.shape != (rbm.visible,) or not bool(((rates >= 0) & (rates <= 1)).all()):
        raise InputError(f"base_rates must be {rbm.visible} numbers in [0, 1], got shape {rates.shape}")
    started = time.perf_counter()
    random = generator or torch.Generator().manual_seed(0)
    run = _anneal(rbm, levels, chains, rates, random)
    size = float(run.effective_size[0])
    warnings = (f"only {size:.1f} of {chains} chains carry the estimate: raise levels",) if size < 10 else ()
    return LogPartition(
        value=float(run.log_z[0]),
        lower=-math.inf,
        upper=math.inf,
        method="ais",
        std_error=float(run.std_error[0]),
        diagnostics={"levels": levels, "chains": chains, "effective_chains": size},
        warnings=warnings,
        seconds=time.perf_counter() - started,
    )


def _anneal(rbm: RBM, levels: int, chains: int, rates: np.ndarray, random: torch.Generator) -> Annealed:
    device = random.device
    W, bv, bh = (torch.tensor(part, device=device) for part in (rbm.W, rbm.bv, rbm.bh))
    base = torch.tensor(special.logit(0.05 + 0.9 * rates), device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, dtype=torch.float64, device=device)

    v = (uniform(chains, rbm.visible) < torch.sigmoid(base)).to(W)
    log_weight = torch.full(
        (chains,), float(softplus(base).sum()) + rbm.hidden * math.log(2), dtype=torch.float64, device=device
    )
    inputs = torch.addmm(bh, v, W)
    beta = 0.0
    for level in range(1, levels + 1):
        before, beta = beta, level / levels
        gain = softplus(beta * inputs) - softplus(before * inputs)
        log_weight += (beta - before) * (v @ (bv - base)) + gain.sum(1)
        h = (uniform(chains, rbm.hidden) < torch.sigmoid(beta * inputs)).to(W)
        v = (uniform(chains, rbm.visible) < torch.sigmoid((1 - beta) * base + beta * torch.addmm(bv, h, W.T))).to(W)
        inputs = torch.addmm(bh, v, W)
    return Annealed(log_weight[None], (2 * v.T - 1)[None], levels)


def _within_budget(rbm: RBM, rates: np.ndarray, budget_s: float, random: torch.Generator) -> LogPartition:
    """Four times the levels until the error is small, or the next round would not fit into the time."""
    levels, spent = 500, 0.0
    while True:
        found = rbm_ais(rbm, levels=levels, base_rates=rates, generator=random)
        spent += found.seconds
        if float(found.std_error or 0.0) < _GOOD_ENOUGH or levels * 4 > _MAX_LEVELS:
            return found
        factor = 4 if spent + 4.4 * found.seconds <= budget_s else 2
        if spent + 1.1 * factor * found.seconds > budget_s:
            return found
        levels *= factor


def _shifted(found: LogPartition, const: float) -> LogPartition:
    return found.with_(value=found.value + const, lower=found.lower + const, upper=found.upper + const)


def train_rbm(
    X: ArrayLike,
    hidden: int,
    *,
    epochs: int = 20,
    lr: Number = 0.1,
    k: int = 1,
    persistent: bool = False,
    batch_size: int = 20,
    seed: int = 0,
) -> RBM:
    """Train a machine by contrastive divergence, plainly: constant rate, no momentum, no decay.

    Parameters
    ----------
    X : (rows, visible) of 0 and 1, or booleans
    hidden : number of hidden units
    epochs : passes over the rows; 0 gives the start: small random weights, visible biases at the data's log odds
    lr : step size
    k : Gibbs steps a gradient
    persistent : go on with the chains of the last step (PCD) in place of beginning at the rows (CD)
    batch_size : rows a gradient
    seed : of the weights, the order and the chains

    Returns
    -------
    RBM

    Raises
    ------
    InputError
        Where X does not fit or a number is out of range.

    Notes
    -----
    Hinton, Neural Computation 2002 (CD); Tieleman, ICML 2008 (PCD).

    Examples
    --------
    >>> X = np.tile([[1, 0, 1, 0], [0, 1, 0, 1]], (50, 1))
    >>> gain = lambda rbm: rbm_log_likelihood(rbm, X).mean
    >>> gain(train_rbm(X, 2, epochs=100)) > gain(train_rbm(X, 2, epochs=0)) + 1
    True
    """
    data = _binary(X, None)
    if len(data) == 0 or data.shape[1] == 0:
        raise InputError(f"X is empty: {data.shape}")
    for name, value in (("hidden", hidden), ("k", k), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if epochs < 0 or not (math.isfinite(lr) and lr > 0):
        raise InputError(f"epochs must be at least 0 and lr positive, got {epochs} and {lr:g}")
    random = np.random.default_rng(seed)
    rows, visible = data.shape
    weights = 0.01 * random.standard_normal((visible, hidden))
    share = (data.sum(0) + 0.5) / (rows + 1)
    bv, bh = special.logit(share), np.zeros(hidden)

    def draw(logits: np.ndarray) -> np.ndarray:
        return (random.random(logits.shape) < special.expit(logits)).astype(np.float64)

    chains: np.ndarray | None = None
    for _ in range(epochs):
        order = random.permutation(rows)
        for first in range(0, rows, batch_size):
            v = data[order[first : first + batch_size]]
            up = special.expit(v @ weights + bh)
            fantasy = v if chains is None else chains
            for _ in range(k):
                fantasy = draw(draw(fantasy @ weights + bh) @ weights.T + bv)
            if persistent:
                chains = fantasy
            down = special.expit(fantasy @ weights + bh)
            weights += lr * (v.T @ up / len(v) - fantasy.T @ down / len(fantasy))
            bv += lr * (v.mean(0) - fantasy.mean(0))
            bh += lr * (up.mean(0) - down.mean(0))
    return RBM(weights, bv, bh)


def _side(name: str) -> Literal["v", "h", ""]:
    """Which side a bias is named after."""
    words = name.rsplit(".", 1)[-1].lower().replace("bias", "_").replace("-", "_").split("_")
    for word in words:
        bare = word[1:] if len(word) == 2 and word[0] == "b" else word
        if bare in ("v", "vis", "visible"):
            return "v"
        if bare in ("h", "hid", "hidden"):
            return "h"
    return ""


def _array(name: str, values: Any) -> np.ndarray:
    try:
        array = np.array(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be numbers in a regular array: {error}") from error
    if not np.isfinite(array).all():
        at = np.argwhere(~np.isfinite(array))[0].tolist()
        raise InputError(f"{name}{at} is {array[tuple(at)]}; every entry must be finite")
    return array


def _binary(X: Any, width: int | None) -> np.ndarray:
    try:
        x = np.asarray(X.detach().cpu() if isinstance(X, Tensor) else X, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"X must be numbers in a regular array: {error}") from error
    if x.ndim != 2 or (width is not None and x.shape[1] != width):
        wanted = "(rows, visible)" if width is None else f"(rows, {width})"
        raise InputError(f"X must be {wanted}, got {x.shape}")
    wrong = (x != 0) & (x != 1)
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        hint = "; turn -1/+1 into 0/1 by (X + 1) / 2" if x[row, column] == -1 else "; units are 0 or 1"
        raise InputError(f"X[{row},{column}] is {x[row, column]:g}{hint}")
    return x

"""Spectral mean field (Park, Yang, Yun, Shin, "Spectral Approximate Inference", ICML 2019) and its certified bounds.

With one more spin for the fields, any diagonal d and B - diag(d) = Σ_j λ_j u_j u_jᵀ,

    log Z = n log 2 + ½ Σ d + log E_x Π_j exp(½ λ_j (u_jᵀx)²),    x uniform,

exactly. The scheme replaces the expectation of the product by the product of the expectations, each of which is known
to machine precision; d solves an SDP that makes every λ_j ≤ 0. Nothing is iterated, so nothing can fail to converge.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from shared_core.errors import InputError
from spectral_mf._inputs import Problem, as_problem
from spectral_mf.rank_one import Engine, log_cosh, log_expectation, quadrature_rounding
from spectral_mf.result import LogPartition, rounding_slack
from spectral_mf.sdp import DiagonalSDP, augmented, solve_diagonal

__all__ = [
    "Diagonal",
    "gaussian",
    "holder_weights",
    "log_det_bound",
    "sdp_bounds",
    "spectral_mean_field",
    "tap_diagonal",
]

Diagonal = Literal["sdp", "none", "shift", "tap"]
_NULL = 1e-12


@dataclass(frozen=True)
class _Spectrum:
    """B - diag(d) = Σ λ u uᵀ, with eigenvalues that are zero but for rounding set to zero."""

    d: Tensor
    lam: Tensor
    u: Tensor  # (models, pairs, n): a row an eigenvector
    sdp: DiagonalSDP | None


def spectral_mean_field(
    A: Any,
    b: Any = None,
    *,
    diagonal: Diagonal | Tensor = "sdp",
    engine: Engine = "auto",
    tilt: bool = False,
    q: float | None = None,
    tol: float = 1e-9,
) -> LogPartition:
    """Estimate log Z by the product of the marginals of the spectral coordinates: the paper's method.

    Parameters
    ----------
    A : (n, n) or (models, n, n) symmetric couplings, each pair counted once (energy ½ xᵀAx + bᵀx)
    b : (n,) or (models, n) fields
    diagonal : ``sdp`` (the method), ``none`` (d = 0), ``shift`` (d = λ_max), ``tap``, or a (models, n + 1) tensor
        (n with `tilt`). All but ``sdp`` are for study: with them estimates are tens of nats off at strong coupling.
    engine : how each one-dimensional expectation is computed, see :func:`spectral_mf.rank_one.log_expectation`; ``dp``
        with ``q=0.001`` is what the paper's code does
    tilt : keep the fields in the product measure in place of a further spin (ours, not the paper's): exact for
        independent spins, and for spins that their fields pin
    q : grid step of ``engine="dp"``
    tol : relative duality gap of the SDP

    Returns
    -------
    The estimate, with a certified upper bound (and n log 2, or the independent spins' log Z, as lower bound) of the
    true log Z. The estimate itself is NO bound. ``diagnostics`` holds d, the eigenvalues, the SDP's gap and seconds.

    Notes
    -----
    Gradients reach A and b with d held constant; d is not stationary for this estimate, so they are those of the
    formula at that d, not of the estimate. ``gaussian`` with ``diagonal="tap"`` has exact gradients.

    Source: paper, abstract and the authors' ``rank1_ising.py``; spec 2.3, equation (SMF).

    Examples
    --------
    >>> import numpy as np
    >>> A = -(np.ones((3, 3)) - np.eye(3))
    >>> round(spectral_mean_field(A).value, 6)  # an antiferromagnetic triangle: exact, log(2 exp(-3) + 6 exp(1))
    2.797846
    """
    started = time.perf_counter()
    problem = as_problem(A, b)
    spectrum = _spectrum(problem, diagonal, tilt, tol)
    sdp_seconds = time.perf_counter() - started
    models, pairs = spectrum.lam.shape
    field = problem.b[:, None, :].expand(models, pairs, -1).reshape(models * pairs, -1) if tilt else None
    found = log_expectation(spectrum.u.reshape(models * pairs, -1), spectrum.lam.reshape(-1), field, engine=engine, q=q)
    base = _base(problem, tilt)
    value = base + 0.5 * spectrum.d.sum(-1) + found.value.reshape(models, pairs).sum(-1)
    log_factors, engine_error = found.value.reshape(models, pairs), found.error.reshape(models, pairs)
    lower, upper = _certified(problem, spectrum, tilt, log_factors, engine_error)
    codes = {0: "quadrature", 1: "dp", 2: "gaussian", 3: "exact", 4: "null"}
    counts = {name: int((found.engine == code).sum()) for code, name in codes.items()}
    details: dict[str, Any] = {
        "d": problem.give_back(spectrum.d),
        "eigenvalues": problem.give_back(spectrum.lam.detach()),
        "engines": {name: count for name, count in counts.items() if count},
        "engine_error": problem.give_back(engine_error.sum(-1)),
        "seconds": {"diagonal": sdp_seconds, "expectations": time.perf_counter() - started - sdp_seconds},
    }
    if spectrum.sdp is not None:
        details["sdp_gap"] = problem.give_back(spectrum.sdp.gap)
        details["sdp_iterations"] = spectrum.sdp.iterations
    return LogPartition.of(
        problem,
        "spectral" if not tilt else "spectral-tilted",
        value,
        lower=lower,
        upper=upper,
        diagnostics=details,
        seconds=time.perf_counter() - started,
    )


def gaussian(A: Any, b: Any = None, *, diagonal: Diagonal | Tensor = "sdp") -> LogPartition:
    """Estimate log Z with the spectral coordinates taken for Gaussian: n log 2 + ½ Σ d - ½ log det(I + diag(d) - B).

    Parameters
    ----------
    A : (n, n) or (models, n, n) symmetric couplings
    b : (n,) or (models, n) fields
    diagonal : ``sdp``; ``tap`` minimises the formula over d (the paramagnetic adaptive-TAP condition), which makes its
        gradients exact; or a (models, n + 1) tensor

    Returns
    -------
    The estimate, which is no bound; with ``sdp`` the certified bounds beside it.

    Raises
    ------
    InputError
        When I + diag(d) - B is not positive definite for the given d.

    Notes
    -----
    Source: the ``use_gaus`` flag of the authors' code; spec 2.4.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.array([[0, 0.2], [0.2, 0]])
    >>> bool(abs(gaussian(A, diagonal="tap").value - (2 * np.log(2) + np.log(np.cosh(0.2)))) < 1e-3)
    True
    """
    started = time.perf_counter()
    problem = as_problem(A, b)
    B = augmented(problem.dense, problem.b)
    d, sdp = _diagonal(B, diagonal, 1e-8)
    S = torch.diag_embed(1 + d) - B
    factor, info = torch.linalg.cholesky_ex(S)
    if bool((info != 0).any()):
        raise InputError("gaussian: I + diag(d) - B is not positive definite for this diagonal; use 'sdp' or 'tap'")
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    value = problem.n * math.log(2) + 0.5 * d.sum(-1) - 0.5 * log_det
    lower = upper = None
    if sdp is not None:
        lower = _base(problem, False) - rounding_slack(problem)
        upper = _base(problem, False) + 0.5 * d.sum(-1)
        upper = upper + rounding_slack(problem, upper)
    return LogPartition.of(
        problem,
        "tap" if isinstance(diagonal, str) and diagonal == "tap" else "gaussian",
        value,
        lower=lower,
        upper=upper,
        diagnostics={"d": problem.give_back(d)},
        seconds=time.perf_counter() - started,
    )


def tap_diagonal(B: Tensor, *, target: float = 1.0, tol: float = 1e-10, max_iterations: int = 200) -> Tensor:
    """Diagonal that minimises ½ target Σ d - ½ log det(I + diag(d) - B): there [(I + diag(d) - B)⁻¹]_ii = target.

    Parameters
    ----------
    B : (models, n, n) symmetric, zero diagonal
    target : what the diagonal of the inverse shall be, > 0; 1 is the paramagnetic adaptive-TAP condition
    tol : largest deviation of a diagonal entry of the inverse from `target`
    max_iterations : most Newton steps

    Notes
    -----
    Convex; Newton with gradient target - diag(S⁻¹) and Hessian S⁻¹∘S⁻¹ (spec 2.4), damped by the decrement so that
    every step stays where S is positive definite.

    Examples
    --------
    >>> tap_diagonal(torch.zeros(1, 2, 2, dtype=torch.float64))
    tensor([[0., 0.]], dtype=torch.float64)
    """
    B = B.detach()
    d = B.abs().sum(-1)
    for _ in range(max_iterations):
        inverse = torch.linalg.inv(torch.diag_embed(1 + d) - B)
        gradient = target - inverse.diagonal(dim1=-2, dim2=-1)
        if float(gradient.abs().max()) < tol:
            break
        step = torch.linalg.solve(inverse**2, gradient)
        # The function is ½ times a self-concordant one: 1 / (1 + decrement) never leaves the domain.
        decrement = (gradient * step).sum(-1).clamp_min(0).sqrt()
        damping = torch.where(decrement < 0.25, torch.ones_like(decrement), 1 / (1 + decrement))
        d = d - damping[:, None] * step
    return d


def log_det_bound(A: Any, b: Any = None) -> Tensor:
    """Certified upper bound of log Z by a Gaussian's entropy: the log-determinant relaxation.

    Spins plus noise uniform on [-1, 1] have the spins' entropy plus log 2 each, and at most that of a Gaussian with
    their covariance. Its dual holds for every d with diag(d) ≻ B:

        log Z ≤ ⅔ Σ d - ½ log det(diag(d) - B) + (N/2) log 2π - N log 2 - log 2,    N = n + 1 spins.

    Parameters
    ----------
    A : (n, n) or (models, n, n) symmetric couplings
    b : (n,) or (models, n) fields

    Returns
    -------
    (models,) tensor, constants of the model and rounding included. 0.18 n above log Z for independent spins; below the
    SDP's bound where couplings are of middling strength.

    Notes
    -----
    Wainwright and Jordan, IEEE Trans. Signal Processing 2006; minimised over d by Newton's method, which need not have
    converged for the bound to hold.

    Examples
    --------
    >>> bool(log_det_bound([[0.0, 1.0], [1.0, 0.0]]) > math.log(2 * math.e + 2 / math.e))
    True
    """
    problem = as_problem(A, b)
    B = augmented(problem.dense, problem.b).detach()
    d = 1 + tap_diagonal(B, target=4 / 3)
    factor, info = torch.linalg.cholesky_ex(torch.diag_embed(d) - B)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    size = problem.n + 1
    value = 2 / 3 * d.sum(-1) - 0.5 * log_det + 0.5 * size * math.log(2 * math.pi) - (size + 1) * math.log(2)
    value = torch.where(info == 0, value + rounding_slack(problem, d.sum(-1)), math.inf)
    return value + problem.const.detach()


def sdp_bounds(A: Any, b: Any = None, *, tilt: bool = False) -> tuple[Tensor, Tensor]:
    """Certified (lower, upper) bounds of log Z out of the SDP, without an estimate.

    Parameters
    ----------
    A : (n, n) or (models, n, n) symmetric couplings
    b : (n,) or (models, n) fields
    tilt : keep the fields in the product measure

    Returns
    -------
    Two (models,) tensors, constants of the model included. The upper one is n log 2 + ½ Σ d (spec 2.4) lowered by
    Hölder's inequality, E Π_j f_j ≤ Π_j (E f_j^{1/w_j})^{w_j} for weights that sum to one.

    Examples
    --------
    >>> import numpy as np
    >>> lower, upper = sdp_bounds(np.zeros((2, 2)))
    >>> bool(lower <= 2 * np.log(2)) and bool(2 * np.log(2) <= upper)
    True
    """
    problem = as_problem(A, b)
    spectrum = _spectrum(problem, "sdp", tilt, 1e-6)
    lower, upper = _certified(problem, spectrum, tilt, None, None)
    if upper is None:
        raise AssertionError("the SDP's diagonal leaves no positive eigenvalue")
    return lower + problem.const.detach(), upper + problem.const.detach()


def holder_weights(lam: Tensor) -> Tensor:
    """Weights w ≥ 0, Σ w = 1, that make Σ_j -½ w_j log(1 + |λ_j| / w_j) least: the Gaussian guide to Hölder's bound.

    Parameters
    ----------
    lam : (models, pairs) eigenvalues ≤ 0, not all zero in any model

    Notes
    -----
    Each term's slope depends on |λ_j| / w_j alone and the problem is convex, so all slopes are equal: w ∝ |λ|.

    Examples
    --------
    >>> holder_weights(torch.tensor([[-3.0, -1.0, 0.0]]))
    tensor([[0.7500, 0.2500, 0.0000]])
    """
    size = lam.abs()
    return size / size.sum(-1, keepdim=True)


def _spectrum(problem: Problem, diagonal: Diagonal | Tensor, tilt: bool, tol: float) -> _Spectrum:
    B = problem.dense if tilt else augmented(problem.dense, problem.b)
    d, sdp = _diagonal(B, diagonal, tol)
    lam, vectors = torch.linalg.eigh(B - torch.diag_embed(d))
    size = torch.maximum(lam.detach().abs().amax(-1, keepdim=True), d.abs().amax(-1, keepdim=True))
    null = lam.detach().abs() <= _NULL * size
    if sdp is not None:
        # d is feasible, so what is positive here is rounding.
        null = null | (lam.detach() > 0)
    return _Spectrum(d, torch.where(null, torch.zeros_like(lam), lam), vectors.mT, sdp)


def _diagonal(B: Tensor, diagonal: Diagonal | Tensor, tol: float) -> tuple[Tensor, DiagonalSDP | None]:
    if isinstance(diagonal, Tensor):
        if diagonal.shape != B.shape[:2]:
            raise InputError(f"diagonal must be {tuple(B.shape[:2])}, got {tuple(diagonal.shape)}")
        return diagonal.to(B), None
    match diagonal:
        case "sdp":
            sdp = solve_diagonal(B.detach(), tol=tol)
            return sdp.d, sdp
        case "none":
            return B.new_zeros(B.shape[:2]), None
        case "shift":
            return torch.linalg.eigvalsh(B.detach())[:, -1:].expand(B.shape[:2]), None
        case "tap":
            return tap_diagonal(B), None
        case _:
            raise InputError(f"unknown diagonal '{diagonal}': choose sdp, tap, none, shift or give a tensor")


def _base(problem: Problem, tilt: bool) -> Tensor:
    n_log_2 = problem.b.new_full((problem.models,), problem.n * math.log(2))
    return n_log_2 + log_cosh(problem.b).sum(-1) if tilt else n_log_2


def _certified(
    problem: Problem, spectrum: _Spectrum, tilt: bool, log_factors: Tensor | None, error: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Lower and upper bound of log Z, without the constant; no upper one where some eigenvalue is positive."""
    base = _base(problem, tilt).detach()
    lower = base - rounding_slack(problem, base)
    if tilt:
        # Jensen: E exp(½ xᵀAx) ≥ exp(E ½ xᵀAx) under the product measure.
        mean = torch.tanh(problem.b.detach())
        lower = lower + 0.5 * torch.einsum("mi,mij,mj->m", mean, problem.dense.detach(), mean)
    lam, u = spectrum.lam.detach(), spectrum.u.detach()
    if bool((lam > 0).any()):
        return lower, None
    models, pairs = lam.shape
    crude = base + 0.5 * spectrum.d.sum(-1)
    gain = torch.zeros_like(crude)
    if log_factors is not None and error is not None:
        # All factors are at most one, so the product is at most the smallest.
        gain = torch.minimum(gain, (log_factors.detach() + error).amin(-1))
    weight = holder_weights(lam.where((lam != 0).any(-1, keepdim=True), torch.ones_like(lam)))
    weight = weight.where(lam != 0, torch.zeros_like(lam))
    scaled = torch.where(weight > 0, lam / weight.clamp_min(1e-300), torch.zeros_like(lam))
    field = problem.b.detach()[:, None, :].expand(models, pairs, -1).reshape(models * pairs, -1) if tilt else None
    flat, eigenvalues = u.reshape(models * pairs, -1), scaled.reshape(-1)
    found = log_expectation(flat, eigenvalues, field, engine="quadrature")
    # A bound needs no accuracy far below rounding: what was computed, plus all that rounding can hide.
    above = torch.logaddexp(found.value, quadrature_rounding(flat, eigenvalues).log())
    factor = torch.minimum(above, torch.zeros_like(above)).reshape(models, pairs)
    gain = torch.minimum(gain, (weight * factor).sum(-1))
    return lower, crude + gain + rounding_slack(problem, crude)

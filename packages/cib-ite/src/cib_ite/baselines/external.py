"""Other packages' estimators of effects behind the interface of this one.

`BCF` (Bayesian causal forests, Hahn, Murray & Carvalho 2020, arXiv:1706.09523) is the sampler of ``stochtree``,
`CausalForest` (Athey, Tibshirani & Wager 2019, arXiv:1610.01271, after double machine learning) that of ``econml``,
`CEVAE` (Louizos et al. 2017, arXiv:1705.08821) that of ``pyro``. Each package is imported by `fit` only; where it is
absent, the error names the extra that installs it.

`EXTERNAL` makes each by name from a seed.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import StratifiedKFold

from cib_ite.baselines.classical import EffectEstimator, LogisticPropensity, Outcome
from shared_core.device import seeded
from shared_core.errors import InputError, not_installed

__all__ = ["BCF", "CEVAE", "EXTERNAL", "CausalForest"]

Vector = NDArray[np.float64]
_PREDICT_ELEMENTS = 1 << 24


def _import(module: str, *, method: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        root = module.partition(".")[0]
        # A package that is there and lacks one of its own is broken, not absent.
        if error.name is None or error.name.partition(".")[0] != root:
            raise
        raise not_installed(method, root, f"cib-ite[{extra}]") from error


@contextmanager
def _quiet(name: str) -> Generator[None]:
    """Silence what a logger only informs of: a package that prints so would spoil machine-read output."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _level(alpha: float) -> float:
    if not 0 < alpha < 1:
        raise InputError(f"alpha is {alpha:g}; it must lie in (0, 1), 0.05 is a 95 % interval")
    return alpha


def _seed(random_state: int | None) -> int:
    return int(np.random.default_rng(random_state).integers(0, 2**31 - 1))


class BCF(EffectEstimator):
    """Bayesian causal forest: the posterior of prognostic and effect forests, by ``stochtree``.

    The propensity that the prognostic forest sees comes from logistic regressions: for the rows at fit, one that has
    not seen the row; for others, the mean over folds. A binary outcome gets a probit link, and effects are differences
    of probabilities.

    Parameters
    ----------
    num_gfr : int, default 10
        Grow-from-root sweeps that warm the chain up.
    num_mcmc : int, default 100
        Draws kept.
    num_trees_prognostic, num_trees_effect : int, default 250 and 100
        Trees of the two forests.
    propensity_folds : int, default 5
        Folds of the propensity.
    outcome : {"auto", "continuous", "binary"}, default "auto"
        "auto" takes an outcome of only 0 and 1 as binary.
    random_state : int, optional
        Same seed, same draws.
    """

    def __init__(
        self,
        num_gfr: int = 10,
        num_mcmc: int = 100,
        *,
        num_trees_prognostic: int = 250,
        num_trees_effect: int = 100,
        propensity_folds: int = 5,
        outcome: Outcome = "auto",
        random_state: int | None = None,
    ) -> None:
        self.num_gfr = num_gfr
        self.num_mcmc = num_mcmc
        self.num_trees_prognostic = num_trees_prognostic
        self.num_trees_effect = num_trees_effect
        self.propensity_folds = propensity_folds
        self.outcome = outcome
        self.random_state = random_state

    def _fit(self, X: Vector, arm: NDArray[np.int64], y: Vector) -> None:
        stochtree = _import("stochtree", method="bcf", extra="bcf")
        smaller = int(np.bincount(arm).min())
        if not 2 <= self.propensity_folds <= smaller:
            raise InputError(f"propensity_folds is {self.propensity_folds}; choose from 2 to {smaller}")
        seed = _seed(self.random_state)
        score = np.empty(len(X))
        self._propensities: list[LogisticPropensity] = []
        folds = StratifiedKFold(self.propensity_folds, shuffle=True, random_state=seed)
        for fit, held_out in folds.split(X, arm):
            self._propensities.append(LogisticPropensity(X[fit], arm[fit]))
            score[held_out] = self._propensities[-1](X[held_out])
        general: dict[str, Any] = {"random_seed": seed, "num_threads": 1}
        if self._binary:
            general |= {
                "outcome_model": stochtree.OutcomeModel(outcome="binary", link="probit"),
                # Fixed under a probit link; said here, it is not warned about.
                "sample_sigma2_global": False,
            }
        model = stochtree.BCFModel()
        model.sample(
            X_train=X,
            Z_train=arm.astype(np.float64),
            y_train=y,
            propensity_train=score,
            num_gfr=self.num_gfr,
            num_mcmc=self.num_mcmc,
            general_params=general,
            prognostic_forest_params={"num_trees": self.num_trees_prognostic},
            treatment_effect_forest_params={"num_trees": self.num_trees_effect},
        )
        self.model_ = model

    def _draws(self, X: Vector) -> tuple[Vector, Vector]:
        score = np.mean([propensity(X) for propensity in self._propensities], axis=0)
        scale = "probability" if self._binary else "linear"

        def under(arm: float) -> Vector:
            given = np.full(len(X), arm)
            draws = self.model_.predict(X, given, score, type="posterior", terms="y_hat", scale=scale)
            return np.asarray(draws, dtype=np.float64).reshape(len(X), -1)

        return under(0.0), under(1.0)

    def _outcomes(self, X: Vector) -> Vector:
        return np.column_stack([draws.mean(axis=1) for draws in self._draws(X)])

    def effect_draws(self, X: ArrayLike) -> Vector:
        """Return draws of the effect from its posterior.

        Parameters
        ----------
        X : array or data frame of shape (n, p)
            The columns seen at fit.

        Returns
        -------
        ndarray of shape (n, num_mcmc)
        """
        control, treated = self._draws(self._checked(X))
        return treated - control

    def effect_std(self, X: ArrayLike) -> Vector:
        """Return the posterior standard deviation of the effect.

        Parameters
        ----------
        X : array or data frame of shape (n, p)
            The columns seen at fit.

        Returns
        -------
        ndarray of shape (n,)
        """
        return self.effect_draws(X).std(axis=1)

    def effect_interval(self, X: ArrayLike, alpha: float = 0.05) -> tuple[Vector, Vector]:
        """Return the central posterior interval of the effect.

        Parameters
        ----------
        X : array or data frame of shape (n, p)
            The columns seen at fit.
        alpha : float, default 0.05
            Probability left outside, half on each side.

        Returns
        -------
        lower, upper : ndarrays of shape (n,)
        """
        tail = _level(alpha) / 2
        lower, upper = np.quantile(self.effect_draws(X), [tail, 1 - tail], axis=1)
        return lower, upper


class CausalForest(EffectEstimator):
    """Honest causal forest on residuals, by ``econml.dml.CausalForestDML``.

    Parameters
    ----------
    n_estimators : int, default 400
        Trees; a multiple of 4.
    min_samples_leaf : int, default 5
        Smallest leaf.
    max_samples : float, default 0.45
        Share of the rows in each tree's subsample, below 0.5 for intervals to hold.
    cv : int, default 3
        Folds of the nuisances (which econml chooses among linear models and forests).
    outcome : {"auto", "continuous", "binary"}, default "auto"
        "auto" takes an outcome of only 0 and 1 as binary.
    n_jobs : int, default 1
        Processes.
    random_state : int, optional
        Same seed, same forest.

    Notes
    -----
    The forest estimates effects alone. `predict_outcomes` puts them on the outcome and treatment models within:
    ``mu0 = m - e tau`` and ``mu1 = m + (1 - e) tau``, clipped to [0, 1] for a binary outcome, which `effect` never is.
    """

    def __init__(
        self,
        n_estimators: int = 400,
        *,
        min_samples_leaf: int = 5,
        max_samples: float = 0.45,
        cv: int = 3,
        outcome: Outcome = "auto",
        n_jobs: int = 1,
        random_state: int | None = None,
    ) -> None:
        self.n_estimators = n_estimators
        self.min_samples_leaf = min_samples_leaf
        self.max_samples = max_samples
        self.cv = cv
        self.outcome = outcome
        self.n_jobs = n_jobs
        self.random_state = random_state

    def _fit(self, X: Vector, arm: NDArray[np.int64], y: Vector) -> None:
        dml = _import("econml.dml", method="causal-forest", extra="forests")
        if self.n_estimators < 4 or self.n_estimators % 4:
            raise InputError(f"n_estimators is {self.n_estimators}; it must be a multiple of 4")
        model = dml.CausalForestDML(
            discrete_treatment=True,
            discrete_outcome=self._binary,
            n_estimators=self.n_estimators,
            min_samples_leaf=self.min_samples_leaf,
            max_samples=self.max_samples,
            cv=self.cv,
            n_jobs=self.n_jobs,
            random_state=_seed(self.random_state),
        )
        with warnings.catch_warnings():
            # What econml asks of scikit-learn in words that will change.
            warnings.simplefilter("ignore", FutureWarning)
            model.fit(y, arm, X=X)
        self.model_ = model

    def _effect(self, X: Vector) -> Vector:
        return np.asarray(self.model_.effect(X), dtype=np.float64).ravel()

    def _outcomes(self, X: Vector) -> Vector:
        def mean_of(models: list[list[Any]], probability: bool) -> Vector:
            found = [
                model.predict_proba(X)[:, 1] if probability else np.ravel(model.predict(X))
                for repeat in models
                for model in repeat
            ]
            return np.mean(found, axis=0)

        mean, score = mean_of(self.model_.models_y, self._binary), mean_of(self.model_.models_t, True)
        effect = self._effect(X)
        outcomes = np.column_stack([mean - score * effect, mean + (1 - score) * effect])
        return outcomes.clip(0, 1) if self._binary else outcomes

    def effect_std(self, X: ArrayLike) -> Vector:
        """Return the standard error of the effect, by the bootstrap of little bags.

        Parameters
        ----------
        X : array or data frame of shape (n, p)
            The columns seen at fit.

        Returns
        -------
        ndarray of shape (n,)
        """
        inference = self.model_.effect_inference(self._checked(X))
        return np.asarray(inference.stderr, dtype=np.float64).ravel()

    def effect_interval(self, X: ArrayLike, alpha: float = 0.05) -> tuple[Vector, Vector]:
        """Return the normal interval of the effect.

        Parameters
        ----------
        X : array or data frame of shape (n, p)
            The columns seen at fit.
        alpha : float, default 0.05
            Probability left outside, half on each side.

        Returns
        -------
        lower, upper : ndarrays of shape (n,)
        """
        lower, upper = self.model_.effect_interval(self._checked(X), alpha=_level(alpha))
        return np.ravel(lower), np.ravel(upper)


class CEVAE(EffectEstimator):
    """Causal effect variational autoencoder, by ``pyro.contrib.cevae``.

    Defaults are those of the ``causalml`` package. A continuous outcome is standardised first.

    Parameters
    ----------
    latent_dim, hidden_dim, num_layers : int, default 20, 200 and 3
        Sizes of the networks.
    num_epochs : int, default 50
        Passes over the data.
    batch_size : int, default 100
        Rows a step.
    learning_rate, learning_rate_decay, weight_decay : float, default 1e-3, 0.1 and 1e-4
        Of the optimiser; the rate falls to ``learning_rate * learning_rate_decay``.
    num_samples : int, default 1000
        Draws of the latent confounder for a prediction.
    outcome_dist : {"studentt", "normal", "laplace"}, default "studentt"
        Of a continuous outcome; a binary one is Bernoulli.
    outcome : {"auto", "continuous", "binary"}, default "auto"
        "auto" takes an outcome of only 0 and 1 as binary.
    random_state : int, optional
        Same seed, same network and same draws.

    Notes
    -----
    Predictions average over draws of the guide's t, y and z. The ``ite`` of ``pyro`` draws t and y once a row, however
    many z it draws: the same in expectation, with noise that ``num_samples`` does not lower.
    """

    def __init__(
        self,
        latent_dim: int = 20,
        hidden_dim: int = 200,
        num_layers: int = 3,
        *,
        num_epochs: int = 50,
        batch_size: int = 100,
        learning_rate: float = 1e-3,
        learning_rate_decay: float = 0.1,
        weight_decay: float = 1e-4,
        num_samples: int = 1000,
        outcome_dist: Literal["studentt", "normal", "laplace"] = "studentt",
        outcome: Outcome = "auto",
        random_state: int | None = None,
    ) -> None:
        self.latent_dim = latent_dim
        self.hidden_dim = hidden_dim
        self.num_layers = num_layers
        self.num_epochs = num_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.learning_rate_decay = learning_rate_decay
        self.weight_decay = weight_decay
        self.num_samples = num_samples
        self.outcome_dist: Literal["studentt", "normal", "laplace"] = outcome_dist
        self.outcome = outcome
        self.random_state = random_state

    def _fit(self, X: Vector, arm: NDArray[np.int64], y: Vector) -> None:
        cevae = _import("pyro.contrib.cevae", method="cevae", extra="cevae")
        pyro = importlib.import_module("pyro")
        import torch

        self._seed = _seed(self.random_state)
        self._center, self._scale = (0.0, 1.0) if self._binary else (float(y.mean()), float(y.std()))
        rows = [torch.as_tensor(part, dtype=torch.float32) for part in (X, arm, (y - self._center) / self._scale)]
        # Neither torch's generator nor pyro's store of parameters is left changed, nor shared with another fit.
        with seeded(self._seed), pyro.get_param_store().scope(), _quiet(cevae.__name__):
            model = cevae.CEVAE(
                feature_dim=X.shape[1],
                outcome_dist="bernoulli" if self._binary else self.outcome_dist,
                latent_dim=self.latent_dim,
                hidden_dim=self.hidden_dim,
                num_layers=self.num_layers,
                num_samples=self.num_samples,
            )
            self.losses_ = model.fit(
                *rows,
                num_epochs=self.num_epochs,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                learning_rate_decay=self.learning_rate_decay,
                weight_decay=self.weight_decay,
                log_every=0,
            )
        self.model_ = model

    def _outcomes(self, X: Vector) -> Vector:
        import torch

        model, guide = self.model_.model, self.model_.guide
        block = max(1, _PREDICT_ELEMENTS // (len(X) * self.hidden_dim))
        total = np.zeros((len(X), 2))
        with torch.no_grad(), seeded(self._seed):
            table = self.model_.whiten(torch.as_tensor(X, dtype=torch.float32))
            for start in range(0, self.num_samples, block):
                # Both arms from the same draws of z, which the guide makes by way of its own t and y.
                x = table.expand(min(block, self.num_samples - start), *table.shape)
                t = guide.t_dist(x).sample()
                z = guide.z_dist(guide.y_dist(t, x).sample(), t, x).sample()
                for a, head in enumerate((model.y0_nn, model.y1_nn)):
                    total[:, a] += head.make_dist(*head(z)).mean.double().sum(0).numpy()
        return self._center + self._scale * total / self.num_samples


EXTERNAL: Mapping[str, Callable[[int], EffectEstimator]] = {
    "bcf": lambda seed: BCF(random_state=seed),
    "causal-forest": lambda seed: CausalForest(random_state=seed),
    "cevae": lambda seed: CEVAE(random_state=seed),
}

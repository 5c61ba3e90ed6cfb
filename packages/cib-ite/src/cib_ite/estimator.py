"""The estimator: fit, effects, intervals, decisions, and saving, in scikit-learn's manner."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Bool, Float, Int64
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from cib_ite.calibration import Conformal, check_alpha, effect_inflation, normal_quantile
from cib_ite.inference import Posterior, Variance, draw_latent, draw_posterior, total_variance
from cib_ite.inputs import OverlapWarning, Preprocessor, as_outcome, as_treatment, unpack
from cib_ite.network import CIBStack
from cib_ite.overlap import Overlap, fit_overlap
from cib_ite.settings import PRESETS, Independence, Likelihood, Settings
from cib_ite.training import HYPERPARAMETERS, Check, Member, Rows, Trained, Trainer, train_shared
from shared_core.device import World, resolve_device
from shared_core.errors import DAMAGE, InputError, no_such

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CIB", "Calibration", "EffectInference", "Problem", "fit_many"]

_FORMAT = 1
# What each living estimator was last asked about; outside of it, since predicting must not change an estimator.
_LAST: WeakKeyDictionary[CIB, tuple[tuple[CIBStack, int, int], np.ndarray, Posterior]] = WeakKeyDictionary()
_SETTING_NAMES = tuple(field.name for field in fields(Settings))
Decision = Literal["treat", "control", "defer"]


@dataclass(frozen=True, eq=False)
class EffectInference:
    """Everything the model says about the effect on each of n rows.

    Parameters
    ----------
    effect : (n,) estimate of ``mu_1(x) - mu_0(x)``, in the units of the outcome
    std : (n,) its standard deviation, calibrated
    lower, upper : (n,) interval of the conditional average effect
    ite_lower, ite_upper : (n,) interval of the individual difference ``Y(1) - Y(0)``; infinite where overlap is poor
    alpha : share of misses the intervals allow
    parts : variances ``representation``, ``model`` (uncalibrated) and ``noise``, (n,) each
    uncertainty : (n,) the score to rank rows by: how far the estimate is likely to be off
    rate : (n,) ``KL(q(z|x) || N(0, I))`` in nats
    rate_percentile : (n,) percentile of the rate among training rows, 0..100
    propensity : (n,) probability of treatment
    support : (n,) share of the forest's neighbourhoods of a row in which both arms occur
    no_overlap, unusual : (n,) flags: nobody to compare with; unlike any training row
    """

    effect: Float[np.ndarray, " n"]
    std: Float[np.ndarray, " n"]
    lower: Float[np.ndarray, " n"]
    upper: Float[np.ndarray, " n"]
    ite_lower: Float[np.ndarray, " n"]
    ite_upper: Float[np.ndarray, " n"]
    alpha: float
    parts: Mapping[str, Float[np.ndarray, " n"]]
    uncertainty: Float[np.ndarray, " n"]
    rate: Float[np.ndarray, " n"]
    rate_percentile: Float[np.ndarray, " n"]
    propensity: Float[np.ndarray, " n"]
    support: Float[np.ndarray, " n"]
    no_overlap: Bool[np.ndarray, " n"]
    unusual: Bool[np.ndarray, " n"]

    def to_frame(self) -> pd.DataFrame:
        """One row a unit, one column a quantity."""
        import pandas as pd

        columns: dict[str, Any] = {
            name: getattr(self, name) for name in ("effect", "std", "lower", "upper", "ite_lower", "ite_upper")
        }
        columns |= {f"var_{name}": values for name, values in self.parts.items()}
        rest = ("uncertainty", "rate", "rate_percentile", "propensity", "support", "no_overlap", "unusual")
        return pd.DataFrame(columns | {name: getattr(self, name) for name in rest})


@dataclass(frozen=True, eq=False)
class Calibration:
    """What held-out rows said about the model; positions refer to the rows given to ``fit``.

    Parameters
    ----------
    inflation : factor on the standard deviation of effects, at least 1
    conformal : scores of both arms
    rows : (k,) positions of the held-out rows
    outcome : (2, k) their predicted outcomes, by members that had not seen them
    effect, std : (k,) their effects and calibrated standard deviations
    pseudo_effect : (k,) doubly robust (AIPW) effects
    doubt : (k,) ascending: how doubtful the sign of each training effect is, 0..1
    rate : (101,) percentiles of the training rows' rate
    uncertainty : (101,) percentiles of the training rows' uncertainty score
    """

    inflation: float
    conformal: Conformal
    rows: Int64[np.ndarray, " k"]
    outcome: Float[np.ndarray, "2 k"]
    effect: Float[np.ndarray, " k"]
    std: Float[np.ndarray, " k"]
    pseudo_effect: Float[np.ndarray, " k"]
    rate: Float[np.ndarray, " q"]
    uncertainty: Float[np.ndarray, " q"]

    def to_tree(self) -> dict[str, Any]:
        """Everything as arrays and plain values."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "conformal"}
        return plain | {"conformal": self.conformal.to_tree()}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Calibration:
        """Rebuild what :meth:`to_tree` gave."""
        plain: dict[str, Any] = dict(tree)
        plain["conformal"] = Conformal.from_tree(tree["conformal"])
        return cls(**plain)


@dataclass(frozen=True, eq=False)
class Problem:
    """Arguments of one ``fit``.

    Parameters
    ----------
    X : (n, p) covariates
    treatment : (n,) two values
    y : (n,) outcomes
    X_unlabeled : (m, p) rows without treatment and outcome, or None
    sample_weight : (n,) or None
    """

    X: Any
    treatment: Any
    y: Any
    X_unlabeled: Any = None
    sample_weight: Any = None


class CIB(TransformerMixin, BaseEstimator):
    """Causal information bottleneck: effects of a binary treatment for individuals, with calibrated uncertainty.

    An encoder makes of the covariates a stochastic representation z; two heads predict the outcome without and with
    treatment from the same z. Training keeps little of x in z (`beta`), nothing that tells the treatment (`gamma`),
    and predictions steady in the arm in which a unit was not seen (`lam`). Several members are trained at once, each
    holding out a fifth of the rows; what they say about rows they did not see calibrates the intervals.

    After Kim, Baek, Hwang and Yang, arXiv:1906.03118. The paper's exact losses were not available: these are
    reconstructed from its abstract and the works it cites.

    Parameters
    ----------
    outcome : ``auto`` takes an outcome of 0 and 1 for binary; effects are then differences of probabilities
    beta : weight of the compression term, in nats of ``KL(q(z|x) || N(0, I))``; the decisive parameter
    gamma : weight of the independence term
    lam : weight of the variance of the counterfactual prediction
    independence : confusion, adversarial, mmd-lin, mmd-rbf, wass, mi-gauss or none
    likelihood : gaussian (a noise scale for each arm), hetero (for each z), mse
    n_members : networks in the ensemble
    interval : how ``target="ite"`` intervals are calibrated: ``conformal`` on the rows each member held out, ``split``
        on a quarter of the rows that no member sees (this is what the theorem is about), ``none`` fits nothing but the
        networks: effects only, for searches
    trunk, heads, discriminator : hidden widths
    latent : dimensions of z
    deterministic, normalize : z is the trunk's output (TARNet, CFR), scaled to unit length (CFR)
    reweight : let both arms count alike in the loss
    head_l2, trunk_l2 : weight decay, as a factor on half the squared weights
    dropout_trunk, dropout_head : for a deterministic z; predictions are then averaged over dropout masks
    samples, predict_samples : draws of z in training and prediction
    batch_size, steps, lr, patience : training; patience counts validations, one in 25 steps
    warmup : share of the steps in which beta, gamma and lam rise from 0
    disc_steps : discriminator steps for each step of the model
    dragon, targeted : weights of DragonNet's losses
    balance_share : treated share that mmd and wass assume; None takes the data's
    bootstrap : train each member on rows drawn with replacement
    allow_missing : accept NaN in X: the column's mean is filled in, and a column "is missing" added
    control_name : which value of the treatment is the control, where it is not 0/1
    overlap_bounds : propensities outside are flagged
    device : auto, cpu, cuda, cuda:N or mps
    random_state : seed of everything random

    Attributes
    ----------
    stack_ : the members' networks
    settings_ : how they were trained
    calibration_ : what held-out rows said
    overlap_ : the propensity model
    history_ : losses at each validation
    outcome_ : continuous or binary
    n_features_in_, feature_names_in_ : as in scikit-learn

    Examples
    --------
    >>> random = np.random.default_rng(0)
    >>> X, t = random.normal(size=(300, 3)), random.integers(0, 2, 300)
    >>> y = X[:, 0] + t * (1 + X[:, 1]) + 0.1 * random.normal(size=300)
    >>> model = CIB(n_members=2, steps=300, random_state=0).fit(X, t, y)
    >>> model.effect(X).shape, [bound.shape for bound in model.effect_interval(X)]
    ((300,), [(300,), (300,)])
    """

    n_features_in_: int
    feature_names_in_: np.ndarray

    def __init__(
        self,
        *,
        outcome: Literal["auto", "continuous", "binary"] = "auto",
        beta: float = 0.1,
        gamma: float = 0.1,
        lam: float = 1e-2,
        independence: Independence = "confusion",
        likelihood: Likelihood = "gaussian",
        n_members: int = 5,
        interval: Literal["conformal", "split", "none"] = "conformal",
        trunk: Sequence[int] = (64, 64),
        heads: Sequence[int] = (64, 64),
        discriminator: Sequence[int] = (64,),
        latent: int = 20,
        deterministic: bool = False,
        normalize: bool = False,
        reweight: bool = True,
        head_l2: float = 1e-2,
        trunk_l2: float = 1e-2,
        dropout_trunk: float = 0.0,
        dropout_head: float = 0.0,
        samples: int = 2,
        predict_samples: int = 200,
        batch_size: int = 100,
        steps: int = 2000,
        lr: float = 2e-3,
        patience: int = 12,
        warmup: float = 0.1,
        disc_steps: int = 1,
        dragon: float = 0.0,
        targeted: float = 0.0,
        balance_share: float | None = None,
        bootstrap: bool = False,
        allow_missing: bool = False,
        control_name: object = None,
        overlap_bounds: tuple[float, float] = (0.05, 0.95),
        device: str = "auto",
        random_state: int = 0,
    ) -> None:
        self.outcome = outcome
        self.beta = beta
        self.gamma = gamma
        self.lam = lam
        self.independence = independence
        self.likelihood = likelihood
        self.n_members = n_members
        self.interval = interval
        self.trunk = trunk
        self.heads = heads
        self.discriminator = discriminator
        self.latent = latent
        self.deterministic = deterministic
        self.normalize = normalize
        self.reweight = reweight
        self.head_l2 = head_l2
        self.trunk_l2 = trunk_l2
        self.dropout_trunk = dropout_trunk
        self.dropout_head = dropout_head
        self.samples = samples
        self.predict_samples = predict_samples
        self.batch_size = batch_size
        self.steps = steps
        self.lr = lr
        self.patience = patience
        self.warmup = warmup
        self.disc_steps = disc_steps
        self.dragon = dragon
        self.targeted = targeted
        self.balance_share = balance_share
        self.bootstrap = bootstrap
        self.allow_missing = allow_missing
        self.control_name = control_name
        self.overlap_bounds = overlap_bounds
        self.device = device
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = bool(self.allow_missing)
        tags.target_tags.required = True
        return tags

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> CIB:
        """Make an estimator of a named kind.

        Parameters
        ----------
        name : ``paper`` (one member, adversary), ``vib`` (only the bottleneck), ``tarnet``, ``cfr-wass``, ``cfr-mmd``,
            ``dragonnet``, ``mc-dropout``
        changes : parameters that replace the preset's

        Examples
        --------
        >>> CIB.from_preset("tarnet", steps=100).deterministic
        True
        """
        if name not in PRESETS:
            raise no_such("preset", name, PRESETS)
        return cls(**{**PRESETS[name], **changes})

    # ---- fitting

    def fit(
        self,
        X: ArrayLike,
        treatment: ArrayLike,
        y: ArrayLike | None = None,
        *,
        X_unlabeled: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        on_check: Callable[[Check], None] | None = None,
        resume: Mapping[str, Any] | None = None,
        on_state: Callable[[dict[str, Any]], None] | None = None,
        world: World | None = None,
    ) -> CIB:
        """Learn from observed treatments and outcomes.

        Parameters
        ----------
        X : (n, p) covariates, a DataFrame or an array
        treatment : (n,) 0/1, or two values with ``control_name``; or ``pack(treatment, y)`` of shape (n, 2) with no `y`
        y : (n,) outcomes
        X_unlabeled : (m, p) rows of which neither treatment nor outcome is known
        sample_weight : (n,) weights >= 0 of the rows in the loss
        on_check : called after each validation
        resume : a state that `on_state` was given, to go on from
        on_state : called now and then with everything needed to resume
        world : processes that train together, from :func:`shared_core.device.process_group`: each trains its part of
            the members, and all end with the same model

        Raises
        ------
        InputError
            With one line that says what is wrong with which argument.
        """
        problem = Problem(X, treatment, y, X_unlabeled, sample_weight)
        fit_many([self], [problem], on_check=on_check, resume=resume, on_state=on_state, world=world)
        return self

    def _settings(self) -> Settings:
        plain = {name: value for name, value in self.get_params(deep=False).items() if name in _SETTING_NAMES}
        for name in ("trunk", "heads", "discriminator"):
            plain[name] = tuple(plain[name])
        return Settings(**plain)

    def _prepare(self, problem: Problem) -> tuple[Rows, list[Member]]:
        """Check the arguments, fit everything that is not a network, and lay the work out."""
        if self.n_members < 1:
            raise InputError(f"n_members: must be at least 1, got {self.n_members}")
        if self.interval not in ("conformal", "split", "none"):
            raise InputError(f"interval: must be conformal, split or none, got {self.interval!r}")
        low, high = self.overlap_bounds
        if not 0 <= low < high <= 1:
            raise InputError(f"overlap_bounds: need 0 <= low < high <= 1, got {self.overlap_bounds}")
        raw_treatment, raw_y = unpack(problem.treatment, problem.y)
        X = self._check_table(problem.X, reset=True)
        t, (control, treated) = as_treatment(raw_treatment, len(X), control=self.control_name, y=raw_y)
        y, binary = as_outcome(raw_y, t, cast("Any", self.outcome))
        self.treatment_values_ = (control, treated)
        self.outcome_ = "binary" if binary else "continuous"
        weight = _weights(problem.sample_weight, len(X))
        self.preprocessor_ = Preprocessor.fit(X, allow_missing=self.allow_missing)
        x = self.preprocessor_.transform(X)
        unlabeled = None
        if problem.X_unlabeled is not None:
            unlabeled = self.preprocessor_.transform(
                self._check_table(problem.X_unlabeled, reset=False, name="X_unlabeled")
            )
        random = np.random.default_rng([int(self.random_state), 1])
        fitting = np.arange(len(X))
        if self.interval == "split":
            part = _fold_numbers(t, y if binary else None, 4, random)
            fitting = np.flatnonzero(part != 0)
        self._held = np.setdiff1d(np.arange(len(X)), fitting)
        members: list[Member] = []
        fold = np.zeros(len(fitting), dtype=np.int64)
        for j in range(self.n_members):
            if j % 5 == 0:
                fold = _fold_numbers(t[fitting], y[fitting] if binary else None, 5, random)
            seed = int(np.random.default_rng([int(self.random_state), 2, j]).integers(1 << 40))
            members.append(
                Member(0, seed, fitting[fold != j % 5], fitting[fold == j % 5], bootstrap=self.bootstrap)
            )  # fmt: skip
        # Of the training part only, so that held-out rows stay what they are.
        self.y_mean_, self.y_scale_ = (0.0, 1.0) if binary else (float(y[fitting].mean()), float(y[fitting].std()))
        if self.interval != "none":
            self.overlap_ = fit_overlap(
                x[fitting], t[fitting], bounds=(float(low), float(high)), seed=int(self.random_state)
            )
            self._warn_of_overlap()
        self._problem = (x, t, y, weight)
        rows = Rows(x, t, (y - self.y_mean_) / self.y_scale_, weight, unlabeled)
        return rows, members

    def _warn_of_overlap(self) -> None:
        if self.overlap_.auc > 0.95:
            warnings.warn(
                f"the covariates tell the treatment almost surely (AUC {self.overlap_.auc:.3f}):"
                f" {self.overlap_.flagged:.0%} of the rows"
                " have hardly anyone to compare with in the other arm; their effects are extrapolations",
                OverlapWarning,
                stacklevel=4,
            )

    def _finish(
        self, stack: CIBStack, settings: Settings, members: Sequence[Member], trained: Trained, first: int
    ) -> None:
        """Take the members' networks and calibrate on what each had not seen."""
        self.stack_, self.settings_ = stack, settings
        chosen = range(first, first + len(members))
        self.history_ = _history(trained.history, chosen)
        self.validation_loss_ = trained.loss[first : first + len(members)]
        x, t, y, weight = self._problem
        if settings.likelihood == "mse" and self.outcome_ == "continuous":
            self._set_noise(members)
        if self.interval == "none":
            del self._held, self._problem
            return
        everything = draw_posterior(
            stack, x, binary=self.outcome_ == "binary", samples=self.predict_samples, seed=int(self.random_state)
        )
        held = np.zeros((len(members), len(x)), dtype=bool)
        for j, member in enumerate(members):
            held[j, member.validation] = True
        held[:, self._held] = True
        rows = self._held if self.interval == "split" else np.flatnonzero(held.any(0))
        self.calibration_ = self._calibrate(everything, held, rows, t, y, weight)
        if self.collapsed():
            warnings.warn(
                f"the bottleneck has collapsed (mean rate {self.calibration_.rate.mean():.3f} nats): all effects come"
                " out alike; lower beta",
                UserWarning,
                stacklevel=4,
            )
        del self._held, self._problem

    def _set_noise(self, members: Sequence[Member]) -> None:
        """Give members that learned by least squares the noise scale that is most likely given their fit."""
        x, t, y, _ = self._problem
        fitted = draw_posterior(self.stack_, x, binary=False, samples=self.predict_samples, seed=int(self.random_state))
        residual = (y - self.y_mean_) / self.y_scale_ - fitted.outcome[:, t, np.arange(len(t))]
        for j, member in enumerate(members):
            for arm in (0, 1):
                own = residual[j, member.train[t[member.train] == arm]]
                self.stack_.log_sigma.data[j, arm] = float(np.log(np.sqrt(np.mean(own**2)) + 1e-3))

    def collapsed(self) -> bool:
        """Whether the representation keeps next to nothing of the covariates (under 0.05 nats)."""
        return not self.deterministic and float(self._calibrated().rate.mean()) < 0.05

    def _calibrate(
        self,
        posterior: Posterior,
        held: Bool[np.ndarray, "members n"],
        rows: Int64[np.ndarray, " k"],
        t: Int64[np.ndarray, " n"],
        y: Float[np.ndarray, " n"],
        weight: Float[np.ndarray, " n"],
    ) -> Calibration:
        scale = self.y_scale_
        share = held[:, rows] / held[:, rows].sum(0)
        outcome = self.y_mean_ + scale * np.einsum("mak,mk->ak", posterior.outcome[:, :, rows], share)
        effect = scale * np.einsum("mk,mk->k", posterior.effect[:, rows], share)
        spread = self._outcome_scale(posterior)[:, rows]
        treated, y_rows = t[rows], y[rows]
        # Rows of a split calibration part took no part in the propensity; the others have theirs out of fold.
        known = self.overlap_.training
        e = known[rows] if len(known) == len(t) else self.overlap_.propensity(self._problem[0][rows])
        parts = self._parts(posterior)
        squared = np.square(y - (self.y_mean_ + scale * posterior.outcome[:, t, np.arange(len(t))])) * weight
        trained_part, held_part = (
            (squared[:, t == 0][kind[:, t == 0]], squared[:, t == 1][kind[:, t == 1]]) for kind in (~held, held)
        )
        inflation = effect_inflation(trained_part, held_part, float(parts.total.mean()))
        conformal = Conformal.fit(y_rows, treated, outcome, spread, e)
        clipped = np.clip(e, 0.02, 0.98)
        residual = np.where(
            treated == 1, (y_rows - outcome[1]) / clipped, -(y_rows - outcome[0]) / (1 - clipped)
        )  # fmt: skip
        std = inflation * np.sqrt(parts.total)
        rate = posterior.rate.mean(0)
        grid = np.linspace(0, 100, 101)
        return Calibration(
            inflation=inflation,
            conformal=conformal,
            rows=rows,
            outcome=outcome,
            effect=effect,
            std=std[rows],
            pseudo_effect=effect + residual,
            rate=np.percentile(rate, grid),
            uncertainty=np.percentile(self._score(std, rate), grid),
        )

    # ---- predicting

    def _check_table(self, X: Any, *, reset: bool, name: str = "X") -> Float[np.ndarray, "n p"]:
        if not reset and hasattr(self, "feature_names_in_") and hasattr(X, "columns"):
            _check_columns(list(map(str, X.columns)), [str(c) for c in self.feature_names_in_], name)
            X = X[list(self.feature_names_in_)]
        elif hasattr(X, "columns"):
            columns = [str(c) for c in X.columns]
            if len(set(columns)) < len(columns):
                twice = next(c for c in columns if columns.count(c) > 1)
                raise InputError(f"{name}: column '{twice}' occurs twice; rename or drop one")
        if hasattr(X, "columns"):
            _check_numeric(X, name)
        found: Any = validate_data(self, X, reset=reset, dtype=np.float64, ensure_all_finite=False)
        checked = cast("np.ndarray", found)
        names = [str(c) for c in getattr(self, "feature_names_in_", [])] or [f"x{i}" for i in range(checked.shape[1])]
        if reset:
            nothing = np.zeros(0)
            Preprocessor(nothing, nothing, nothing, nothing.astype(bool), self.allow_missing).check(checked, names)
        else:
            self.preprocessor_.check(checked, names)
        return checked

    def _calibrated(self) -> Calibration:
        check_is_fitted(self, "stack_")
        if not hasattr(self, "calibration_"):
            raise InputError("this model was fitted with interval='none': it has effects only; fit it with 'conformal'")
        return self.calibration_

    def _posterior(self, X: ArrayLike) -> tuple[Posterior, Float[np.ndarray, "n q"]]:
        check_is_fitted(self, "stack_")
        x = self.preprocessor_.transform(self._check_table(X, reset=False))
        # Effects, intervals and decisions are usually asked for the same rows one after another.
        asked = (self.stack_, self.predict_samples, self.random_state)
        known = _LAST.get(self)
        if known is not None and known[0] == asked and np.array_equal(known[1], x):
            return known[2], x
        made = draw_posterior(
            self.stack_, x, binary=self.outcome_ == "binary", samples=self.predict_samples, seed=int(self.random_state)
        )
        _LAST[self] = (asked, x, made)
        return made, x

    def _parts(self, posterior: Posterior) -> Variance:
        """Variance of effects by its sources, uncalibrated, in squared units of the outcome."""
        found, square = total_variance(posterior.effect, posterior.effect_variance), self.y_scale_**2
        return Variance(square * found.representation, square * found.model)

    def _outcome_variance(self, posterior: Posterior) -> Float[np.ndarray, "2 n"]:
        """Variance of each arm's mean outcome over members and z, in squared units of the outcome."""
        parts = [total_variance(posterior.outcome[:, a], posterior.outcome_variance[:, a]).total for a in (0, 1)]
        return np.stack(parts) * self.y_scale_**2

    def _outcome_scale(self, posterior: Posterior) -> Float[np.ndarray, "2 n"]:
        """Add noise and uncertainty of the mean: the standard deviation of each arm's outcome itself."""
        noise = np.mean(np.square(posterior.noise), axis=0) * self.y_scale_**2
        return np.sqrt(np.maximum(noise + self._outcome_variance(posterior), 1e-12))

    def _score(self, std: Float[np.ndarray, " n"], rate: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Rank rows by how far their estimate is likely to be off."""
        return std * np.sqrt(np.maximum(rate, 1e-6)) if not self.deterministic else std

    def effect(self, X: ArrayLike) -> Float[np.ndarray, " n"]:
        """Estimate the effect on each row, ``mu_1(x) - mu_0(x)``, ``(n,)`` in units of the outcome.

        This is the conditional average effect: the individual difference ``Y(1) - Y(0)`` also has noise that no
        covariate tells, which only ``effect_interval(target="ite")`` covers.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        """
        posterior, _ = self._posterior(X)
        return posterior.effect.mean(0) * self.y_scale_

    predict = effect

    def predict_outcomes(self, X: ArrayLike) -> Float[np.ndarray, "n 2"]:
        """Return expected outcomes (probabilities, if binary) without and with treatment, ``(n, 2)``.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        """
        posterior, _ = self._posterior(X)
        return (self.y_mean_ + self.y_scale_ * posterior.outcome.mean(0)).T

    def effect_std(self, X: ArrayLike) -> Float[np.ndarray, " n"]:
        """Calibrated standard deviation of the effect, ``(n,)``.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        """
        inflation = self._calibrated().inflation
        posterior, _ = self._posterior(X)
        return inflation * np.sqrt(self._parts(posterior).total)

    def uncertainty(self, X: ArrayLike) -> Float[np.ndarray, " n"]:
        """Score by which to rank or withhold rows, ``(n,)``: the standard deviation times the root of the rate.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        """
        return self.effect_inference(X).uncertainty

    def effect_interval(
        self,
        X: ArrayLike,
        alpha: float = 0.1,
        *,
        target: Literal["cate", "ite"] = "cate",
        noise: Literal["independent", "worst"] = "independent",
        method: Literal["auto", "model", "conformal"] = "auto",
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Lower and upper bounds of the effect of each row, ``(n,)`` each.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        alpha : share of misses allowed, in (0, 1)
        target : ``cate``, the effect expected for such a row (approximate, no guarantee), or ``ite``, the difference
            ``Y(1) - Y(0)`` of the individual
        noise : for ``ite`` by the model: noise of the two arms ``independent``, or the ``worst`` case; not identified
        method : ``model`` is normal, ``conformal`` only for ``ite``; auto picks conformal there
        """
        check_alpha(alpha)
        if target not in ("cate", "ite"):
            raise InputError(f"target: must be cate or ite, got {target!r}")
        if method == "conformal" and target == "cate":
            raise InputError(
                "method: conformal intervals are for target='ite'; the conditional effect is never observed"
            )
        calibration = self._calibrated()
        posterior, x = self._posterior(X)
        if target == "ite" and method != "model":
            return self._conformal_interval(posterior, self.overlap_.propensity(x), alpha)
        centre = posterior.effect.mean(0) * self.y_scale_
        variance = calibration.inflation**2 * self._parts(posterior).total
        if target == "ite":
            sd = self.y_scale_ * np.sqrt(np.mean(np.square(posterior.noise), axis=0))
            variance = variance + (sd.sum(0) ** 2 if noise == "worst" else np.square(sd).sum(0))
        half = normal_quantile(alpha) * np.sqrt(variance)
        return self._bounded(centre - half, centre + half)

    def outcome_interval(
        self, X: ArrayLike, arm: int, alpha: float = 0.1
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Conformal bounds of the outcome itself, ``Y(arm)``, ``(n,)`` each; infinite where overlap is too poor.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        arm : 0, without treatment, or 1, with it
        alpha : share of misses allowed, in (0, 1)
        """
        check_alpha(alpha)
        if arm not in (0, 1):
            raise InputError(f"arm: must be 0 (control) or 1 (treated), got {arm!r}")
        calibration = self._calibrated()
        posterior, x = self._posterior(X)
        mean = self.y_mean_ + self.y_scale_ * posterior.outcome.mean(0)[arm]
        spread = self._outcome_scale(posterior)[arm]
        return calibration.conformal.outcome_interval(arm, mean, spread, self.overlap_.propensity(x), alpha)

    def _bounded(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (np.maximum(low, -1.0), np.minimum(high, 1.0)) if self.outcome_ == "binary" else (low, high)

    def _conformal_interval(
        self, posterior: Posterior, propensity: Float[np.ndarray, " n"], alpha: float
    ) -> tuple[np.ndarray, np.ndarray]:
        outcome = self.y_mean_ + self.y_scale_ * posterior.outcome.mean(0)
        bounds = self.calibration_.conformal.effect_interval(
            outcome, self._outcome_scale(posterior), propensity, alpha
        )  # fmt: skip
        return self._bounded(*bounds)

    def effect_inference(self, X: ArrayLike, alpha: float = 0.1) -> EffectInference:
        """Return all there is to know about each row; see :class:`EffectInference`.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        alpha : share of misses the intervals allow
        """
        check_alpha(alpha)
        scale, calibration = self.y_scale_, self._calibrated()
        posterior, x = self._posterior(X)
        parts = self._parts(posterior)
        effect = posterior.effect.mean(0) * scale
        std = calibration.inflation * np.sqrt(parts.total)
        half = normal_quantile(alpha) * std
        lower, upper = self._bounded(effect - half, effect + half)
        propensity, support, alone = self.overlap_.look(x)
        ite_lower, ite_upper = self._conformal_interval(posterior, propensity, alpha)
        rate = posterior.rate.mean(0)
        noise = np.square(posterior.noise).mean(0).sum(0) * scale**2
        percentile = np.interp(rate, calibration.rate, np.linspace(0, 100, 101))
        return EffectInference(
            effect=effect,
            std=std,
            lower=lower,
            upper=upper,
            ite_lower=ite_lower,
            ite_upper=ite_upper,
            alpha=alpha,
            parts={"representation": parts.representation, "model": parts.model, "noise": noise},
            uncertainty=self._score(std, rate),
            rate=rate,
            rate_percentile=percentile,
            propensity=propensity,
            support=support,
            no_overlap=alone,
            unusual=rate > calibration.rate[-1] if not self.deterministic else np.zeros(len(rate), dtype=bool),
        )

    def transform(self, X: ArrayLike) -> Float[np.ndarray, "n d"]:
        """Return ``E[z|x]`` of all members side by side, ``(n, members * latent)``.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        """
        posterior, _ = self._posterior(X)
        return np.concatenate(list(posterior.latent), axis=1)

    def sample_latent(self, X: ArrayLike, *, seed: int = 0) -> Float[np.ndarray, "members n d"]:
        """Draw one z of each row from every member's q(z|x), ``(members, n, latent)``; ``I(Z;T)`` is about these.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        seed : of the draw
        """
        check_is_fitted(self, "stack_")
        x = self.preprocessor_.transform(self._check_table(X, reset=False))
        return draw_latent(self.stack_, x, seed=seed)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the columns of :meth:`transform`: ``cib0, cib1, ...``.

        Parameters
        ----------
        input_features : ignored; scikit-learn passes it
        """
        del input_features
        check_is_fitted(self, "stack_")
        width = self.settings_.trunk[-1] if self.deterministic else self.settings_.latent
        return np.array([f"cib{k}" for k in range(self.stack_.size * width)], dtype=object)

    def mean_rate(self, X: ArrayLike) -> float:
        """Mean ``KL(q(z|x) || N(0, I))`` over rows and members, in nats: an upper bound on ``I(Z;X)``.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        """
        return float(self._posterior(X)[0].rate.mean())

    # ---- averages and decisions

    def ate(self, X: ArrayLike) -> float:
        """Average effect over these rows.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        """
        return float(self.effect(X).mean())

    def ate_interval(self, X: ArrayLike | None = None, alpha: float = 0.05) -> tuple[float, float]:
        """Interval of the average effect.

        Without `X`: of the population that ``fit`` saw, from doubly robust effects cross-fitted on the held-out rows,
        asymptotically valid if one of outcome and propensity is right. With `X`: around the mean of its effects, with
        that standard error and the ensemble's disagreement about the mean.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``, or None
        alpha : share of misses allowed
        """
        check_alpha(alpha)
        pseudo = self._calibrated().pseudo_effect
        variance = float(pseudo.var(ddof=1) / len(pseudo))
        centre = float(pseudo.mean())
        if X is not None:
            posterior, _ = self._posterior(X)
            means = posterior.effect.mean(1) * self.y_scale_
            centre = float(means.mean())
            variance += float(means.var(ddof=1)) if len(means) > 1 else 0.0
        half = normal_quantile(alpha) * float(np.sqrt(variance))
        return centre - half, centre + half

    def group_effects(self, groups: ArrayLike, alpha: float = 0.05) -> pd.DataFrame:
        """Average effect in groups of the training rows, doubly robust, with intervals.

        Parameters
        ----------
        groups : (n,) a label for each row given to ``fit``
        alpha : share of misses allowed
        """
        import pandas as pd

        check_alpha(alpha)
        calibration, labels = self._calibrated(), np.asarray(groups)
        pseudo, rows = calibration.pseudo_effect, calibration.rows
        if len(labels) <= int(rows.max()):
            raise InputError(f"groups: {len(labels)} labels; give one for each row that fit saw")
        z = normal_quantile(alpha)
        lines: list[dict[str, Any]] = []
        for label in np.unique(labels[rows]):
            inside = pseudo[labels[rows] == label]
            half = z * float(inside.std(ddof=1) / np.sqrt(len(inside))) if len(inside) > 1 else np.inf
            mean = float(inside.mean())
            lines.append({"group": label, "n": len(inside), "effect": mean, "lower": mean - half, "upper": mean + half})
        return pd.DataFrame(lines)

    def decide(
        self,
        X: ArrayLike,
        cost: float = 0.0,
        max_defer: float = 0.2,
        *,
        rule: Literal["doubt", "interval"] = "doubt",
        alpha: float = 0.1,
        defer_flagged: bool = True,
    ) -> np.ndarray:
        """Treat, do not treat, or leave it to a person: ``(n,)`` of "treat", "control", "defer".

        Rows whose effect exceeds `cost` are treated, the others not. Deferred are rows without overlap and rows unlike
        any seen in training, and

        * ``rule="doubt"``: rows more doubtful than all but a share `max_defer` of the training rows, doubt being the
          probability that the effect is on the other side of `cost`; on rows like those of training about `max_defer`
          are deferred for doubt, on stranger rows more;
        * ``rule="interval"``: rows whose individual (conformal) interval at `alpha` contains `cost`; rows decided
          wrongly for the individual are then at most a share `alpha` of all rows, marginally.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        cost : of treating, in units of the outcome; use a negative outcome's sign accordingly
        max_defer : share of training-like rows deferred for doubt, in [0, 1]
        rule : see above
        alpha : of ``rule="interval"``
        defer_flagged : defer rows without overlap and unusual rows
        """
        if not 0 <= max_defer <= 1:
            raise InputError(f"max_defer: must be a share in [0, 1], got {max_defer}")
        if rule not in ("doubt", "interval"):
            raise InputError(f"rule: must be doubt or interval, got {rule!r}")
        found = self.effect_inference(X, alpha)
        decision = np.where(found.effect > cost, "treat", "control").astype("<U7")
        if rule == "interval":
            waits = (found.ite_lower <= cost) & (found.ite_upper >= cost)
        else:
            calibration = self.calibration_
            known = doubt(calibration.effect, calibration.std, cost)
            doubtful = doubt(found.effect, found.std, cost)
            # At the ends the quantile is a training row's own doubt, which new rows may pass.
            waits = doubtful > (
                np.inf if max_defer == 0 else -1 if max_defer == 1 else np.quantile(known, 1 - max_defer)
            )
        decision[waits | ((found.no_overlap | found.unusual) & defer_flagged)] = "defer"
        return decision

    def score(self, X: ArrayLike, treatment: ArrayLike, y: ArrayLike | None = None) -> float:
        """Return minus the R-loss (Nie and Wager, 2021), which needs no true effect: higher is better.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        treatment : (n,), or ``pack(treatment, y)`` with no `y`
        y : (n,) outcomes
        """
        from cib_ite.metrics import cross_fit_nuisances, tau_risk_r

        effect = self.effect(X)
        raw_treatment, raw_y = unpack(treatment, y)
        t, _ = as_treatment(raw_treatment, len(effect), control=self.treatment_values_[0], y=raw_y)
        outcome = np.asarray(raw_y, dtype=np.float64)
        x = self.preprocessor_.transform(self._check_table(X, reset=False))
        found = cross_fit_nuisances(x, t, outcome, outcome=cast("Any", self.outcome_), seed=int(self.random_state))
        return -tau_risk_r(effect, t, outcome, found.outcome_mean, found.propensity)

    # ---- saving

    def save(self, path: str | Path) -> None:
        """Write the fitted estimator to one safetensors file; no pickle is involved.

        Parameters
        ----------
        path : file to write, e.g. ``model.safetensors``. It holds no covariates of training rows, but held-out
            predictions and propensities of theirs.
        """
        from shared_core.runs import save_tree

        self._calibrated()
        parameters = self.get_params(deep=False)
        tree: dict[str, Any] = {
            "cib_ite": _FORMAT,
            "parameters": json.dumps(parameters, default=_plain),
            "settings": json.dumps(self.settings_.to_json()),
            "treatment_values": json.dumps(list(self.treatment_values_), default=_plain),
            "outcome": self.outcome_,
            "y": [self.y_mean_, self.y_scale_],
            "inputs": int(self.n_features_in_),
            "names": [str(c) for c in getattr(self, "feature_names_in_", [])],
            "preprocessor": {field.name: getattr(self.preprocessor_, field.name) for field in fields(Preprocessor)},
            "overlap": self.overlap_.to_tree(),
            "calibration": self.calibration_.to_tree(),
            "weights": {name: p.detach() for name, p in self.stack_.named_parameters()},
            "validation_loss": self.validation_loss_,
            "history": json.dumps(self.history_),
        }
        save_tree(path, tree)

    @classmethod
    def load(cls, path: str | Path) -> CIB:
        """Read what :meth:`save` wrote.

        Parameters
        ----------
        path : the file

        Raises
        ------
        InputError
            When it is missing, damaged, or something else.
        """
        from shared_core.runs import load_tree

        tree = load_tree(path)
        if not isinstance(tree, dict) or "cib_ite" not in tree:
            raise InputError(f"{path} is not a model of cib-ite; give the file that CIB.save wrote")
        tree = cast("dict[str, Any]", tree)
        try:
            parameters = json.loads(tree["parameters"])
            for name in ("trunk", "heads", "discriminator", "overlap_bounds"):
                parameters[name] = tuple(parameters[name])
            made = cls(**parameters)
            made.settings_ = Settings.of(json.loads(tree["settings"]))
            control, treated = json.loads(tree["treatment_values"])
            made.treatment_values_ = (control, treated)
            made.outcome_ = tree["outcome"]
            made.y_mean_, made.y_scale_ = (float(v) for v in tree["y"])
            made.n_features_in_ = tree["inputs"]
            if tree["names"]:
                made.feature_names_in_ = np.array(tree["names"], dtype=object)
            made.preprocessor_ = Preprocessor(**tree["preprocessor"])
            made.overlap_ = Overlap.from_tree(tree["overlap"])
            made.calibration_ = Calibration.from_tree(tree["calibration"])
            made.validation_loss_ = np.asarray(tree["validation_loss"])
            made.history_ = json.loads(tree["history"])
            weights = tree["weights"]
            stack = CIBStack(
                weights["encoder.weights.0"].shape[1], made.settings_, seeds=[0] * len(weights["log_sigma"])
            )
            stack.load_state_dict(weights)
            made.stack_ = stack.requires_grad_(False)
        except DAMAGE as error:
            raise InputError(f"{path} was written by another version of cib-ite, or it is damaged ({error})") from error
        return made


def doubt(effect: Float[np.ndarray, " n"], std: Float[np.ndarray, " n"], cost: float = 0.0) -> Float[np.ndarray, " n"]:
    """Probability, under a normal distribution, that the true effect lies on the other side of `cost`.

    Parameters
    ----------
    effect, std : ``(n,)`` estimates and their standard deviations
    cost : where treating stops to pay

    Examples
    --------
    >>> doubt(np.array([0.0, 2.0]), np.array([1.0, 1.0])).round(3)
    array([0.5  , 0.023])
    """
    from scipy.stats import norm

    return norm.sf(np.abs(effect - cost) / np.maximum(std, 1e-12))


def fit_many(
    estimators: Sequence[CIB],
    problems: Sequence[Problem],
    *,
    on_check: Callable[[Check], None] | None = None,
    resume: Mapping[str, Any] | None = None,
    on_state: Callable[[dict[str, Any]], None] | None = None,
    state_every: int = 10,
    world: World | None = None,
) -> list[CIB]:
    """Fit several estimators, each to its own data, as one batched program.

    They must agree in everything about the networks and their training save ``beta, gamma, lam, head_l2, trunk_l2``,
    and their data in the number of covariates. Each comes out as if it had been fitted alone.

    Parameters
    ----------
    estimators : unfitted; they are fitted in place
    problems : arguments of ``fit`` for each
    on_check : called after each validation
    resume : a state that `on_state` was given
    on_state : called with everything needed to resume, every `state_every` validations
    state_every : see `on_state`
    world : processes that share the members, as in :meth:`CIB.fit`

    Examples
    --------
    >>> random = np.random.default_rng(0)
    >>> X, t = random.normal(size=(200, 2)), random.integers(0, 2, 200)
    >>> data = [Problem(X, t, X[:, 0] + k * t + random.normal(size=200)) for k in range(2)]
    >>> first, second = fit_many([CIB(n_members=1, steps=100), CIB(n_members=1, steps=100)], data)
    >>> bool(second.ate(X) > first.ate(X))
    True
    """
    if len(estimators) != len(problems) or not estimators:
        raise InputError(f"fit_many: {len(estimators)} estimators for {len(problems)} problems; need one for each")
    settings = [estimator._settings() for estimator in estimators]  # pyright: ignore[reportPrivateUsage]
    common = {name: getattr(settings[0], name) for name in HYPERPARAMETERS}
    for other in settings[1:]:
        if replace(other, **common) != settings[0]:
            raise InputError("fit_many: estimators may differ in beta, gamma, lam, head_l2 and trunk_l2 only")
    data: list[Rows] = []
    members: list[Member] = []
    for place, (estimator, problem) in enumerate(zip(estimators, problems, strict=True)):
        rows, own = estimator._prepare(problem)  # pyright: ignore[reportPrivateUsage]
        data.append(rows)
        hyper = {name: float(getattr(settings[place], name)) for name in common}
        members += [replace(member, data=place, hyper=hyper) for member in own]
    binary = {estimator.outcome_ for estimator in estimators}
    if len(binary) > 1:
        raise InputError("fit_many: continuous and binary outcomes cannot train together")
    device = resolve_device(estimators[0].device)
    # A stack's options must hold for its members with the largest weight of each term.
    largest = {name: max(getattr(s, name) for s in settings) for name in common}
    world = world or World()
    if world.size > len(members):
        raise InputError(f"{world.size} processes cannot share {len(members)} networks; start {len(members)} at most")
    part = world.shard(len(members))
    how: dict[str, Any] = {"binary": binary == {"binary"}, "device": device, "first": part.start}
    trainer = Trainer(data, members[part], replace(settings[0], **largest), **how)
    if resume is not None:
        trainer.load_state(_part_of_state(resume, world))

    def after(check: Check) -> None:
        if on_check is not None:
            on_check(check)
        if world.size == 1 and on_state is not None and (check.step // settings[0].eval_every) % state_every == 0:
            on_state(trainer.state())

    if world.size > 1:
        more: dict[str, Any] = {"on_check": after, "on_state": on_state, "state_every": state_every}
        trained = train_shared(trainer, world, len(members), **more)
    else:
        trainer.on_check = after
        trained = trainer.run()
    first = 0
    for place, estimator in enumerate(estimators):
        own = [member for member in members if member.data == place]
        stack = trained.part(first, len(own))
        estimator._finish(stack, settings[place], own, trained, first)  # pyright: ignore[reportPrivateUsage]
        first += len(own)
    return list(estimators)


def _part_of_state(state: Mapping[str, Any], world: World) -> Mapping[str, Any]:
    parts = state.get("parts", [state])
    if len(parts) != world.size:
        raise InputError(
            f"training was interrupted with {len(parts)} processes and goes on with as many, not with {world.size}"
        )
    return parts[world.rank]


def _history(checks: Sequence[Check], members: range) -> list[dict[str, float]]:
    """Means over an estimator's live members at each validation."""
    lines: list[dict[str, float]] = []
    for check in checks:
        places = [place for place, member in enumerate(check.members) if member in members]
        if places:
            line = {"step": float(check.step), "validation": float(np.mean([check.validation[p] for p in places]))}
            line |= {name: float(np.mean([values[p] for p in places])) for name, values in check.terms.items()}
            lines.append(line)
    return lines


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"cannot save a parameter of type {type(value).__name__}")


def _weights(weight: Any, rows: int) -> Float[np.ndarray, " n"]:
    if weight is None:
        return np.ones(rows)
    values = np.asarray(weight, dtype=np.float64).ravel()
    if len(values) != rows:
        raise InputError(f"sample_weight: has {len(values)} rows and X has {rows}; they must match row by row")
    if not np.isfinite(values).all() or values.min() < 0 or values.sum() == 0:
        raise InputError("sample_weight: must be finite, >= 0 and not all zero")
    return values / values.mean()


def _fold_numbers(
    t: Int64[np.ndarray, " n"], y: Float[np.ndarray, " n"] | None, folds: int, random: np.random.Generator
) -> Int64[np.ndarray, " n"]:
    """Deal rows into folds so that each has its part of every arm (and of both outcomes, if binary)."""
    strata = t if y is None else 2 * t + y.astype(np.int64)
    fold = np.zeros(len(t), dtype=np.int64)
    start = 0
    for stratum in np.unique(strata):
        rows = random.permutation(np.flatnonzero(strata == stratum))
        # Where one stratum stops dealing the next goes on, so that folds stay equal.
        fold[rows] = (start + np.arange(len(rows))) % folds
        start += len(rows)
    return fold


def _check_columns(given: list[str], wanted: list[str], name: str) -> None:
    if missing := [column for column in wanted if column not in given]:
        raise InputError(f"{name}: column '{missing[0]}' is missing, which the model was trained on")
    if len(set(given)) < len(given):
        twice = next(column for column in given if given.count(column) > 1)
        raise InputError(f"{name}: column '{twice}' occurs twice; rename or drop one")
    if extra := [column for column in given if column not in wanted]:
        raise InputError(
            f"{name}: column '{extra[0]}' was not there in training; give the {len(wanted)} columns of fit"
        )


def _check_numeric(X: Any, name: str) -> None:
    for column in X.columns:
        kind = X[column].dtype
        if getattr(kind, "kind", "O") not in "fiub":
            value = next((v for v in X[column].tolist() if v is not None), None)
            raise InputError(
                f"{name}: column '{column}' holds {value!r}, which is no number; encode it, e.g. by pandas.get_dummies"
            )

"""Who could have been treated at all: cross-fitted propensities, and rows that have nobody like them in one arm.

Two views, because one is not enough. A logistic regression is smooth and calibrated; a random forest sees corners of
the covariate space, hidden in interactions, in which everybody got the same treatment. Both are stored as plain arrays,
so that a saved model needs no pickle and holds no training row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

__all__ = ["ForestArrays", "Overlap", "auc", "fit_overlap"]

_TREES = 100
_C_GRID = (0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True, eq=False)
class ForestArrays:
    """A forest of classification trees as arrays: node k goes left where ``x[feature[k]] <= threshold[k]``.

    Parameters
    ----------
    feature : (nodes,) -1 at leaves
    threshold : (nodes,)
    left, right : (nodes,) positions of the children
    value : (nodes,) treated share of the training rows that came there
    pure : (nodes,) 1.0 where they were all of one arm
    roots : (trees,) positions of the roots
    """

    feature: Int64[np.ndarray, " nodes"]
    threshold: Float[np.ndarray, " nodes"]
    left: Int64[np.ndarray, " nodes"]
    right: Int64[np.ndarray, " nodes"]
    value: Float[np.ndarray, " nodes"]
    pure: Float[np.ndarray, " nodes"]
    roots: Int64[np.ndarray, " trees"]

    @classmethod
    def of(cls, forest: Any) -> ForestArrays:
        """Take the trees of a fitted scikit-learn forest of two classes."""
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ("feature", "threshold", "left", "right", "value")}
        roots: list[int] = []
        start = 0
        for member in forest.estimators_:
            tree = member.tree_
            roots.append(start)
            leaf = tree.children_left < 0
            parts["feature"].append(np.where(leaf, -1, tree.feature))
            parts["threshold"].append(tree.threshold)
            parts["left"].append(np.where(leaf, 0, tree.children_left + start))
            parts["right"].append(np.where(leaf, 0, tree.children_right + start))
            counts = tree.value[:, 0, :]
            parts["value"].append(counts[:, 1] / counts.sum(axis=1))
            start += tree.node_count
        joined = {name: np.concatenate(values) for name, values in parts.items()}
        integers = {name: joined[name].astype(np.int64) for name in ("feature", "left", "right")}
        numbers = {name: joined[name].astype(np.float64) for name in ("threshold", "value")}
        numbers["pure"] = ((numbers["value"] <= 0) | (numbers["value"] >= 1)).astype(np.float64)
        return cls(**integers, **numbers, roots=np.array(roots, dtype=np.int64))

    def predict(self, x: Float[np.ndarray, "n p"]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Treated share in a row's leaves, and the share of its leaves in which everybody is of one arm, ``(n,)`` each.

        Parameters
        ----------
        x : ``(n, p)`` standardised rows
        """
        # The trees compare single-precision values, as scikit-learn does.
        x = x.astype(np.float32).astype(np.float64)
        share, pure = np.zeros(len(x)), np.zeros(len(x))
        row = np.arange(len(x))
        for root in self.roots:
            node = np.full(len(x), root)
            while True:
                feature = self.feature[node]
                inner = feature >= 0
                if not inner.any():
                    break
                goes_left = x[row, np.maximum(feature, 0)] <= self.threshold[node]
                node = np.where(inner, np.where(goes_left, self.left[node], self.right[node]), node)
            share += self.value[node]
            pure += self.pure[node]
        return share / len(self.roots), pure / len(self.roots)


@dataclass(frozen=True, eq=False)
class Overlap:
    """Propensity of being treated, and support in both arms, for any row.

    Parameters
    ----------
    coefficients : (p + 1,) logistic regression on standardised covariates, the constant last
    forest : the forest's trees
    weight : share of the forest in the propensity, chosen by out-of-fold log loss
    share : treated share of the training rows
    bounds : propensities outside are flagged
    training : (n,) out-of-fold propensity of the training rows
    flagged : share of the training rows without overlap
    auc : of the out-of-fold propensity
    """

    coefficients: Float[np.ndarray, " q"]
    forest: ForestArrays
    weight: float
    share: float
    bounds: tuple[float, float]
    training: Float[np.ndarray, " n"]
    flagged: float
    auc: float

    def look(
        self, x: Float[np.ndarray, "n p"]
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Propensity, support and whether overlap is lacking, ``(n,)`` each.

        Support is the share of a row's leaves in which both arms occur. A leaf holds so many training rows that one arm
        is hardly missing from it by chance; where it is missing from most of them, nobody like the row was seen in it,
        whatever a smooth propensity says.

        Parameters
        ----------
        x : ``(n, p)`` standardised rows
        """
        share, pure = self.forest.predict(x)
        propensity = (1 - self.weight) * self._logistic(x) + self.weight * share
        low, high = self.bounds
        return propensity, 1 - pure, (propensity < low) | (propensity > high) | (pure > 0.5)

    def propensity(self, x: Float[np.ndarray, "n p"]) -> Float[np.ndarray, " n"]:
        """Probability of treatment, ``(n,)``.

        Parameters
        ----------
        x : ``(n, p)`` standardised rows
        """
        return self.look(x)[0]

    def _logistic(self, x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-np.clip(x @ self.coefficients[:-1] + self.coefficients[-1], -30, 30)))

    def to_tree(self) -> dict[str, Any]:
        """Everything as arrays and plain values."""
        forest = self.forest
        return {
            "coefficients": self.coefficients,
            "forest": {
                name: getattr(forest, name)
                for name in ("feature", "threshold", "left", "right", "value", "pure", "roots")
            },
            "weight": self.weight,
            "share": self.share,
            "bounds": list(self.bounds),
            "training": self.training,
            "flagged": self.flagged,
            "auc": self.auc,
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Overlap:
        """Rebuild what :meth:`to_tree` gave."""
        rest = {key: value for key, value in tree.items() if key not in {"forest", "bounds"}}
        low, high = tree["bounds"]
        return cls(forest=ForestArrays(**tree["forest"]), bounds=(float(low), float(high)), **rest)


def auc(score: Float[np.ndarray, " n"], positive: Int64[np.ndarray, " n"]) -> float:
    """Area under the ROC curve, ties counting half; 0.5 where one class is missing.

    Examples
    --------
    >>> auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
    0.75
    """
    from scipy.stats import rankdata

    ones = int(positive.sum())
    if ones == 0 or ones == len(positive):
        return 0.5
    ranks = rankdata(score)
    return float((ranks[positive == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(positive) - ones)))


def _log_loss(p: np.ndarray, t: np.ndarray) -> float:
    p = np.clip(p, 1e-4, 1 - 1e-4)
    return float(-np.mean(np.where(t == 1, np.log(p), np.log(1 - p))))


def fit_overlap(
    x: Float[np.ndarray, "n p"],
    treatment: Int64[np.ndarray, " n"],
    *,
    folds: int = 5,
    bounds: tuple[float, float] = (0.05, 0.95),
    seed: int = 0,
) -> Overlap:
    """Fit the propensity model by cross-fitting.

    Parameters
    ----------
    x : ``(n, p)`` standardised covariates
    treatment : ``(n,)`` 0 or 1
    folds : of the logistic regression; the forest uses its out-of-bag trees
    bounds : propensities outside are flagged
    seed : of folds and forest

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(400, 3))
    >>> t = (np.random.default_rng(1).random(400) < 1 / (1 + np.exp(-2 * x[:, 0]))).astype(np.int64)
    >>> bool(fit_overlap(x, t).auc > 0.75)
    True
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    folds = int(max(2, min(folds, np.bincount(treatment, minlength=2).min())))
    parts = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, treatment))
    out = {c: np.zeros(len(x)) for c in _C_GRID}
    for train, test in parts:
        for c in _C_GRID:
            fitted = LogisticRegression(C=c, max_iter=500).fit(x[train], treatment[train])
            out[c][test] = fitted.predict_proba(x[test])[:, 1]
    best = min(_C_GRID, key=lambda c: _log_loss(out[c], treatment))
    final: Any = LogisticRegression(C=best, max_iter=500).fit(x, treatment)
    # So large that an arm is missing from a leaf by chance in one of 250, and at a propensity of 5 % in about half.
    rarer = min(treatment.mean(), 1 - treatment.mean())
    leaf = int(max(10, min(np.ceil(np.log(4e-3) / np.log(1 - rarer)), len(x) // 10)))
    make: Any = RandomForestClassifier
    forest = make(_TREES, min_samples_leaf=leaf, max_features=0.5, oob_score=True, random_state=seed, n_jobs=1)
    forest.fit(x, treatment)
    bagged = np.nan_to_num(np.asarray(forest.oob_decision_function_)[:, 1], nan=float(treatment.mean()))
    grid = np.linspace(0, 1, 11)
    weight = float(min(grid, key=lambda w: _log_loss((1 - w) * out[best] + w * bagged, treatment)))
    blended = (1 - weight) * out[best] + weight * bagged
    made = Overlap(
        coefficients=np.append(final.coef_[0], final.intercept_[0]).astype(np.float64),
        forest=ForestArrays.of(forest),
        weight=weight,
        share=float(treatment.mean()),
        bounds=bounds,
        training=blended,
        flagged=0.0,
        auc=auc(blended, treatment),
    )
    return replace(made, flagged=float(made.look(x)[2].mean()))

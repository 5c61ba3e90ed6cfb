"""Small arrays of every kind of task, and estimators that are fitted to them in a second."""

from __future__ import annotations

import numpy as np

from ial_nap.estimator import NAPClassifier, NAPRegressor

N, T, R = 60, 3, 4
NAMES = ("LDL", "HDL", "age", "ward")
UNITS = ("mg/dL", "mg/dL", "years", "")
STEPS = ("2009", "2010", "2011")
IDS = tuple(f"pid-{k}" for k in range(N))
OPTIONS = {"hidden": 5, "latent": 2, "epochs": 3, "samples": 4, "device": "cpu", "seed": 1}


def arrays(seed=0, n=N):
    """Values in units of their own, real steps, and what is to be predicted."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, T, R)) * [30.0, 10.0, 9.0, 1.0] + [120.0, 50.0, 60.0, 0.0]
    lengths = random.integers(1, T + 1, n)
    lengths[:5] = T
    last = x[np.arange(n), lengths - 1]
    score = (last[:, 0] - 120) / 30 - 0.5 * (last[:, 2] - 60) / 9 + 0.3 * random.logistic(size=n)
    return x, lengths, score


def labels(kind, seed=0, n=N):
    score = arrays(seed, n)[2]
    return {
        "binary": np.where(score > 0, "ill", "well"),
        "multiclass": np.digitize(score, [-0.5, 0.5]) * 10,
        "multilabel": np.stack([score > 0, score > 0.7, score < -0.3], 1).astype(int),
        "regression": 500 + 40 * score,
    }[kind]


def fitted(kind="binary", *, options=None, names=True, **given):
    x, lengths, _ = arrays()
    made = (NAPRegressor if kind == "regression" else NAPClassifier)(**{**OPTIONS, **(options or {})})
    told = {"feature_names": NAMES, "units": UNITS, "step_names": STEPS, "ids": IDS} if names else {}
    return made.fit(x, labels(kind), **{"lengths": lengths, **told, **given})

"""Data to models to metrics: what ``demo``, ``compare`` and ``diagnose`` run.

Every method of a comparison gets the same splits, the same number of candidate settings and the same way to choose
among them: by error on a validation part of the training data. The test part is looked at once. Each repetition goes
through ``run.each``, so that an interrupted comparison repeats only the piece it was in, and workers can share the
pieces.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypedDict, cast

import numpy as np
from jaxtyping import Float, Int64

from shared_core.device import one_thread
from shared_core.errors import InputError, no_such
from shared_core.runs import Claim, Result, Run, interval, summarize
from shared_core.tables import learn_scale
from sparsity_norm.ampute import ampute
from sparsity_norm.audit import VSPReport, vsp_curve, vsp_report
from sparsity_norm.data import Table
from sparsity_norm.factorization import BaselineOnly, BiasedMF, GlobalMean, ItemKNN
from sparsity_norm.impute import METHODS, make_transformer
from sparsity_norm.plots import Curve
from sparsity_norm.ratings import RatingMatrix, split_ratings
from sparsity_norm.recommend import AutoRecRecommender
from sparsity_norm.serving import Recommender

__all__ = [
    "RATING_METHODS",
    "TREE",
    "Diagnosis",
    "OutOfFold",
    "RatingCell",
    "TableCell",
    "compare_ratings",
    "compare_tables",
    "count_correlation",
    "diagnose_predictions",
    "diagnose_ratings",
    "diagnose_table",
    "drift_curve",
    "out_of_fold",
    "rating_cell",
    "table_cell",
    "table_metrics",
    "table_row",
    "tuned_recommender",
]

PAPER = "Yi et al., ICLR 2020"
Mode = Literal["item", "user"]
Model = Literal["network", "linear"]
TREE = "tree"
_MANY_RATINGS = 2_000_000


def _silent(note: str) -> None:
    del note


def count_correlation(count: Float[np.ndarray, " n"], values: Float[np.ndarray, " n"]) -> float:
    """Pearson correlation of `values` with the logarithm of the observed count; 0 where either is constant.

    Parameters
    ----------
    count : (n,) observed entries of each instance
    values : (n,) predictions, or the truth

    Examples
    --------
    >>> round(count_correlation(np.array([1.0, 10.0, 100.0]), np.array([1.0, 2.0, 3.0])), 6)
    1.0
    """
    x, y = np.log(np.maximum(count, 1)), np.asarray(values, dtype=np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


# ---- tables


@dataclass(frozen=True)
class OutOfFold:
    """Predictions for instances that the predicting model was not trained on.

    Parameters
    ----------
    rows : (n,) which instances of the table
    count : (n,) observed entries of each
    scores : (n,) predicted values, or (n, classes) probabilities
    truth : (n,) targets
    setting : what was chosen in the first fold
    seconds : for tuning, training and predicting
    """

    rows: Int64[np.ndarray, " n"]
    count: Float[np.ndarray, " n"]
    scores: Float[np.ndarray, "n ..."]
    truth: Float[np.ndarray, " n"]
    setting: dict[str, Any]
    seconds: float

    @property
    def prediction(self) -> Float[np.ndarray, " n"]:
        """One number an instance: the predicted value, or the probability of the last class of two."""
        return self.scores if self.scores.ndim == 1 else self.scores[:, -1]

    @property
    def target(self) -> Float[np.ndarray, " n"]:
        """What :attr:`prediction` predicts: the value, or whether the instance is of the last class."""
        return self.truth if self.scores.ndim == 1 else (self.truth == self.scores.shape[1] - 1).astype(np.float64)


def out_of_fold(
    table: Table, method: str, *, seed: int, model: Model = "network", folds: int = 1, device: str = "auto"
) -> OutOfFold:
    """Train a method on part of a table and predict the rest.

    Parameters
    ----------
    table : what to learn; NaN is missing
    method : a name in :data:`sparsity_norm.impute.METHODS`, or ``tree`` (gradient boosting with native missing values)
    seed : of the split and of everything random in the model
    model : what follows the method: a network of two hidden layers, or a linear model
    folds : 1 tests on one random fifth, k > 1 on every row once
    device : where networks train

    Raises
    ------
    UnknownKeyError
        For a method that does not exist.
    """
    if method not in METHODS and method != TREE:
        raise no_such("method for tables", method, [*METHODS, TREE])
    started = time.perf_counter()
    rows: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    settings: list[dict[str, Any]] = []
    with one_thread():
        for train, test in _folds(table, folds, seed):
            offset, factor = learn_scale(table.x[train], table.scale)
            x = (table.x - offset) * factor
            predict, setting = _fit_method(method, x[train], table.y[train], table.task, model, seed, device)
            rows.append(test)
            scores.append(predict(x[test]))
            settings.append(setting)
    tested = np.concatenate(rows)
    return OutOfFold(
        rows=tested,
        count=(~np.isnan(table.x[tested])).sum(axis=1).astype(np.float64),
        scores=np.concatenate(scores),
        truth=table.y[tested],
        setting=settings[0],
        seconds=time.perf_counter() - started,
    )


def _folds(table: Table, folds: int, seed: int) -> list[tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " test"]]]:
    from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold

    parts = max(folds, 5)
    if table.groups is not None:
        splitter: Any = GroupKFold(parts, shuffle=True, random_state=seed)
    elif table.task == "classification" and np.unique(table.y, return_counts=True)[1].min() >= parts:
        splitter = StratifiedKFold(parts, shuffle=True, random_state=seed)
    else:
        splitter = KFold(parts, shuffle=True, random_state=seed)
    if len(table.x) < parts or (table.groups is not None and len(np.unique(table.groups)) < parts):
        raise InputError(f"{table.name}: too few rows or groups for {parts} parts; give more data")
    found = [(train, test) for train, test in splitter.split(table.x, table.y, table.groups)]
    return found if folds > 1 else found[:1]


_Predict = Callable[[np.ndarray], np.ndarray]


def _fit_method(
    method: str, x: np.ndarray, y: np.ndarray, task: str, model: Model, seed: int, device: str
) -> tuple[_Predict, dict[str, Any]]:
    if method == TREE:
        return _fit_best(_trees(task, seed), x, y, task, seed, watch=False)
    if model == "linear":
        return _fit_linear(method, x, y, task)
    if METHODS[method].imputer is None:
        return _fit_best(_networks(method, task, seed, device), x, y, task, seed, watch=True)
    # Once for all candidates: on large tables the imputer costs more than the networks.
    imputer = make_transformer(method).fit(x)
    predict, setting = _fit_best(_networks("zero", task, seed, device), imputer.transform(x), y, task, seed, watch=True)
    return lambda rows: predict(imputer.transform(rows)), setting


def _networks(method: str, task: str, seed: int, device: str) -> list[tuple[dict[str, Any], Any]]:
    from sparsity_norm.sklearn import SNClassifier, SNRegressor

    make: Any = SNClassifier if task == "classification" else SNRegressor
    common: dict[str, Any] = {
        "hidden": (64, 64),
        "input": method,
        "lr": 3e-3,
        "batch_size": 128,
        "epochs": 60,
        "early_stopping": True,
        "patience": 8,
        "device": device,
        "random_state": seed,
    }
    settings = [{"weight_decay": decay} for decay in (0.0, 0.1, 1.0)]
    return [(setting, make(**common, **setting)) for setting in settings]


def _trees(task: str, seed: int) -> list[tuple[dict[str, Any], Any]]:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    make: Any = HistGradientBoostingClassifier if task == "classification" else HistGradientBoostingRegressor
    settings = [{"learning_rate": rate} for rate in (0.03, 0.1, 0.3)]
    return [(setting, make(**setting, early_stopping=False, random_state=seed)) for setting in settings]


def _fit_best(
    candidates: list[tuple[dict[str, Any], Any]], x: np.ndarray, y: np.ndarray, task: str, seed: int, *, watch: bool
) -> tuple[_Predict, dict[str, Any]]:
    """Fit every candidate on four fifths of the training rows, keep the one with the smallest error on the last.

    With `watch`, a candidate is stopped by its error on that last fifth as well.
    """
    from sklearn.model_selection import train_test_split

    classify = task == "classification"
    stratify = y if classify and np.unique(y, return_counts=True)[1].min() >= 2 else None
    fit, held = train_test_split(np.arange(len(y)), test_size=0.2, random_state=seed, stratify=stratify)
    best: tuple[float, Any, dict[str, Any]] | None = None
    for setting, estimator in candidates:
        targets = y.astype(np.int64) if classify else y
        if watch:
            estimator.fit(x[fit], targets[fit], validation=(x[held], targets[held]))
        else:
            estimator.fit(x[fit], targets[fit])
        predict = _scorer(estimator, classify, int(y.max()) + 1 if classify else 0)
        error = _log_loss(predict(x[held]), y[held]) if classify else float(np.mean((predict(x[held]) - y[held]) ** 2))
        if best is None or error < best[0]:
            best = error, predict, setting
    assert best is not None
    return best[1], best[2]


def _fit_linear(method: str, x: np.ndarray, y: np.ndarray, task: str) -> tuple[_Predict, dict[str, Any]]:
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    if task == "classification":
        grid = {"C": np.logspace(-3, 3, 7)}
        search: Any = GridSearchCV(LogisticRegression(max_iter=1000), grid, cv=3, scoring="neg_log_loss")
        fitted = make_pipeline(make_transformer(method), search).fit(x, y.astype(np.int64))
        return _scorer(fitted, True, int(y.max()) + 1), {"C": float(search.best_params_["C"])}
    last = RidgeCV(np.logspace(-3, 4, 15))
    fitted = make_pipeline(make_transformer(method), last).fit(x, y)
    return _scorer(fitted, False, 0), {"alpha": float(cast("float", last.alpha_))}


def _scorer(estimator: Any, classify: bool, classes: int) -> _Predict:
    if not classify:
        return lambda x: np.asarray(estimator.predict(x), dtype=np.float64).ravel()

    def probabilities(x: np.ndarray) -> np.ndarray:
        # A class that the training part lacks still has its column.
        full = np.zeros((len(x), classes))
        full[:, np.asarray(estimator.classes_, dtype=np.int64)] = estimator.predict_proba(x)
        return full

    return probabilities


def _log_loss(probability: np.ndarray, y: np.ndarray) -> float:
    of_truth = probability[np.arange(len(y)), y.astype(np.int64)]
    return float(-np.log(np.maximum(of_truth, 1e-12)).mean())


class TableCell(TypedDict):
    """What one method did in one repetition; plain JSON."""

    metrics: dict[str, float]
    correlation: float
    true_correlation: float
    drift: list[list[float]]
    seconds: float
    setting: dict[str, Any]


def table_cell(
    table: Table,
    method: str,
    *,
    seed: int,
    model: Model = "network",
    folds: int = 1,
    rates: tuple[float, float] | None = None,
    device: str = "auto",
) -> TableCell:
    """Remove entries if asked to, train, predict what was held out, and measure.

    Parameters
    ----------
    table, method, model, folds, device : as in :func:`out_of_fold`
    seed : of the removal, the split and the model
    rates : keep each observed entry with the instance's own probability, uniform in this range; None removes nothing
    """
    if rates is not None:
        x, _ = ampute(table.x, *rates, random_state=seed)
        table = Table(table.name, x, table.y, table.task, table.groups, table.scale)
    found = out_of_fold(table, method, seed=seed, model=model, folds=folds, device=device)
    drift = drift_curve(found.prediction, found.count, found.target)
    return {
        "metrics": table_metrics(found, table.task),
        "correlation": count_correlation(found.count, found.prediction),
        "true_correlation": count_correlation(found.count, found.target),
        "drift": [drift.count.tolist(), drift.mean.tolist(), drift.half_width.tolist()],
        "seconds": found.seconds,
        "setting": found.setting,
    }


def drift_curve(
    prediction: Float[np.ndarray, " n"], count: Float[np.ndarray, " n"], truth: Float[np.ndarray, " n"] | None = None
) -> Curve:
    """Mean of prediction minus truth in bins of the observed count (of the prediction itself without truth)."""
    bins = vsp_curve(prediction if truth is None else prediction - truth, count)
    mean = np.array([b.prediction for b in bins])
    high = np.array([b.prediction_high for b in bins])
    return Curve(np.array([b.count_mean for b in bins]), mean, np.nan_to_num(high - mean))


def _mean_curve(cells: Sequence[TableCell]) -> Curve:
    """Average the repetitions' curves, those with as many bins as the first."""
    curves = [np.array(cell["drift"]) for cell in cells if len(cell["drift"][0]) == len(cells[0]["drift"][0])]
    count, mean, half_width = np.mean(curves, axis=0)
    return Curve(count, mean, half_width / np.sqrt(len(curves)))


def table_metrics(found: OutOfFold, task: str) -> dict[str, float]:
    """RMSE of a regression; accuracy in percent, log loss and (two classes) AUROC of a classification."""
    if task == "regression":
        return {"RMSE": float(np.sqrt(np.mean((found.scores - found.truth) ** 2)))}
    metrics = {
        "accuracy": 100 * float(np.mean(found.scores.argmax(axis=1) == found.truth)),
        "log loss": _log_loss(found.scores, found.truth),
    }
    if found.scores.shape[1] == 2 and 0 < found.truth.mean() < 1:
        from sklearn.metrics import roc_auc_score

        metrics["AUROC"] = float(roc_auc_score(found.truth, found.prediction))
    return metrics


def table_row(values: Sequence[float], *, dataset: str, method: str, metric: str, seconds: float = 0.0) -> Result:
    """Make a row of the values that one of :func:`table_metrics`, or a gap of correlations, took."""
    unit = "%" if metric == "accuracy" else "1"
    better = _better(metric)
    return summarize(values, dataset=dataset, method=method, metric=metric, unit=unit, better=better, seconds=seconds)


def _better(metric: str) -> Literal["lower", "higher"]:
    return "higher" if metric in {"accuracy", "AUROC"} else "lower"


def compare_tables(
    run: Run,
    table: Table,
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    model: Model = "network",
    folds: int = 1,
    rates: tuple[float, float] | None = None,
    device: str = "auto",
    advance: Callable[[str], None] = _silent,
) -> tuple[list[Result], list[Claim], dict[str, Curve]]:
    """Compare methods on a table over several repetitions.

    Parameters
    ----------
    run : where finished pieces are kept
    table, model, folds, rates, device : as in :func:`table_cell`
    methods : names in :data:`sparsity_norm.impute.METHODS`, or ``tree``
    seeds : one repetition each; all methods see the same removals and splits
    advance : called with a short note after each piece

    Returns
    -------
    Results, claims, and for each method the mean of prediction minus truth against the observed count.
    """
    fixed: dict[str, Any] = {"model": model, "folds": folds, "rates": rates, "device": device}
    pairs = {
        f"{table.name}/{model}/{folds}/{rates}/{method}/{seed}": (method, seed) for method in methods for seed in seeds
    }
    work = {key: partial(table_cell, table, method, seed=seed, **fixed) for key, (method, seed) in pairs.items()}

    def tell(key: str, cell: TableCell) -> None:
        metric, value = next(iter(cell["metrics"].items()))
        advance(f"{pairs[key][0]}: {metric} {value:.4g}")

    cells: dict[str, list[TableCell]] = {}
    for key, cell in run.each(work, tell).items():
        cells.setdefault(pairs[key][0], []).append(cell)
    results: list[Result] = []
    first = next(iter(cells.values()))[0]
    for metric in [*first["metrics"], "count correlation gap"]:
        for method, found in cells.items():
            values = [_table_metric(cell, metric) for cell in found]
            seconds = sum(cell["seconds"] for cell in found)
            results.append(table_row(values, dataset=table.name, method=method, metric=metric, seconds=seconds))
    curves = {method: _mean_curve(found) for method, found in cells.items()}
    return results, _table_claims(cells, table.name), curves


def _table_metric(cell: TableCell, metric: str) -> float:
    if metric == "count correlation gap":
        return abs(cell["correlation"] - cell["true_correlation"])
    return cell["metrics"][metric]


def _gain_claim(text: str, source: str, gains: Sequence[float]) -> Claim:
    """Hold a mean gain against 0: with several repetitions the paired 95 % interval must lie above it."""
    mean, low, _ = interval(gains)
    return Claim(text=text, source=source, holds=(mean if low is None else low) > 0, value=mean, threshold=0.0)


def _gap_claim(name: str, ours: Sequence[float], rival: Sequence[float]) -> Claim:
    gap, half = float(np.mean(ours)), float(np.mean(rival)) / 2
    return Claim(
        text=f"{name}: sn at least halves zero's dependence of predictions on the count beyond the truth's",
        source=f"{PAPER}, figure 1 (qualitative); the factor is this project's",
        holds=gap <= half,
        value=gap,
        threshold=half,
    )


def _table_claims(cells: Mapping[str, Sequence[TableCell]], name: str) -> list[Claim]:
    def values(method: str, of: str) -> list[float]:
        return [_table_metric(cell, of) for cell in cells[method]]

    metrics = next(iter(cells.values()))[0]["metrics"]
    metric = "AUROC" if "AUROC" in metrics else next(iter(metrics))
    sign = 1.0 if _better(metric) == "higher" else -1.0
    claims: list[Claim] = []
    for ours, rival, source in (
        ("sn", "zero", PAPER),
        ("sn", "mean", "this project: where mean filling is the better choice, this says so"),
        ("sn-center", "mean", "this project"),
    ):
        if {ours, rival} <= set(cells):
            pairs = zip(values(ours, metric), values(rival, metric), strict=True)
            text = f"{name}: {ours} is better than {rival} in {metric}"
            claims.append(_gain_claim(text, source, [sign * (a - b) for a, b in pairs]))
    if {"sn", "zero"} <= set(cells):
        gaps = (values(method, "count correlation gap") for method in ("sn", "zero"))
        claims.append(_gap_claim(name, *gaps))
    return claims


# ---- ratings


@dataclass(frozen=True)
class RatingMethod:
    """A method of the comparison: how to build it, and the five settings it is tuned over."""

    build: Callable[[Mapping[str, Any], Mapping[str, Any]], Recommender]
    settings: Sequence[Mapping[str, Any]]


def _autorec(**fixed: Any) -> RatingMethod:
    def build(setting: Mapping[str, Any], common: Mapping[str, Any]) -> Recommender:
        return AutoRecRecommender(**fixed, **setting, **common)

    return RatingMethod(build, [{"reg": reg} for reg in (1.0, 2.0, 5.0, 10.0, 20.0)])


def _baseline(make: Callable[..., Recommender], settings: Sequence[Mapping[str, Any]]) -> RatingMethod:
    return RatingMethod(lambda setting, _: make(**setting), settings)


RATING_METHODS: dict[str, RatingMethod] = {
    "autorec-sn": _autorec(power=1.0),
    "autorec-zero": _autorec(power=0.0),
    "autorec-sqrt": _autorec(power=0.5),
    "autorec-sn-biases": _autorec(power=1.0, biases=True),
    "autorec-sqrt-biases": _autorec(power=0.5, biases=True),
    "autorec-zero-biases": _autorec(power=0.0, biases=True),
    "global-mean": _baseline(GlobalMean, [{}]),
    "baseline-only": _baseline(
        BaselineOnly,
        [{"reg_user": u, "reg_item": i} for u, i in ((0.5, 0.5), (1.0, 1.0), (2.0, 2.0), (5.0, 5.0), (15.0, 10.0))],
    ),
    "biased-mf": _baseline(
        BiasedMF, [{"rank": r, "reg": s} for r, s in ((20, 0.1), (40, 0.08), (40, 0.1), (40, 0.12), (40, 0.15))]
    ),
    "item-knn": _baseline(ItemKNN, [{"neighbours": k} for k in (10, 20, 40, 80, 160)]),
}


class RatingCell(TypedDict):
    """What one method did on one split; plain JSON."""

    rmse: float
    mae: float
    correlation: float
    true_correlation: float
    seconds: float
    setting: dict[str, Any]


def rating_cell(
    ratings: RatingMatrix, method: str, *, seed: int, mode: Mode = "item", options: Mapping[str, Any] | None = None
) -> RatingCell:
    """Split, tune on validation ratings, train on all training ratings, test once.

    Parameters
    ----------
    ratings : all ratings; 10 % become the test part, 10 % of the rest the validation part
    method : a name in :data:`RATING_METHODS`
    seed : of the split and of everything random in the method
    mode : whether items or users are the instances of AutoRec; also whose counts predictions are correlated with
    options : hidden, lr, batch_size, epochs, device of AutoRec

    Raises
    ------
    UnknownKeyError
        For a method that does not exist.
    """
    started = time.perf_counter()
    model, test, setting = tuned_recommender(ratings, method, seed=seed, mode=mode, options=options)
    seconds = time.perf_counter() - started
    found = model.evaluate(test)
    counts, predicted, true = _instance_means(model, test, mode)
    return {
        "rmse": found.rmse,
        "mae": found.mae,
        "correlation": count_correlation(counts, predicted),
        "true_correlation": count_correlation(counts, true),
        "seconds": seconds,
        "setting": setting,
    }


def tuned_recommender(
    ratings: RatingMatrix, method: str, *, seed: int, mode: Mode = "item", options: Mapping[str, Any] | None = None
) -> tuple[Recommender, RatingMatrix, dict[str, Any]]:
    """Hold out a test part, choose a setting on validation ratings, and train on all that is left.

    Parameters are those of :func:`rating_cell`; returns the fitted recommender, the test part and the setting chosen.
    """
    with one_thread(len(ratings) < _MANY_RATINGS):
        return _tuned_recommender(ratings, method, seed=seed, mode=mode, options=options)


def _tuned_recommender(
    ratings: RatingMatrix, method: str, *, seed: int, mode: Mode, options: Mapping[str, Any] | None
) -> tuple[Recommender, RatingMatrix, dict[str, Any]]:
    if method not in RATING_METHODS:
        raise no_such("method for ratings", method, RATING_METHODS)
    candidates = RATING_METHODS[method]
    train, test = split_ratings(ratings, test_fraction=0.1, seed=seed)
    fit_part, validation_part = split_ratings(train, test_fraction=0.1, seed=seed)
    common = {"mode": mode, "random_state": seed, **(options or {})}
    errors: list[float] = []
    epochs: list[int] = []
    for setting in candidates.settings if len(candidates.settings) > 1 else []:
        # AutoRec holds the same part out by itself, to find its number of epochs.
        model = candidates.build(setting, common | {"validation": 0.1, "refit": False})
        if isinstance(model, AutoRecRecommender):
            model.fit(train)
            epochs.append(model.n_epochs_)
        else:
            model.fit(fit_part)
        errors.append(model.evaluate(validation_part).rmse)
    best = int(np.argmin(errors)) if errors else 0
    chosen = dict(candidates.settings[best])
    final = common | {"validation": 0.0} | ({"epochs": max(epochs[best], 1)} if epochs else {})
    model = candidates.build(chosen, final).fit(train)
    return model, test, chosen | ({"epochs": final["epochs"]} if epochs else {})


def _instance_means(
    model: Recommender, test: RatingMatrix, mode: Mode
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Training count, mean unclipped prediction and mean rating of each instance, over its test cells."""
    train = model.ratings_
    code, counts = (test.items, train.item_counts) if mode == "item" else (test.users, train.user_counts)
    tested = np.bincount(code, minlength=len(counts))
    chosen = (tested > 0) & (counts > 0)
    sums = [
        np.bincount(code, w, minlength=len(counts)) for w in (model.score_cells(test.users, test.items), test.values)
    ]
    predicted, true = (total[chosen] / tested[chosen] for total in sums)
    return counts[chosen].astype(np.float64), predicted, true


def compare_ratings(
    run: Run,
    ratings: RatingMatrix,
    *,
    name: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    mode: Mode = "item",
    options: Mapping[str, Any] | None = None,
    advance: Callable[[str], None] = _silent,
) -> tuple[list[Result], list[Claim]]:
    """Compare methods on a rating matrix over several random splits.

    Parameters
    ----------
    run : where finished pieces are kept
    ratings, mode, options : as in :func:`rating_cell`
    name : what to call the data in results
    methods : names in :data:`RATING_METHODS`
    seeds : one split each; all methods see the same splits
    advance : called with a short note after each piece

    Returns
    -------
    Results (RMSE, MAE, and how far the correlation with the observed count is from the truth's), and the paper's claims
    where both methods it speaks of are there.
    """
    pairs = {f"{name}/{mode}/{method}/{seed}": (method, seed) for method in methods for seed in seeds}
    work = {
        key: partial(rating_cell, ratings, method, seed=seed, mode=mode, options=options)
        for key, (method, seed) in pairs.items()
    }
    cells: dict[str, list[RatingCell]] = {}
    found = run.each(work, lambda key, cell: advance(f"{pairs[key][0]}: RMSE {cell['rmse']:.4f}"))
    for key, cell in found.items():
        cells.setdefault(pairs[key][0], []).append(cell)
    dataset = f"{name}, {mode}s as instances"
    results: list[Result] = []
    for metric, unit in (("RMSE", "rating"), ("MAE", "rating"), ("count correlation gap", "1")):
        for method, of_method in cells.items():
            values = [_rating_metric(cell, metric) for cell in of_method]
            seconds = sum(cell["seconds"] for cell in of_method)
            results.append(
                summarize(
                    values, dataset=dataset, method=method, metric=metric, unit=unit, better="lower", seconds=seconds
                )
            )
    return results, _rating_claims(cells, dataset)


def _rating_metric(cell: RatingCell, metric: str) -> float:
    match metric:
        case "RMSE":
            return cell["rmse"]
        case "MAE":
            return cell["mae"]
        case _:
            return abs(cell["correlation"] - cell["true_correlation"])


def _rating_claims(cells: Mapping[str, Sequence[RatingCell]], dataset: str) -> list[Claim]:
    def gains(rival: str) -> list[float]:
        return [theirs["rmse"] - ours["rmse"] for theirs, ours in zip(cells[rival], cells["autorec-sn"], strict=True)]

    claims: list[Claim] = []
    if "autorec-sn" not in cells:
        return claims
    if "autorec-zero" in cells:
        text = f"{dataset}: Sparsity Normalization lowers AutoRec's RMSE, each at its own best penalty"
        claims.append(_gain_claim(text, PAPER, gains("autorec-zero")))
        gaps = (
            [_rating_metric(cell, "count correlation gap") for cell in cells[method]]
            for method in ("autorec-sn", "autorec-zero")
        )
        claims.append(_gap_claim(dataset, *gaps))
    for rival in ("baseline-only", "biased-mf", "item-knn"):
        if rival in cells:
            text = f"{dataset}: AutoRec with Sparsity Normalization beats {rival}"
            claims.append(_gain_claim(text, "this project", gains(rival)))
    return claims


# ---- diagnosis


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` reports: rows, verdicts as claims, sentences, the audits in full, and lines to draw."""

    results: list[Result]
    claims: list[Claim]
    notes: list[str]
    reports: dict[str, Any]
    curves: dict[str, Curve]


class _Predictions(TypedDict):
    prediction: list[float]
    count: list[float]
    truth: list[float]
    seconds: float


def diagnose_predictions(
    name: str,
    prediction: Float[np.ndarray, " n"],
    count: Float[np.ndarray, " n"],
    truth: Float[np.ndarray, " n"] | None = None,
) -> Diagnosis:
    """Audit predictions that any model made.

    Parameters
    ----------
    name : what to call the data
    prediction : (n,) predicted values or probabilities of one class
    count : (n,) how many inputs were known of each instance
    truth : (n,) the true values; without them dependence can be told, bias cannot
    """
    for label, column in (("prediction", prediction), ("count", count), ("truth", truth)):
        if column is not None and np.isnan(column).any():
            row = int(np.isnan(column).argmax())
            raise InputError(f"{name}: row {row + 1}: the {label} is missing; leave out rows without it")
    report = vsp_report(prediction, count, truth)
    claim = _verdict_claim(f"{name}: predictions depend on how much is known", report)
    return Diagnosis(
        [_dependence_row(report, name, "predictions", 0.0)],
        [claim],
        [f"{report.verdict}: {report.message}"],
        {"predictions": report.to_dict()},
        {"predictions": drift_curve(prediction, count, truth)},
    )


def _dependence_row(report: VSPReport, name: str, method: str, seconds: float) -> Result:
    # The bootstrap interval is over instances, so n stays 1.
    found = report.excess or report.pearson
    metric = "excess count correlation" if report.excess else "count correlation"
    value, low, high = (0.0 if np.isnan(part) else abs(part) for part in (found.value, found.low, found.high))
    inside = found.low <= 0 <= found.high
    low, high = (0.0, max(low, high)) if inside else (min(low, high), max(low, high))
    return Result(
        dataset=name,
        method=method,
        metric=metric,
        unit="1",
        better="lower",
        mean=value,
        low=low,
        high=high,
        n=1,
        seconds=seconds,
    )


def _verdict_claim(text: str, report: VSPReport) -> Claim:
    found = report.excess or report.pearson
    problem = report.verdict in {"biased", "dependent"}
    value = None if np.isnan(found.value) else found.value
    return Claim(text=text, source="this run", holds=problem, value=value, threshold=report.tolerance)


def _diagnose_methods(name: str, found: Mapping[str, _Predictions], before: str, after: str) -> Diagnosis:
    results: list[Result] = []
    notes: list[str] = []
    reports: dict[str, VSPReport] = {}
    curves: dict[str, Curve] = {}
    for method, data in found.items():
        prediction, count, truth = (np.asarray(data[key]) for key in ("prediction", "count", "truth"))
        reports[method] = report = vsp_report(prediction, count, truth)
        curves[method] = drift_curve(prediction, count, truth)
        results.append(_dependence_row(report, name, method, data["seconds"]))
        rmse = float(np.sqrt(np.mean((prediction - truth) ** 2)))
        results.append(summarize([rmse], dataset=name, method=method, metric="RMSE", better="lower"))
        notes.append(f"{method}: {report.verdict}: {report.message}")
    claims = [
        _verdict_claim(
            f"{name}: with {before} predictions depend on how much is known, beyond the truth", reports[before]
        ),
        _verdict_claim(f"{name}: with {after} they still do", reports[after]),
    ]
    errors = {row.method: row.mean for row in results if row.metric == "RMSE"}
    best = min(errors, key=lambda method: errors[method])
    notes.append(f"smallest error on rows the model had not seen: {best} (RMSE {errors[best]:.4g})")
    audits: dict[str, Any] = {method: report.to_dict() for method, report in reports.items()}
    return Diagnosis(sorted(results, key=lambda row: row.metric), claims, notes, audits, curves)


def diagnose_table(
    run: Run, table: Table, *, seed: int, folds: int = 5, device: str = "auto", advance: Callable[[str], None] = _silent
) -> Diagnosis:
    """Predict a table out of fold with zero imputation and with Sparsity Normalization, and audit both.

    Parameters
    ----------
    run : where finished pieces are kept
    table, seed, folds, device : as in :func:`out_of_fold`
    advance : called with a short note after each piece
    """
    keys = {f"{table.name}/{folds}/{method}/{seed}": method for method in ("zero", "sn", "sn-center")}
    fixed: dict[str, Any] = {"seed": seed, "folds": folds, "device": device}
    work = {key: partial(_predict_table, table, method, **fixed) for key, method in keys.items()}
    found = run.each(work, lambda key, _: advance(keys[key]))
    return _diagnose_methods(table.name, {keys[key]: part for key, part in found.items()}, "zero", "sn")


def _predict_table(table: Table, method: str, *, seed: int, folds: int, device: str) -> _Predictions:
    part = out_of_fold(table, method, seed=seed, folds=folds, device=device)
    return {
        "prediction": part.prediction.tolist(),
        "count": part.count.tolist(),
        "truth": part.target.tolist(),
        "seconds": part.seconds,
    }


def diagnose_ratings(
    run: Run,
    ratings: RatingMatrix,
    *,
    name: str,
    seed: int,
    mode: Mode = "user",
    device: str = "auto",
    advance: Callable[[str], None] = _silent,
) -> Diagnosis:
    """Train AutoRec with and without Sparsity Normalization and audit mean predictions against training counts.

    Parameters
    ----------
    run : where finished pieces are kept
    ratings, mode, seed : as in :func:`rating_cell`
    name : what to call the data
    device : where to train
    advance : called with a short note after each piece
    """
    keys = {f"{name}/{mode}/{method}/{seed}": method for method in ("autorec-zero", "autorec-sn")}
    fixed: dict[str, Any] = {"seed": seed, "mode": mode, "device": device}
    work = {key: partial(_predict_ratings, ratings, method, **fixed) for key, method in keys.items()}
    found = run.each(work, lambda key, _: advance(keys[key]))
    return _diagnose_methods(name, {keys[key]: part for key, part in found.items()}, "autorec-zero", "autorec-sn")


def _predict_ratings(ratings: RatingMatrix, method: str, *, seed: int, mode: Mode, device: str) -> _Predictions:
    started = time.perf_counter()
    options = {"hidden": 100, "lr": 3e-3, "epochs": 200, "device": device}
    model, test, _ = tuned_recommender(ratings, method, seed=seed, mode=mode, options=options)
    counts, predicted, true = _instance_means(model, test, mode)
    return {
        "prediction": predicted.tolist(),
        "count": counts.tolist(),
        "truth": true.tolist(),
        "seconds": time.perf_counter() - started,
    }

"""What settings can be, by name; of no cost to import."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

from shared_core.errors import InputError, no_such

__all__ = [
    "METHODS",
    "METRIC_WORDS",
    "ExportFormat",
    "FeatureRanker",
    "InstanceRanker",
    "Method",
    "Picture",
    "TaskKind",
    "Written",
    "chosen_methods",
    "written",
]

TaskKind = Literal["binary", "multiclass", "multilabel", "regression"]
InstanceRanker: TypeAlias = Literal["uncertainty", "influence", "error", "entropy", "margin", "random"]
"""How instances are ranked."""

FeatureRanker: TypeAlias = Literal["counterfactual", "uncertainty", "influence", "random"]
"""How features of an instance are ranked."""

ExportFormat = Literal["csv", "label-studio", "html", "jsonl"]
Picture = Literal["attention", "contributions", "curve", "reliability", "history", "comparison", "agreement"]

Method: TypeAlias = Literal[
    "retain",
    "random-retain",
    "if-retain",
    "random-ua",
    "random-nap",
    "aila",
    "rrr",
    "drop",
    "gate-only",
    "ial-nap",
    "ial-nap-finetuned",
    "ial-nap:influence-uncertainty",
    "ial-nap:influence-influence",
    "ial-nap:influence-counterfactual",
]
"""Ways to learn from verdicts (spec 3), the baselines first; "retain" does not learn from them."""

METHODS: tuple[Method, ...] = get_args(Method)
"""All of them."""

METRIC_WORDS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "brier": "Brier score",
    "ece": "ECE",
    "log_loss": "log loss",
    "mae": "MAE",
    "rmse": "RMSE",
    "mpe": "mean percentage error",
}
"""How metrics are written in tables and pictures, where not by their names."""


class Written(NamedTuple):
    """How a score is written in tables, pictures and sentences.

    Parameters
    ----------
    name : in words
    unit : of it; "1" is none
    factor : what 1 of the score is in this unit
    """

    name: str
    unit: str = "1"
    factor: float = 1.0

    @property
    def unit_of_change(self) -> str:
        """Unit of a difference of two such scores."""
        return "points" if self.unit == "%" else self.unit

    def value(self, score: float) -> str:
        """Write a score."""
        return f"{self.factor * score:.4g}" + (" %" if self.unit == "%" else "")

    def change(self, difference: float) -> str:
        """Write a difference of two scores, with its sign."""
        return f"{self.factor * difference:+.4g}" + (" points" if self.unit == "%" else "")

    def size(self, difference: float) -> str:
        """Write how large a difference of two scores is."""
        return f"{self.factor * difference:g} points" if self.unit == "%" else f"{difference:.2f}"


def written(metric: str) -> Written:
    """Say how a metric is written: accuracies are in percent.

    Parameters
    ----------
    metric : its name

    Examples
    --------
    >>> written("auroc").value(0.9), written("accuracy").value(0.9), written("accuracy").change(-0.025)
    ('0.9', '90 %', '-2.5 points')
    """
    name = METRIC_WORDS.get(metric, metric)
    return Written(name, "%", 100.0) if metric == "accuracy" else Written(name)


def chosen_methods(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return methods, each once; "all" stands for every one.

    Parameters
    ----------
    names : as given

    Raises
    ------
    InputError
        For none, and for an unknown one: the message lists them all.

    Examples
    --------
    >>> chosen_methods(("retain", "ial-nap", "retain"))
    ('retain', 'ial-nap')
    >>> len(chosen_methods(("all",))) == len(METHODS)
    True
    """
    wanted = [known for name in names for known in (METHODS if name == "all" else (name,))]
    unknown = next((name for name in wanted if name not in METHODS), None)
    if unknown is not None:
        raise no_such("method", unknown, ("all", *METHODS), where="--methods")
    if not wanted:
        raise InputError(f"--methods: name one at least; there are all, {', '.join(METHODS)}")
    return tuple(dict.fromkeys(wanted))

"""What settings can be, by name; of no cost to import."""

from __future__ import annotations

from typing import Literal

from shared_core.errors import InputError

__all__ = [
    "METHODS",
    "ExportFormat",
    "FeatureBy",
    "InstanceBy",
    "Picture",
    "TaskKind",
    "chosen_methods",
]

TaskKind = Literal["binary", "multiclass", "multilabel", "regression"]
InstanceBy = Literal["uncertainty", "influence", "error", "entropy", "margin", "random"]
FeatureBy = Literal["counterfactual", "uncertainty", "influence", "random"]
ExportFormat = Literal["csv", "label-studio", "html", "jsonl"]
Picture = Literal["attention", "contributions", "curve", "reliability", "history", "comparison", "agreement"]

METHODS = (
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
)
"""Ways to learn from verdicts, by name; the baselines first."""


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
    if unknown is not None or not wanted:
        what = "no method is named" if unknown is None else f"no method '{unknown}'"
        raise InputError(f"--methods: {what}; there are all, {', '.join(METHODS)}")
    return tuple(dict.fromkeys(wanted))

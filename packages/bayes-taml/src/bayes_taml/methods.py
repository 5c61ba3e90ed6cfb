"""What can be trained: Bayesian TAML, its ablations, and what the paper compares to, each as a few options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from shared_core.errors import no_such

__all__ = ["METHODS", "Method", "find_method"]


@dataclass(frozen=True)
class Method:
    """How one method differs from MAML with a head that starts at zero.

    Parameters
    ----------
    text : in a line
    balance : variables that are inferred, of ``omega``, ``gamma``, ``z``
    bayes : infer distributions, pay for their divergence and sample; else use means alone
    naive : predict at the means, though trained with samples
    alpha : ``scalar``, one step size that is set; ``learned``, one for each element (Meta-SGD)
    head : ``zero``, or ``proto``, from class means
    rule : ``inverse``: class weights in proportion to 1/N; ``gamma``: all steps times N / (N + kappa), kappa learned;
        ``oversample``: repeat rows of small classes at random until all have as many
    algorithm : ``maml``; ``protonet``, nothing adapted; ``scratch``, no meta-learning: Adam on the support
    standing : how sure it is that this is what the paper compared to
    """

    text: str
    balance: tuple[str, ...] = ()
    bayes: bool = True
    naive: bool = False
    alpha: Literal["scalar", "learned"] = "learned"
    head: Literal["zero", "proto"] = "zero"
    rule: Literal["none", "inverse", "gamma", "oversample"] = "none"
    algorithm: Literal["maml", "protonet", "scratch"] = "maml"
    standing: Literal["code", "notes", "standard", "ours"] = "code"


_ALL = ("omega", "gamma", "z")

METHODS: Mapping[str, Method] = {
    "bayesian-taml": Method("class weights, layer steps and modulation, inferred as distributions", _ALL),
    "deterministic-taml": Method("their means alone: no sampling, no divergence", _ALL, bayes=False, standing="notes"),
    "naive-taml": Method("trained as Bayesian TAML, predicts at the means", _ALL, naive=True, standing="notes"),
    "omega-taml": Method("class weights only", ("omega",)),
    "gamma-taml": Method("layer steps only", ("gamma",)),
    "z-taml": Method("modulation only", ("z",)),
    "omega-gamma-taml": Method("class weights and layer steps", ("omega", "gamma")),
    "maml": Method("one step size, nothing inferred", alpha="scalar"),
    "metasgd": Method("a learned step size for each element"),
    "metasgd-inverse": Method("Meta-SGD with class weights in proportion to 1/N", rule="inverse"),
    "maml-oversampled": Method("MAML, small classes repeated", alpha="scalar", rule="oversample", standing="standard"),
    "gamma-rule": Method("Meta-SGD with all steps times N / (N + kappa)", rule="gamma", standing="ours"),
    "protonet": Method("distances to class means of features", algorithm="protonet", standing="standard"),
    "protomaml": Method("MAML from a head of class means", alpha="scalar", head="proto", standing="standard"),
    "scratch": Method("random weights, Adam on the support", algorithm="scratch", standing="standard"),
}
"""Methods by name."""


def find_method(name: str) -> Method:
    """Return a method, or say which there are.

    Parameters
    ----------
    name : of the method

    Examples
    --------
    >>> find_method("metasgd").alpha
    'learned'
    """
    if name not in METHODS:
        raise no_such("method", name, METHODS)
    return METHODS[name]

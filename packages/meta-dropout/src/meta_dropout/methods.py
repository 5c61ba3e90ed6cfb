"""What can be trained: meta-dropout, its ablations, and what the paper compares to, each as a few options.

Everything here shares one engine, one network and one protocol; a method differs from MAML in what it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from meta_dropout.layers import Noise
from shared_core.errors import no_such

__all__ = ["METHODS", "Method", "find_method"]


@dataclass(frozen=True)
class Method:
    """How one method differs from MAML.

    Parameters
    ----------
    text : in a line
    noise : family of the noise in the layers
    algorithm : ``maml``; ``fomaml``, inner gradients taken for constants; ``metasgd``, a learned step size for every
        parameter; ``anil``, only the head adapted; ``reptile``; ``protonet``, nothing adapted; without meta-learning:
        ``scratch``, adapted from random weights, and ``pretrained``, from those of a classifier of all training classes
    mixup : parameter of the Beta distribution of mixing weights; 0 is no mixing
    manifold : mix at a layer drawn anew for each step, instead of at the input
    penalty : weight of the noise family's penalty in the inner loss
    rate : share of units dropped
    attack : norm and radius of the attack on the support in the inner loop, or None
    standing : how sure it is that this is what the paper compared to
    tune : values to try of its own options, where settings are chosen
    """

    text: str
    noise: Noise = "none"
    algorithm: Literal["maml", "fomaml", "metasgd", "anil", "reptile", "protonet", "scratch", "pretrained"] = "maml"
    mixup: float = 0.0
    manifold: bool = False
    penalty: float = 0.0
    rate: float = 0.1
    attack: tuple[Literal["l1", "l2", "linf"], float] | None = None
    standing: Literal["code", "memory", "inferred", "standard"] = "standard"
    tune: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])


METHODS: Mapping[str, Method] = {
    "meta-dropout": Method("input-dependent multiplicative noise on every layer", "multiplicative", standing="code"),
    "maml": Method("no noise", standing="code"),
    "deterministic": Method("the generators' means as gates, no noise", "deterministic", standing="memory"),
    "more-params": Method("the gates' parameters adapted too", "more-params", standing="memory"),
    "learned-variance": Method("a second generator for the noise's size", "learned-variance", standing="memory"),
    "fixed": Method("multiplicative noise, nothing learned", "fixed", standing="memory"),
    "independent": Method("learned noise levels, whatever the input", "independent", standing="memory"),
    "weight": Method("Gaussian noise on weights, learned scales", "weight", standing="memory"),
    "additive": Method("learned additive noise", "additive", standing="inferred"),
    "dropout": Method("Bernoulli dropout in the inner loop", "dropout", tune={"rate": (0.1, 0.3, 0.5)}),
    "mixup": Method("input mixup in the inner loop", mixup=1.0, standing="inferred", tune={"mixup": (0.2, 1.0, 2.0)}),
    "manifold-mixup": Method(
        "mixup at a layer drawn for each step",
        mixup=1.0,
        manifold=True,
        standing="inferred",
        tune={"mixup": (0.2, 1.0, 2.0)},
    ),
    "vib": Method(
        "variational information bottleneck before the head",
        "vib",
        penalty=1e-4,
        standing="memory",
        tune={"penalty": (1e-5, 1e-4, 1e-3)},
    ),
    "information-dropout": Method(
        "log-normal noise with a penalty",
        "information",
        penalty=1e-4,
        standing="inferred",
        tune={"penalty": (0.0, 1e-5, 1e-4, 1e-3)},
    ),
    "adversarial-linf": Method("inner training on attacked support", attack=("linf", 0.1), standing="inferred"),
    "adversarial-l2": Method("inner training on attacked support", attack=("l2", 5.0), standing="inferred"),
    "adversarial-l1": Method("inner training on attacked support", attack=("l1", 100.0), standing="inferred"),
    "fomaml": Method("inner gradients taken for constants", algorithm="fomaml"),
    "metasgd": Method("a learned step size for every parameter", algorithm="metasgd"),
    "metasgd-dropout": Method("meta-dropout under Meta-SGD", "multiplicative", "metasgd", standing="memory"),
    "anil": Method("only the head adapted", algorithm="anil"),
    "reptile": Method("moves towards the adapted parameters", algorithm="reptile"),
    "protonet": Method("distances to class means, nothing adapted", algorithm="protonet"),
    "scratch": Method("adapted from random weights", algorithm="scratch", tune={"inner_lr": (0.03, 0.3, 1.0)}),
    "pretrained": Method(
        "adapted from a classifier of all training classes", algorithm="pretrained", tune={"inner_lr": (0.03, 0.3, 1.0)}
    ),
}


def find_method(name: str) -> Method:
    """Return a method by its name.

    Parameters
    ----------
    name : a key of :data:`METHODS`

    Examples
    --------
    >>> find_method("meta-dropout").noise
    'multiplicative'
    """
    if name not in METHODS:
        raise no_such("method", name, METHODS)
    return METHODS[name]

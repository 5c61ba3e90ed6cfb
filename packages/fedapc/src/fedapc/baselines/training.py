"""Settings that methods have in common, and the few numbers that only some of them know."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fedapc.client import Learning
from shared_core.errors import InputError

__all__ = ["Training"]


@dataclass(frozen=True)
class Training:
    """How clients learn, by whatever method.

    Parameters
    ----------
    epochs, batch_size, optimizer, lr, patience, lr_factor, least_lr : see `fedapc.Learning`
    weight_decay : of the body's weights; neither of biases and norms nor of heads
    sgd_factor : multiplies `lr` for methods that are defined with SGD (SCAFFOLD, Stable-SGD), which stands still at
        the learning rates of Adam; not if `optimizer` is ``sgd``, as `lr` is one of SGD then
    proximal : FedProx's mu, of half the squared distance from the base that the round began with
    ewc_strength : EWC's lambda
    ewc_mode : ``separate``, a penalty a past task; ``online``, one that fades
    ewc_decay : what an online penalty keeps from task to task, gamma
    curvature_strength : FedCurv's lambda
    dropout : Stable-SGD's, of hidden activations
    lr_decay_per_task : Stable-SGD's gamma, that multiplies the learning rate from task to task
    server_lr : SCAFFOLD's global step
    kb_policy, keep_unsent : of FedAPC and its variants, see `fedapc.Server`
    learning : of methods that decompose weights. Default: that of `fedapc.Learning`, but for the fields in common

    Raises
    ------
    InputError
        For numbers out of range.

    Examples
    --------
    >>> Training(lr=3e-4, learning=Learning(sparsity=1e-4)).learning.sparsity
    0.0001
    >>> Training(dropout=1.0)
    Traceback (most recent call last):
    ...
    shared_core.errors.InputError: dropout: 1.0, expected 0 or more and less than 1
    """

    epochs: int = 1
    batch_size: int = 100
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3 / 3
    patience: int = 3
    lr_factor: float = 3.0
    least_lr: float = 1e-10
    weight_decay: float = 1e-4
    sgd_factor: float = 100.0
    proximal: float = 0.01
    ewc_strength: float = 100.0
    ewc_mode: Literal["separate", "online"] = "separate"
    ewc_decay: float = 0.95
    curvature_strength: float = 1.0
    dropout: float = 0.25
    lr_decay_per_task: float = 0.8
    server_lr: float = 1.0
    kb_policy: str = "last"
    keep_unsent: bool = True
    learning: Learning | None = None

    def __post_init__(self) -> None:
        for name in ("proximal", "ewc_strength", "curvature_strength"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}: {getattr(self, name)}, expected 0 or more")
        for name in ("sgd_factor", "server_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}: {getattr(self, name)}, expected a positive number")
        for name in ("ewc_decay", "lr_decay_per_task"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name}: {getattr(self, name)}, expected more than 0 and at most 1")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout: {self.dropout}, expected 0 or more and less than 1")
        for name, choices in (("ewc_mode", ("separate", "online")), ("optimizer", ("adam", "sgd"))):
            if getattr(self, name) not in choices:
                raise InputError(f"{name}: '{getattr(self, name)}'; choose {' or '.join(choices)}")
        # That checks the fields in common.
        self.plain()

    def plain(self) -> Learning:
        """Return how a network without decomposed weights learns by this."""
        return Learning(
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            lr=self.lr,
            patience=self.patience,
            lr_factor=self.lr_factor,
            least_lr=self.least_lr,
            weight_decay=self.weight_decay,
            sparsity=0.0,
            retention=0.0,
            retroactive="none",
            mask=False,
            adaptive=False,
            transfer="none",
            upload_fraction=1.0,
            share_adaptive=False,
        )

    def sgd(self) -> Learning:
        """Return `plain` for a method that is defined with SGD."""
        factor = 1.0 if self.optimizer == "sgd" else self.sgd_factor
        return replace(self.plain(), optimizer="sgd", lr=factor * self.lr)

    def decomposed(self) -> Learning:
        """Return how a network with decomposed weights learns."""
        return self.learning or Learning(
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            lr=self.lr,
            patience=self.patience,
            lr_factor=self.lr_factor,
            least_lr=self.least_lr,
            weight_decay=self.weight_decay,
        )

"""What a member is made of and how it is trained, in one frozen object, and the named presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from shared_core.errors import InputError

__all__ = ["INDEPENDENCE", "PRESETS", "Independence", "Likelihood", "Settings"]

Independence = Literal["adversarial", "confusion", "mmd-lin", "mmd-rbf", "wass", "mi-gauss", "none"]
Likelihood = Literal["gaussian", "mse", "hetero"]
INDEPENDENCE: tuple[str, ...] = ("adversarial", "confusion", "mmd-lin", "mmd-rbf", "wass", "mi-gauss", "none")


@dataclass(frozen=True)
class Settings:
    """Sizes, weights of the terms, and training.

    Parameters
    ----------
    beta : weight of the compression term ``KL(q(z|x) || N(0, I))``, summed over dimensions
    gamma : weight of the independence term
    lam : weight of the variance of the counterfactual prediction
    independence : which measure of dependence between z and treatment
    likelihood : ``gaussian`` learns one noise scale an arm, ``hetero`` one for each z, ``mse`` is plain least squares
    trunk, heads, discriminator : hidden widths
    latent : dimensions of z
    deterministic : z is the trunk's output itself (TARNet, CFR, DragonNet)
    normalize : scale a deterministic z to unit length
    reweight : weigh rows so that both arms count alike
    head_l2, trunk_l2 : weight of half the squared weights
    dropout_trunk, dropout_head : shares dropped after each trunk layer, and before the output (deterministic z only)
    samples : of z in training (K)
    batch_size, steps, lr, lr_decay, lr_every : Adam with lr multiplied by lr_decay each lr_every steps
    warmup : share of the steps in which beta, gamma and lam rise from 0
    disc_steps, disc_lr : steps of the discriminator for each of the model, and how many times lr its step size is: the
        bound that the adversary minimises means something only while the discriminator keeps up with z
    eval_every, patience, eval_samples : validation every so many steps, stop after so many without improvement
    clip : largest norm of a member's gradient
    kernel_width : of ``mmd-rbf``; None is the median distance
    sharpness, rounds : of ``wass``
    dragon, targeted : weights of DragonNet's propensity loss and targeted regularisation; 0 is without
    balance_share : share of treated assumed by mmd and wass; None is the training share
    """

    beta: float = 0.1
    gamma: float = 0.1
    lam: float = 1e-2
    independence: Independence = "confusion"
    likelihood: Likelihood = "gaussian"
    trunk: tuple[int, ...] = (200, 200, 200)
    heads: tuple[int, ...] = (100, 100, 100)
    discriminator: tuple[int, ...] = (100,)
    latent: int = 32
    deterministic: bool = False
    normalize: bool = False
    reweight: bool = True
    head_l2: float = 1e-4
    trunk_l2: float = 0.0
    dropout_trunk: float = 0.0
    dropout_head: float = 0.0
    samples: int = 5
    batch_size: int = 100
    steps: int = 3000
    lr: float = 1e-3
    lr_decay: float = 0.97
    lr_every: int = 100
    warmup: float = 0.1
    disc_steps: int = 1
    disc_lr: float = 5.0
    eval_every: int = 25
    patience: int = 20
    eval_samples: int = 10
    clip: float = 5.0
    kernel_width: float | None = None
    sharpness: float = 10.0
    rounds: int = 10
    dragon: float = 0.0
    targeted: float = 0.0
    balance_share: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be trained with."""
        for name in ("beta", "gamma", "lam", "head_l2", "trunk_l2", "dragon", "targeted"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}: must be a number >= 0, got {getattr(self, name)}")
        for name in ("latent", "samples", "steps", "disc_steps", "eval_every", "patience", "eval_samples", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not all(width >= 1 for width in (*self.trunk, *self.heads, *self.discriminator)) or not self.trunk:
            raise InputError(f"trunk, heads, discriminator: widths >= 1, and one trunk layer, got {self.trunk}")
        if self.batch_size < 4:
            raise InputError(f"batch_size: must be at least 4 (two rows of each arm), got {self.batch_size}")
        for name in ("lr", "lr_decay", "clip", "sharpness", "disc_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}: must be > 0, got {getattr(self, name)}")
        for name in ("dropout_trunk", "dropout_head", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: must be in [0, 1), got {getattr(self, name)}")
        if self.independence not in INDEPENDENCE:
            raise InputError(f"independence: '{self.independence}' is not one of {', '.join(INDEPENDENCE)}")
        if self.likelihood not in ("gaussian", "mse", "hetero"):
            raise InputError(f"likelihood: '{self.likelihood}' is not one of gaussian, mse, hetero")
        if self.lam > 0 and self.samples < 2 and not self.deterministic:
            raise InputError("lam > 0 needs samples >= 2: the variance over one sample of z is not defined")
        if (self.dropout_trunk or self.dropout_head) and not self.deterministic:
            raise InputError("dropout is for a deterministic z: set deterministic=True, or use the bottleneck instead")
        if self.normalize and not self.deterministic:
            raise InputError(
                "normalize: a unit-length z contradicts the Gaussian prior; use it with deterministic=True"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Make settings of a mapping, lists becoming tuples; what is not a setting is left out."""
        known = {field.name for field in fields(cls)}
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**{key: value for key, value in plain.items() if key in known})

    def to_json(self) -> dict[str, Any]:
        """Return all settings as plain values."""
        return asdict(self)


# cfrnet's own weight decay: on the heads alone.
_CFR_DECAY: dict[str, Any] = {"head_l2": 1e-4, "trunk_l2": 0.0}
_CFR: dict[str, Any] = {
    "beta": 0.0,
    "gamma": 0.0,
    "lam": 0.0,
    "independence": "none",
    "likelihood": "mse",
    "deterministic": True,
    "normalize": True,
    "samples": 1,
    **_CFR_DECAY,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"independence": "adversarial", "n_members": 1, **_CFR_DECAY},
    "vib": {"gamma": 0.0, "lam": 0.0, "independence": "none"},
    "tarnet": _CFR | {"normalize": False},
    "cfr-wass": _CFR | {"independence": "wass", "gamma": 0.3, "balance_share": 0.5},
    "cfr-mmd": _CFR | {"independence": "mmd-lin", "gamma": 0.3, "balance_share": 0.5},
    "dragonnet": _CFR | {"normalize": False, "heads": (100, 100), "dragon": 1.0, "targeted": 1.0, "reweight": False},
    "mc-dropout": _CFR | {"normalize": False, "dropout_trunk": 0.1, "dropout_head": 0.5},
}

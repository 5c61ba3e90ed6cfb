"""Settings of a federation, checked once at its edge; the method's own code takes plain arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedapc.choices import AdaptiveInit, AttentionInit, Retroactive, Score, Transfer, sampled_parts
from shared_core.errors import InputError, no_such

if TYPE_CHECKING:
    from fedapc.client import Learning

__all__ = ["PRESETS", "FedAPCConfig", "FedAPCFields", "Preset"]

Preset = Literal["probed", "fedweit", "reference", "fed-apc"]

PRESETS: dict[str, dict[str, Any]] = {
    # Ours: attention that begins at the part which helps, and parts that hold nothing but what a task has learnt.
    "probed": {},
    # The paper's, as far as it is known (spec 2.6).
    "fedweit": {"adaptive_init": "scaled", "attention_init": "zeros", "attention_lr": 30.0},
    # What the authors' code does where it differs from the paper (spec 2.6). Two of its faults are not copied: masks
    # without a gradient, and zeros that stand for "not sent".
    "reference": {
        "upload_fraction": 0.7,
        "score": "abs-raw-mask",
        "kb_policy": "last+self",
        "keep_unsent": False,
        "retroactive": "none",
        "adaptive_init": "scaled",
        "attention_init": "scaled",
        "attention_lr": 1.0,
    },
    # Our reading of the first version's title: adaptive parts are communicated, and not attended to.
    "fed-apc": {"adaptive_init": "scaled", "transfer": "mean"},
}
"""What each preset sets, besides the defaults; settings given win over it."""

_SERVER = ("rounds", "fraction", "kb_policy", "keep_unsent")


class FedAPCFields(BaseModel):
    """The fields of `FedAPCConfig`, for command lines that add their own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rounds: int = Field(default=20, ge=1, description="rounds of communication a task")
    fraction: float = Field(default=1.0, gt=0, le=1, description="share of the clients asked a round")
    kb_policy: str = Field(
        default="last", description="parts of others a client gets: last, last+self, all, sample:K (so many), none"
    )
    keep_unsent: bool = Field(default=True, description="rows of the base that nobody sent keep the server's value")
    epochs: int = Field(default=1, ge=1, description="passes over a task's examples a round")
    batch_size: int = Field(default=100, ge=1, description="examples a step")
    optimizer: Literal["adam", "sgd"] = Field(default="adam", description="begun afresh every round")
    lr: float = Field(
        default=1e-3 / 3, gt=0, description="learning rate; below the threshold, or parts do not become sparse"
    )
    patience: int = Field(
        default=3, ge=1, description="epochs without a lower validation loss before the rate is lowered"
    )
    lr_factor: float = Field(default=3.0, gt=1, description="what divides the learning rate then")
    least_lr: float = Field(default=1e-10, ge=0, description="learning rate below which a task is not trained any more")
    attention_lr: float = Field(default=3.0, gt=0, description="multiplies the learning rate of the attention")
    sparsity: float = Field(default=1e-3, ge=0, description="lambda 1, of the L1 norm of adaptive parts")
    l1_solver: Literal["subgradient", "prox"] = Field(
        default="subgradient", description="prox: exact zeros while training"
    )
    mask_sparsity: float = Field(default=0.0, ge=0, description="lambda of the L1 norm of masks")
    retention: float = Field(default=100.0, ge=0, description="lambda 2, of changes of past tasks")
    retroactive: Retroactive = Field(
        default="shared",
        description="parts of past tasks follow the base: shared or joint; none: they stay, as in the code",
    )
    proximal: float = Field(default=0.0, ge=0, description="mu of FedProx, of the distance from the server's base")
    weight_decay: float = Field(
        default=1e-4, ge=0, description="of the task's part and mask, and of the first task's base"
    )
    threshold: float = Field(default=1e-3, ge=0, description="what an entry of a part must exceed to be kept and sent")
    mask: bool = Field(default=True, description="a learnt gate a row and task")
    adaptive: bool = Field(default=True, description="tasks have parts of their own")
    transfer: Transfer = Field(
        default="learned", description="weights of the parts of others: learned, their mean, or none"
    )
    adaptive_init: AdaptiveInit = Field(
        default="zeros", description="a part begins at zeros, or as the base over a factor"
    )
    adaptive_factor: float = Field(default=3.0, gt=0, description="that factor")
    attention_init: AttentionInit = Field(
        default="probe", description="attention begins at the part that helps most; at zeros; or scaled, at random"
    )
    train_base: bool = Field(default=True, description="else the base stays what the server drew")
    upload_fraction: float = Field(
        default=0.3, gt=0, le=1, description="kappa, share of the base's rows a client sends"
    )
    score: Score = Field(default="gated-norm", description="what rows are chosen by")
    share_adaptive: bool = Field(default=True, description="send adaptive parts to the server")

    @field_validator("kb_policy")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        sampled_parts(value)
        return value


class FedAPCConfig(FedAPCFields):
    """All settings of FedAPC; names and defaults are those of `Learning` and `Server`.

    Raises
    ------
    pydantic.ValidationError
        For unknown settings and numbers out of range; `preset` raises `InputError` with one line instead.

    Examples
    --------
    >>> FedAPCConfig(rounds=5).learning().upload_fraction
    0.3
    >>> FedAPCConfig.preset("reference", rounds=5).kb_policy
    'last+self'
    """

    @classmethod
    def preset(cls, name: str, **settings: Any) -> FedAPCConfig:
        """Return a preset with some settings changed.

        Parameters
        ----------
        name : ``probed``, the defaults; ``fedweit``, the paper's method; ``reference``, what the authors' code does;
            ``fed-apc``, the mean of the parts of others in place of attention, which is our reading of the method's
            first name
        settings : that win over the preset's

        Raises
        ------
        InputError
            For another name, an unknown setting, a number out of range.
        """
        if name not in PRESETS:
            raise no_such("preset", name, PRESETS)
        try:
            return cls(**{**PRESETS[name], **settings})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{where}: {first['msg']}, got {first['input']!r}") from error

    def learning(self) -> Learning:
        """Return what concerns clients."""
        from fedapc.client import Learning

        return Learning(**self.model_dump(exclude=set(_SERVER)))

    def serving(self) -> dict[str, Any]:
        """Return what concerns the server, as keyword arguments of `fedapc.Server`."""
        return self.model_dump(include=set(_SERVER))

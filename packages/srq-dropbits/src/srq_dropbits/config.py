"""How a model is to be quantized: one frozen object, which JSON, TOML and the command line can fill."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shared_core.errors import no_such
from srq_dropbits.errors import InvalidBitsError, OverrideError, SrqError
from srq_dropbits.functional import Baseline

__all__ = [
    "DEFAULT_METHOD",
    "ESTIMATORS",
    "METHODS",
    "DropBits",
    "Estimator",
    "LearnBits",
    "Override",
    "QuantConfig",
    "Weighting",
]

Estimator = Literal[
    "mcste", "mode-soft", "mode-gumbel", "rq", "rq-st", "rq-local", "lsq", "lsq+", "pact", "ste-minmax", "sr", "ptq"
]
Weighting = Literal["size", "layer", "macs"]
ESTIMATORS: tuple[Estimator, ...] = (
    "mcste",
    "mode-soft",
    "mode-gumbel",
    "rq",
    "rq-st",
    "rq-local",
    "lsq",
    "lsq+",
    "pact",
    "ste-minmax",
    "sr",
    "ptq",
)
"""Gradient estimators by name; the README's table says what each does and where it comes from."""

_PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DropBits(_Strict):
    """Random removal of bit levels in training (specification 2.5).

    Parameters
    ----------
    p_keep : probability that a level stays, given that the levels below stay; 0.97 is ours, chosen on validation rows
        (README); gates that are learned with bit-widths start at 0.9
    learn : learn the probability instead of keeping it fixed
    sharing : ``bit``: one gate for a whole level; ``endpoint``: one for every pair of points -n and n
    min_bits : levels of this bit-width are never dropped; with 1 a layer can be pruned away
    mask_path : ``prob``: masks act on the categorical distribution, as in the papers, which needs estimator ``mcste``;
        ``value``: on the value, level by level; ``auto``: ``prob`` where it can be
    activations : also drop levels of activations, which the papers' experiments do not do
    """

    p_keep: float = Field(default=0.97, gt=0, lt=1)
    learn: bool = False
    sharing: Literal["bit", "endpoint"] = "bit"
    min_bits: int = Field(default=2, ge=1, le=8)
    mask_path: Literal["auto", "prob", "value"] = "auto"
    activations: bool = False

    @model_validator(mode="after")
    def _check(self) -> DropBits:
        if self.sharing == "endpoint" and self.mask_path == "value":
            raise ValueError("sharing='endpoint' has no levels to add up; use mask_path='prob'")
        return self

    def path(self, estimator: Estimator) -> Literal["prob", "value"]:
        """Say what masks act on with an estimator.

        Parameters
        ----------
        estimator : of the weights, or of the activations

        Examples
        --------
        >>> DropBits().path("mcste"), DropBits().path("mode-soft")
        ('prob', 'value')
        """
        if self.mask_path == "auto":
            return "prob" if estimator == "mcste" or self.sharing == "endpoint" else "value"
        return self.mask_path


class LearnBits(_Strict):
    """Learned bit-widths, one for each layer's weights (specification 2.6).

    Parameters
    ----------
    max_bits : bit-width that every layer starts with
    min_bits : lowest bit-width; 1 allows a layer to be pruned away
    penalty : strength lambda of the penalty on levels; where it starts if there is a target
    target_bits : average bit-width, under `weighting`, that the controller steers to
    target_bytes : size of all quantized weights that must not be exceeded
    weighting : what a layer's levels cost: ``size``: its share of the weights; ``macs``: its share of multiplications;
        ``layer``: the same for every layer, as in the papers
    speed : rate of the controller, per step and bit of distance
    """

    max_bits: int = Field(default=4, ge=2, le=8)
    min_bits: int = Field(default=2, ge=1, le=8)
    penalty: float = Field(default=0.03, ge=0, allow_inf_nan=False)
    target_bits: float | None = Field(default=None, gt=0, le=8)
    target_bytes: int | None = Field(default=None, gt=0)
    weighting: Weighting = "size"
    speed: float = Field(default=0.05, gt=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> LearnBits:
        if self.min_bits >= self.max_bits:
            raise ValueError(f"min_bits {self.min_bits} leaves nothing to learn below max_bits {self.max_bits}")
        if self.target_bits is not None and self.target_bytes is not None:
            raise ValueError("give target_bits or target_bytes, not both")
        if self.target_bits is not None and not self.min_bits <= self.target_bits <= self.max_bits:
            raise ValueError(f"target_bits {self.target_bits:g} is not between {self.min_bits} and {self.max_bits}")
        return self


class Override(_Strict):
    """Settings of single layers that differ from the rest; what is None stays.

    Parameters
    ----------
    weight_bits : 2..8
    act_bits : 1..8, or 0 to leave the layer's input as it is
    per_channel : a step for every output channel
    estimator : another estimator
    """

    weight_bits: int | None = None
    act_bits: int | None = None
    per_channel: bool | None = None
    estimator: Estimator | None = None

    @field_validator("weight_bits", "act_bits", mode="before")
    @classmethod
    def _bits(cls, value: object, info: Any) -> object:
        if value is None or (info.field_name == "act_bits" and value == 0):
            return value
        return _whole_bits(value, info.field_name)


def _whole_bits(value: object, name: str) -> int:
    low = 2 if name == "weight_bits" else 1
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= 8:
        raise ValueError(f"{name} is {value!r}; give a whole number from {low} to 8")
    return value


class QuantConfig(_Strict):
    """How to quantize a model.

    Parameters
    ----------
    weight_bits : bit-width of weights, 2..8; where bits are learned, `learn_bits` says
    act_bits : bit-width of every quantized layer's input, 1..8; None leaves activations as they are
    estimator : how gradients pass the rounding
    baseline : control variate of ``mcste``: ``input``, ``clipped`` or ``zero``
    per_channel : a step for every output channel of the weights
    symmetric : weights on -(2^(b-1)-1) .. 2^(b-1)-1; otherwise from -2^(b-1) on
    quantize_input : bit-width of the network's own input; None: as `act_bits`; 0 or False: left as it is
    learn_sigma : learn the noise scale's ratio to the step, within 1/8 .. 1/2
    rho : that ratio at the start
    temperature : of concrete samples (``rq``, ``rq-st``, ``rq-local``, ``mode-gumbel``)
    delta : window of ``rq-local`` in noise scales
    init : weights' first step: ``mse`` searches the least squared error, ``lsq`` is 2 mean|w| / sqrt(n_hi), ``max`` is
        max|w| / n_hi; ``auto`` is ``mse`` up to 4 bits, ``lsq`` above
    dropbits : regularise by dropping bit levels
    learn_bits : learn bit-widths
    pact_decay : L2 penalty on PACT's clipping values
    quantize_adds : find sums of two tensors in the model (by ``torch.fx``) and put both on one grid
    include : patterns of layer names to quantize; empty: all
    exclude : patterns of layer names to leave alone
    overrides : pattern -> settings, or ``"skip"``; later patterns win
    seed : of the masks

    Examples
    --------
    >>> QuantConfig(weight_bits=3, act_bits=3, dropbits=DropBits(p_keep=0.8)).estimator
    'mode-soft'
    """

    weight_bits: int = 4
    act_bits: int | None = 4
    estimator: Estimator = "mode-soft"
    baseline: Baseline = "input"
    per_channel: bool = False
    symmetric: bool = True
    quantize_input: int | None = 8
    learn_sigma: bool = True
    rho: float = Field(default=1 / 3, ge=1 / 8, le=1 / 2)
    temperature: _PositiveFloat = 1.0
    delta: _PositiveFloat = 3.0
    init: Literal["auto", "mse", "lsq", "max"] = "auto"
    dropbits: DropBits | None = None
    learn_bits: LearnBits | None = None
    pact_decay: float = Field(default=2e-4, ge=0, allow_inf_nan=False)
    quantize_adds: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: dict[str, Override | Literal["skip"]] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0, lt=2**31)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _plain(error) from None

    @field_validator("weight_bits", "act_bits", "quantize_input", mode="before")
    @classmethod
    def _bits(cls, value: object, info: Any) -> object:
        name = info.field_name
        if value is None or (name == "quantize_input" and value in (0, False)):
            return 0 if value is not None else None
        return _whole_bits(value, name)

    @model_validator(mode="after")
    def _check(self) -> QuantConfig:
        if self.learn_bits is not None and not self.symmetric:
            raise ValueError("learned bits need the symmetric grid: drop symmetric=False")
        gated = self.dropbits is not None or self.learn_bits is not None
        path = (self.dropbits or DropBits()).path(self.estimator)
        if gated and path == "prob" and self.estimator != "mcste":
            pairs = self.dropbits is not None and self.dropbits.sharing == "endpoint"
            raise ValueError(
                f"masks on {'end points' if pairs else 'probabilities'} need estimator 'mcste', not '{self.estimator}';"
                f" or use DropBits({'sharing=' + repr('bit') if pairs else 'mask_path=' + repr('value')})"
            )
        if gated and self.estimator in {"pact", "ste-minmax", "ptq"}:
            raise ValueError(f"estimator '{self.estimator}' has no bit levels to drop")
        if self.learn_bits is not None and self.dropbits is not None and self.dropbits.sharing == "endpoint":
            raise ValueError("learned bits need DropBits(sharing='bit')")
        return self

    @staticmethod
    def method(name: str, weight_bits: int = 4, act_bits: int | None = 4, **changes: Any) -> QuantConfig:
        """Make the configuration of a method by its name, as comparisons and the command line call it.

        Parameters
        ----------
        name : one of ``METHODS``; ``cpq`` may stand for ``srq``
        weight_bits : 2..8; the bit-width to start from, and never to exceed, where bits are learned
        act_bits : 1..8 or None
        **changes : further settings

        Examples
        --------
        >>> QuantConfig.method("rq-st", 2, 2).estimator
        'rq-st'
        """
        if name.startswith("cpq"):
            name = "srq" + name.removeprefix("cpq")
        if name not in METHODS:
            raise SrqError(str(no_such("method", name, METHODS)))
        settings: dict[str, Any] = {"weight_bits": weight_bits, "act_bits": act_bits, **METHODS[name]}
        if settings.get("learn_bits") is True:
            settings["learn_bits"] = LearnBits(max_bits=weight_bits) if weight_bits > 2 else None
        if settings.get("dropbits") is True:
            settings["dropbits"] = DropBits()
        return QuantConfig(**settings | changes)


def _plain(error: ValidationError) -> SrqError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part not in {"Override", "literal['skip']"})
    message = first["msg"].removeprefix("Value error, ")
    if place in {"weight_bits", "act_bits", "quantize_input"}:
        return InvalidBitsError(message)
    if first["loc"][:1] == ("overrides",) and first["loc"][-1] in {"weight_bits", "act_bits"}:
        return InvalidBitsError(f"{place.rpartition('.')[0]}: {message}")
    if first["type"] == "extra_forbidden":
        return OverrideError(f"unknown setting '{place}'; see QuantConfig")
    return SrqError(f"{place}: {message}" if place else message)


DEFAULT_METHOD = "srq"

_SRQ: dict[str, Any] = {"estimator": "mode-soft"}
METHODS: dict[str, dict[str, Any]] = {
    "ptq": {"estimator": "ptq"},
    "ste-minmax": {"estimator": "ste-minmax"},
    "pact": {"estimator": "pact"},
    "lsq": {"estimator": "lsq"},
    "lsq+": {"estimator": "lsq+"},
    "sr": {"estimator": "sr"},
    "rq": {"estimator": "rq"},
    "rq-local": {"estimator": "rq-local"},
    "rq-st": {"estimator": "rq-st"},
    "mcste-zero": {"estimator": "mcste", "baseline": "zero"},
    "mcste-input": {"estimator": "mcste", "baseline": "input"},
    "mcste-clipped": {"estimator": "mcste", "baseline": "clipped"},
    "mode-soft": {"estimator": "mode-soft"},
    "mode-gumbel": {"estimator": "mode-gumbel"},
    "srq": _SRQ,
    "srq+dropbits": _SRQ | {"dropbits": True},
    "srq+dropbits+bits": _SRQ | {"dropbits": True, "learn_bits": True},
}
"""Methods by name -> the settings in which they differ."""

"""Settings of estimators, rankings and simulations, checked once at the edge; methods' code takes plain arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ial_nap.choices import FeatureRanker, InstanceRanker

if TYPE_CHECKING:
    from ial_nap.estimator import NAPClassifier, NAPRegressor
    from ial_nap.ranking import CER
    from ial_nap.series import Kind
    from ial_nap.simulation import Setting

__all__ = ["EstimatorFields", "RankingFields", "SimulationFields"]


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def _own(self, fields: type[BaseModel]) -> dict[str, Any]:
        """Return what one of the classes this one is made of declares."""
        return {name: getattr(self, name) for name in fields.model_fields}


class EstimatorFields(_Fields):
    """What an estimator is told; names and defaults are those of :class:`ial_nap.NAPClassifier`.

    Raises
    ------
    pydantic.ValidationError
        For unknown settings and numbers out of range.

    Examples
    --------
    >>> EstimatorFields(hidden=8).estimator("regression", device="cpu", seed=1).hidden
    8
    """

    hidden: int = Field(32, ge=1, description="units of each recurrent layer")
    latent: int = Field(16, ge=0, description="entries of the latent of a step; 0: verdicts act on the gate alone")
    keep: float = Field(0.8, gt=0, le=1, description="probability of keeping what dropout may drop")
    rnn: Literal["gru", "lstm"] = Field("gru", description="recurrent layers")
    epochs: int = Field(150, ge=1, description="epochs of training at most")
    batch_size: int = Field(200, ge=1, description="instances of a gradient step")
    lr: float = Field(3e-3, gt=0, description="step size of Adam")
    l2: float = Field(0.004, ge=0, description="weight of half the squared weights")
    patience: int = Field(20, ge=1, description="epochs without a better validation loss before training stops")
    samples: int = Field(30, ge=2, description="draws of a prediction")
    hard: bool = Field(True, description="exclude a cell entirely where verdicts against it prevail")
    kappa: float = Field(1.0, gt=0, description="prior count of verdicts: as many move a cell half way")
    protocol: Literal["episodic", "paper"] = Field(
        "episodic",
        description="training with imagined annotators, which obeys at once; or the release's, which needs --finetune",
    )
    context: Literal["masks", "full", "attentive"] = Field(
        "masks",
        description="what the latent reads: verdicts; the annotated series beside them (full); those like the one at"
        " hand (attentive)",
    )

    def estimator(self, kind: Kind, *, device: str, seed: int) -> NAPClassifier | NAPRegressor:
        """Return an estimator that is not trained yet; cells that are missing read as the mean.

        Parameters
        ----------
        kind : of the task
        device : where to compute
        seed : of all that is drawn
        """
        from ial_nap.estimator import NAPClassifier, NAPRegressor

        made = NAPRegressor if kind == "regression" else NAPClassifier
        return made(**self._own(EstimatorFields), missing="mask", device=device, seed=seed)


class RankingFields(_Fields):
    """How instances and cells are ranked; names and defaults are those of :class:`ial_nap.CER`.

    Examples
    --------
    >>> RankingFields(k=3).cer().k
    3
    """

    instance: InstanceRanker = Field("uncertainty", description="how instances are ranked")
    feature: FeatureRanker = Field("counterfactual", description="how features of an instance are ranked")
    k: int = Field(10, ge=1, description="instances to look at")
    f: int = Field(8, ge=1, description="features of each to show first")
    order: Literal["harmful", "abs"] = Field(
        "harmful", description="by influence: first those without which validation were better, or the largest"
    )
    scope: Literal["head", "attention"] = Field("head", description="parameters that influence is through")

    def cer(self, samples: int = 30, groups: tuple[tuple[str, ...], ...] = ()) -> CER:
        """Return the ranking.

        Parameters
        ----------
        samples : draws of a prediction
        groups : names of features that belong together
        """
        from ial_nap.ranking import CER

        return CER(**self._own(RankingFields), samples=samples, groups=groups)


class SimulationFields(_Fields):
    """What all methods of a simulation have in common; names and defaults are those of `Setting`.

    Examples
    --------
    >>> SimulationFields(rounds=2, k=3).setting().rounds
    2
    """

    rounds: int = Field(4, ge=1, description="rounds of annotation")
    k: int = Field(10, ge=1, description="instances shown in a round")
    f: int = Field(8, ge=1, description="features shown of each")
    hidden: int = Field(32, ge=1, description="units of each recurrent layer")
    latent: int = Field(16, ge=1, description="entries of the latent of a step")
    keep: float = Field(0.8, gt=0, le=1, description="probability of keeping what dropout may drop")
    epochs: int = Field(150, ge=1, description="epochs of the first training at most")
    batch_size: int = Field(200, ge=1, description="instances of a gradient step")
    lr: float = Field(3e-3, gt=0, description="step size of Adam in the first training")
    l2: float = Field(0.004, ge=0, description="weight of half the squared weights")
    steps: int = Field(50, ge=1, description="gradient steps a round of methods that train on verdicts")
    step_lr: float = Field(1e-3, gt=0, description="step size of these")
    weight: float = Field(1.0, gt=0, description="weight of the penalties of aila and rrr")
    samples: int = Field(8, ge=1, description="draws of a prediction")

    def setting(self) -> Setting:
        """Return the settings of a simulation."""
        from ial_nap.simulation import Setting

        return Setting(**self._own(SimulationFields))

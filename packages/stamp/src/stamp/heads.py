"""Mask heads: from what a set does to the channels of a group to a logit for each of them (spec 2.4).

``channel`` is ours: one small network, shared by all channels of all groups, reads how a channel behaves on this set
compared with how it usually does and with its neighbours, and adds that to a logit of the channel's own.
``mlp`` and ``clamp`` are the specification's, ``free`` reads nothing and is the control.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from shared_core.errors import InputError
from stamp.drawing import drawn_linear
from stamp.observing import Features
from stamp.sampling import safe_probability

__all__ = ["ChannelHead", "ClampHead", "FreeHead", "Head", "HeadName", "MlpHead", "make_head"]

HeadName = Literal["channel", "mlp", "clamp", "free"]

_MOMENTUM = 0.99


class Head(nn.Module):
    """Gives each channel of a group a logit.

    Parameters
    ----------
    widths : of the groups, by name
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        if not widths:
            raise InputError("the network has no group of channels that can be pruned; see stamp.trace for why")
        self.place = {name: k for k, name in enumerate(widths)}
        self.through = False
        """Whether gradients go on into the features: only where an encoder made what is observed, and has to learn."""

    def logits(
        self,
        name: str,
        features: Features,
        y: Int64[Tensor, " n"] | None = None,
        static: Float[Tensor, "width kinds"] | None = None,
    ) -> Float[Tensor, " width"]:
        """Return the logits of a group's channels; gradients go into the features only with `through`.

        Parameters
        ----------
        name : of the group
        features : what its channels do on the set
        y : class of each instance; only a head made with ``labels=True`` takes it
        static : further numbers a channel, as ratios to the group's mean
        """
        raise NotImplementedError

    def _still(self, x: Tensor) -> Tensor:
        return x if self.through else x.detach()

    def learn_statistics(self, name: str, features: Features, y: Int64[Tensor, " n"] | None = None) -> None:
        """Take a set of meta-training into the running statistics, where the head has any.

        Parameters
        ----------
        name : of the group
        features : what its channels do on the set
        y : class of each instance
        """


def make_head(name: HeadName, widths: Mapping[str, int], *, labels: bool = False, generator: torch.Generator) -> Head:
    """Make a head by name.

    Parameters
    ----------
    name : ``channel``, ``mlp``, ``clamp`` or ``free``
    widths : of the groups, by name
    labels : whether the head also looks at classes; ``channel`` only
    generator : of the initial parameters

    Raises
    ------
    InputError
        For an unknown name, or labels for a head that cannot read them.
    """
    kinds: dict[str, type[Head]] = {"mlp": MlpHead, "clamp": ClampHead, "free": FreeHead}
    if name == "channel":
        return ChannelHead(widths, labels=labels, generator=generator)
    if name not in kinds:
        raise InputError(f"head: must be channel, mlp, clamp or free, got '{name}'")
    if labels:
        raise InputError(f"labels: only the head 'channel' reads them, not '{name}'")
    return MlpHead(widths, generator=generator) if name == "mlp" else kinds[name](widths)


class FreeHead(Head):
    """One logit a channel, which no data change: ordinary learned gates.

    Parameters
    ----------
    widths : of the groups, by name
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__(widths)
        self.free = nn.ParameterList(torch.ones(width) for width in widths.values())

    def logits(
        self,
        name: str,
        features: Features,  # noqa: ARG002
        y: Int64[Tensor, " n"] | None = None,  # noqa: ARG002
        static: Float[Tensor, "width kinds"] | None = None,  # noqa: ARG002
    ) -> Float[Tensor, " width"]:
        """Return the channels' own logits.

        Parameters
        ----------
        name : of the group
        features, y, static : not used
        """
        return self.free[self.place[name]]


class MlpHead(Head):
    """A network a group, from the group's mean features to all its logits (spec 2.4).

    Normalising across channels keeps what distinguishes one set from another.

    Parameters
    ----------
    widths : of the groups, by name
    hidden : units of a network, at most as many as the group has channels
    generator : of the initial parameters
    """

    def __init__(self, widths: Mapping[str, int], hidden: int = 64, *, generator: torch.Generator) -> None:
        super().__init__(widths)
        self.first = nn.ModuleList(drawn_linear(2 * w, min(hidden, w), generator) for w in widths.values())
        self.second = nn.ModuleList(skip_init(nn.Linear, min(hidden, w), w) for w in widths.values())
        for layer in self.second.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0.0, 0.3, generator=generator)
                nn.init.ones_(layer.bias)

    def logits(
        self,
        name: str,
        features: Features,
        y: Int64[Tensor, " n"] | None = None,  # noqa: ARG002
        static: Float[Tensor, "width kinds"] | None = None,  # noqa: ARG002
    ) -> Float[Tensor, " width"]:
        """Apply the group's network.

        Parameters
        ----------
        name : of the group
        features : what its channels do on the set
        y, static : not used
        """
        h = self._still(features.mean)
        u = h / (h.square().mean(1, keepdim=True).clamp_min(1e-24).sqrt() + 1e-5)
        v = torch.cat([u.mean(0), _deviation(u)])
        k = self.place[name]
        return self.second[k](functional.relu(self.first[k](v)))


class ClampHead(Head):
    """A clamped affine function of each channel's standardised feature, averaged over the set (spec 2.4).

    Means and deviations run over meta-training: with those of the set itself the average would be `beta`, whatever the
    set. The clamp passes gradients through.

    Parameters
    ----------
    widths : of the groups, by name
    beta : at the start
    """

    def __init__(self, widths: Mapping[str, int], beta: float = 0.9) -> None:
        super().__init__(widths)
        self.gamma = nn.ParameterList(torch.ones(width) for width in widths.values())
        self.beta = nn.ParameterList(torch.full((width,), beta) for width in widths.values())
        self.statistics = nn.ModuleList(_Statistics(width, 1) for width in widths.values())

    def logits(
        self,
        name: str,
        features: Features,
        y: Int64[Tensor, " n"] | None = None,  # noqa: ARG002
        static: Float[Tensor, "width kinds"] | None = None,  # noqa: ARG002
    ) -> Float[Tensor, " width"]:
        """Standardise by the running statistics, clamp, and average.

        Parameters
        ----------
        name : of the group
        features : what its channels do on the set
        y, static : not used
        """
        k = self.place[name]
        statistics: _Statistics = self.statistics[k]  # pyright: ignore[reportAssignmentType]
        standard = statistics.standardised(self._still(features.mean)[..., None])[..., 0]
        raw = self.gamma[k] * standard + self.beta[k]
        # Added last, so that the forward value is that of the clamp, whose margin keeps the logit finite.
        pi = safe_probability(raw).detach() + (raw - raw.detach())
        return torch.logit(pi.mean(0))

    def learn_statistics(self, name: str, features: Features, y: Int64[Tensor, " n"] | None = None) -> None:  # noqa: ARG002
        """Let the running mean and variance of each channel move towards the set's.

        Parameters
        ----------
        name : of the group
        features : what its channels do on the set
        y : not used
        """
        statistics: _Statistics = self.statistics[self.place[name]]  # pyright: ignore[reportAssignmentType]
        statistics.learn(features.mean.detach()[..., None])


class ChannelHead(Head):
    """One network for all channels of all groups, beside a logit of each channel's own.

    It reads, of a channel: mean activation, its deviation over the set, its deviation over positions and the share of
    non-zeros, each compared with the channel's history over meta-training (in its deviations) and with the other
    channels of its group (as a ratio); norms of weights and what the channel does to the separation of the set; with
    labels, the share of the variance of its activation that lies between classes; and an embedding of the group. Its
    size does not depend on the widths.

    Parameters
    ----------
    widths : of the groups, by name
    labels : whether it looks at classes too
    hidden : units
    embedding : of a group
    static : numbers a channel from elsewhere: norms of weights and sensitivities
    generator : of the initial parameters
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        labels: bool = False,
        hidden: int = 32,
        embedding: int = 8,
        static: int = 4,
        generator: torch.Generator,
    ) -> None:
        super().__init__(widths)
        self.labels = labels
        kinds = 4 + labels
        self.free = nn.ParameterList(torch.ones(width) for width in widths.values())
        self.groups = nn.Parameter(0.3 * torch.randn(len(widths), embedding, generator=generator))
        self.first = drawn_linear(2 * kinds + static + embedding, hidden, generator)
        self.second = drawn_linear(hidden, 1, generator)
        self.statistics = nn.ModuleList(_Statistics(width, kinds) for width in widths.values())
        self.static = static

    def logits(
        self,
        name: str,
        features: Features,
        y: Int64[Tensor, " n"] | None = None,
        static: Float[Tensor, "width kinds"] | None = None,
    ) -> Float[Tensor, " width"]:
        """Add what the network says of each channel to the channel's own logit.

        Parameters
        ----------
        name : of the group
        features : what its channels do on the set
        y : class of each instance, where the head was made with labels
        static : further numbers a channel, as ratios to the group's mean; zeros without them

        Raises
        ------
        InputError
            For labels that are missing.
        """
        k = self.place[name]
        found = self._described(features, y)
        statistics: _Statistics = self.statistics[k]  # pyright: ignore[reportAssignmentType]
        usual = statistics.standardised(found).clamp(-4.0, 4.0)
        among = (found / (found.abs().mean(0) + 1e-6)).clamp(-1.0, 6.0) - 1
        fixed = found.new_zeros(len(found), self.static) if static is None else static.to(found).clamp(-6.0, 6.0) - 1
        group = self.groups[k].expand(len(found), -1)
        read = self.second(functional.relu(self.first(torch.cat([usual, among, fixed, group], 1))))
        return self.free[k] + read[:, 0]

    def learn_statistics(self, name: str, features: Features, y: Int64[Tensor, " n"] | None = None) -> None:
        """Let the history of each channel move towards what it does on this set.

        Parameters
        ----------
        name : of the group
        features : what its channels do on the set
        y : class of each instance, where the head was made with labels
        """
        statistics: _Statistics = self.statistics[self.place[name]]  # pyright: ignore[reportAssignmentType]
        statistics.learn(self._described(features, y).detach()[None])

    def _described(self, features: Features, y: Tensor | None) -> Float[Tensor, "width kinds"]:
        mean = self._still(features.mean)
        found = [
            mean.mean(0),
            _deviation(mean),
            self._still(features.std).mean(0),
            features.nonzero.detach().mean(0),
        ]
        if self.labels:
            if y is None:
                raise InputError("labels: this generator was made with labels=True; give it the classes too, y=")
            found.append(_between_classes(mean, y.to(mean.device)))
        return torch.stack(found, 1)


def _deviation(x: Float[Tensor, "n width"]) -> Float[Tensor, " width"]:
    """Return the deviation of each column; the root of 0 has no finite gradient."""
    variance = x.var(0, correction=0)
    varies = variance > 0
    return torch.where(varies, variance, 1.0).sqrt() * varies


def _between_classes(x: Float[Tensor, "n width"], y: Int64[Tensor, " n"]) -> Float[Tensor, " width"]:
    """Return the share of each column's variance that lies between classes."""
    _, y = y.unique(return_inverse=True)
    member = functional.one_hot(y).to(x)
    means = member.T @ x / member.sum(0)[:, None]
    between = (means[y] - x.mean(0)).square().mean(0)
    # Of a channel that is all but constant, rounding would have a share.
    return between / (x.var(0, correction=0) + 1e-6 * x.square().mean(0) + 1e-12)


class _Statistics(nn.Module):
    """Running means and variances: plain averages at first, with momentum 0.99 once they are over many sets."""

    mean: Tensor
    variance: Tensor
    sets: Tensor

    def __init__(self, width: int, kinds: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, kinds))
        self.register_buffer("variance", torch.ones(width, kinds))
        self.register_buffer("sets", torch.zeros(()))

    def learn(self, x: Float[Tensor, "n width kinds"]) -> None:
        rate = max(1 / (1 + float(self.sets)), 1 - _MOMENTUM)
        with torch.no_grad():
            # About the old mean, once there is one: the spread between sets counts too.
            centre = x.mean(0) if float(self.sets) == 0 else self.mean
            self.variance += rate * ((x - centre).square().mean(0) - self.variance)
            self.mean += rate * (x.mean(0) - self.mean)
            self.sets += 1

    def standardised(self, x: Float[Tensor, "*n width kinds"]) -> Float[Tensor, "*n width kinds"]:
        # A deviation of next to nothing would blow up rounding errors.
        floor = 1e-3 * self.mean.abs().mean(0) + 1e-6
        return (x - self.mean) / (self.variance.sqrt() + floor)

"""The mask generator: reads a set of the new data and says how probably each channel should stay (spec 2.3 to 2.5)."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from shared_core.errors import InputError
from shared_core.runs import atomic_path
from stamp.baselines.magnitudes import bn_scale, l1_norm
from stamp.encoders import EncoderName, make_encoder
from stamp.examples import Examples
from stamp.gating import separations
from stamp.heads import ChannelHead, HeadName, make_head
from stamp.observing import Features, observe
from stamp.projection import ExpectedCost, project
from stamp.structure import ChannelGroups
from stamp.training import HeadError, head_name

__all__ = ["GeneratorError", "MaskGenerator", "draw_set"]

_VERSION = 2
_STABLE = 3


class GeneratorError(InputError):
    """A generator that was made for another network, or a file that holds none."""


class MaskGenerator(nn.Module):
    """Reads a set and gives each channel of each group a keep probability: one for the set, not one for each example.

    The set goes through the frozen network in eval mode, once. What enters the consumers of each group is pooled, and a
    head makes logits of it.

    Parameters
    ----------
    groups : of the network that it is for
    encoder : ``instances`` shows the network the set as it is; ``attention`` and ``pma`` show pseudo-instances
        made of it, ``subsample`` a part of it (spec 2.3)
    head : ``channel`` (default), ``mlp``, ``clamp`` or ``free`` (spec 2.4; the first is ours)
    pseudo : pseudo-instances
    labels : whether the head ``channel`` also looks at the classes of the set; without, it needs none
    sensitivity : whether the head ``channel`` also reads what each channel does to the separation of the set's
        instances, or with `labels` of its classes; see `gating.separations`. It costs one backward pass a set
    classifier : qualified name of the network's last layer, for the sensitivity. Default: its last linear layer; a
        network without one has no sensitivity
    sequential : gate each group before the next is read, so that later logits see earlier pruning; off by default,
        because many sets then go through the network at once
    input_shape : of one input; ``attention`` and ``pma`` need it
    temperature : at which its decisions are as sharp as those that it was trained with; training sets it
    seed : of the initial parameters

    Raises
    ------
    InputError
        For unknown names, or a network in which no group can be pruned.

    Examples
    --------
    >>> from stamp.groups import trace
    >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)).eval()
    >>> x = torch.rand(16, 1, 8, 8)
    >>> generator = MaskGenerator(trace(net, x))
    >>> {name: tuple(pi.shape) for name, pi in generator(net, x).items()}
    {'0': (8,), '2': (4,)}
    """

    def __init__(
        self,
        groups: ChannelGroups,
        *,
        encoder: EncoderName = "instances",
        head: HeadName = "channel",
        pseudo: int = 32,
        labels: bool = False,
        sensitivity: bool = True,
        classifier: str | None = None,
        sequential: bool = False,
        input_shape: Sequence[int] | None = None,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.settings: dict[str, Any] = {
            "encoder": encoder,
            "head": head,
            "pseudo": pseudo,
            "labels": labels,
            "sensitivity": sensitivity,
            "classifier": classifier,
            "sequential": sequential,
            "input_shape": None if input_shape is None else [int(n) for n in input_shape],
            "temperature": float(temperature),
        }
        if labels and encoder not in ("instances", "subsample"):
            raise InputError(f"labels: pseudo-instances of encoder '{encoder}' have no class; take 'instances'")
        random = torch.Generator().manual_seed(seed)
        self.encoder = make_encoder(encoder, pseudo=pseudo, input_shape=input_shape, generator=random)
        self.head = make_head(head, groups.widths(), labels=labels, generator=random)
        self.labels = labels
        self.sensitivity = sensitivity and head == "channel"
        # Heads stop gradients where nothing could learn from them (spec 2.4); an encoder could not learn without.
        self.head.through = any(True for _ in self.encoder.parameters())
        self.sequential = sequential

    def logits(
        self,
        model: nn.Module,
        x: Float[Tensor, "set ..."],
        *,
        y: Int64[Tensor, " set"] | None = None,
        generator: torch.Generator | None = None,
        learn: bool = False,
        weights: Mapping[str, Float[Tensor, "width 2"]] | None = None,
        cost: ExpectedCost | None = None,
        budget: float | None = None,
    ) -> dict[str, Float[Tensor, " width"]]:
        """Return the logits of one set.

        Parameters
        ----------
        model : the network; run in eval mode and left as it is
        x : the set
        y : class of each instance; only with ``labels=True``
        generator : of the encoder ``subsample``
        learn : let the running statistics of the head learn from this set
        weights : what `weight_ratios` returned for this network, where many sets are read
        cost, budget : share of the cost for which the logits are to be used; with `sequential`, later groups see what
            it leaves of earlier ones, by a first reading that gates nothing

        Raises
        ------
        GeneratorError
            For a set of fewer than two instances.
        """
        if len(x) < 2:
            raise GeneratorError(f"a set has {len(x)} instances; give at least 2, their spread is part of what is read")
        if self.labels:
            chosen = torch.arange(len(x))
            if self.settings["encoder"] == "subsample":
                chosen = self.encoder(chosen, generator)
            x, y = x[chosen.to(x.device)], None if y is None else y[chosen.to(y.device)]
            shown = x
        else:
            shown = self.encoder(x, generator)
        static = self._static_of(model, shown, y, self.weight_ratios(model) if weights is None else weights)
        if not self.sequential:
            return self._at_once(model, shown, y, static, learn=learn)
        shift = 0.0
        if cost is not None and budget is not None:
            with torch.no_grad():
                shift = project(self._at_once(model, shown, y, static, learn=False), cost, budget)[1]
        found: dict[str, Tensor] = {}

        def gate(name: str, features: Features) -> Tensor:
            found[name] = self._of_group(name, features, y, static, learn=learn)
            return torch.sigmoid(found[name].detach() - shift)

        with _frozen(model):
            observe(model, self.groups, shown, gate=gate)
        return {group.name: found[group.name] for group in self.groups.prunable}

    def _at_once(
        self, model: nn.Module, shown: Tensor, y: Tensor | None, static: Mapping[str, Tensor], *, learn: bool
    ) -> dict[str, Float[Tensor, " _width"]]:
        with _frozen(model):
            features = observe(model, self.groups, shown)
        return {
            group.name: self._of_group(group.name, features[group.name], y, static, learn=learn)
            for group in self.groups.prunable
        }

    def forward(
        self,
        model: nn.Module,
        x: Float[Tensor, "set ..."],
        *,
        y: Int64[Tensor, " set"] | None = None,
        cost: ExpectedCost | None = None,
        budget: float | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Float[Tensor, " width"]]:
        """Return the keep probabilities of one set.

        Parameters
        ----------
        model : the network; run in eval mode and left as it is
        x : the set
        y : class of each instance; only with ``labels=True``
        cost, budget : if given, the expected cost is this share of the whole network's; see `projection.project`
        generator : of the encoder ``subsample``
        """
        logits = self.logits(model, x, y=y, generator=generator, cost=cost, budget=budget)
        return self._probabilities(logits, cost, budget)

    def pi(
        self,
        model: nn.Module,
        data: Examples,
        *,
        sets: int | Literal["auto"] = 10,
        set_size: int = 64,
        cost: ExpectedCost | None = None,
        budget: float | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Float[Tensor, " width"]]:
        """Average keep probabilities over sets drawn from some data: what a network is pruned by (spec 2.8).

        Parameters
        ----------
        model : the network
        data : of the new task, from its training part
        sets : how many are drawn; ``auto`` stops when three more sets change no decision at 1/2, at the latest after 30
        set_size : instances of a set; of fewer data, all, drawn with replacement
        cost, budget : if given, the expected cost is this share of the whole network's
        generator : of the draws

        Raises
        ------
        GeneratorError
            For fewer than two examples, or no set.
        """
        if sets != "auto" and sets < 1:
            raise GeneratorError(f"sets: must be at least 1, got {sets}")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        like = next(iter(model.parameters()), torch.zeros(()))
        weights = self.weight_ratios(model)
        total: dict[str, Tensor] = {}
        steady, before = 0, None
        most = 30 if sets == "auto" else sets
        with torch.no_grad():
            for number in range(1, most + 1):
                x, y = draw_set(data, set_size, generator)
                y = y.to(like.device) if self.labels else None
                logits = self.logits(
                    model, x.to(like), y=y, generator=generator, weights=weights, cost=cost, budget=budget
                )
                for name, value in self._probabilities(logits, cost, budget).items():
                    total[name] = total.get(name, 0.0) + value
                if sets == "auto":
                    kept = torch.cat([value > number / 2 for value in total.values()])
                    steady = steady + 1 if before is not None and bool((kept == before).all()) else 0
                    before = kept
                    if steady == _STABLE:
                        most = number
                        break
        return {name: value / most for name, value in total.items()}

    def _probabilities(
        self, logits: Mapping[str, Tensor], cost: ExpectedCost | None, budget: float | None
    ) -> dict[str, Tensor]:
        if cost is None or budget is None:
            return {name: torch.sigmoid(value) for name, value in logits.items()}
        return project(logits, cost, budget)[0]

    def _of_group(
        self, name: str, features: Features, y: Tensor | None, static: Mapping[str, Tensor], *, learn: bool
    ) -> Float[Tensor, " width"]:
        # A network in another precision, or elsewhere, is read all the same.
        like = next(self.head.parameters())
        features = Features(features.mean.to(like), features.std.to(like), features.nonzero.to(like))
        if learn:
            self.head.learn_statistics(name, features, y)
        return self.head.logits(name, features, y, static.get(name))

    def _static_of(
        self, model: nn.Module, x: Tensor, y: Tensor | None, weights: Mapping[str, Tensor]
    ) -> dict[str, Float[Tensor, "width 4"]]:
        """Ratios to the group's mean: norms of weights, of norms' scales, and the sensitivities, signed and not."""
        classifier = self.settings["classifier"] or _last_layer(model)
        if not self.sensitivity or classifier is None:
            return {name: functional.pad(value, (0, 2), value=1.0) for name, value in weights.items()}
        found = separations(model, self.groups, x.detach(), classifier, y if self.labels else None)
        both = {
            name: torch.stack([value, value.abs()], 1) / (value.abs().mean() + 1e-12) for name, value in found.items()
        }
        return {name: torch.cat([value, both[name].to(value)], 1) for name, value in weights.items()}

    def weight_ratios(self, model: nn.Module) -> dict[str, Float[Tensor, "width 2"]]:
        """Return norms of weights and of norms' scales, as ratios to their group's mean; nothing if no head reads them.

        Parameters
        ----------
        model : the network
        """
        if not isinstance(self.head, ChannelHead):
            return {}
        nothing = Examples(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), ("",))
        random = torch.Generator()
        found = [score(model, self.groups, nothing, random) for score in (l1_norm, bn_scale)]
        return {
            name: torch.stack([scores[name] / (scores[name].mean() + 1e-12) for scores in found], 1)
            for name in self.groups.widths()
        }

    def check(self, groups: ChannelGroups) -> None:
        """Refuse groups of another network.

        Parameters
        ----------
        groups : traced from the network to be pruned

        Raises
        ------
        GeneratorError
            When names, widths or places differ from those that the generator was made for.
        """
        if groups.signature() != self.groups.signature():
            own, other = self.groups.widths(), groups.widths()
            differ = [name for name in {**own, **other} if own.get(name) != other.get(name)]
            where = f"group '{differ[0]}' has {own.get(differ[0], 'no')} channels in it" if differ else "places differ"
            now = f" and {other.get(differ[0], 'none')} here" if differ else ""
            raise GeneratorError(f"the generator was made for another network: {where}{now}; meta-fit one for this one")

    def save(self, path: str | Path) -> None:
        """Write the generator, a small file beside the network's own.

        Parameters
        ----------
        path : of a safetensors file
        """
        about = {"version": _VERSION, "settings": self.settings, "signature": self.groups.signature()}
        with atomic_path(Path(path)) as temporary:
            tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
            # One entry: safetensors writes several in no fixed order.
            save_file(tensors, temporary, {"stamp.generator": json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path, groups: ChannelGroups) -> MaskGenerator:
        """Read a generator.

        Parameters
        ----------
        path : of a file that `save` wrote
        groups : traced from the network that it is to prune

        Raises
        ------
        GeneratorError
            For a file that holds no generator, or one for another network.
        """
        try:
            with safe_open(str(path), framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
                header = cast("dict[str, str]", file.metadata() or {})
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise GeneratorError(f"{path}: there is no such file; `stamp meta-fit` writes one") from None
        except (OSError, SafetensorError) as error:
            raise GeneratorError(f"{path}: is no generator ({str(error).splitlines()[0]})") from None
        try:
            about: dict[str, Any] = json.loads(header.get("stamp.generator", "{}"))
            version = about.get("version")
        except (ValueError, AttributeError, RecursionError):
            raise GeneratorError(f"{path}: its settings cannot be read; the file is damaged") from None
        if version != _VERSION:
            raise GeneratorError(f"{path}: holds tensors, but no generator of this version of stamp")
        try:
            made = cls(groups, **about["settings"])
        except (KeyError, TypeError, ValueError):
            raise GeneratorError(f"{path}: its settings cannot be read; the file is damaged") from None
        if about.get("signature") != groups.signature():
            expected = {name: value.shape for name, value in made.state_dict().items()}
            other = next((n for n, t in tensors.items() if n in expected and expected[n] != t.shape), "its groups")
            raise GeneratorError(
                f"{path}: was made for a network of other groups ({other} differs); meta-fit one for this network"
            )
        try:
            made.load_state_dict(tensors)
        except RuntimeError:
            raise GeneratorError(f"{path}: its tensors do not go with its settings; the file is damaged") from None
        return made


def _last_layer(model: nn.Module) -> str | None:
    """Name the classifier's last layer, which e.g. a network for segmentation has not."""
    try:
        return head_name(model)
    except HeadError:
        return None


@contextmanager
def _frozen(model: nn.Module) -> Generator[None]:
    """Let no gradient go into the network's parameters, whatever becomes of those into its input."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def draw_set(data: Examples, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a set: without replacement where there is enough, else as many as there are, with replacement.

    Parameters
    ----------
    data : to draw from
    size : instances wanted
    generator : of the draw

    Returns
    -------
    Inputs as the network takes them, and classes.

    Raises
    ------
    GeneratorError
        For fewer than two examples, or a size below 2.
    """
    if size < 2 or len(data) < 2:
        raise GeneratorError(f"a set of {size} of {len(data)} examples: it needs at least 2 of both")
    if len(data) >= size:
        index = torch.randperm(len(data), generator=generator)[:size]
    else:
        index = torch.randint(len(data), (len(data),), generator=generator)
    index = index.to(data.x.device)
    return data.inputs(index), data.y[index]

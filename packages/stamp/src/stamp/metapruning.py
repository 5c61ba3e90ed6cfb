"""MetaPruning: a network that makes a network's weights for any widths, and a search over widths with it (spec 3).

After Liu et al., "MetaPruning: Meta Learning for Automatic Neural Network Channel Pruning", ICCV 2019. The weights of
each layer come from two linear layers that read the widths at the layer's two ends; they are trained on the new data
at widths drawn at random. Widths are then searched by evolution: a candidate is judged by the accuracy of the network
made for it, its batch norms' statistics computed anew. One such hypernetwork serves one data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from stamp.axes import BATCH, axis_places
from stamp.drawing import endless_batches
from stamp.examples import Examples
from stamp.parameter_masks import layer_weights
from stamp.selection import BudgetError, Cost, widths_like
from stamp.structure import ChannelGroups
from stamp.surgery import cut, restrict
from stamp.training import accuracy, recalibrate_bn

__all__ = ["SCALES", "MetaPruned", "WeightMaker", "meta_pruning"]

SCALES = tuple(round(0.1 + 0.03 * k, 2) for k in range(31))

Keep = dict[str, Tensor]
Choice = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class MetaPruned:
    """The widths that the search found, and the network made for them.

    Parameters
    ----------
    keep : which channels of each group stay: the first ones, or the best by the scores given
    network : of these widths, with the weights made for them and batch norms' statistics of the training data
    accuracy : of `network` on the validation examples, in [0, 1]
    cost : share of the dense network's cost
    tried : accuracy of each candidate, by its width in each group
    """

    keep: Keep
    network: nn.Module
    accuracy: float
    cost: float
    tried: dict[tuple[int, ...], float]


def meta_pruning(
    model: nn.Module,
    groups: ChannelGroups,
    data: Examples,
    validation: Examples,
    cost: Cost,
    budget: float,
    *,
    generator: torch.Generator,
    steps: int = 1000,
    population: int = 50,
    generations: int = 20,
    parents: int = 10,
    mutation_rate: float = 0.1,
    scales: Sequence[float] = SCALES,
    scores: Mapping[str, Tensor] | None = None,
    hidden: int = 32,
    batch_size: int = 64,
    lr: float = 1e-3,
    recalibration: int = 20,
) -> MetaPruned:
    """Train a hypernetwork on the new data, and search the widths that its weights do best at within a budget.

    Parameters
    ----------
    model : from which the groups were traced, with a head for the data's classes; it stays as it is
    groups : its channel groups
    data : labelled; for training, and for the candidates' batch statistics
    validation : labelled; judges the candidates, so that it may not be the test data
    cost : of a choice of channels
    budget : share of the dense network's cost that a candidate may have
    generator : draws weights, batches and widths
    steps : of Adam with a cosine rate, each at widths of its own
    population : candidates of each generation: half of them crossed, and mutated, from parents, the rest drawn anew
    generations : of the search
    parents : best candidates so far, from which the next generation is made
    mutation_rate : probability that a group's width is drawn anew
    scales : widths to choose from, as shares of each group's channels, ascending
    scores : of each channel; a width keeps the best. Without them it keeps the first, as the authors do
    hidden : width of each hypernetwork
    batch_size, lr : of the training
    recalibration : batches for the batch statistics of a candidate

    Raises
    ------
    BudgetError
        If the smallest scales everywhere miss the budget; it carries the share that they reach.

    Notes
    -----
    The authors reject candidates outside a window of the cost. Here a candidate is shifted, all its scales by as many
    places, to the largest widths that meet the budget: the search works for any budget, and no candidate is lost. A
    hypernetwork starts at the network's own weights, where the authors train from scratch.

    Examples
    --------
    >>> from stamp.counting import CostModel
    >>> from stamp.groups import trace
    >>> net = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 2))
    >>> data = Examples(torch.rand(8, 2), torch.arange(8) % 2, ("a", "b"))
    >>> groups = trace(net, data.inputs())
    >>> cost = CostModel.macs(net, groups, data.inputs(slice(0, 1)))
    >>> generator = torch.Generator().manual_seed(0)
    >>> meta_pruning(net, groups, data, data, cost, 0.5, generator=generator, steps=5, population=3).network[0]
    Linear(in_features=2, out_features=5, bias=True)
    """
    widths = groups.widths()
    ranked = {n: -torch.arange(w) for n, w in widths.items()} if scores is None else scores
    search = _Search(widths, ranked, cost, budget, sorted(scales), generator)
    maker = WeightMaker(model, groups, hidden, generator)
    _train(maker, model, groups, data, search, steps=steps, batch_size=batch_size, lr=lr)

    tried: dict[Choice, float] = {}
    seed = int(torch.randint(1 << 31, (), generator=generator, device=generator.device))

    def made(choice: Choice) -> nn.Module:
        keep = search.keep(choice)
        small = cut(model, groups, keep).eval()
        with torch.no_grad():
            weights = restrict(model, groups, keep, maker(search.shares_of(choice)))
            for name, parameter in small.named_parameters():
                parameter.copy_(weights[name])
        return recalibrate_bn(small, data, batches=recalibration, batch_size=batch_size, seed=seed)

    candidates = search.drawn(population, tried)
    for generation in range(max(1, generations)):
        for choice in candidates:
            tried[choice] = accuracy(made(choice), validation)
        if generation + 1 < generations:
            best = sorted(tried, key=lambda choice: -tried[choice])[:parents]
            candidates = search.mutated(best, population // 2, mutation_rate, tried)
            candidates += search.crossed(best, population - population // 2, [*tried, *candidates])
            candidates += search.drawn(population - len(candidates), [*tried, *candidates])
    winner = max(tried, key=lambda choice: tried[choice])
    keep = search.keep(winner)
    network = made(winner)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in network.named_modules():
        module.training = modes.get(name, model.training)
    return MetaPruned(
        keep,
        network,
        tried[winner],
        search.share(winner),
        {tuple(search.widths_of(choice).values()): value for choice, value in tried.items()},
    )


class WeightMaker(nn.Module):
    """Make the parameters of a network, whole, for the share of its channels that each group is to keep.

    A weight with channels of groups at its ends is made by two linear layers from these groups' shares; all others are
    parameters of this module, the same for all widths.

    Parameters
    ----------
    model : whose weights are made at first, but for a deviation of a tenth of their spread
    groups : its channel groups
    hidden : width of each hypernetwork
    generator : draws the weights of the hypernetworks
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self._readers = _groups_of_weights(model, groups)
        self._names = [name for name, _ in model.named_parameters()]
        self.own = nn.ParameterDict()
        self.first = nn.ParameterDict()
        self.second = nn.ParameterDict()
        for name, parameter in model.named_parameters():
            key = name.replace(".", "/")
            self.own[key] = nn.Parameter(parameter.detach().clone())
            if name in self._readers:
                inputs = len(self._readers[name])
                first = torch.empty(hidden, inputs + 1, dtype=parameter.dtype, device=generator.device)
                second = torch.empty(parameter.numel(), hidden, dtype=parameter.dtype, device=generator.device)
                nn.init.normal_(first, std=math.sqrt(2 / (inputs + 1)), generator=generator)
                nn.init.normal_(second, std=0.1 / math.sqrt(hidden), generator=generator)
                spread = parameter.detach().std() if parameter.numel() > 1 else parameter.detach().abs().sum()
                self.first[key] = nn.Parameter(first.to(parameter.device))
                self.second[key] = nn.Parameter(second.to(parameter.device) * spread)

    def forward(self, shares: Mapping[str, float]) -> dict[str, Float[Tensor, "..."]]:
        """Return all parameters of the network, by name.

        Parameters
        ----------
        shares : share of the channels that is kept, of each group that is not frozen
        """
        made: dict[str, Tensor] = {}
        for name in self._names:
            key = name.replace(".", "/")
            weight = self.own[key]
            if name in self._readers:
                read = weight.new_tensor([*(shares[group] for group in self._readers[name]), 1.0])
                weight = weight + (self.second[key] @ (self.first[key] @ read).relu()).view_as(weight)
            made[name] = weight
        return made


def _groups_of_weights(model: nn.Module, groups: ChannelGroups) -> dict[str, list[str]]:
    weights = layer_weights(model)
    found: dict[str, list[str]] = {}
    for group in groups.prunable:
        for slot in group.slots:
            if slot.axis.startswith(("dim", "rows")):
                continue
            for place in axis_places(model.get_submodule(slot.module), slot.axis):
                name = f"{slot.module}.{place.tensor}" if slot.module else place.tensor
                if name in weights and group.name not in found.setdefault(name, []):
                    found[name].append(group.name)
    return found


def _train(
    maker: WeightMaker,
    model: nn.Module,
    groups: ChannelGroups,
    data: Examples,
    search: _Search,
    *,
    steps: int,
    batch_size: int,
    lr: float,
) -> None:
    optimizer = torch.optim.Adam(maker.parameters(), lr)
    schedule = CosineAnnealingLR(optimizer, max(1, steps))
    batches = endless_batches(model, data, search.generator, batch_size)
    with torch.enable_grad():
        for _ in range(steps):
            choice = search.anything()
            keep = search.keep(choice)
            small = cut(model, groups, keep).eval()
            for module in small.modules():
                # Widths differ from step to step, and so do the statistics of what a norm sees.
                if isinstance(module, BATCH):
                    module.train()
            x, y = next(batches)
            weights = restrict(model, groups, keep, maker(search.shares_of(choice)))
            loss = functional.cross_entropy(functional_call(small, weights, x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


class _Search:
    """Candidates: a place in the scales for each group, whose channels cost no more than the budget."""

    def __init__(
        self,
        widths: Mapping[str, int],
        scores: Mapping[str, Tensor],
        cost: Cost,
        budget: float,
        scales: Sequence[float],
        generator: torch.Generator,
    ) -> None:
        self.widths = widths
        # The summand keeps 0.29 * 100 from falling to 28.
        self.scaled = [[max(1, min(width, int(width * s + 1e-9))) for s in scales] for width in widths.values()]
        self.scores = scores
        self.cost = cost
        self.scales = scales
        self.budget = budget
        self.generator = generator
        self.dense = float(cost.exact({}))
        self._shares: dict[Choice, float] = {}
        least = self.share(tuple(0 for _ in widths))
        if least > budget:
            raise BudgetError(
                f"budget={budget} is out of reach: {scales[0]} of every group's channels still cost {least:.4f} of the"
                " dense network; raise the budget, or give smaller scales",
                least,
            )

    def widths_of(self, choice: Choice) -> dict[str, int]:
        return {name: scaled[at] for name, scaled, at in zip(self.widths, self.scaled, choice, strict=True)}

    def shares_of(self, choice: Choice) -> dict[str, float]:
        return {name: kept / self.widths[name] for name, kept in self.widths_of(choice).items()}

    def keep(self, choice: Choice) -> Keep:
        return widths_like(self.scores, self.widths_of(choice))

    def share(self, choice: Choice) -> float:
        if choice not in self._shares:
            self._shares[choice] = float(self.cost.exact(self.keep(choice))) / self.dense
        return self._shares[choice]

    def anything(self) -> Choice:
        """Draw a place for each group, at any cost."""
        return tuple(self._integers(len(self.scales), len(self.widths)))

    def fitted(self, choice: Choice) -> Choice:
        """Shift all places alike, as far up as the budget allows; of places with the same width, take the first."""
        most = len(self.scales) - 1
        low, high = -most, most
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.share(self._shifted(choice, middle)) <= self.budget
            low, high = (middle, high) if fits else (low, middle - 1)
        shifted = zip(self.scaled, self._shifted(choice, low), strict=True)
        return tuple(scaled.index(scaled[at]) for scaled, at in shifted)

    def _shifted(self, choice: Choice, by: int) -> Choice:
        most = len(self.scales) - 1
        return tuple(min(most, max(0, at + by)) for at in choice)

    def drawn(self, number: int, known: Collection[Choice]) -> list[Choice]:
        return self._new(number, known, self.anything)

    def mutated(self, parents: Sequence[Choice], number: int, rate: float, known: Collection[Choice]) -> list[Choice]:
        def mutate() -> Choice:
            parent = parents[self._integers(len(parents), 1)[0]]
            changes = torch.rand(len(parent), generator=self.generator, device=self.generator.device) < rate
            fresh = self.anything()
            return tuple(
                new if change else old for old, new, change in zip(parent, fresh, changes.tolist(), strict=True)
            )

        return self._new(number, known, mutate)

    def crossed(self, parents: Sequence[Choice], number: int, known: Collection[Choice]) -> list[Choice]:
        def cross() -> Choice:
            first, second = (parents[k] for k in self._integers(len(parents), 2))
            sides = self._integers(2, len(first))
            return tuple(a if side else b for a, b, side in zip(first, second, sides, strict=True))

        return self._new(number, known, cross)

    def _new(self, number: int, known: Collection[Choice], propose: Callable[[], Choice]) -> list[Choice]:
        """Collect proposals that fit and are not known, as many as come up in ten times as many trials."""
        seen = set(known)
        found: list[Choice] = []
        for _ in range(10 * number):
            if len(found) == number:
                break
            choice = self.fitted(propose())
            if choice not in seen:
                seen.add(choice)
                found.append(choice)
        return found

    def _integers(self, below: int, number: int) -> list[int]:
        return torch.randint(below, (number,), generator=self.generator, device=self.generator.device).tolist()

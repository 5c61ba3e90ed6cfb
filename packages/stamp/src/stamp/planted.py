"""Do masks follow the data? Where that is known, because specialists were merged, and where it is not (spec 8.6).

In the *planted* network each data set has an input channel of its own, and a specialist of each is merged block by
block: every layer holds the channels of all in random order, and no weight leads from one to another, so that exactly
the specialist's channels are of use for its data. The *shared* network was trained on all the data, each still in its
channel. So was the *plain* one, in which all sets come in by the same channels, as in any user's network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal, TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from shared_core.errors import InputError
from shared_core.runs import Claim, Result, Run, summarize
from stamp.examples import Examples
from stamp.experiments import FREE, Protocol, Target, fit_generator, pretrain
from stamp.groups import trace
from stamp.networks import smallconv
from stamp.pruning import Adaptivity
from stamp.pruning import adaptivity as measured

__all__ = ["Kind", "Seen", "Study", "in_channel", "merged", "numbered_from", "precision", "study"]

Kind = Literal["planted", "shared", "plain"]


def in_channel(data: Examples, place: int, sets: int) -> Examples:
    """Give images of one channel a channel of their own among those of several sets.

    Parameters
    ----------
    data : ``(n, 1, height, width)`` images
    place : their channel; the others are zero
    sets : channels

    Raises
    ------
    InputError
        For images of several channels.

    Examples
    --------
    >>> data = Examples(torch.ones(2, 1, 4, 4), torch.tensor([0, 1]), ("a", "b"))
    >>> in_channel(data, 1, 2).x.sum((2, 3)).tolist()
    [[0.0, 16.0], [0.0, 16.0]]
    """
    if len(data.shape) != 3 or data.shape[0] != 1:
        raise InputError(f"{data.name}: inputs have shape {data.shape}; each set needs images of one channel")
    x = torch.zeros(len(data), sets, *data.shape[1:], dtype=data.x.dtype)
    x[:, place] = data.x[:, 0]
    return replace(data, x=x)


def numbered_from(data: Examples, first: int, class_names: Sequence[str]) -> Examples:
    """Give the classes of a set their place among those of several sets.

    Parameters
    ----------
    data : of one set
    first : place of its first class
    class_names : of all sets

    Examples
    --------
    >>> data = Examples(torch.ones(2, 3), torch.tensor([0, 1]), ("a", "b"))
    >>> numbered_from(data, 3, tuple("xyzab")).y.tolist()
    [3, 4]
    """
    return replace(data, y=data.y + first, class_names=tuple(class_names))


def merged(
    specialists: Sequence[nn.Module], generator: torch.Generator
) -> tuple[nn.Module, tuple[Int64[Tensor, " _width"], ...]]:
    """Merge networks of one architecture, made by `stamp.networks.smallconv` for one channel, into one.

    Parameters
    ----------
    specialists : two or more, of equal numbers of channels
    generator : of the order of channels in each layer

    Returns
    -------
    model : in evaluation mode, with a channel of input for each specialist and the outputs of all of them in a row
    owners : of each layer but the head, whose channel each one is

    Raises
    ------
    InputError
        For fewer than two, or other networks.
    """
    stacks = [_layers(network) for network in specialists]
    if len(stacks) < 2 or len({tuple(conv.out_channels for conv, _ in blocks) for blocks, _ in stacks}) > 1:
        raise InputError("specialists: need two or more networks of the same widths")
    widths = [conv.out_channels for conv, _ in stacks[0][0]]
    heads = [head for _, head in stacks]
    number = len(stacks)
    model = smallconv(sum(head.out_features for head in heads), number, channels=[number * width for width in widths])
    blocks, head = _layers(model)
    entering = [torch.tensor([place]) for place in range(number)]
    owners: list[Tensor] = []
    with torch.no_grad():
        for depth, ((conv, norm), width) in enumerate(zip(blocks, widths, strict=True)):
            parts = torch.randperm(number * width, generator=generator).split(width)
            conv.weight.zero_()
            owner = torch.zeros(number * width, dtype=torch.int64)
            for place, (own, before) in enumerate(zip(parts, entering, strict=True)):
                from_conv, from_norm = stacks[place][0][depth]
                conv.weight[own[:, None], before[None, :]] = from_conv.weight
                for name, value in from_norm.state_dict().items():
                    if value.dim():
                        norm.state_dict()[name][own] = value
                owner[own] = place
            owners.append(owner)
            entering = list(parts)
        head.weight.zero_()
        first = 0
        for before, own_head in zip(entering, heads, strict=True):
            rows = torch.arange(first, first + own_head.out_features)
            head.weight[rows[:, None], before[None, :]] = own_head.weight
            head.bias[rows] = own_head.bias
            first += own_head.out_features
    return model.eval(), tuple(owners)


def precision(keep: Bool[Tensor, " width"], owner: Int64[Tensor, " width"], place: int) -> float:
    """Return the share of kept channels that belong to one specialist.

    Parameters
    ----------
    keep : which channels stay
    owner : whose each channel is
    place : of the specialist

    Examples
    --------
    >>> precision(torch.tensor([True, True, True, False]), torch.tensor([0, 0, 1, 1]), 0)
    0.6666666666666666
    """
    return int((owner[keep] == place).sum()) / int(keep.sum())


def _layers(network: nn.Module) -> tuple[list[tuple[nn.Conv2d, nn.BatchNorm2d]], nn.Linear]:
    modules = list(network.children())
    convs = [module for module in modules if isinstance(module, nn.Conv2d)]
    norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
    head = modules[-1] if modules else None
    if not convs or len(convs) != len(norms) or not isinstance(head, nn.Linear):
        raise InputError(f"specialists: need networks that smallconv made, got a {type(network).__name__}")
    return list(zip(convs, norms, strict=True)), head


# ---- experiment 6


class Seen(TypedDict):
    """What one seed showed; plain JSON. Accuracies in [0, 1], by data set and mask.

    ``recalibrated`` and ``plain`` are with and without the batch norms' statistics of the data. ``precision``, by data
    set and group, is that of a planted network only. ``overlap``, by group, is the mean over pairs of data sets.
    """

    recalibrated: dict[str, dict[str, float]]
    plain: dict[str, dict[str, float]]
    precision: dict[str, dict[str, float]]
    overlap: dict[str, float]
    widths: dict[str, dict[str, list[int]]]
    seconds: float


@dataclass(frozen=True, eq=False)
class Study:
    """What the experiment found.

    Parameters
    ----------
    results : rows of the table
    claims : the specification's, as measured
    seen : by seed
    """

    results: list[Result]
    claims: list[Claim]
    seen: dict[int, Seen]


def _silent(note: str, steps: int) -> None:
    del note, steps


def study(
    run: Run,
    kind: Kind,
    domains: Callable[[int], Mapping[str, Target]],
    *,
    unseen: Callable[[int], Mapping[str, Target]] | None = None,
    seeds: Sequence[int],
    protocol: Protocol,
    budget: float,
    channels: Sequence[int] = (16, 32, 32),
    control: bool = True,
    draws: int = 10,
    min_channels: int | float = 0.05,
    device: torch.device | str = "cpu",
    advance: Callable[[str, int], None] = _silent,
) -> Study:
    """Judge each data set with its own mask, with the others', and with baselines' at the same widths.

    Nothing is fine-tuned, and the network keeps its head, of which only the data set's classes compete. Where there are
    `unseen` sets, these are judged instead, by class means: a head for them does not exist.

    Parameters
    ----------
    run : keeps what is done
    kind : of network
    domains : data sets of a seed, by name, of images of one channel
    unseen : likewise, other sets, which neither the network nor the generator is trained on; for a plain network
    seeds : of networks, generators and masks
    protocol : of both trainings; its `MetaConfig` should take rows of the network's own head, ``inner="slice"``
    budget : share of the multiply-adds
    channels : of each specialist's layers; the network has as many times more as there are data sets
    control : measure `FREE` masks, too
    draws : of random masks
    min_channels : the least to keep of each group, see `selection.select`
    device : where
    advance : called with a note and the number of seeds done
    """

    def compute(seed: int) -> Seen:
        with protocol.alone(device):
            return _seen(
                kind, domains(seed), {} if unseen is None else unseen(seed), seed, protocol, budget, channels, device,
                control=control, draws=draws, min_channels=min_channels,
            )  # fmt: skip

    def told(key: str, found: Seen) -> None:
        own = ", ".join(f"{name} {100 * row['own']:.1f} %" for name, row in found["recalibrated"].items())
        advance(f"{key}, own masks: {own}", 1)

    found = run.each({f"{kind}/{seed}": partial(compute, seed) for seed in seeds}, told)
    seen = {seed: found[f"{kind}/{seed}"] for seed in seeds}
    what = f"{kind} network" if unseen is None else f"unseen by a {kind} network"
    return Study(_rows(what, seen), _claims(kind, what, seen), seen)


def _network(
    kind: Kind, domains: Mapping[str, Target], seed: int, protocol: Protocol, channels: Sequence[int], device: str
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Train the network, and return it with the owners of its channels, where they are known."""

    def trained(model: nn.Module, data: Examples, seed: int) -> nn.Module:
        model = model.to(device)
        pretrain(model, data, steps=protocol.pretrain_steps, lr=protocol.pretrain_lr, seed=seed)
        return model

    if kind == "planted":
        specialists = [
            trained(smallconv(target.train.num_classes, 1, channels=channels, seed=seed + place), target.train, seed)
            for place, target in enumerate(domains.values())
        ]
        model, owners = merged([network.cpu() for network in specialists], torch.Generator().manual_seed(seed))
        return model.to(device), owners
    parts = [target.train for target in _placed(domains, kind).values()]
    everything = replace(parts[0], x=torch.cat([p.x for p in parts]), y=torch.cat([p.y for p in parts]), name="all")
    widths = [len(parts) * width for width in channels]
    inputs = parts[0].shape[0] if kind == "plain" else len(parts)
    return trained(smallconv(everything.num_classes, inputs, channels=widths, seed=seed), everything, seed), ()


def _placed(domains: Mapping[str, Target], kind: Kind) -> dict[str, Target]:
    """Give each data set its channel, or all the same, and its classes their place in the head."""
    names = [f"{name} {label}" for name, target in domains.items() for label in target.train.class_names]
    starts = np.cumsum([0, *(target.train.num_classes for target in domains.values())]).tolist()

    def moved(data: Examples, place: int) -> Examples:
        seen = replace(data, name="all") if kind == "plain" else in_channel(data, place, len(domains))
        return numbered_from(seen, starts[place], names)

    return {
        name: Target(*(moved(part, place) for part in (target.train, target.validation, target.test)))
        for place, (name, target) in enumerate(domains.items())
    }


def _seen(
    kind: Kind,
    domains: Mapping[str, Target],
    unseen: Mapping[str, Target],
    seed: int,
    protocol: Protocol,
    budget: float,
    channels: Sequence[int],
    device: torch.device | str,
    *,
    control: bool,
    draws: int,
    min_channels: int | float,
) -> Seen:
    if len(domains) < 2:
        raise InputError(f"domains: need two or more, got {', '.join(domains) or 'none'}")
    if len({target.train.x.dtype for target in domains.values()}) > 1:
        raise InputError("domains: all of them must be bytes, or none")
    if unseen and kind != "plain":
        raise InputError(f"unseen: in a {kind} network each set has a channel of its own; take kind='plain'")
    if both := [name for name in unseen if name in domains]:
        raise InputError(f"unseen: '{both[0]}' is one of the sets to train on")
    model, owners = _network(kind, domains, seed, protocol, channels, str(device))
    placed = _placed(domains, kind)
    starts = np.cumsum([0, *(target.train.num_classes for target in domains.values())]).tolist()
    classes = {name: range(*ends) for name, ends in zip(domains, pairwise(starts), strict=True)}
    groups = trace(model, next(iter(placed.values())).train.inputs(slice(0, 2)))
    tasks = [
        target.train if kind == "plain" else in_channel(target.train, place, len(domains))
        for place, target in enumerate(domains.values())
    ]
    generator, history = fit_generator(model, groups, tasks, protocol, seed=seed)
    pairs = {name: (target.train, target.test) for name, target in (unseen or placed).items()}
    if unseen:
        # What the network was trained on lends its masks.
        pairs |= {name: (target.train, target.test) for name, target in domains.items()}

    def judged(by: object, *, recalibrate: bool, baselines: Sequence[str]) -> Adaptivity:
        return measured(
            model, groups, by, pairs, budget, baselines=baselines, draws=draws, recalibrate=recalibrate,  # pyright: ignore[reportArgumentType]
            keep_head=not unseen, classes=None if unseen else classes, masks=protocol.sets, seed=seed,
            min_channels=min_channels, only=[*unseen] or None,
        )  # fmt: skip

    baselines = ("random", "l1", "bn", "act", "snip")
    found = judged(generator, recalibrate=True, baselines=baselines)
    plain = judged(generator, recalibrate=False, baselines=baselines)
    if control:
        free, _ = fit_generator(model, groups, tasks, protocol, seed=seed, head="free")
        for table, recalibrate in ((found.accuracy, True), (plain.accuracy, False)):
            for name, row in judged(free, recalibrate=recalibrate, baselines=()).accuracy.items():
                table[name][FREE] = row["own"]
    right: dict[str, dict[str, float]] = {}
    for place, name in enumerate(domains if owners else ()):
        keep = found.keep[name]
        right[name] = {g: precision(keep[g], owner, place) for g, owner in zip(groups.widths(), owners, strict=True)}
    widths = groups.widths()
    return {
        "recalibrated": found.accuracy,
        "plain": plain.accuracy,
        "precision": right,
        "overlap": {g: float(np.mean([each[g] for each in found.overlaps.values()])) for g in widths},
        "widths": {name: {g: [int(found.keep[name][g].sum()), widths[g]] for g in widths} for name in found.accuracy},
        "seconds": history.seconds,
    }


def _rows(what: str, seen: Mapping[int, Seen]) -> list[Result]:
    found: list[Result] = []
    first = next(iter(seen.values()))
    seconds = sum(each["seconds"] for each in seen.values())
    for domain in first["recalibrated"]:
        dataset = f"{domain}, {what}"
        for part, metric in (("recalibrated", "accuracy"), ("plain", "accuracy, not recalibrated")):
            for mask in first[part][domain]:
                values = [100 * each[part][domain][mask] for each in seen.values()]
                found.append(
                    summarize(values, dataset=dataset, method=mask, metric=metric, unit="%", better="higher",
                              seconds=seconds if mask == "own" else 0.0)
                )  # fmt: skip
        for group in first["precision"].get(domain, ()):
            values = [100 * each["precision"][domain][group] for each in seen.values()]
            metric = f"precision in group {group}"
            found.append(summarize(values, dataset=dataset, method="own", metric=metric, unit="%", better="higher"))
    for group in first["overlap"]:
        values = [each["overlap"][group] for each in seen.values()]
        metric = f"overlap of masks in group {group}"
        found.append(summarize(values, dataset=what, method="own", metric=metric, better="lower"))
    return found


def _claims(kind: Kind, what: str, seen: Mapping[int, Seen]) -> list[Claim]:
    """Hold the worst data set, the mean over seeds, against the specification's gates."""
    domains = list(next(iter(seen.values()))["recalibrated"])

    def ahead(masks: Sequence[str]) -> float:
        """Return by how many points the own mask is ahead of the best of some."""

        def of(domain: str) -> float:
            rows = [each["recalibrated"][domain] for each in seen.values()]
            best = max(np.mean([row[mask] for row in rows]) for mask in masks)
            return 100 * float(np.mean([row["own"] for row in rows]) - best)

        return min(map(of, domains))

    where = f"{what}, worst data set, mean of {len(seen)} seed{'s' * (len(seen) > 1)}, without fine-tuning"
    source = "specification, experiment 6"

    def points(text: str, masks: Sequence[str], threshold: float) -> Claim:
        value = ahead(masks)
        # No better than equal is not better.
        holds = value >= threshold if threshold else value > 0
        return Claim(text=f"{text} ({where})", source=source, holds=holds, value=value, threshold=threshold)

    if kind == "plain":
        found = [
            points("a set's own mask is better than another set's", ("other",), 0.0),
            points("a set's own mask is better than random, l1, bn and act ones", ("random", "l1", "bn", "act"), 0.0),
        ]
    elif kind == "shared":
        found = [
            points("a set's own mask is 10 points better than random, l1 and act ones", ("random", "l1", "act"), 10.0)
        ]
    else:
        groups = next(iter(seen.values()))["precision"][domains[0]]
        worst = min(float(np.mean([e["precision"][d][g] for e in seen.values()])) for d in domains for g in groups)
        found = [
            points("a set's own mask is 30 points better than another set's", ("other",), 30.0),
            points(
                "a set's own mask is 20 points better than those of methods that use no labels",
                ("random", "l1", "bn", "act"),
                20.0,
            ),
            Claim(
                text=f"nine in ten channels kept are the specialist's, in the worst group ({where})", source=source,
                holds=worst >= 0.9, value=worst, threshold=0.9,
            ),
        ]  # fmt: skip
    if FREE in next(iter(seen.values()))["recalibrated"][domains[0]]:
        text = "masks follow the data: a set's own mask is better than one meta-fitted for all data"
        value = ahead((FREE,))
        found.append(
            Claim(text=f"{text} ({where})", source="this project", holds=value > 0, value=value, threshold=0.0)
        )
    return found

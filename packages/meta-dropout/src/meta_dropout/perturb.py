"""Perturb a module of one's own: say where, and its layers get noise generators; which parameters play which role."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from meta_dropout.backbones import initialise
from meta_dropout.layers import BatchShift, Noise, PerturbedHead, PerturbedLayer, UnsupportedLayerError
from meta_dropout.passes import Pass, running
from shared_core.errors import InputError

__all__ = ["Perturbed", "Role"]

Role = Literal["theta", "phi", "norm"]
_IN_PLACE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.ReLU6, nn.SiLU, nn.Mish, nn.Hardswish, nn.Dropout)


class Perturbed(nn.Module):
    """A copy of a module whose layers are perturbed by learned noise.

    Its parameters have roles. ``theta`` is adapted to each task; ``phi``, the noise generators, and ``norm``, the
    shifts of normalisations, are learned over tasks and never adapted.

    Parameters
    ----------
    module : any module that maps a batch to logits ``(n, ways)``, or to outputs ``(n, ...)`` for regression
    sites : names of its Conv1d, Conv2d and Linear layers to perturb, as in ``named_modules()``; None takes all of them
    head : name of the last linear layer, which gets additive noise; None takes the last linear layer that there is
    noise : family, see :class:`meta_dropout.layers.PerturbedLayer`
    rate : share of units dropped, for ``noise="dropout"``
    seed : of the generators' initial weights, normal with standard deviation 0.02 as in the authors' code; biases are 0
    normalise : what to do with BatchNorm layers, whose running averages have no meaning in a task: ``replace`` them by
        :class:`meta_dropout.layers.BatchShift`, or ``refuse``

    Raises
    ------
    UnsupportedLayerError
        When a site is no such layer, or a module cannot be batched over tasks; it is named.

    Examples
    --------
    >>> model = Perturbed(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    >>> {role: sum(p.numel() for p in model.role(role).values()) for role in ("theta", "phi", "norm")}
    {'theta': 67, 'phi': 49, 'norm': 0}
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        sites: Sequence[str] | None = None,
        head: str | None = None,
        noise: Noise = "multiplicative",
        rate: float = 0.1,
        seed: int = 0,
        normalise: Literal["replace", "refuse"] = "replace",
    ) -> None:
        super().__init__()
        self.module, self.noise = copy.deepcopy(module), noise
        self._refuse_what_cannot_be_batched(normalise)
        layers = {
            name: layer
            for name, layer in self.module.named_modules()
            if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear)
        }
        linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
        if head is None:
            head = linear[-1] if linear else None
        elif head not in linear:
            raise UnsupportedLayerError(f"head: '{head}' is no Linear layer of the module; there are: {_list(linear)}")
        self.head = head
        chosen = list(layers) if sites is None else list(sites)
        for name in chosen:
            if name not in layers:
                found = dict(self.module.named_modules()).get(name)
                what = "there is no such layer" if found is None else f"it is a {type(found).__name__}"
                raise UnsupportedLayerError(
                    f"sites: cannot perturb '{name}', {what}; Conv1d, Conv2d and Linear layers here: {_list(layers)}"
                )
        self.sites = tuple(chosen)
        for name in chosen:
            layer = layers[name]
            is_head = name == head and isinstance(layer, nn.Linear)
            site = (
                PerturbedHead(layer, noise)
                if is_head and isinstance(layer, nn.Linear)
                else PerturbedLayer(layer, noise, rate=rate)
            )
            site.name = name
            for kind, branch in site.named_children():
                if kind == "code":
                    initialise(branch, seed=seed, init="kaiming")
                elif kind != "main":
                    initialise(branch, seed=seed + 1009 * len(name) + sum(name.encode()) + (kind == "spread"))
            self._put(name, site)
        for name, layer in self.module.named_modules():
            if isinstance(layer, BatchShift):
                layer.name = name
        self._roles: dict[str, Role] = {name: self._role_of(name) for name, _ in self.named_parameters()}

    def _put(self, name: str, layer: nn.Module) -> None:
        if not name:
            self.module = layer
            return
        parent, _, last = name.rpartition(".")
        setattr(self.module.get_submodule(parent), last, layer)

    def _refuse_what_cannot_be_batched(self, normalise: str) -> None:
        for name, layer in list(self.module.named_modules()):
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
                if normalise == "refuse":
                    raise UnsupportedLayerError(
                        f"'{name}' is a {type(layer).__name__}: its running averages mix tasks; use"
                        " normalise='replace', GroupNorm, or meta_dropout.BatchShift"
                    )
                self._put(name, BatchShift(layer.num_features))
            elif isinstance(layer, _IN_PLACE) and getattr(layer, "inplace", False):
                # Writing over a value that every task shares is an error under vmap.
                layer.inplace = False
            elif isinstance(layer, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout):
                raise UnsupportedLayerError(
                    f"'{name}' is a {type(layer).__name__}: it draws from the global generator; leave it out, or use"
                    " the baseline method 'dropout'"
                )

    def _role_of(self, name: str) -> Role:
        owner, _, last = name.rpartition(".")
        module = self.get_submodule(owner)
        if isinstance(module, BatchShift):
            return "norm"
        branches = owner.split(".")
        if (
            "generator" in branches
            or "spread" in branches
            or (isinstance(module, PerturbedLayer) and last in {"level", "scale"})
        ):
            return "theta" if self.noise in {"more-params", "information"} else "phi"
        return "theta"

    def role(self, role: Role) -> dict[str, nn.Parameter]:
        """Parameters of one role, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if self._roles[name] == role}

    def prepare(self, x: Tensor) -> dict[str, tuple[int, ...]]:
        """Look at one batch: give per-unit noise its shape, and return the shape of each site's noise.

        Parameters
        ----------
        x : ``(n, ...)`` any batch

        Returns
        -------
        Shapes of one pass's noise for this batch, by site; the families that draw none are absent.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        fresh = [m for m in self.modules() if isinstance(m, PerturbedLayer) and m.noise == "independent"]
        with torch.no_grad():
            if fresh and any(layer.level.dim() == 1 for layer in fresh):
                plain: dict[str, tuple[int, ...]] = {}
                for layer in fresh:
                    layer.level = nn.Parameter(layer.level.new_zeros(()))
                with running(Pass(shapes=plain)):
                    self(x)
                for layer in fresh:
                    layer.shape_units(plain[layer.name])
            with running(Pass(shapes=shapes)):
                self(x)
        sampled = {m.name for m in self.modules() if isinstance(m, PerturbedLayer | PerturbedHead) and m.sampled}
        return {name: shape for name, shape in shapes.items() if name in sampled}

    def data_sites(self, x: Tensor) -> tuple[str, ...]:
        """Sites whose input is the data itself: their generators say the same at every step of an adaptation.

        Parameters
        ----------
        x : ``(n, ...)`` any batch
        """
        inputs: dict[str, Tensor] = {}
        with torch.no_grad(), running(Pass(inputs=inputs)):
            self(x)
        return tuple(
            name for name, h in inputs.items() if h is x and isinstance(self.module.get_submodule(name), PerturbedLayer)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the module."""
        return self.module(x)

    def call(self, parameters: Mapping[str, Tensor], x: Tensor, told: Pass) -> Any:
        """Evaluate with other parameters, and with what the pass is told; no state is read or written.

        Parameters
        ----------
        parameters : by the names of ``named_parameters()``
        x : ``(n, ...)``
        told : noise and statistics
        """
        with running(told):
            return torch.func.functional_call(self, dict(parameters), (x,))


def _list(names: Any) -> str:
    shown = [name or "(the module itself)" for name in names]
    return ", ".join(shown) if shown else "none"


def require_finite(x: Tensor, what: str) -> None:
    """Refuse NaN and infinity in images or features."""
    if not bool(torch.isfinite(x).all()):
        raise InputError(f"{what}: holds NaN or infinite values")

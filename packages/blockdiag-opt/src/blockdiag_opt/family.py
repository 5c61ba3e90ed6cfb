"""The members of the family under the names their diagonal counterparts have made familiar."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from blockdiag_opt.optimizer import BlockDiagonal

__all__ = [
    "AdaBlock",
    "BlockAMSGrad",
    "BlockAdaFom",
    "BlockAdagrad",
    "BlockAdam",
    "BlockAdamW",
    "BlockRMSprop",
    "RandomizedBlockAdam",
]


class BlockAdam(BlockDiagonal):
    """Adam with a second-moment matrix for every block; a drop-in for ``torch.optim.Adam``.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad : as of ``torch.optim.Adam``; with ``block_size=1`` the steps are
        Adam's exactly. The best `lr` is another one than Adam's: tune it from 0.02 on.
    options : every keyword of :class:`BlockDiagonal`: ``block_size=10``, ``grouping="auto"``, ``clip=None``,
        ``update_interval=1``, ...

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(20, 4)
    >>> optimizer = BlockAdam(model.parameters(), lr=1e-2)
    >>> model(torch.ones(8, 20)).square().mean().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | int | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | int = 1e-8,
        weight_decay: float | int = 0.0,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


class BlockAdamW(BlockDiagonal):
    """AdamW with a second-moment matrix for every block; a drop-in for ``torch.optim.AdamW``.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad : as of ``torch.optim.AdamW``; the decay is decoupled
    options : every keyword of :class:`BlockDiagonal`

    Examples
    --------
    >>> import torch
    >>> BlockAdamW(torch.nn.Linear(3, 3).parameters()).defaults["weight_decay"]
    0.01
    """

    def __init__(
        self,
        params: Any,
        lr: float | int | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | int = 1e-8,
        weight_decay: float | int = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        given: dict[str, Any] = {"decoupled": True} | options
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **given)


class BlockAMSGrad(BlockDiagonal):
    """AMSGrad for blocks: second moments are bounded from below by all earlier ones in the Loewner order.

    There is no largest element of two symmetric matrices; ``Vmax + [V - Vmax]_+`` is the least change of the old bound
    that dominates both, and the elementwise maximum if they are diagonal. Our reconstruction: the paper does not say.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay : as of ``torch.optim.Adam``
    options : every keyword of :class:`BlockDiagonal`

    Examples
    --------
    >>> import torch
    >>> BlockAMSGrad(torch.nn.Linear(3, 3).parameters()).defaults["amsgrad"]
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float | int | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | int = 1e-8,
        weight_decay: float | int = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, True, **options)


class BlockAdaFom(BlockDiagonal):
    """AdaFom for blocks: second moments are the mean of all gradients' outer products, the rate falls as 1/sqrt(t).

    The member for which the convergence proof is cleanest (its framework: Chen et al., arXiv:1808.02941).

    Parameters
    ----------
    params, lr, betas, eps, weight_decay : as of ``torch.optim.Adam``; ``betas[1]`` is not used
    options : every keyword of :class:`BlockDiagonal`

    Examples
    --------
    >>> import torch
    >>> BlockAdaFom(torch.nn.Linear(3, 3).parameters()).defaults["method"]
    'adafom'
    """

    def __init__(
        self,
        params: Any,
        lr: float | int | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | int = 1e-8,
        weight_decay: float | int = 0.0,
        **options: Any,
    ) -> None:
        given: dict[str, Any] = {"method": "adafom"} | options
        super().__init__(params, lr, betas, eps, weight_decay, **given)


class BlockRMSprop(BlockDiagonal):
    """RMSprop with a second-moment matrix for every block; a drop-in for ``torch.optim.RMSprop``, not centred.

    Parameters
    ----------
    params, lr, alpha, eps, weight_decay, momentum : as of ``torch.optim.RMSprop``
    centered : refused if true
    options : every keyword of :class:`BlockDiagonal`

    Examples
    --------
    >>> import torch
    >>> BlockRMSprop(torch.nn.Linear(3, 3).parameters()).defaults["betas"]
    (0.0, 0.99)
    """

    def __init__(
        self,
        params: Any,
        lr: float | int | Tensor = 1e-2,
        alpha: float | int = 0.99,
        eps: float | int = 1e-8,
        weight_decay: float | int = 0.0,
        momentum: float | int = 0.0,
        centered: bool = False,
        **options: Any,
    ) -> None:
        if centered:
            raise ValueError("centered=True is not to be had for blocks; leave it out")
        given: dict[str, Any] = {"method": "rmsprop", "momentum": momentum} | options
        super().__init__(params, lr, (0.0, alpha), eps, weight_decay, **given)


class BlockAdagrad(BlockDiagonal):
    """Adagrad with the sum of outer products of every block; a drop-in for ``torch.optim.Adagrad``.

    Parameters
    ----------
    params, lr, lr_decay, weight_decay, initial_accumulator_value, eps : as of ``torch.optim.Adagrad``
    options : every keyword of :class:`BlockDiagonal`; ``grouping="full"`` is full-matrix Adagrad

    Examples
    --------
    >>> import torch
    >>> BlockAdagrad(torch.nn.Linear(3, 3).parameters()).defaults["eps"]
    1e-10
    """

    def __init__(
        self,
        params: Any,
        lr: float | int | Tensor = 1e-2,
        lr_decay: float | int = 0.0,
        weight_decay: float | int = 0.0,
        initial_accumulator_value: float | int = 0.0,
        eps: float | int = 1e-10,
        **options: Any,
    ) -> None:
        given: dict[str, Any] = {
            "method": "adagrad",
            "lr_decay": lr_decay,
            "initial_accumulator_value": initial_accumulator_value,
        } | options
        super().__init__(params, lr, (0.0, 0.0), eps, weight_decay, **given)


class RandomizedBlockAdam(BlockDiagonal):
    """Block-Adam on a few tensors drawn anew each step, Adam on the others ("RAdaBlock").

    Second moments of all blocks are kept at every step, so that it saves decompositions, not memory (as in the
    authors' code). Draws come from `seed` and the number of the step: replicas agree, and a resumed run draws what it
    would have drawn.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay : as of ``torch.optim.Adam``
    layers_per_step : tensors with blocks that take the block step, >= 0; the authors' value is 1
    seed : of the draws
    options : every keyword of :class:`BlockDiagonal`

    Examples
    --------
    >>> import torch
    >>> RandomizedBlockAdam(torch.nn.Linear(3, 3).parameters(), layers_per_step=2).defaults["layers_per_step"]
    2
    """

    def __init__(
        self,
        params: Any,
        lr: float | int | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | int = 1e-8,
        weight_decay: float | int = 0.0,
        *,
        layers_per_step: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        given: dict[str, Any] = {"layers_per_step": layers_per_step, "seed": seed} | options
        super().__init__(params, lr, betas, eps, weight_decay, **given)


class AdaBlock(BlockDiagonal):
    """The authors' preset: their groupings, damping 1e-4 before bias correction, 1e-6 on the eigenvalues.

    Read in the authors' code (abcdxyzpqrst/blockopt). What is not copied: blocks that straddle two units where the
    block size does not divide a layer, and tensors that their code leaves out.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay : weight decay is decoupled
    options : every keyword of :class:`BlockDiagonal`

    Examples
    --------
    >>> import torch
    >>> AdaBlock(torch.nn.Linear(3, 3).parameters()).defaults["grouping"]
    'paper'
    """

    def __init__(
        self,
        params: Any,
        lr: float | int | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | int = 1e-4,
        weight_decay: float | int = 0.0,
        **options: Any,
    ) -> None:
        preset: dict[str, Any] = {"grouping": "paper", "jitter": 1e-6, "damping_form": "paper", "decoupled": True}
        super().__init__(params, lr, betas, eps, weight_decay, **(preset | options))

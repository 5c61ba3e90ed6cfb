"""Train any number of members, on any number of data sets, as one batched program.

A member is trained exactly as it would be alone: its weights, batches and noise depend on its own seed only. Batches
are stratified by arm, and laid out treated rows first, so that each outcome head sees a slice. Members that stopped
early leave the stack. Several processes each train a part of the members, and all end with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cib_ite import closed_form, losses
from cib_ite.network import CIBStack
from cib_ite.settings import Settings
from shared_core.device import World
from shared_core.errors import InputError

__all__ = [
    "HYPERPARAMETERS",
    "Check",
    "Member",
    "Rows",
    "Trained",
    "Trainer",
    "TrainingDiverged",
    "Weights",
    "train_shared",
]

HYPERPARAMETERS = ("beta", "gamma", "lam", "head_l2", "trunk_l2")
_POOL = 1 << 20
_RETRIES = 3

Weights = dict[str, Tensor]
_Value = TypeVar("_Value")


class _Adam:
    """Adam (Kingma and Ba, 2015) on tensors that change in place, by the kernel behind `torch.optim.Adam(fused=True)`.

    `torch.optim` itself takes seconds to import on its first use. The state is one first and one second moment for each
    tensor, and the number of steps.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float) -> None:
        self.parameters, self.lr, self.steps = list(parameters), lr, 0
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move the parameters along one set of gradients."""
        self.steps += 1
        count = [torch.tensor(float(self.steps), device=p.device) for p in self.parameters]
        torch._fused_adam_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            self.parameters, list(gradients), self.first, self.second, [], count,
            lr=self.lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False,
        )  # fmt: skip


class _Buffer:
    """Parameters of a stack side by side in one tensor, a row for each network; the parameters become views of it.

    An update is then a handful of kernels instead of a handful for each parameter.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], *, decayed: str) -> None:
        # Those that weight decay is for come first, so that they are a slice.
        ordered = sorted(named, key=lambda pair: not pair[0].startswith(decayed))
        self.names = [name for name, _ in ordered]
        self._shapes = [parameter.shape for _, parameter in ordered]
        self._rows = self._shapes[0][0]
        self.values = torch.cat([parameter.detach().reshape(self._rows, -1) for _, parameter in ordered], 1)
        self._joined = torch.empty_like(self.values)
        widths = [shape[1:].numel() for shape in self._shapes]
        self.decayed = sum(w for name, w in zip(self.names, widths, strict=True) if name.startswith(decayed))
        for (_, parameter), view in zip(ordered, self.split(self.values).values(), strict=True):
            parameter.data = view

    def join(self, named: Mapping[str, Tensor]) -> Tensor:
        """Lay gradients side by side as the parameters are, in memory that the next call overwrites."""
        # Fresh memory of this size would cost more than filling it.
        return torch.cat([named[name].reshape(self._rows, -1) for name in self.names], 1, out=self._joined)

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Cut ``(rows, width)`` into views by the parameters' names."""
        found: dict[str, Tensor] = {}
        start = 0
        for name, shape in zip(self.names, self._shapes, strict=True):
            width = shape[1:].numel()
            found[name] = values[:, start : start + width].view(shape)
            start += width
        return found


class TrainingDiverged(ArithmeticError):  # noqa: N818
    """A loss was not finite, four times in a row with ever smaller steps; says at which step and in which term."""


@dataclass(frozen=True, eq=False)
class Rows:
    """One data set in the units of the network.

    Parameters
    ----------
    x : (n, p) standardised covariates
    treatment : (n,) 0 or 1
    y : (n,) standardised outcome, or 0/1
    weight : (n,) weights of the rows, of mean 1
    unlabeled : (m, p) rows without treatment and outcome, or None
    """

    x: Float[np.ndarray, "n p"]
    treatment: Int64[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    weight: Float[np.ndarray, " n"]
    unlabeled: Float[np.ndarray, "m p"] | None = None


@dataclass(frozen=True, eq=False)
class Member:
    """One network to train.

    Parameters
    ----------
    data : position of its data set
    seed : of its weights, batches and noise
    train, validation : indices of its rows; what decides on stopping is not trained on
    bootstrap : train on rows drawn with replacement
    hyper : values of ``beta, gamma, lam, head_l2, trunk_l2`` that replace the settings'
    """

    data: int
    seed: int
    train: Int64[np.ndarray, " a"]
    validation: Int64[np.ndarray, " b"]
    bootstrap: bool = False
    hyper: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Check:
    """What is known at a validation: the step, each live member's validation loss, and the training terms."""

    step: int
    steps: int
    members: tuple[int, ...]
    validation: tuple[float, ...]
    terms: Mapping[str, tuple[float, ...]]
    alive: int


@dataclass(frozen=True, eq=False)
class Trained:
    """Members with their best weights.

    Parameters
    ----------
    stack : the networks
    loss : (members,) best validation loss
    step : (members,) where it was reached
    history : the checks in order
    """

    stack: CIBStack
    loss: Float[np.ndarray, " members"]
    step: Int64[np.ndarray, " members"]
    history: list[Check]

    def part(self, first: int, count: int) -> CIBStack:
        """Return a stack of `count` of the members, from the position `first` on."""
        named = dict(self.stack.named_parameters())
        size = named["encoder.weights.0"].shape[1]
        device, dtype = named["log_sigma"].device, named["log_sigma"].dtype
        made = CIBStack(size, self.stack.settings, seeds=[0] * count).to(device, dtype).requires_grad_(False)
        members = torch.arange(first, first + count, device=device)
        for name, parameter in made.named_parameters():
            parameter.copy_(named[name].detach()[_rows(name, members)])
        return made


class Trainer:
    """Train a stack of members.

    Parameters
    ----------
    data : the data sets
    members : who trains on which
    settings : shared by all of them, save what `Member.hyper` replaces
    binary : the outcome is 0/1 and heads give logits
    device, dtype : where and in which precision
    on_check : called after each validation
    first : what to call the first member in messages, where these are a part of all
    """

    def __init__(
        self,
        data: Sequence[Rows],
        members: Sequence[Member],
        settings: Settings,
        *,
        binary: bool,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        on_check: Callable[[Check], None] | None = None,
        first: int = 0,
    ) -> None:
        if len({rows.x.shape[1] for rows in data}) != 1:
            raise InputError("data sets that train together must have the same covariates")
        self.data, self.members, self.settings, self.binary = list(data), list(members), settings, binary
        self.device, self.dtype, self.on_check, self.first = torch.device(device), dtype, on_check, first
        self.stack = CIBStack(data[0].x.shape[1], settings, seeds=[m.seed for m in members]).to(self.device, dtype)
        self.step, self.history = 0, list[Check]()
        self._alive = np.arange(len(members))
        count = len(members)
        self._best_loss = np.full(count, np.inf)
        self._best_step = np.zeros(count, dtype=np.int64)
        self._stale = np.zeros(count, dtype=np.int64)
        self._diverged: dict[int, tuple[int, str]] = {}
        self._best: Weights = {name: p.detach().clone() for name, p in self.stack.named_parameters()}
        self._prepare()
        self._focus()
        self._optimizers = self._new_optimizers()

    # ---- data on the device

    def _prepare(self) -> None:
        offsets = np.cumsum([0, *(len(rows.x) for rows in self.data)])

        def tensor(values: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(values)).to(self.device, self.dtype)

        self._x = tensor([rows.x for rows in self.data])
        self._y = tensor([rows.y for rows in self.data])
        self._w = tensor([rows.weight for rows in self.data])
        with_unlabeled = [rows.unlabeled is not None and len(rows.unlabeled) > 0 for rows in self.data]
        if any(with_unlabeled) and not all(with_unlabeled):
            raise InputError("either every data set has unlabelled rows or none")
        self._unlabeled = tensor([rows.unlabeled for rows in self.data if rows.unlabeled is not None]) if any(
            with_unlabeled
        ) else None  # fmt: skip
        self._unlabeled_offsets = np.cumsum([0, *(0 if r.unlabeled is None else len(r.unlabeled) for r in self.data)])
        pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(20190607), dtype=self.dtype)
        self._pool = pool.to(self.device)

        size = self.settings.batch_size
        u = [float(self.data[m.data].treatment[m.train].mean()) for m in self.members]
        treated = [int(np.clip(round(size * share), 2, size - 2)) for share in u]
        self._slots = max(treated), max(size - k for k in treated)
        self._arm_rows: list[tuple[np.ndarray, np.ndarray]] = []
        present = np.zeros((len(self.members), sum(self._slots)))
        self._counts = [(k, size - k) for k in treated]
        for g, member in enumerate(self.members):
            rows = self.data[member.data]
            arms = [member.train[rows.treatment[member.train] == arm] for arm in (1, 0)]
            if min(map(len, arms)) < 2:
                raise InputError("the training part needs at least two rows in each arm; give more data")
            if member.bootstrap:
                random = np.random.default_rng([member.seed, 1 << 20])
                arms = [random.choice(rows_, len(rows_)) for rows_ in arms]
            self._arm_rows.append((arms[0] + offsets[member.data], arms[1] + offsets[member.data]))
            present[g, : self._counts[g][0]] = 1
            present[g, self._slots[0] : self._slots[0] + self._counts[g][1]] = 1
        self._padded = bool((present == 0).any())
        self._present = torch.from_numpy(present).to(self.device, self.dtype)
        slot_arm = np.repeat([1.0, 0.0], self._slots)
        self._slot_treatment = torch.from_numpy(slot_arm).to(self.device, self.dtype)
        self._share = torch.tensor(u, device=self.device, dtype=self.dtype)
        self._hyper = {
            name: torch.tensor(
                [float(m.hyper.get(name, getattr(self.settings, name))) for m in self.members],
                device=self.device,
                dtype=self.dtype,
            )
            for name in HYPERPARAMETERS
        }
        self._wants_variance = bool((self._hyper["lam"] > 0).any())
        self._closed = self._unlabeled is None and closed_form.covers(self.settings)
        self._decays = {name: bool((self._hyper[name] > 0).any()) for name in ("head_l2", "trunk_l2")}
        most = max(len(member.validation) for member in self.members)
        index = np.zeros((len(self.members), most), dtype=np.int64)
        valid = np.zeros((len(self.members), most))
        arm = np.zeros((len(self.members), most))
        for g, member in enumerate(self.members):
            chosen = slice(len(member.validation))
            index[g, chosen] = member.validation + offsets[member.data]
            valid[g, chosen] = 1
            arm[g, chosen] = self.data[member.data].treatment[member.validation]
        self._validation = torch.from_numpy(index).to(self.device)
        self._validation_arm = torch.from_numpy(arm).to(self.device, self.dtype)
        weight = torch.from_numpy(valid).to(self.device, self.dtype) * self._w[self._validation]
        if self.settings.reweight:
            weight = weight * losses.reweight(self._validation_arm, self._share[:, None])
        self._validation_weight = weight

    def _focus(self) -> None:
        """Take what every step needs of the live members out of the whole, once for all steps until one leaves."""
        ids = torch.from_numpy(self._alive).to(self.device)
        self._ids = ids
        self._now_hyper = {name: value[ids] for name, value in self._hyper.items()}
        self._now_share = self._share[ids]
        self._now_present = self._present[ids] if self._padded else None
        self._now_rows = self._present[ids].sum(1)
        self._now_row_share = self._present[ids] / self._now_rows.unsqueeze(1)
        balance = losses.reweight(self._slot_treatment, self._share[ids, None]) if self.settings.reweight else None
        self._now_balance = balance
        # In the order of the buffers: heads have two networks a member.
        self._now_decay = [
            self._hyper[name][ids].repeat_interleave(repeat)[:, None] if self._decays[name] else None
            for name, repeat in (("head_l2", 2), ("trunk_l2", 1))
        ]

    def _over_rows(self, values: Tensor) -> Tensor:
        """Mean over a batch's rows, padding left out, ``(stack,)``."""
        if self._now_present is None:
            return values.mean(1)
        return (values * self._now_present).sum(1) / self._now_rows

    def _new_optimizers(self) -> tuple[_Adam, _Adam]:
        named = list(self.stack.named_parameters())
        heads = [(name, p) for name, p in named if name.startswith("heads")]
        others = [(name, p) for name, p in named if not name.startswith("heads") and self._is_model(name)]
        judge = [(name, p) for name, p in named if not self._is_model(name)]
        model = [_Buffer(heads, decayed="heads.weights"), _Buffer(others, decayed="encoder.weights")]
        self._buffers = model, [_Buffer(judge, decayed="-")] if judge else []
        lr = self.settings.lr
        model_values, judge_values = ([buffer.values for buffer in part] for part in self._buffers)
        return _Adam(model_values, lr), _Adam(judge_values, lr * self.settings.disc_lr)

    def _moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Both moments of every parameter, by its name."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for optimizer, buffers in zip(self._optimizers, self._buffers, strict=True):
            for buffer, first, second in zip(buffers, optimizer.first, optimizer.second, strict=True):
                pair = buffer.split(first), buffer.split(second)
                found |= {name: (pair[0][name], pair[1][name]) for name in buffer.names}
        return found

    def _set_moments(self, moments: Mapping[str, Sequence[Tensor]]) -> None:
        for name, (first, second) in self._moments().items():
            first.copy_(moments[name][0])
            second.copy_(moments[name][1])

    def _is_model(self, name: str) -> bool:
        # DragonNet's propensity logit is part of the model; elsewhere it belongs to the adversary.
        return not name.startswith("discriminator") or self.settings.dragon > 0

    # ---- batches

    def _chunk(self) -> tuple[Tensor, np.ndarray, Tensor | None]:
        """Row indices and noise offsets of the next `eval_every` steps, from the members' own seeds."""
        steps, size = self.settings.eval_every, sum(self._slots)
        index = np.zeros((steps, len(self._alive), size), dtype=np.int64)
        offsets = np.zeros((steps, len(self._alive), 2), dtype=np.int64)
        extra = np.zeros((steps, len(self._alive), self.settings.batch_size), dtype=np.int64)
        for place, g in enumerate(self._alive):
            random = np.random.default_rng([self.members[g].seed, 2 << 20, self.step])
            start = 0
            for rows, count, slots in zip(self._arm_rows[g], self._counts[g], self._slots, strict=True):
                index[:, place, start : start + count] = _shuffled(rows, steps * count, random).reshape(steps, count)
                # A padding slot repeats a row of its arm, with weight 0.
                index[:, place, start + count : start + slots] = rows[0]
                start += slots
            offsets[:, place] = random.integers(0, _POOL - 1, (steps, 2))
            if self._unlabeled is not None:
                low, high = self._unlabeled_offsets[self.members[g].data : self.members[g].data + 2]
                extra[:, place] = random.integers(low, high, (steps, self.settings.batch_size))
        unlabeled = torch.from_numpy(extra).to(self.device) if self._unlabeled is not None else None
        return torch.from_numpy(index).to(self.device), offsets, unlabeled

    def _noise(self, offsets: np.ndarray, rows: int, each: tuple[int, ...], skip: int = 0) -> Tensor:
        """Take normal draws ``(stack, rows, *each)`` from where in the pool a member's own offset says.

        `skip` rows are passed over: a row's draws must not depend on how many slots the rows before it have.
        """
        width = int(np.prod(each))
        first, length = skip * width, rows * width
        # Half of the pool for where to start, half to read on.
        starts = (offsets % (_POOL // 2)).tolist()
        if first + length <= _POOL // 2:
            parts = [self._pool[start + first : start + first + length] for start in starts]
        else:
            drawn = [torch.Generator(device=self.device).manual_seed(start + skip) for start in starts]
            parts = [torch.randn(length, generator=g, device=self.device, dtype=self.dtype) for g in drawn]
        return torch.stack(parts).view(len(offsets), rows, *each)

    def _batch_noise(self, offsets: np.ndarray, rows: int, each: tuple[int, ...]) -> Tensor:
        """Draws for the slots of a batch: treated, control, and unlabelled rows behind them."""
        treated, control = self._slots
        size = self.settings.batch_size
        parts = [self._noise(offsets, treated, each), self._noise(offsets, control, each, size)]
        if rows > treated + control:
            parts.append(self._noise(offsets, rows - treated - control, each, 2 * size))
        return torch.cat(parts, 1)

    # ---- the loss

    def _terms(
        self, net: CIBStack, rows: Tensor, offsets: np.ndarray, unlabeled: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Each term of the objective for every member ``(stack,)``, and z's distribution for the discriminator."""
        s = self.settings
        treated = self._slots[0]
        x, y, w = self._x[rows], self._y[rows], self._w[rows]
        if self._now_balance is not None:
            w = w * self._now_balance
        labelled = x.shape[1]
        if unlabeled is not None and self._unlabeled is not None:
            x = torch.cat([x, self._unlabeled[unlabeled]], 1)
        masks = self._dropout_masks(net, x.shape[1], offsets) if s.dropout_trunk else None
        mean, scale = net.encode(x, masks)
        terms: dict[str, Tensor] = {}
        if scale is None:
            z = mean.unsqueeze(2)
        else:
            noise = self._batch_noise(offsets[:, 0], x.shape[1], (s.samples, mean.shape[2]))
            z = torch.addcmul(mean.unsqueeze(2), scale.unsqueeze(2), noise)
        wants_variance = scale is not None and self._wants_variance
        if s.dropout_head:
            raw = net.raw_outcomes(z, self._head_masks(net, z.shape[1], offsets))
            raw_t, raw_c = raw[:, 1, :treated], raw[:, 0, treated:]
        elif wants_variance:
            raw = net.raw_outcomes(z)
            raw_t, raw_c = raw[:, 1, :treated], raw[:, 0, treated:labelled]
            other = torch.cat([raw[:, 0, :treated], raw[:, 1, treated:labelled]], 1)[..., 0]
            prediction = torch.sigmoid(other) if self.binary else other
            variance = self._over_rows(losses.counterfactual_variance(prediction))
            if unlabeled is not None:
                both = raw[:, :, labelled:, :, 0]
                both = torch.sigmoid(both) if self.binary else both
                count = 2 * (x.shape[1] - labelled)
                variance = variance * self._now_rows + losses.counterfactual_variance(both).sum((1, 2))
                variance = variance / (self._now_rows + count)
            terms["variance"] = variance
        else:
            raw_t, raw_c = net.arm_outcomes(1, z[:, :treated]), net.arm_outcomes(0, z[:, treated:labelled])
        nll = torch.cat(
            [self._nll(net, 1, raw_t, y[:, :treated]), self._nll(net, 0, raw_c, y[:, treated:])], 1
        )  # fmt: skip
        terms["prediction"] = self._over_rows(nll * w)
        mean_l, scale_l = mean[:, :labelled], None if scale is None else scale[:, :labelled]
        if scale_l is not None:
            terms["rate"] = self._over_rows(losses.kl_diag(mean_l, scale_l))
        if s.dragon > 0:
            terms |= self._dragon_terms(net, z[:, :, 0], raw_t, raw_c, y)
        elif s.independence != "none":
            terms["independence"] = self._independence(net, z[:, :labelled, 0], mean_l, scale_l)
        return terms, (mean_l.detach() if scale_l is None else torch.stack([mean_l, scale_l]).detach())

    def _nll(self, net: CIBStack, arm: int, raw: Tensor, y: Tensor) -> Tensor:
        """Average the negative log likelihood over samples, ``(stack, rows)``."""
        y = y.unsqueeze(2)
        if self.binary:
            return losses.bernoulli_nll(y, raw[..., 0]).mean(2)
        if self.settings.likelihood == "mse":
            return (y - raw[..., 0]).square().mean(2)
        if self.settings.likelihood == "hetero":
            return losses.gaussian_nll(y, raw[..., 0], (nn.functional.softplus(raw[..., 1]) + 1e-3).log()).mean(2)
        return losses.gaussian_nll(y, raw[..., 0], net.noise_log_scale[:, arm, None, None]).mean(2)

    def _independence(self, net: CIBStack, z: Tensor, mean: Tensor, scale: Tensor | None) -> Tensor:
        s = self.settings
        treatment = self._slot_treatment.expand(z.shape[:2])
        if s.independence in {"confusion", "adversarial"}:
            logit = _frozen_discriminator(net, z)
            share, present = self._now_share, self._now_present
            if present is None:
                if s.independence == "confusion":
                    return losses.confusion(logit, share)
                return losses.adversarial(logit, treatment)
            each = (
                losses.confusion(logit.unsqueeze(-1), share.unsqueeze(-1).expand(logit.shape))
                if s.independence == "confusion"
                else losses.adversarial(logit.unsqueeze(-1), treatment.unsqueeze(-1))
            )
            return self._over_rows(each)
        share, present = self._now_share, self._now_present
        if s.balance_share is not None:
            share = torch.full_like(share, s.balance_share)
        if present is not None:
            # Members with fewer rows in an arm are few: they are measured one by one.
            parts = [
                self._imbalance(z[g : g + 1, keep], treatment[g : g + 1, keep], mean[g : g + 1, keep],
                                None if scale is None else scale[g : g + 1, keep], share[g : g + 1])
                for g in range(len(z))
                for keep in [present[g] > 0]
            ]  # fmt: skip
            return torch.cat(parts)
        return self._imbalance(z, treatment, mean, scale, share)

    def _imbalance(
        self, z: Tensor, treatment: Tensor, mean: Tensor, scale: Tensor | None, share: Tensor
    ) -> Tensor:  # fmt: skip
        s = self.settings
        match s.independence:
            case "mmd-lin":
                return losses.mmd_lin(z, treatment, share)
            case "mmd-rbf":
                return losses.mmd_rbf(z, treatment, share, s.kernel_width)
            case "wass":
                return losses.sinkhorn(z, treatment, share, sharpness=s.sharpness, rounds=s.rounds)
            case _:
                return losses.mi_gauss(mean, torch.zeros_like(mean) if scale is None else scale, treatment, share)

    def _dragon_terms(
        self, net: CIBStack, h: Tensor, raw_t: Tensor, raw_c: Tensor, y: Tensor
    ) -> dict[str, Tensor]:  # fmt: skip
        logit = net.treatment_logit(h)
        t = self._slot_treatment.expand(logit.shape)
        terms = {"propensity": self._over_rows(losses.bernoulli_nll(t, logit))}
        if self.settings.targeted > 0:
            g = (torch.sigmoid(logit) + 0.01) / 1.02
            factual = torch.cat([raw_t[:, :, 0, 0], raw_c[:, :, 0, 0]], 1)
            if self.binary:
                factual = torch.sigmoid(factual)
            nudged = factual + net.epsilon[:, None] * (t / g - (1 - t) / (1 - g))
            terms["targeted"] = self._over_rows((y - nudged).square())
        return terms

    def _total(self, terms: Mapping[str, Tensor], warm: float) -> Tensor:
        total = terms["prediction"]
        for name, weight in (("rate", "beta"), ("independence", "gamma"), ("variance", "lam")):
            if name in terms:
                total = torch.addcmul(total, self._now_hyper[weight], terms[name], value=warm)
        if "propensity" in terms:
            total = total + self.settings.dragon * terms["propensity"]
        if "targeted" in terms:
            total = total + self.settings.targeted * terms["targeted"]
        return total

    def _dropout_masks(self, net: CIBStack, rows: int, offsets: np.ndarray) -> list[Tensor | None]:
        return dropout_masks(net, rows, self.settings.dropout_trunk, seed=int(offsets[0, 0]), kind="trunk")

    def _head_masks(self, net: CIBStack, rows: int, offsets: np.ndarray) -> list[Tensor | None]:
        return dropout_masks(net, rows, self.settings.dropout_head, seed=int(offsets[0, 1]), kind="heads")

    # ---- the loop

    def run(self) -> Trained:
        """Train until every member has stopped, or `steps` are done.

        Raises
        ------
        TrainingDiverged
            When a member's loss is not finite even with an eighth of the step size.
        """
        self._loop()
        self._retry()
        for name, parameter in (final := self._final_stack()).named_parameters():
            parameter.data.copy_(self._best[name])
        return Trained(final, self._best_loss.copy(), self._best_step.copy(), self.history)

    def _final_stack(self) -> CIBStack:
        made = CIBStack(self._x.shape[1], self.settings, seeds=[m.seed for m in self.members])
        return made.to(self.device, self.dtype).requires_grad_(False)

    def _one_step(
        self, rows: Tensor, offsets: np.ndarray, unlabeled: Tensor | None
    ) -> dict[str, Tensor]:  # fmt: skip
        s, net = self.settings, self.stack
        warm = min(1.0, (self.step + 1) / max(1.0, s.warmup * s.steps)) if s.warmup else 1.0
        if self._closed:
            terms, gradients, z = self._written_down(net, rows, offsets, warm)
        else:
            terms, gradients, z = self._taped(net, rows, offsets, unlabeled, warm)
        self._add_l2(gradients)
        self._clip(gradients, net.size)
        self._optimizers[0].step(gradients)
        if s.dragon == 0 and s.independence in {"confusion", "adversarial"}:
            for turn in range(s.disc_steps):
                self._discriminate(net, z, offsets[:, 1] + 7919 * turn)
        self.step += 1
        if self.step % s.lr_every == 0:
            for optimizer in self._optimizers:
                optimizer.lr *= s.lr_decay
        return terms

    def _taped(
        self, net: CIBStack, rows: Tensor, offsets: np.ndarray, unlabeled: Tensor | None, warm: float
    ) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
        """Terms, gradients of the model's buffers and z's distribution, by automatic differentiation."""
        terms, z = self._terms(net, rows, offsets, unlabeled)
        named = {name: p for name, p in net.named_parameters() if self._is_model(name)}
        # A term that is switched off leaves parameters (the noise scales, DragonNet's epsilon) without a gradient.
        found: Any = torch.autograd.grad(self._total(terms, warm).sum(), list(named.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)
        }
        return terms, [buffer.join(gradients) for buffer in self._buffers[0]], z

    def _written_down(
        self, net: CIBStack, rows: Tensor, offsets: np.ndarray, warm: float
    ) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
        """As :meth:`_taped`, by the formulas of :mod:`cib_ite.closed_form`."""
        s = self.settings
        noise = None
        if not s.deterministic:
            noise = self._batch_noise(offsets[:, 0], rows.shape[1], (s.samples, s.latent))
        weights = {name: warm * self._now_hyper[name] for name in ("beta", "gamma", "lam")}
        terms, gradients, z = closed_form.model_gradients(
            net,
            self._batch(rows),
            noise,
            binary=self.binary,
            variance=self._wants_variance,
            imbalance=self._imbalance_of(net),
            **weights,
        )
        return terms, [buffer.join(gradients) for buffer in self._buffers[0]], z

    def _imbalance_of(self, net: CIBStack) -> closed_form.Imbalance | None:
        """How to measure dependence where that is not the discriminator's matter."""
        if self.settings.independence in {"none", "confusion", "adversarial"}:
            return None
        return lambda z, mean, scale: self._independence(net, z, mean, scale)

    def _batch(self, rows: Tensor) -> closed_form.Batch:
        weight = self._w[rows]
        return closed_form.Batch(
            x=self._x[rows],
            y=self._y[rows],
            weight=weight if self._now_balance is None else weight * self._now_balance,
            share=self._now_row_share,
            treated=self._slots[0],
            treatment=self._slot_treatment,
            treated_share=self._now_share,
        )

    def _discriminate(self, net: CIBStack, z: Tensor, offsets: np.ndarray) -> None:
        """One step of the discriminator on freshly drawn z, through which no gradient goes to the encoder."""
        judge = self._optimizers[1]
        if z.dim() == 4:
            z = torch.addcmul(z[0], z[1], self._batch_noise(offsets, z.shape[2], (z.shape[3],)))
        found = closed_form.discriminator_gradients(net, z, self._slot_treatment, self._now_row_share)
        judge.step([buffer.join(found) for buffer in self._buffers[1]])

    def _add_l2(self, gradients: Sequence[Tensor]) -> None:
        for buffer, gradient, decay in zip(self._buffers[0], gradients, self._now_decay, strict=True):
            if decay is not None:
                gradient[:, : buffer.decayed].addcmul_(buffer.values[:, : buffer.decayed], decay)

    def _clip(self, gradients: Sequence[Tensor], size: int) -> None:
        # A member's two heads are two rows side by side, so a reshape puts each member's values in a row.
        flat = [gradient.view(size, -1) for gradient in gradients]
        norms = torch.stack([torch.linalg.vector_norm(gradient, dim=1) for gradient in flat])
        norm = torch.linalg.vector_norm(norms, dim=0)
        # Hardly ever needed, and looking is cheaper than multiplying everything by one.
        if bool((norm > self.settings.clip).any()):
            factor = (self.settings.clip / norm).clamp(max=1.0).unsqueeze(1)
            for gradient in flat:
                gradient.mul_(factor)

    @torch.no_grad()
    def _check(self, terms: Mapping[str, Tensor]) -> None:
        loss = self._validate()
        found = loss.cpu().numpy().astype(np.float64)
        values = {name: value.detach().cpu().numpy().astype(np.float64) for name, value in terms.items()}
        alive = self._alive
        broken = ~np.isfinite(found) | ~np.isfinite(np.stack(list(values.values()))).all(0)
        for place in np.flatnonzero(broken):
            named = sorted(values, key=lambda name: name != "prediction")
            term = next((name for name in named if not np.isfinite(values[name][place])), "validation")
            self._diverged[int(alive[place])] = (self.step, term)
        better = ~broken & (found < self._best_loss[alive] - 1e-6)
        self._best_loss[alive[better]] = found[better]
        self._best_step[alive[better]] = self.step
        self._stale[alive] = np.where(better, 0, self._stale[alive] + 1)
        if better.any():
            places = torch.from_numpy(np.flatnonzero(better)).to(self.device)
            targets = torch.from_numpy(alive[better]).to(self.device)
            for name, parameter in self.stack.named_parameters():
                self._best[name][_rows(name, targets)] = parameter.detach()[_rows(name, places)]
        check = Check(
            self.step,
            self.settings.steps,
            tuple(int(g) for g in alive),
            tuple(float(v) for v in found),
            {name: tuple(float(v) for v in value) for name, value in values.items()},
            int((self._stale[alive] < self.settings.patience).sum()),
        )
        self.history.append(check)
        going = ~broken & (self._stale[alive] < self.settings.patience)
        # Shrinking the stack costs a copy, so it waits until it is worth it.
        if not going.all() and (going.sum() <= 0.8 * len(alive) or broken.any()):
            self._shrink(np.flatnonzero(going))
        if self.on_check is not None:
            self.on_check(check)

    def _validate(self) -> Tensor:
        s, net, ids = self.settings, self.stack, self._ids
        index = self._validation[ids]
        weight, arm = self._validation_weight[ids], self._validation_arm[ids]
        mean, scale = net.encode(self._x[index])
        offsets = np.array([(self.members[g].seed * 1_000_003 + 17) % _POOL for g in self._alive], dtype=np.int64)
        if scale is None:
            z = mean.unsqueeze(2)
        else:
            noise = self._noise(offsets, index.shape[1], (s.eval_samples, mean.shape[2]))
            z = torch.addcmul(mean.unsqueeze(2), scale.unsqueeze(2), noise)
        raw = net.raw_outcomes(z)
        y = self._y[index]
        nll = torch.where(arm > 0, self._nll(net, 1, raw[:, 1], y), self._nll(net, 0, raw[:, 0], y))
        loss = (nll * weight).sum(1) / weight.sum(1)
        if scale is not None:
            valid = (weight > 0).to(self.dtype)
            rate = (losses.kl_diag(mean, scale) * valid).sum(1) / valid.sum(1)
            loss = loss + self._hyper["beta"][ids] * rate
        if s.dragon > 0:
            loss = loss + s.dragon * (losses.bernoulli_nll(arm, net.treatment_logit(mean)) * weight).sum(
                1
            ) / weight.sum(1)
        return loss

    def _shrink(self, places: np.ndarray) -> None:
        """Go on with the members at these places only."""
        if not len(places):
            self._alive = self._alive[:0]
            return
        kept = torch.from_numpy(places).to(self.device)
        smaller = CIBStack(self._x.shape[1], self.settings, seeds=[0] * len(places)).to(self.device, self.dtype)
        before = [(optimizer.lr, optimizer.steps) for optimizer in self._optimizers]
        moments = {name: tuple(m[_rows(name, kept)] for m in pair) for name, pair in self._moments().items()}
        named = dict(smaller.named_parameters())
        for name, parameter in self.stack.named_parameters():
            named[name].data.copy_(parameter.detach()[_rows(name, kept)])
        self.stack = smaller
        self._optimizers = self._new_optimizers()
        self._set_moments(moments)
        for optimizer, (lr, steps) in zip(self._optimizers, before, strict=True):
            optimizer.lr, optimizer.steps = lr, steps
        self._alive = self._alive[places]
        self._focus()

    def _retry(self) -> None:
        """Train members that met a loss that is not finite again from their last good weights, with half the step."""
        diverged, lr = self._diverged, self.settings.lr
        for _ in range(_RETRIES):
            if not diverged:
                return
            lr /= 2
            members = sorted(diverged)
            again = Trainer(
                self.data,
                [self.members[g] for g in members],
                replace(self.settings, lr=lr),
                binary=self.binary,
                device=self.device,
                dtype=self.dtype,
            )
            picked = torch.tensor(members, device=self.device)
            for name, parameter in again.stack.named_parameters():
                parameter.data.copy_(self._best[name][_rows(name, picked)])
                again._best[name].copy_(parameter.detach())
            again._loop()
            for place, g in enumerate(members):
                if place not in again._diverged:
                    self._best_loss[g], self._best_step[g] = again._best_loss[place], again._best_step[place]
                    for name, value in again._best.items():
                        here, there = torch.tensor([g]), torch.tensor([place])
                        self._best[name][_rows(name, here)] = value[_rows(name, there)]
            diverged = {members[place]: where for place, where in again._diverged.items()}
        if diverged:
            member, (step, term) = next(iter(diverged.items()))
            raise TrainingDiverged(
                f"member {self.first + member}: the term '{term}' is not finite at step {step}, even with the step size"
                f" {lr:g}; look for extreme values in X and y, or lower lr"
            )

    @property
    def going(self) -> bool:
        """Whether there is a step left, and a member to take it."""
        return self.step < self.settings.steps and len(self._alive) > 0

    def _loop(self) -> None:
        s = self.settings
        while self.going:
            index, offsets, unlabeled = self._chunk()
            terms: dict[str, Tensor] = {}
            for inner in range(min(s.eval_every, s.steps - self.step)):
                terms = self._one_step(index[inner], offsets[inner], None if unlabeled is None else unlabeled[inner])
            self._check(terms)

    # ---- interruption

    def state(self) -> dict[str, Any]:
        """Everything needed to go on later, as plain values and tensors on the CPU."""
        return {
            "step": self.step,
            "alive": self._alive,
            "best_loss": self._best_loss,
            "best_step": self._best_step,
            "stale": self._stale,
            "diverged": {g: list(where) for g, where in self._diverged.items()},
            "best": {name: value.cpu() for name, value in self._best.items()},
            "weights": {name: p.detach().cpu().contiguous() for name, p in self.stack.named_parameters()},
            "moments": {name: [moment.cpu().contiguous() for moment in pair] for name, pair in self._moments().items()},
            "optimizers": [[optimizer.lr, optimizer.steps] for optimizer in self._optimizers],
            "history": [
                [c.step, list(c.members), list(c.validation), {k: list(v) for k, v in c.terms.items()}, c.alive]
                for c in self.history
            ],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave, on the same data, members and settings."""
        alive = np.asarray(state["alive"])
        if len(alive) < len(self._alive):
            self._shrink(alive)
        # Without a member left, training is over, and the stack is the one that the last of them were in.
        if len(alive):
            named = dict(self.stack.named_parameters())
            for name, value in state["weights"].items():
                named[name].data.copy_(value)
            self._set_moments(state["moments"])
        for optimizer, (lr, steps) in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.lr, optimizer.steps = float(lr), int(steps)
        self.step = int(state["step"])
        self._best_loss, self._best_step = np.array(state["best_loss"]), np.array(state["best_step"])
        self._stale = np.array(state["stale"])
        self._diverged = {int(g): (int(w[0]), str(w[1])) for g, w in state["diverged"].items()}
        self._best = {name: value.to(self.device) for name, value in state["best"].items()}
        self.history = [
            Check(step, self.settings.steps, tuple(members), tuple(validation),
                  {k: tuple(v) for k, v in terms.items()}, count)
            for step, members, validation, terms, count in state["history"]
        ]  # fmt: skip


def train_shared(
    trainer: Trainer,
    world: World,
    count: int,
    *,
    on_check: Callable[[Check], None],
    on_state: Callable[[dict[str, Any]], None] | None = None,
    state_every: int = 10,
) -> Trained:
    """Train this process's part of the members while the others train theirs, and give every process all of them.

    Parameters
    ----------
    trainer : of the members ``world.shard(count)``
    world : the processes
    count : members of all
    on_check : called in every process after each validation of any, with the members of all
    on_state : called in every process with the states of all parts, every `state_every` validations
    state_every : see `on_state`

    Raises
    ------
    TrainingDiverged
        In every process, when a member of any has met a loss that is not finite.
    """
    starts = [World(rank, world.size).shard(count).start for rank in range(world.size)]
    going = any(_gathered(world, trainer.going))

    def meet(own: Check | None) -> None:
        nonlocal going
        found = _gathered(world, (own, trainer.going))
        going = any(still for _, still in found)
        check = _joined([(start, part) for start, (part, _) in zip(starts, found, strict=True) if part is not None])
        on_check(check)
        if on_state is not None and (check.step // trainer.settings.eval_every) % state_every == 0:
            on_state({"step": check.step, "parts": _gathered(world, trainer.state())})

    trainer.on_check = meet
    own: tuple[Weights, np.ndarray, np.ndarray, list[Check]] | TrainingDiverged
    try:
        trained = trainer.run()
        weights = {name: p.detach().cpu() for name, p in trained.stack.named_parameters()}
        own = weights, trained.loss, trained.step, trained.history
    except TrainingDiverged as error:
        own = error
    while going:
        meet(None)
    parts: list[tuple[Weights, np.ndarray, np.ndarray, list[Check]]] = []
    for part in _gathered(world, own):
        if isinstance(part, TrainingDiverged):
            raise part
        parts.append(part)
    size = parts[0][0]["encoder.weights.0"].shape[1]
    stack = CIBStack(size, trainer.settings, seeds=[0] * count).requires_grad_(False)
    for name, parameter in stack.named_parameters():
        parameter.copy_(torch.cat([weights[name] for weights, _, _, _ in parts]))
    by_step: dict[int, list[tuple[int, Check]]] = {}
    for start, (_, _, _, history) in zip(starts, parts, strict=True):
        for check in history:
            by_step.setdefault(check.step, []).append((start, check))
    return Trained(
        stack.to(trainer.device, trainer.dtype),
        np.concatenate([loss for _, loss, _, _ in parts]),
        np.concatenate([step for _, _, step, _ in parts]),
        [_joined(by_step[step]) for step in sorted(by_step)],
    )


def _joined(parts: Sequence[tuple[int, Check]]) -> Check:
    """Join the checks of parts of the members, each with the number of its first, into one of all."""
    checks = [check for _, check in parts]
    return Check(
        checks[0].step,
        checks[0].steps,
        tuple(start + member for start, check in parts for member in check.members),
        tuple(value for check in checks for value in check.validation),
        {name: tuple(value for check in checks for value in check.terms[name]) for name in checks[0].terms},
        sum(check.alive for check in checks),
    )


def _gathered(world: World, value: _Value) -> list[_Value]:
    """Give every process the values of all, in the order of their ranks."""
    import torch.distributed as dist

    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, value)
    return found


def dropout_masks(net: CIBStack, rows: int, rate: float, *, seed: int, kind: str) -> list[Tensor | None]:
    """Inverted-dropout factors for each layer's input; both heads of a member share theirs."""
    part = net.encoder if kind == "trunk" else net.heads
    device = part.weights[0].device
    generator = torch.Generator(device=device).manual_seed(seed)
    masks: list[Tensor | None] = []
    last = len(part.weights) - 1
    for layer, weight in enumerate(part.weights):
        if rate == 0 or (layer == 0 if kind == "trunk" else layer != last):
            masks.append(None)
            continue
        kept = torch.rand((net.size, rows, weight.shape[1]), generator=generator, device=device) >= rate
        factor = kept.to(weight.dtype) / (1 - rate)
        masks.append(factor if kind == "trunk" else factor.repeat_interleave(2, 0))
    return masks


def _frozen_discriminator(net: CIBStack, z: Tensor) -> Tensor:
    """Logits through which gradients reach z but not the discriminator."""
    part = net.discriminator
    last = len(part.weights) - 1
    for layer, (weight, bias) in enumerate(zip(part.weights, part.biases, strict=True)):
        z = torch.baddbmm(bias.detach(), z, weight.detach())
        if layer < last:
            z = nn.functional.elu_(z)
    return z[..., 0]


def _rows(name: str, members: Tensor) -> Tensor:
    """Positions of these members in a parameter's first axis: the heads have two entries a member."""
    if name.startswith("heads"):
        return torch.stack([2 * members, 2 * members + 1], 1).flatten()
    return members


def _shuffled(rows: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` rows: whole shuffles of all of them, one after another."""
    turns = -(-count // len(rows))
    return random.permuted(np.broadcast_to(rows, (turns, len(rows))), axis=1).reshape(-1)[:count]

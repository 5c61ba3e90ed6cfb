"""Race: influence of training instances against pydvl and captum, in time and in how well it ranks.

    python benchmarks/race_pydvl.py [--rows 400 --validation 200 --repeats 5 --l2 0.004 --json FILE]

A model is trained on the task whose shortcut is known with a tenth of its labels flipped, and its output layer fitted
to its minimum, so that leaving an instance out and fitting again has an exact answer: the change of the mean
validation loss, for every instance (Newton's method from scratch). Each contestant scores all training instances for
the mean loss of all validation instances from the same layer, features, labels and regularisation, in float64:

* ial-nap: :class:`ial_nap.HeadInfluence`, one direct solve;
* ial-nap CG: :class:`ial_nap.ModelInfluence` on the layer's parameters, as for wider scopes;
* pydvl CG with its defaults, with as many iterations and as small a tolerance as ours, and for all validation
  instances at once; and its direct solve. There is one solve for each validation instance, then a mean;
* captum Arnoldi and its exact Hessian ("naive"), with a dimension that is full.

Time is the median over repeats in one process, contestants taking turns; the ratio is the peer's to ial-nap's, above 1
ours is faster. Beside it stands Spearman's correlation with exact leave-one-out, and Pearson's. Peers that are not
installed are left out, and without any one line says so, with status 0.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ial_nap.influence import HeadInfluence, ModelInfluence
from ial_nap.nap import FeatureNAP
from ial_nap.series import Series, make_series
from ial_nap.toys import shift_task
from ial_nap.training import Episodic, Training


def there(name: str) -> bool:
    """Whether a module can be imported, with all that it needs."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def fitted(phi: Tensor, y: Tensor, l2: float, start: Tensor | None = None) -> Tensor:
    """Fit logistic regression to its minimum; the last weight is the bias, which is free."""
    shown = torch.cat([phi, torch.ones(len(phi), 1).to(phi)], 1)
    free = torch.ones(shown.shape[1]).to(phi)
    free[-1] = 0
    w = torch.zeros_like(free) if start is None else start.clone()
    for _ in range(30):
        p = (shown @ w).sigmoid()
        slope = shown.T @ (p - y) / len(y) + l2 * free * w
        if slope.abs().max() < 1e-12:
            break
        hessian = shown.T @ ((p * (1 - p) / len(y)).unsqueeze(1) * shown) + l2 * free.diag()
        w = w - torch.linalg.solve(hessian, slope)
    return w


def loss_of(w: Tensor, phi: Tensor, y: Tensor) -> Tensor:
    """Mean loss of a layer."""
    return nn.functional.binary_cross_entropy_with_logits(phi @ w[:-1] + w[-1], y)


def left_out(phi: Tensor, y: Tensor, other: Tensor, other_y: Tensor, w: Tensor, l2: float) -> Tensor:
    """Increase of the validation loss when an instance is left out, exactly; the penalty keeps its share."""
    base, found = loss_of(w, other, other_y), list[Tensor]()
    n = len(y)
    for k in range(n):
        kept = torch.arange(n) != k
        again = fitted(phi[kept], y[kept], l2 * n / (n - 1), w)
        found.append(loss_of(again, other, other_y) - base)
    return torch.stack(found)


def main() -> None:
    """Race and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 400), ("validation", 200), ("repeats", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--l2", type=float, default=0.004)
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    has_pydvl, has_captum = there("pydvl.influence.torch"), there("captum.influence")
    if not has_pydvl and not has_captum:
        print("neither pydvl nor captum is here: no race (pip install 'pydvl[influence]' captum)")
        return
    seed, l2 = settings.seed, settings.l2
    train = shift_task(settings.rows, shift=1.2, seed=seed)
    is_flipped = torch.rand(len(train), generator=torch.Generator().manual_seed(seed)) < 0.1
    train = replace(train, y=torch.where(is_flipped, 1 - train.targets, train.targets))
    validation = shift_task(settings.validation, shift=1.2, seed=seed + 1, like=train)
    model = FeatureNAP.of(train, seed=seed)
    Training(model, Episodic(model, seed=seed), train, validation, epochs=40, seed=seed).run()
    with torch.no_grad():
        phi, other = (model.additive(s.x, s.lengths).double() for s in (train, validation))
    # Features of the layer in one unit, so that no peer's iteration suffers from their scale.
    deviation = phi.std(0)
    phi, other = phi / deviation, other / deviation
    y, other_y = train.targets.double(), validation.targets.double()
    w = fitted(phi, y, l2)
    truth = left_out(phi, y, other, other_y, w, l2).numpy()

    layer = nn.Linear(phi.shape[1], 1).double()
    with torch.no_grad():
        layer.weight.copy_(w[None, :-1])
        layer.bias.copy_(w[-1:])

    def head() -> Tensor:
        with torch.no_grad():
            logits, other_logits = layer(phi), layer(other)
            found = HeadInfluence.of(
                (phi, logits, y.long()), (other, other_logits, other_y.long()), "binary", l2=l2, damping=0.0
            )
            return found.scores(phi, logits, y.long())

    def as_series(values: Tensor, labels: Tensor) -> Series:
        return make_series(values.unsqueeze(1), labels.long(), kind="binary", standardise=False).to(torch.float64)

    one, two = as_series(phi, y), as_series(other, other_y)

    def conjugate() -> Tensor:
        return ModelInfluence(
            lambda s: layer(s.x[:, 0]), list(layer.parameters()), one, two, l2=l2, damping=0.0
        ).scores(one)

    contestants: dict[str, Callable[[], Tensor]] = {"ial-nap": head, "ial-nap CG": conjugate}
    targets, other_targets = y.unsqueeze(1), other_y.unsqueeze(1)
    if has_pydvl:
        from pydvl.influence.torch import CgInfluence, DirectInfluence

        loader = DataLoader(TensorDataset(phi, targets), batch_size=len(y))
        loss = nn.functional.binary_cross_entropy_with_logits

        def by_pydvl(made: Callable[[], object]) -> Callable[[], Tensor]:
            def run() -> Tensor:
                return made().fit(loader).influences(other, other_targets, phi, targets).mean(0) / len(y)

            return run

        contestants["pydvl CG"] = by_pydvl(lambda: CgInfluence(layer, loss, l2))
        tight = {"rtol": 1e-8, "atol": 1e-12, "maxiter": 100}
        contestants["pydvl CG tight"] = by_pydvl(lambda: CgInfluence(layer, loss, l2, **tight))
        contestants["pydvl CG block"] = by_pydvl(
            lambda: CgInfluence(layer, loss, l2, solve_simultaneously=True, **tight)
        )
        contestants["pydvl direct"] = by_pydvl(lambda: DirectInfluence(layer, loss, l2))
    if has_captum:
        from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
        from captum.influence._core.influence_function import NaiveInfluenceFunction

        size = phi.shape[1] + 1
        common = {
            "checkpoint": "",
            "checkpoints_load_func": lambda _model, _path: 1.0,
            "loss_fn": nn.BCEWithLogitsLoss(reduction="none"),
            "batch_size": len(y),
            "hessian_reg": l2,
            "hessian_inverse_tol": 0.0,
            "projection_dim": size,
            "sample_wise_grads_per_batch": False,
        }

        def by_captum(made: Callable[..., object], **own: object) -> Callable[[], Tensor]:
            def run() -> Tensor:
                found = made(layer, TensorDataset(phi, targets), **common, **own)
                return found.influence((other, other_targets)).mean(0) / len(y)

            return run

        contestants["captum Arnoldi"] = by_captum(ArnoldiInfluenceFunction, arnoldi_dim=4 * size, arnoldi_tol=1e-9)
        contestants["captum naive"] = by_captum(NaiveInfluenceFunction)

    seconds: dict[str, list[float]] = {}
    found: dict[str, np.ndarray] = {}
    for turn in range(settings.repeats + 1):
        for name, run in list(contestants.items()):
            begun = time.perf_counter()
            try:
                scores = run()
            except Exception as error:
                print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
                del contestants[name]
                continue
            if turn:
                seconds.setdefault(name, []).append(time.perf_counter() - begun)
            found[name] = scores.detach().double().numpy().reshape(-1)

    rows = {}
    print(f"{len(y)} training and {len(other_y)} validation instances, {phi.shape[1] + 1} parameters, l2 {l2}:")
    print(f"  {'':15} {'median':>12} {'ratio':>9}   Spearman   Pearson with exact leave-one-out")
    for name, values in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(seconds["ial-nap"], values, strict=True))
        rank, line = float(spearmanr(found[name], truth)[0]), float(pearsonr(found[name], truth)[0])
        rows[name] = {"seconds": statistics.median(values), "ratio": ratio, "spearman": rank, "pearson": line}
        print(f"  {name:15} {1e3 * rows[name]['seconds']:9.2f} ms {ratio:8.1f}x   {rank:8.4f}   {line:8.4f}")
    if settings.json:
        settings.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

"""Race: ten TARNets of IHDP as one program, against CATENets' torch TARNet, draw after draw.

    python benchmarks/race_catenets.py [--draws 10] [--steps 2000] [--threads 1 2] [--quick] [--json]

Needs ``pip install catenets``, and IHDP in the folder that ``SHARED_CORE_DATA`` names; without it, the embedded data
take its place, and the table says so. Everything runs in one process, one entrant after the other, each after a short
warm-up outside its clock, for each number of threads in turn; ratios compare equal numbers of threads. A clock starts
with arrays and stops with fitted networks; predictions are outside.

Equal on both sides: rows (a fit sees 90 % of a draw and trains on four fifths of them), widths and depths, ELU, no
batch norm, batch size, learning rate, weight decay, and gradient steps: CATENets counts epochs, which are converted.
Nobody stops early, ours by a patience that is never reached; it still takes the best of its checks, every 25 steps,
whose cost is inside its clock. CATENets is given standardised rows and outcomes, which ours makes inside its clock, and
is let off its checks but one. Different: our learning rate falls by 3 % each 100 steps, both arms count alike, and
gradients are clipped; CATENets' rate is constant, and it computes a propensity and a discrepancy that it multiplies
by 0. Errors therefore need not agree; they show that neither side won time by learning nothing.

Other rows are for information: the same networks of ours one draw after the other (what batching is worth), CFR with
the Wasserstein term, and the causal information bottleneck with one and with five members at equal trunk and heads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from cib_ite.data import EffectTable, Split, embedded, ihdp, split
from cib_ite.estimator import CIB, Problem, fit_many
from cib_ite.metrics import sqrt_pehe
from shared_core.errors import InputError

LR, WEIGHT_DECAY, BATCH = 1e-3, 1e-4, 100
# Trunk layers and width, head layers and width.
SIZES = {"CFR's, which are CATENets' defaults": (3, 200, 2, 100), "ours": (2, 64, 2, 64)}
Fitted = list[Callable[[np.ndarray], np.ndarray]]


@dataclass(frozen=True)
class Draw:
    """Rows to fit to, and rows to judge by."""

    table: EffectTable
    parts: Split

    @property
    def fitting(self) -> EffectTable:
        return self.table.rows(np.concatenate([self.parts.train, self.parts.validation]))

    def error(self, effect: Callable[[np.ndarray], np.ndarray]) -> float:
        test = self.table.rows(self.parts.test)
        return sqrt_pehe(effect(test.x), test.mu0, test.mu1)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Result:
    """What one entrant did."""

    sizes: str
    threads: int
    entrant: str
    steps: int
    seconds: float
    ratio: float | None
    sqrt_pehe: float
    sqrt_pehe_median: float


def load_draws(draws: int) -> tuple[str, list[Draw]]:
    """Return the name of the data, and as many draws of it as there are, up to `draws`."""
    tables: list[EffectTable] = []
    with contextlib.suppress(InputError):
        for draw in range(draws):
            tables.append(ihdp(draw))  # noqa: PERF401  (those before a missing one are kept)
    name = "IHDP"
    if not tables:
        name = "diabetes (embedded; set SHARED_CORE_DATA to a folder with IHDP for the real race)"
        tables = [embedded("diabetes", seed=draw) for draw in range(draws)]
    return name, [Draw(table, split(table, seed=draw)) for draw, table in enumerate(tables)]


def seconds_of(fit: Callable[[], Fitted]) -> tuple[float, Fitted]:
    start = time.perf_counter()
    fitted = fit()
    return time.perf_counter() - start, fitted


def steps_and_epochs(rows: int, steps: int) -> tuple[int, int]:
    """Return the whole number of CATENets' epochs that comes closest to `steps`, and the steps that they are."""
    training = rows - int(np.ceil(0.2 * rows))
    # As CATENets counts them, by rounding.
    batches = int(np.round(training / BATCH)) if training > BATCH else 1
    epochs = max(1, round(steps / batches))
    return epochs * batches, epochs


def catenets(draws: Sequence[Draw], sizes: tuple[int, int, int, int], steps: int) -> Callable[[], Fitted]:
    from catenets.models.torch import TARNet
    from sklearn.preprocessing import StandardScaler

    trunk, trunk_width, heads, heads_width = sizes
    prepared: list[tuple[Any, ...]] = []
    for draw in draws:
        rows = draw.fitting
        scaler = StandardScaler().fit(rows.x)
        mean, scale = rows.y.mean(), rows.y.std()
        prepared.append((scaler, scale, scaler.transform(rows.x), (rows.y - mean) / scale, rows.treatment))

    def fit() -> Fitted:
        fitted: Fitted = []
        for seed, (scaler, scale, x, y, t) in enumerate(prepared):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002  (CATENets shuffles with it)
            _, epochs = steps_and_epochs(len(x), steps)
            model = TARNet(
                x.shape[1],
                n_layers_r=trunk,
                n_units_r=trunk_width,
                n_layers_out=heads,
                n_units_out=heads_width,
                lr=LR,
                weight_decay=WEIGHT_DECAY,
                n_iter=epochs,
                n_iter_print=epochs,
                batch_size=BATCH,
                val_split_prop=0.2,
                batch_norm=False,
                early_stopping=False,
                seed=seed,
            ).fit(x, y, t)

            def effect(new: np.ndarray, model: Any = model, scaler: Any = scaler, scale: float = scale) -> np.ndarray:
                with torch.no_grad():
                    return scale * model.predict(scaler.transform(new)).numpy()

            fitted.append(effect)
        return fitted

    return fit


def ours(
    make: Callable[..., CIB],
    draws: Sequence[Draw],
    sizes: tuple[int, int, int, int],
    steps: int,
    *,
    together: bool = True,
) -> Callable[[], Fitted]:
    trunk, trunk_width, heads, heads_width = sizes
    rows = [draw.fitting for draw in draws]
    problems = [Problem(table.x, table.treatment, table.y) for table in rows]

    def fit() -> Fitted:
        models = [
            make(
                trunk=(trunk_width,) * trunk,
                heads=(heads_width,) * heads,
                lr=LR,
                head_l2=WEIGHT_DECAY,
                trunk_l2=WEIGHT_DECAY,
                batch_size=BATCH,
                steps=steps_and_epochs(table.n, steps)[0],
                patience=10**9,
                interval="none",
                device="cpu",
                random_state=seed,
            )
            for seed, table in enumerate(rows)
        ]
        if together:
            fit_many(models, problems)
        else:
            for model, problem in zip(models, problems, strict=True):
                fit_many([model], [problem])
        for model in models:
            if (taken := model.history_[-1]["step"]) != model.steps:
                raise RuntimeError(f"took {taken:.0f} of {model.steps} steps; that is no race")
        return [model.effect for model in models]

    return fit


def preset(name: str, members: int = 1) -> Callable[..., CIB]:
    return lambda **options: CIB.from_preset(name, n_members=members, **options)


def cib(members: int) -> Callable[..., CIB]:
    return lambda **options: CIB(n_members=members, **options)


def race(draws: Sequence[Draw], label: str, steps: int, threads: int, show: Callable[[Result], None]) -> list[Result]:
    """Run every entrant once; the first is the peer that ratios refer to."""
    sizes = SIZES[label]

    def entrants(draws: Sequence[Draw], steps: int) -> dict[str, Callable[[], Fitted]]:
        return {
            "CATENets TARNet": catenets(draws, sizes, steps),
            "ours: tarnet, all draws as one program": ours(preset("tarnet"), draws, sizes, steps),
            "ours: tarnet, one draw after another": ours(preset("tarnet"), draws, sizes, steps, together=False),
            "ours: cfr-wass, as one program": ours(preset("cfr-wass"), draws, sizes, steps),
            "ours: CIB, 1 member": ours(cib(1), draws, sizes, steps),
            "ours: CIB, 5 members": ours(cib(5), draws, sizes, steps),
        }

    torch.set_num_threads(threads)
    warming, racing = entrants(draws[:1], 25), entrants(draws, steps)
    results: list[Result] = []
    for name, fit in racing.items():
        warming[name]()
        seconds, fitted = seconds_of(fit)
        errors = [draw.error(effect) for draw, effect in zip(draws, fitted, strict=True)]
        taken = steps_and_epochs(draws[0].fitting.n, steps)[0]
        ratio = results[0].seconds / seconds if results else None
        results.append(
            Result(label, threads, name, taken, seconds, ratio, float(np.mean(errors)), float(np.median(errors)))
        )
        show(results[-1])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="two draws, 50 steps, one thread: to see whether it runs")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if options.quick:
        options.draws, options.steps, options.threads = 2, 50, options.threads[:1]
    data, draws = load_draws(options.draws)

    def show(result: Result) -> None:
        if not options.json:
            ratio = f"{result.ratio:6.2f} x" if result.ratio is not None else " " * 8
            print(
                f"{result.entrant:>40}: {result.seconds:8.2f} s  {ratio}   sqrt PEHE {result.sqrt_pehe:.3f}"
                f" (median {result.sqrt_pehe_median:.3f})",
                flush=True,
            )

    results: list[Result] = []
    for threads in options.threads:
        for label in SIZES:
            if not options.json:
                steps = steps_and_epochs(draws[0].fitting.n, options.steps)[0]
                layers = "trunk {} x {}, heads {} x {}".format(*SIZES[label])
                print(f"\n{data}, {len(draws)} draws, {steps} steps; sizes {label} ({layers}); threads: {threads}")
            results += race(draws, label, options.steps, threads, show)
    if options.json:
        json.dump(
            {"options": vars(options), "data": data, "results": [asdict(r) for r in results]}, sys.stdout, indent=2
        )
        return
    print("\nHow many times as fast as CATENets' TARNet, equal networks, steps and threads (wanted: at least 4):")
    for result in results:
        if "tarnet, all draws" in result.entrant and result.ratio is not None:
            verdict = "reached" if result.ratio >= 4 else "missed"
            print(f"  sizes {result.sizes}, threads {result.threads}: {result.ratio:.2f} ({verdict})")


if __name__ == "__main__":
    main()

"""Race: the batched counterfactual against captum's FeatureAblation; both must give the same numbers.

    python benchmarks/race_captum.py [--rows 10 100 --steps 4 --features 34 --repeats 7 --json FILE]

What a prediction would be with a feature at its mean at all steps, for every feature and instance; and with one cell at
its mean, for every cell. Ours puts the copies of instances into batches (:func:`ial_nap.counterfactual`), captum runs
the model once for each group of cells with its default of one perturbation at a time, and with as many at once as
there are. Contestants take turns in one process; the ratio is the median over turns of the peer's time over ours,
above 1 ours is faster. The numbers are compared each time, to 1e-5.

Without captum one line says so, with status 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ial_nap.nap import FeatureNAP
from ial_nap.ranking import counterfactual

try:
    from captum.attr import FeatureAblation
except ImportError:
    FeatureAblation = None


def main() -> None:
    """Race, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10, 100])
    for name, default in (("steps", 4), ("features", 34), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    if FeatureAblation is None:
        print("captum is not here: no race (pip install captum)")
        return
    t, r = settings.steps, settings.features
    model = FeatureNAP(t, r, 1)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    model.refresh()
    rows = []
    print(f"T={t}, r={r}; above 1: ial-nap is faster")
    for n in settings.rows:
        x, lengths = torch.randn(n, t, r, generator=random), torch.full((n,), t)
        for cells in (False, True):
            groups = torch.arange(t * r).view(1, t, r) if cells else torch.arange(r).expand(1, t, r)
            ablation = FeatureAblation(lambda x: model(x, torch.full((len(x),), t)).logits[:, 0].sigmoid())

            def predict(x: Tensor, lengths: Tensor) -> Tensor:
                return model(x, lengths).logits.sigmoid()

            def ours(x: Tensor = x, lengths: Tensor = lengths, cells: bool = cells) -> Tensor:
                with torch.no_grad():
                    return counterfactual(predict, x, lengths, cells=cells)

            def peer(at_once: int, x: Tensor = x, groups: Tensor = groups, ablation: object = ablation) -> Tensor:
                with torch.no_grad():
                    return ablation.attribute(x, feature_mask=groups, perturbations_per_eval=at_once).abs()

            together = int(groups.max()) + 1
            contestants: dict[str, Callable[[], Tensor]] = {
                "ial-nap": ours,
                "captum, 1 at once": lambda peer=peer: peer(1),
                f"captum, {together} at once": lambda peer=peer, together=together: peer(together),
            }
            seconds: dict[str, list[float]] = {name: [] for name in contestants}
            for turn in range(settings.repeats + 1):
                values = []
                for name, run in contestants.items():
                    begun = time.perf_counter()
                    values.append(run())
                    if turn:
                        seconds[name].append(time.perf_counter() - begun)
                for other in values[1:]:
                    torch.testing.assert_close(other, values[0], atol=1e-5, rtol=0)
            what = "cells" if cells else "features"
            for name, taken in seconds.items():
                ratio = statistics.median(b / a for a, b in zip(seconds["ial-nap"], taken, strict=True))
                print(f"  {n:5} instances, {what:8} {name:20} {1e3 * statistics.median(taken):9.2f} ms {ratio:7.2f}x")
                rows.append({"rows": n, "what": what, "who": name, "median": statistics.median(taken), "ratio": ratio})
    if settings.json:
        settings.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

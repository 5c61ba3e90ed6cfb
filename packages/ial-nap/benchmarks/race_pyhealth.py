"""Race: the attention layer forwards and backwards against pyhealth's RETAIN layer, and whose attention is whose step.

    python benchmarks/race_pyhealth.py [--rows 256 --steps 20 --width 64 --repeats 15] [--ragged] [--json FILE]

Both get the same values, already embedded, and as many hidden units as entries; dropout is off. Ours is
:class:`ial_nap.Retain` whole, with an embedding and an output layer that the peer's layer does not have. Contestants
take turns in one process; the ratio is the median over turns of the peer's time over ours, so that above 1 ours is
faster.

Alignment: both read a series from its end, so that when its first step is changed the weights of the first step alone
may move. pyhealth 1.1.6 makes its weights in reversed time and multiplies them with values in forward time.

Without pyhealth there is no race: one line says so, and the status is 0. It needs only its layer; see `--help`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ial_nap.attention import Retain


def layer_of_pyhealth() -> type[nn.Module] | None:
    """Return the RETAIN layer; without what the rest of that package imports."""
    found = importlib.util.find_spec("pyhealth")
    if found is None or not found.submodule_search_locations:
        return None
    try:
        return importlib.import_module("pyhealth.models.retain").RETAINLayer
    except ImportError:
        for name in [name for name in sys.modules if name.startswith("pyhealth")]:
            del sys.modules[name]
    # Its other models and data sets import a great deal that a layer does not need: stand-ins answer for them.
    folder = Path(found.submodule_search_locations[0])
    for name in ("pyhealth", "pyhealth.models"):
        module = types.ModuleType(name)
        module.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
    for name, needed in (("pyhealth.datasets", "SampleEHRDataset"), ("pyhealth.models", "BaseModel")):
        module = sys.modules.setdefault(name, types.ModuleType(name))
        setattr(module, needed, type(needed, (nn.Module,), {}))
    return importlib.import_module("pyhealth.models.retain").RETAINLayer


def times(contestants: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Take turns, after one turn that does not count."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, run in contestants.items():
            begun = time.perf_counter()
            run()
            if turn:
                found[name].append(time.perf_counter() - begun)
    return found


def scores_of_peer(layer: nn.Module, x: Tensor) -> Tensor:
    """Return its weights of entries at each place it multiplies them with."""
    found: list[Tensor] = []
    handle = layer.beta_li.register_forward_hook(lambda _m, _i, out: found.append(out.detach()))
    layer(x)
    handle.remove()
    return found[0].tanh()


def main() -> None:
    """Race, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 256), ("steps", 20), ("width", 64), ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ragged", action="store_true", help="series of 1 to `steps` steps")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    peer = layer_of_pyhealth()
    if peer is None:
        print("pyhealth is not here: no race (pip install --no-deps pyhealth==1.1.6)")
        return
    torch.manual_seed(0)
    rows, steps, width = settings.rows, settings.steps, settings.width
    x = torch.randn(rows, steps, width)
    lengths = torch.randint(1, steps + 1, (rows,)) if settings.ragged else torch.full((rows,), steps)
    x = x * (torch.arange(steps) < lengths.unsqueeze(1)).unsqueeze(2)
    mask = (torch.arange(steps) < lengths.unsqueeze(1)).float()
    ours = Retain(width, width, hidden=width, keep=1.0)
    layer = peer(width, dropout=0.0)

    def step_ours() -> None:
        ours.zero_grad()
        ours(x, lengths).logits.square().mean().backward()

    def step_peer() -> None:
        layer.zero_grad()
        layer(x, mask).square().mean().backward()

    found = times({"ial-nap": step_ours, "pyhealth": step_peer}, settings.repeats)
    ratio = statistics.median(b / a for a, b in zip(found["ial-nap"], found["pyhealth"], strict=True))
    medians = {name: statistics.median(values) for name, values in found.items()}
    print(f"forward and backward, {rows} x {steps} x {width}{' ragged' if settings.ragged else ''}:")
    for name, value in medians.items():
        print(f"  {name:9} {1e3 * value:8.1f} ms")
    print(f"  ratio     {ratio:8.2f} (above 1: ial-nap is faster)")

    one = torch.randn(1, steps, width)
    other = one.clone()
    other[:, 0] += 1
    full = torch.tensor([steps])
    with torch.no_grad():
        moved = {
            "ial-nap": (ours(one, full).beta - ours(other, full).beta).abs().amax(2)[0],
            "pyhealth": (scores_of_peer(layer, one) - scores_of_peer(layer, other)).abs().amax(2)[0],
        }
    aligned = {name: (values > 1e-6).nonzero()[:, 0].tolist() for name, values in moved.items()}
    print("the first step changes; weights that move are those of steps:")
    for name, places in aligned.items():
        print(f"  {name:9} {places}{'' if places == [0] else '   <- not that step'}")
    if settings.json:
        text = {"median_seconds": medians, "ratio": ratio, "moved": aligned}
        settings.json.write_text(json.dumps(text, indent=1))


if __name__ == "__main__":
    main()

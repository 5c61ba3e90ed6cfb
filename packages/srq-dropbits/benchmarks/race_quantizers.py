"""Race: forward and backward of every quantizer on one tensor, as a multiple of LSQ's, the floor.

    python benchmarks/race_quantizers.py [--bits 2 3 4] [--elements 1000000] [--threads 1] [--json FILE]

Contestants are the weight quantizers that ``prepare`` installs, in training mode, which take turns in one process on
the same tensor. SRQ costs the same at all bit-widths; RQ's full grid costs as much as it has points, and above
``--most-points`` of them it is timed on fewer elements and scaled up (marked ~). A contestant that needs longer than
``--most-seconds`` for all its turns takes fewer, three at least. ``kept`` counts the tensors that stay
from the forward to the backward pass, the input included.
"""

from __future__ import annotations

from typing import Any

import torch
from peers import clock, installed, options_of, print_table, write_json
from torch import Tensor, nn

from srq_dropbits.config import DropBits
from srq_dropbits.grid import Grid
from srq_dropbits.quantizers import WeightQuantizer

CONTESTANTS: dict[str, dict[str, Any]] = {
    "LSQ": {"estimator": "lsq"},
    "SRQ": {"estimator": "mode-soft"},
    "SRQ, noise fixed": {"estimator": "mode-soft", "learn_sigma": False},
    "SRQ + DropBits": {"estimator": "mode-soft", "dropbits": DropBits()},
    "mcste-input": {"estimator": "mcste"},
    "mcste-input + DropBits": {"estimator": "mcste", "dropbits": DropBits()},
    "mode-gumbel": {"estimator": "mode-gumbel"},
    "RQ": {"estimator": "rq"},
    "RQ-ST": {"estimator": "rq-st"},
    "RQ, local": {"estimator": "rq-local"},
}
FULL_GRID = ("mode-gumbel", "RQ", "RQ-ST")
PEER = "brevitas LSQ"


def make(label: str, bits: int, weight: Tensor) -> nn.Module | None:
    """Make a contestant with its step set, or None where it is the same as another one."""
    if label == PEER:
        return make_peer(bits, weight)
    quantizer = WeightQuantizer(Grid.signed(bits), **CONTESTANTS[label])
    if "dropbits" in CONTESTANTS[label] and not quantizer.gates:
        return None
    quantizer.initialize(weight)
    return quantizer.train()


def make_peer(bits: int, weight: Tensor) -> nn.Module:
    """Make brevitas' quantizer of a linear layer's weights with a learned step."""
    import brevitas.nn as qnn
    from brevitas.quant.scaled_int import Int8WeightPerTensorFloatMSE

    layer = qnn.QuantLinear(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        weight_quant=Int8WeightPerTensorFloatMSE,
        weight_bit_width=bits,
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.weight_quant(layer.weight)
    return layer.weight_quant.train()


class Pass:
    """Forward and backward of a quantizer; nothing else is in the clock."""

    def __init__(self, quantizer: nn.Module, weight: Tensor, gradient: Tensor) -> None:
        self.quantizer, self.gradient = quantizer, gradient
        self.weight = weight.clone().requires_grad_()
        steps = [p for p in quantizer.parameters() if p.requires_grad and p.numel() < weight.numel()]
        self.wanted = [self.weight, *steps]

    def __call__(self) -> None:
        if isinstance(self.quantizer, WeightQuantizer):
            self.quantizer.resample()
        out = self.quantizer(self.weight)
        # brevitas returns a tuple with value, step and zero point.
        out = getattr(out, "value", out)
        torch.autograd.grad(out, self.wanted, self.gradient, allow_unused=True)

    def kept_bytes(self) -> int:
        """Count what autograd keeps, every storage once."""
        sizes: dict[int, Tensor] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = self.quantizer(self.weight)
        del out
        return sum(tensor.untyped_storage().nbytes() for tensor in sizes.values())


def main() -> None:
    parser = options_of(__doc__.splitlines()[0], bits=[2, 3, 4], repeats=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--elements", type=int, default=1_000_000)
    parser.add_argument("--most-points", type=int, default=31, help="largest grid that RQ is timed on in full")
    parser.add_argument("--most-seconds", type=float, default=1.0, help="of one contestant at one bit-width")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rows = max(options.elements // 1000, 1)
    weight, gradient = torch.randn(rows, options.elements // rows), torch.randn(rows, options.elements // rows)
    labels = [*CONTESTANTS, PEER] if installed("brevitas") else list(CONTESTANTS)
    results: list[dict[str, Any]] = []
    for bits in options.bits:
        points = Grid.signed(bits).size
        share = max(1, -(-points // options.most_points))
        passes: dict[str, Pass] = {}
        scaled: dict[str, int] = {}
        for label in labels:
            scaled[label] = share if label in FULL_GRID else 1
            part = slice(None, rows // scaled[label])
            quantizer = make(label, bits, weight[part])
            if quantizer is not None:
                passes[label] = Pass(quantizer, weight[part], gradient[part])
        times = clock(passes, options.repeats, most_s=options.most_seconds)
        times = {label: ms * scaled[label] for label, ms in times.items()}
        kept = {label: one.kept_bytes() * scaled[label] for label, one in passes.items()}
        results.append({"bits": bits, "ms": times, "kept_bytes": kept})
        lines = []
        for label in labels:
            mark = "~" if scaled[label] > 1 else ""
            if label in times:
                lines.append(
                    (
                        label,
                        f"{mark}{times[label]:.2f}",
                        f"{times[label] / times['LSQ']:.2f}",
                        f"{times['SRQ'] / times[label]:.3f}",
                        f"{mark}{kept[label] / 2**20:.1f}",
                    )
                )
            else:
                lines.append((label, None, None, None, None))
        title = f"{bits} bits, {points} points, {weight.numel()} elements, {options.threads} thread(s)"
        print_table(title, ("forward + backward", "ms", "/ LSQ", "SRQ / it", "kept MiB"), lines)
    print()
    for found in results:
        ms = found["ms"]
        print(f"{found['bits']} bits: SRQ / LSQ {ms['SRQ'] / ms['LSQ']:.2f}", end="")
        print(f", mcste-input / LSQ {ms['mcste-input'] / ms['LSQ']:.2f} (target <= 2.50)", end="")
        print(f", SRQ / RQ {ms['SRQ'] / ms['RQ']:.3f}" + (" (target <= 0.200)" if found["bits"] == 4 else ""), end="")
        print(f", LSQ / brevitas {ms['LSQ'] / ms[PEER]:.2f}" if PEER in ms else "")
    write_json(options, results)


if __name__ == "__main__":
    main()

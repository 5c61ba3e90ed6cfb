"""The claims E1 to E6 on real data. Learning rates are those that ``make reproduce`` found on other seeds.

What is asserted is what holds; what the papers say and what does not hold here is asserted the other way round, where
the effect is beyond noise, or printed. `README.md` has the whole tables.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from shared_core.runs import Run
from srq_dropbits import QuantConfig, calibrate, convert, export_onnx, prepare, save_packed
from srq_dropbits.experiments import TASKS, Comparison, compare, lottery, sweep, task_named
from srq_dropbits.functional import log_probs
from srq_dropbits.models import build

pytestmark = pytest.mark.claims

SEEDS = [0, 1, 2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims") / "run"
    return Run(folder, package="srq-dropbits", version="0", command="test", config={}, seed=0, device="cpu")


def means(found: Comparison, metric: str) -> dict[tuple[str, str], float]:
    return {(row.dataset.split()[-1], row.method): row.mean for row in found.results if row.metric == metric}


def ladder(run: Run, task: str) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], float]]:
    """Return accuracies in percent and quantization errors by bits and method."""
    bits = [(2, 2), (4, 4)]
    accuracy: dict[tuple[str, str], float] = {}
    error: dict[tuple[str, str], float] = {}
    for rate, methods in ((3e-3, ["ptq", "lsq", "srq", "mcste-input"]), (3e-4, ["mcste-zero"])):
        found = compare(run, [TASKS[task]], methods, bits, SEEDS, rates=[rate])
        accuracy |= means(found, "test accuracy")
        error |= means(found, "quantization error")
    return accuracy, error


@pytest.fixture(scope="module")
def mnist(run, data_folder):
    if not (data_folder / "mnist").is_dir():
        pytest.skip("needs MNIST's four files in the folder mnist of SHARED_CORE_DATA")
    return ladder(run, "mnist-small")


@pytest.fixture(scope="module")
def digits(run):
    return ladder(run, "digits")


# ---- E1: low bits


def test_e1_mnist_at_two_and_four_bits(mnist):
    accuracy, _ = mnist
    print({key: round(value, 2) for key, value in accuracy.items()})
    # Required were 5 points. Rounding with the least squared error and fresh BN statistics is a strong baseline.
    assert accuracy["2/2", "srq"] >= accuracy["2/2", "ptq"] + 2
    assert accuracy["2/2", "srq"] >= accuracy["2/2", "lsq"] - 1
    assert accuracy["4/4", "srq"] >= accuracy["4/4", "float32"] - 1.5


def test_e1_digits_at_two_and_four_bits(digits):
    accuracy, _ = digits
    print({key: round(value, 2) for key, value in accuracy.items()})
    assert accuracy["2/2", "srq"] >= accuracy["2/2", "lsq"] - 1
    assert accuracy["4/4", "srq"] >= accuracy["4/4", "float32"] - 1.5


def test_the_literal_estimator_loses(mnist):
    accuracy, _ = mnist
    assert accuracy["2/2", "mcste-zero"] < accuracy["2/2", "srq"] - 1


# ---- E2: clusters


def test_e2_weights_cluster_at_their_grid_points(mnist, digits):
    for _, error in (mnist, digits):
        ratio = {bits: error[bits, "mcste-input"] / error[bits, "lsq"] for bits in ("2/2", "4/4")}
        print(ratio)
        # At most 0.8 was hoped for; at 2 bits it is about that.
        assert ratio["2/2"] < 1
        assert ratio["4/4"] < 0.8


# ---- E3: the bias to the mode


def total_variation(x: float, p_keep: float) -> tuple[float, float]:
    """Return the distance of the selection from pi without and with dropped bits, all masks enumerated, 3 bits."""
    points = np.arange(-3, 4)
    pi = log_probs(torch.tensor([x], dtype=torch.float64), torch.tensor(1.0), torch.tensor(1 / 3), -3, 3).exp()[0]

    def chosen(largest: int) -> np.ndarray:
        return (points == np.clip(np.round(x), -largest, largest)).astype(float)

    masked = p_keep * chosen(3) + (1 - p_keep) * chosen(1)
    return tuple(float(np.abs(each - pi.numpy()).sum()) / 2 for each in (chosen(3), masked))


def test_e3_dropped_bits_bring_the_selection_nearer_to_the_distribution_in_one_cell_only():
    near = [total_variation(x, 0.7) for x in np.linspace(1.55, 2.8, 20)]
    assert all(masked <= plain + 1e-12 for plain, masked in near)
    assert np.mean([plain - masked for plain, masked in near]) > 0.01
    # The claim is about values near the outer cells; well inside the outermost one it is the other way round.
    plain, masked = total_variation(3.5, 0.7)
    print(plain, masked)
    assert masked > plain + 0.1


# ---- E4: learned bits


def test_e4_bits_fall_with_the_penalty_and_meet_a_target(run):
    task = task_named("digits")
    options = {"uniform": [2], "weighting": "layer", "act_bits": 4}
    found = sweep(run, task, SEEDS[:2], targets=[2.5], penalties=[0.0, 0.01, 0.1, 1.0], **options)
    bits = {name: np.mean([point[0] for point in each]) for name, each in found.points.items()}
    accuracy = {name: np.mean([point[1] for point in each]) for name, each in found.points.items()}
    print(bits, accuracy)
    falling = [bits[f"learned, penalty {penalty:g}"] for penalty in (0.0, 0.01, 0.1, 1.0)]
    assert all(later <= earlier + 0.1 for earlier, later in pairwise(falling))
    assert falling[0] - falling[-1] > 0.5
    assert all(abs(point[0] - 2.5) <= 0.15 for point in found.points["learned, target 2.5"])
    assert accuracy["learned, target 2.5"] >= accuracy["uniform 2 bits"] - 0.005


# ---- E5: the quantized lottery ticket


def test_e5_joint_learning_against_retraining_is_measured(run):
    found = lottery(run, task_named("digits", rows=700, float_epochs=10, epochs=5), [0, 1, 2], target=2.5)
    for row in found.results:
        if row.metric == "joint - retrained":
            print(row.method, row.mean, row.low, row.high)
            # Three pairs cannot settle it: either outcome is within a few points.
            assert math.isfinite(row.mean)
            assert abs(row.mean) < 10
    joint = [point[2] for point in found.points["joint, from float network"]]
    assert joint == [point[2] for point in found.points["retrained, from float network"]]


# ---- E6: real size


def test_e6_three_bits_take_a_tenth_and_int4_an_eighth(tmp_path):
    model = build("lenet5", (1, 28, 28), 10)
    plain = 4 * sum(parameter.numel() for parameter in model.parameters())
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    quantized = prepare(model, QuantConfig(weight_bits=3, act_bits=3), x)
    calibrate(quantized, [x])
    integer = convert(quantized.eval(), x)
    save_packed(integer, tmp_path / "m.srq.safetensors")
    ratio = (tmp_path / "m.srq.safetensors").stat().st_size / plain
    print(ratio)
    assert ratio <= 0.105
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    export_onnx(integer, tmp_path / "m.onnx", x, weight_type="int4")
    stored = onnx.load(tmp_path / "m.onnx").graph.initializer
    weights = [tensor for tensor in stored if tensor.data_type == onnx.TensorProto.INT4]
    codes = sum(len(tensor.raw_data) for tensor in weights)
    assert codes == sum(math.ceil(math.prod(tensor.dims) / 2) for tensor in weights)
    assert codes / plain == pytest.approx(1 / 8, rel=0.01)

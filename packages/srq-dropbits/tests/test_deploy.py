"""Integer layers against NumPy's int64 arithmetic, converted models against fake quantization, and what is folded."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from srq_dropbits import deploy
from srq_dropbits.config import QuantConfig
from srq_dropbits.deploy import (
    IntegerConv,
    IntegerLinear,
    build_layer,
    convert,
    integer_accumulators,
    integer_layers,
    size_table,
)
from srq_dropbits.errors import CalibrationError, ExportError, NonFiniteError, NothingToQuantizeError
from srq_dropbits.grid import Grid
from srq_dropbits.layers import ResidualAdd
from srq_dropbits.packing import pack_bits
from srq_dropbits.qat import calibrate, prepare


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(shape, generator=generator(seed))


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def quantized(model, x, **changes):
    config = QuantConfig(**{"weight_bits": 3, "act_bits": 4, "estimator": "lsq", **changes})
    qmodel = prepare(model.eval(), config, x)
    calibrate(qmodel, [x])
    return qmodel.eval()


def assert_same_outputs(imodel, qmodel, x):
    expected, found = qmodel(x).detach(), imodel(x)
    assert float(expected.std(0).max()) > 0.01 * float(expected.abs().max()), "the outputs tell nothing"
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def draw(seed, grid, shape):
    """Integers of a grid, and their bit stream."""
    stored = torch.randint(0, grid.size, shape, generator=generator(seed))
    return stored * grid.stride + grid.n_lo, pack_bits(stored, grid.bits) if grid.bits else stored.new_zeros(0).byte()


def from_tensors(module, kind, weight_grid, input_grid, seed=0, input_scale=0.25, scale=None, **options):
    weights, codes = draw(seed, weight_grid, tuple(module.weight.shape))
    layer = build_layer(
        module,
        kind,
        weight_grid=weight_grid,
        weight_shape=tuple(module.weight.shape),
        codes=codes,
        scale=torch.tensor(0.1) if scale is None else scale,
        bias=None if module.bias is None else module.bias.detach().clone(),
        input_grid=input_grid,
        input_scale=None if input_grid is None else torch.tensor(input_scale),
        **options,
    )
    return layer, weights


def inputs_of(seed, grid, shape, step=0.25):
    n = torch.randint(grid.n_lo, grid.n_hi + 1, shape, generator=generator(seed))
    # Off the grid by less than half a step, so the codes are known.
    return n, (n + 0.8 * (torch.rand(shape, generator=generator(seed + 1)) - 0.5)) * step


WEIGHT_GRIDS = [
    Grid.signed(2),
    Grid.signed(3, symmetric=False),
    Grid.signed(8),
    Grid.odd(1),
    Grid.odd(8),
    Grid(0, 0, 0),
]
INPUT_GRIDS = [Grid.unsigned(1), Grid.unsigned(8), Grid.signed(8, symmetric=False), Grid(4, -3, 12), Grid(3, 2, 9)]


class TestAccumulators:
    @pytest.mark.parametrize("weight_grid", WEIGHT_GRIDS)
    @pytest.mark.parametrize("input_grid", INPUT_GRIDS)
    @pytest.mark.parametrize("int8", [True, False])
    def test_linear_equals_numpy(self, monkeypatch, weight_grid, input_grid, int8):
        if not int8:
            monkeypatch.setattr(deploy, "int8_is_exact", lambda: False)
        layer, weights = from_tensors(seeded(lambda: nn.Linear(70, 9)), "linear", weight_grid, input_grid)
        n, x = inputs_of(3, input_grid, (2, 5, 70))
        sums = n.numpy().astype(np.int64) @ weights.numpy().astype(np.int64).T
        assert np.array_equal(integer_accumulators(layer, x).numpy(), sums)
        expected = torch.as_tensor(sums) * (0.25 * 0.1) + layer.bias
        torch.testing.assert_close(layer(x), expected.float(), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("int8", [True, False])
    def test_sums_beyond_float32_stay_exact(self, monkeypatch, int8):
        # 5000 products of up to 255 * 127 pass 2^24, where float32 starts to round.
        if not int8:
            monkeypatch.setattr(deploy, "int8_is_exact", lambda: False)
        module = seeded(lambda: nn.Linear(5000, 3))
        layer, weights = from_tensors(module, "linear", Grid.signed(8), Grid.unsigned(8))
        n = 255 - torch.randint(0, 3, (4, 5000), generator=generator(5))
        weights = weights.abs()
        layer.codes = pack_bits(weights + 127, 8)
        sums = n.numpy().astype(np.int64) @ weights.numpy().astype(np.int64).T
        assert sums.max() > 2**24
        assert np.array_equal(integer_accumulators(layer, n * 0.25).numpy(), sums)
        assert not np.array_equal((n.float() @ weights.float().T).numpy().astype(np.int64), sums), (
            "the case does not show the difference"
        )

    @pytest.mark.parametrize("weight_grid", [Grid.signed(3), Grid.odd(2), Grid.signed(8)])
    @pytest.mark.parametrize(
        ("make", "kind", "shape"),
        [
            (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), "conv1d", (2, 4, 9)),
            (lambda: nn.Conv2d(4, 6, (3, 2), padding=(2, 1), dilation=(1, 2), groups=2), "conv2d", (2, 4, 7, 6)),
            (lambda: nn.Conv2d(4, 8, 3, padding="same", groups=4, bias=False), "conv2d", (2, 4, 7, 6)),
            (lambda: nn.Conv2d(2, 3, 4, padding="same", padding_mode="reflect"), "conv2d", (2, 2, 7, 6)),
            (lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="circular"), "conv2d", (2, 2, 7, 6)),
            (lambda: nn.Conv1d(2, 3, 3, padding="valid", padding_mode="replicate"), "conv1d", (2, 2, 7)),
            (lambda: nn.Conv3d(2, 3, 2, padding=1), "conv3d", (2, 2, 4, 3, 5)),
            (lambda: nn.Conv2d(1, 4, 3), "conv2d", (1, 1, 8, 8)),
            (lambda: nn.Conv2d(4, 6, 3), "conv2d", (4, 8, 8)),
            (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), "conv_transpose1d", (2, 4, 5)),
            (lambda: nn.ConvTranspose2d(4, 6, 3, 2, padding=1, groups=2), "conv_transpose2d", (2, 4, 5, 4)),
            (lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2), "conv_transpose3d", (2, 2, 3, 4, 3)),
        ],
    )
    def test_convolutions_equal_the_float64_layer(self, make, kind, shape, weight_grid):
        module = seeded(make)
        layer, weights = from_tensors(module, kind, weight_grid, Grid.unsigned(8))
        n, x = inputs_of(3, Grid.unsigned(8), shape)
        reference = copy.deepcopy(module).double()
        reference.weight.data.copy_(weights)
        if reference.bias is not None:
            reference.bias.data.zero_()
        sums = reference(n.double()).detach()
        assert torch.equal(integer_accumulators(layer, x), sums.round().long())
        bias = 0 if module.bias is None else module.bias.detach().reshape(-1, *(1,) * layer.dimensions)
        torch.testing.assert_close(layer(x), (sums * 0.025 + bias).float(), rtol=1e-5, atol=1e-5)

    def test_convolution_by_hand(self):
        # NumPy's int64 products over patches, independent of torch's convolutions.
        layer, weights = from_tensors(seeded(lambda: nn.Conv2d(3, 5, 3)), "conv2d", Grid.signed(4), Grid.unsigned(4))
        n, x = inputs_of(2, Grid.unsigned(4), (2, 3, 6, 7))
        patches = np.lib.stride_tricks.sliding_window_view(n.numpy().astype(np.int64), (3, 3), axis=(2, 3))
        sums = np.einsum("bcyxij,ocij->boyx", patches, weights.numpy().astype(np.int64))
        assert np.array_equal(integer_accumulators(layer, x).numpy(), sums)

    def test_a_large_convolution_uses_float64(self):
        module = seeded(lambda: nn.Conv1d(600, 2, 1))
        layer, weights = from_tensors(module, "conv1d", Grid.signed(8), Grid.unsigned(8))
        assert layer.accumulator is torch.float64
        layer.codes = pack_bits(torch.full_like(weights, 254), 8)
        n = torch.full((1, 600, 1), 255)
        assert integer_accumulators(layer, n * 0.25).unique().tolist() == [600 * 255 * 127]

    def test_a_transposed_convolution_takes_an_output_size(self):
        module = seeded(lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1))
        layer, weights = from_tensors(module, "conv_transpose2d", Grid.signed(3), Grid.unsigned(8))
        n, x = inputs_of(3, Grid.unsigned(8), (1, 3, 4, 4))
        module.weight.data.copy_(weights * 0.1)
        expected = module(n * 0.25, output_size=(8, 7)).detach()
        torch.testing.assert_close(layer(x, output_size=(8, 7)), expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ExportError, match="expected 7 to 8 along axis 1"):
            layer(x, output_size=(8, 9))

    def test_layers_without_integer_sums_say_so(self):
        layer, _ = from_tensors(nn.Linear(3, 2), "linear", Grid.signed(3), None, name="head")
        with pytest.raises(ExportError, match="layer 'head': linear with float inputs"):
            integer_accumulators(layer, torch.ones(1, 3))

    def test_nan_is_not_turned_into_an_integer(self):
        layer, _ = from_tensors(nn.Linear(3, 2), "linear", Grid.signed(3), Grid.unsigned(4), name="head")
        x = torch.tensor([[1.0, float("nan"), 2.0]])
        if deploy.int8_is_exact():
            with pytest.raises(NonFiniteError, match="layer 'head': NaN"):
                layer(x)
        else:
            assert layer(x).isnan().all()

    def test_autocast_does_not_touch_the_integers(self):
        layer, _ = from_tensors(seeded(lambda: nn.Conv2d(3, 4, 3)), "conv2d", Grid.signed(8), Grid.unsigned(8))
        _, x = inputs_of(2, Grid.unsigned(8), (1, 3, 6, 6))
        expected = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), expected)

    def test_an_empty_batch_passes(self):
        layer, _ = from_tensors(nn.Linear(3, 2), "linear", Grid.signed(3), Grid.unsigned(4))
        assert layer(torch.zeros(0, 3)).shape == (0, 2)


class TestState:
    def test_buffers_are_bytes_and_load_back(self):
        make = lambda seed: from_tensors(nn.Linear(10, 4), "linear", Grid.signed(3), Grid.unsigned(4), seed)[0]  # noqa: E731
        a, b = make(1), make(2)
        assert a.codes.dtype == torch.uint8
        assert a.codes.numel() == 15
        x = inputs_of(0, Grid.unsigned(4), (3, 10))[1]
        assert not torch.equal(a(x), b(x))
        b.load_state_dict(a.state_dict())
        assert torch.equal(a(x), b(x))

    def test_copies_and_pickles_compute_the_same_and_carry_no_cache(self):
        layer, _ = from_tensors(nn.Linear(64, 64), "linear", Grid.signed(2), Grid.unsigned(4))
        x = inputs_of(0, Grid.unsigned(4), (3, 64))[1]
        expected = layer(x)
        data = pickle.dumps(layer)
        assert len(data) < 64 * 64
        assert torch.equal(pickle.loads(data)(x), expected)
        assert torch.equal(copy.deepcopy(layer)(x), expected)
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        assert set(layer.state_dict()) == {"codes", "scale", "bias", "input_scale"}

    @pytest.mark.parametrize("input_grid", [None, Grid.unsigned(8)])
    def test_low_memory_gives_the_same_and_keeps_nothing(self, input_grid):
        x = normal(0, 3, 10)
        kept, _ = from_tensors(seeded(lambda: nn.Linear(10, 4)), "linear", Grid.signed(3), input_grid)
        lean, _ = from_tensors(seeded(lambda: nn.Linear(10, 4)), "linear", Grid.signed(3), input_grid, low_memory=True)
        assert torch.equal(kept(x), lean(x))
        assert kept._cache
        assert not lean._cache

    @pytest.mark.parametrize("bits", range(1, 9))
    @pytest.mark.parametrize("rowwise", [True, False])
    def test_embeddings_look_up_the_dequantized_rows(self, bits, rowwise):
        grid = Grid.odd(bits)
        module = nn.Embedding(7, 5)
        module.bias = None
        scale = normal(1, 7).abs() if rowwise else None
        index = torch.tensor([[0, 6], [3, 3]])
        outputs = []
        for low_memory in (False, True):
            layer, weights = from_tensors(module, "embedding", grid, None, scale=scale, low_memory=low_memory)
            outputs.append(layer(index))
        table = weights * (scale.unsqueeze(1) if rowwise else 0.1)
        torch.testing.assert_close(outputs[0], table[index], rtol=1e-6, atol=1e-6)
        assert torch.equal(*outputs)
        torch.testing.assert_close(layer.dequantized_weight(), table, rtol=1e-6, atol=1e-6)

    def test_an_embedding_that_renormalises_is_refused(self):
        with pytest.raises(ExportError, match="layer 'words': max_norm"):
            build_layer(
                nn.Embedding(4, 2, max_norm=1.0),
                "embedding",
                name="words",
                weight_grid=Grid(0, 0, 0),
                weight_shape=(4, 2),
            )


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.add = ResidualAdd()

    def forward(self, x):
        return self.add(x, self.norm(self.conv(x)).relu())


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.block = Block(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, stride=2)
        self.norm2 = nn.BatchNorm2d(8, affine=False)
        self.head = nn.Linear(8 * 36, 10)
        self.norm3 = nn.BatchNorm1d(10)

    def forward(self, x):
        x = self.block(self.norm(self.conv(x)).relu())
        x = self.norm2(self.depthwise(x)).relu()
        return self.norm3(self.head(x.view(x.size(0), -1)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, index):
        x = self.words(index)
        x = x + self.attention(self.norm(x), self.norm(x), self.norm(x), need_weights=False)[0]
        return self.out((x + self.down(nn.functional.gelu(self.up(self.norm(x))))).mean(1))


def with_statistics(model, x):
    """Batch norms far from the identity."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(normal(1, module.num_features) * 0.3)
            module.running_var.copy_(normal(2, module.num_features).abs() + 0.3)
            if module.affine:
                module.weight.data.copy_(normal(3, module.num_features))
                module.bias.data.copy_(normal(4, module.num_features) * 0.3)
    return model


def conv_net(**changes):
    x = torch.rand(16, 1, 16, 16, generator=generator(3))
    return quantized(with_statistics(seeded(ConvNet), x), x, **changes), x


class TestConvert:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"weight_bits": 2, "act_bits": 2},
            {"weight_bits": 8, "act_bits": 8},
            {"per_channel": True},
            {"symmetric": False, "quantize_input": False},
            {"act_bits": None},
        ],
    )
    @pytest.mark.parametrize("example", [True, False])
    def test_a_conv_net_gives_the_same_outputs(self, changes, example):
        qmodel, x = conv_net(**changes)
        imodel = convert(qmodel, x if example else None)
        with torch.no_grad():
            assert_same_outputs(imodel, qmodel, x)
        folded = {name for name, module in imodel.named_modules() if isinstance(module, nn.Identity)}
        assert folded == {"norm", "block.norm", "norm2"} | ({"norm3"} if example else set())

    @pytest.mark.parametrize("method", ["ptq", "ste-minmax", "pact", "lsq", "lsq+", "srq", "rq"])
    def test_every_method_converts(self, method):
        x = normal(1, 32, 12)
        model = seeded(lambda: nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4)))
        qmodel = prepare(model, QuantConfig.method(method, 3, 3), x)
        calibrate(qmodel, [x])
        with torch.no_grad():
            assert_same_outputs(convert(qmodel.eval(), x), qmodel, x)

    def test_a_transformer_gives_the_same_outputs(self):
        index = torch.randint(0, 20, (8, 6), generator=generator(0))
        qmodel = quantized(seeded(Transformer), index)
        imodel = convert(qmodel, index)
        with torch.no_grad():
            assert_same_outputs(imodel, qmodel, index)
        names = {name for name, _ in integer_layers(imodel)}
        assert {"words", "attention.q_proj", "attention.out_proj", "up", "out"} <= names

    def test_a_single_layer_becomes_a_single_layer(self):
        x = normal(0, 8, 6)
        qmodel = quantized(seeded(lambda: nn.Linear(6, 3)), x)
        layer = convert(qmodel, x)
        assert isinstance(layer, IntegerLinear)
        assert_same_outputs(layer, qmodel, x)

    def test_the_codes_are_those_of_training(self):
        qmodel, x = conv_net()
        imodel = convert(qmodel, x)
        weight = qmodel.head.weight.detach()
        codes = imodel.head.weight_codes()
        assert codes.abs().max() <= 3
        step = weight.abs().max() / codes.abs().max()
        torch.testing.assert_close(codes * step, weight, rtol=1e-5, atol=1e-6)

    def test_the_model_given_is_left_alone(self):
        qmodel, x = conv_net()
        before = {name: tensor.clone() for name, tensor in qmodel.state_dict().items()}
        imodel = convert(qmodel, x)
        after = qmodel.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert isinstance(qmodel.norm, nn.BatchNorm2d)
        assert not any(parameter.requires_grad for parameter in imodel.parameters())
        assert not imodel(x.requires_grad_(True)).requires_grad or not list(imodel.parameters())
        clone = copy.deepcopy(imodel)
        clone.load_state_dict(imodel.state_dict())
        assert torch.equal(clone(x), imodel(x))

    def test_one_layer_under_two_names_stays_one(self):
        shared = seeded(lambda: nn.Linear(6, 6))
        x = normal(0, 8, 6)
        qmodel = quantized(nn.Sequential(shared, nn.Tanh(), shared), x)
        imodel = convert(qmodel, x)
        assert imodel[0] is imodel[2]
        assert_same_outputs(imodel, qmodel, x)

    def test_batch_size_does_not_change_a_bit(self):
        qmodel, x = conv_net()
        imodel = convert(qmodel, x)
        assert torch.equal(torch.cat([imodel(row.unsqueeze(0)) for row in x]), imodel(x))

    def test_a_model_without_quantized_layers_says_so(self):
        with pytest.raises(NothingToQuantizeError, match="Sequential has no quantized layer"):
            convert(nn.Sequential(nn.ReLU()))

    def test_an_uncalibrated_layer_is_named(self):
        x = normal(0, 4, 6)
        qmodel = prepare(nn.Sequential(nn.Linear(6, 3)), QuantConfig(weight_bits=3, act_bits=3), x)
        with pytest.raises(CalibrationError, match=r"layer '0': .* run calibrate first"):
            convert(qmodel)

    def test_real_digits(self):
        from shared_core.data import load

        x = torch.as_tensor(load("digits").images[:512] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
        net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
        qmodel = quantized(with_statistics(net, x), x, weight_bits=2)
        with torch.no_grad():
            assert_same_outputs(convert(qmodel, x), qmodel, x)


class TestFolding:
    """Which batch norms go into the layer before them."""

    def convert(self, model, x, example=True, **changes):
        qmodel = quantized(with_statistics(model, x), x, **changes)
        imodel = convert(qmodel, x if example else None)
        with torch.no_grad():
            expected, found = qmodel(x), imodel(x)
        for a, b in zip(
            expected if isinstance(expected, tuple) else [expected],
            found if isinstance(found, tuple) else [found],
            strict=True,
        ):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        return {name for name, module in imodel.named_modules() if isinstance(module, nn.Identity)}

    def net(self, forward, norm=lambda: nn.BatchNorm2d(4)):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(2, 4, 3, padding=1)
                self.norm = norm()
                if "other" in forward.__code__.co_names:
                    self.other = nn.Conv2d(4, 4, 1)

        Net.forward = forward
        return seeded(Net)

    x = torch.rand(4, 2, 6, 6, generator=generator(1))

    @pytest.mark.parametrize("example", [True, False])
    @pytest.mark.parametrize(
        ("forward", "expected"),
        [
            (lambda self, x: self.other(self.norm(self.conv(x))), {"norm"}),
            (lambda self, x: self.other(self.norm(self.conv(x).relu())), set()),
        ],
    )
    def test_only_a_norm_right_after(self, forward, expected, example):
        assert self.convert(self.net(forward), self.x, example) == expected

    def test_not_when_the_output_is_used_twice(self):
        def forward(self, x):
            y = self.conv(x)
            return self.other(self.norm(y) + y)

        for example in (True, False):
            assert self.convert(self.net(forward), self.x, example) == set()

    def test_not_when_the_output_is_returned(self):
        def forward(self, x):
            y = self.conv(x)
            return self.norm(y), y

        for example in (True, False):
            assert self.convert(self.net(forward), self.x, example) == set()

    def test_not_when_the_norm_is_used_elsewhere(self):
        def forward(self, x):
            return self.norm(self.other(self.norm(self.conv(x))))

        for example in (True, False):
            assert self.convert(self.net(forward), self.x, example) == set()

    def test_asking_for_a_shape_is_no_use(self):
        def forward(self, x):
            y = self.conv(x)
            assert y.shape[0] == y.size(0)
            assert y.ndim == y.dim() == 4
            if y.dtype == torch.float32 and y.shape[2] > 1:
                return self.other(self.norm(y))
            return y

        assert self.convert(self.net(forward), self.x) == {"norm"}

    def test_reading_a_value_is_a_use(self):
        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) * y.max().item()

        assert self.convert(self.net(forward), self.x) == set()

    def test_branches_on_values_need_the_example(self):
        def forward(self, x):
            if float(x.sum()) < 0:
                return x
            return self.norm(self.conv(x))

        assert self.convert(self.net(forward), self.x, example=False) == set()
        assert self.convert(self.net(forward), self.x, example=True) == {"norm"}

    def test_not_without_running_statistics(self):
        class Loose(nn.BatchNorm2d):
            pass

        def forward(self, x):
            return self.norm(self.conv(x))

        plain = self.net(forward, lambda: nn.BatchNorm2d(4, track_running_stats=False))
        qmodel = quantized(plain, self.x)
        assert isinstance(convert(qmodel, self.x).norm, nn.BatchNorm2d)
        assert self.convert(self.net(forward, lambda: Loose(4)), self.x) == set()

    def test_a_norm_over_positions_stays(self):
        # As many positions as features: the shapes alone cannot tell them apart.
        model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)))
        x = torch.rand(3, 6, 5, generator=generator(0))
        for example in (True, False):
            assert self.convert(model, x, example) == set()

    def test_keyword_arguments_and_tuples(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(3, 4)
                self.norm = nn.BatchNorm1d(4)

            def forward(self, x, shift):
                return self.norm(self.a(x)) + shift

        x, shift = normal(0, 8, 3), torch.ones(4)
        config = QuantConfig(weight_bits=4, act_bits=None, estimator="lsq")
        qmodel = prepare(with_statistics(seeded(Two), x), config, (x, shift)).eval()
        for example in ((x, shift), {"x": x, "shift": shift}):
            imodel = convert(qmodel, example)
            assert isinstance(imodel.norm, nn.Identity)
            torch.testing.assert_close(imodel(x, shift), qmodel(x, shift).detach(), rtol=1e-5, atol=1e-5)

    def test_a_layer_called_twice_with_its_norm_folds(self):
        def forward(self, x):
            return self.norm(self.conv(x)) + self.norm(self.conv(x.flip(-1)))

        assert self.convert(self.net(forward), self.x, act_bits=None) == {"norm"}

    def test_codes_are_untouched(self):
        model = with_statistics(self.net(lambda self, x: self.norm(self.conv(x))), self.x)
        qmodel = quantized(model, self.x)
        with_fold, without = convert(qmodel, self.x).conv, None
        qmodel.norm.register_forward_hook(lambda *_: None)
        without = convert(qmodel, self.x).conv
        assert isinstance(with_fold, IntegerConv)
        assert with_fold.folded is not None
        assert without.folded is None
        assert torch.equal(with_fold.codes, without.codes)
        gain = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
        torch.testing.assert_close(with_fold.scale, (without.scale * gain).detach(), rtol=1e-6, atol=0.0)


class TestSizeTable:
    def test_bytes_before_and_after(self):
        qmodel, x = conv_net()
        imodel = convert(qmodel, x)
        plain = ConvNet()
        for before in (plain, qmodel):
            table = size_table(before, imodel)
            rows = {row.name: row for row in table.rows}
            assert rows["head"].bytes_before == 4 * (10 * 288 + 10)
            # 2880 codes of 3 bits, ten scales, ten biases, one input step.
            assert rows["head"].bytes_after == 1080 + 40 + 40 + 4
            assert rows["head"].dtype_before == "float32"
            assert rows["head"].dtype_after.startswith("uint8")
        whole = size_table(plain, imodel)
        state = [*plain.parameters(), *plain.buffers()]
        assert whole.bytes_before == sum(t.numel() * t.element_size() for t in state)
        assert whole.bytes_after == sum(t.numel() * t.element_size() for t in imodel.buffers())
        assert "head" in str(whole)


def test_pruned_layers_give_their_bias():
    layer, _ = from_tensors(seeded(lambda: nn.Linear(4, 3)), "linear", Grid(0, 0, 0), Grid.unsigned(3))
    assert layer.codes.numel() == 0
    torch.testing.assert_close(layer(normal(0, 2, 4)), layer.bias.expand(2, 3))


def test_weight_only_layers_scale_once():
    layer, weights = from_tensors(seeded(lambda: nn.Linear(4, 3)), "linear", Grid.signed(4), None)
    x = normal(0, 2, 4)
    torch.testing.assert_close(layer(x), functional.linear(x, weights * 0.1, layer.bias), rtol=1e-5, atol=1e-6)

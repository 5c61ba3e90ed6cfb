from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shared_core.errors import InputError
from srq_dropbits.models import (
    MLP,
    VGG7,
    DigitsCNN,
    LeNet5,
    ResNetSmall,
    TransformerSmall,
    build,
    load_weights,
)

SPECS = [
    "digits-cnn",
    "digits-cnn:0.5",
    "lenet5",
    "lenet5:0.25",
    "vgg7:0.0625",
    "resnet:0.5",
    "mobilenet:0.5",
    "transformer",
    "transformer:4",
    "mlp",
    "mlp:7,5",
]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


class TestArchitectures:
    @pytest.mark.parametrize("spec", SPECS)
    @pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 20)])
    def test_map_images_to_a_number_a_class_and_learn(self, spec, shape):
        model = build(spec, shape, 7, seed=1)
        out = model(torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)))
        assert out.shape == (4, 7)
        out.square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_lenet5_has_the_papers_layers(self):
        # 32C5-MP2-64C5-MP2-512FC on 28 x 28: 28-5+1 = 24, 12, 8, 4, so 64 * 4 * 4 = 1024 inputs of the hidden layer.
        expected = (25 + 1) * 32 + (25 * 32 + 1) * 64 + (1024 + 1) * 512 + (512 + 1) * 10
        assert parameters(LeNet5((1, 28, 28), 10)) == expected

    def test_vgg7_has_the_papers_layers(self):
        pairs = [(3, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
        convolutions = sum(9 * before * after + 2 * after for before, after in pairs)
        dense = 512 * 4 * 4 * 1024 + 2 * 1024 + (1024 + 1) * 10
        with torch.device("meta"):
            assert parameters(VGG7((3, 32, 32), 10)) == convolutions + dense

    def test_digits_cnn_has_16_32_and_64_units(self):
        model = DigitsCNN((1, 8, 8), 10)
        kinds = [(type(m).__name__, m.weight.shape[0]) for m in model if isinstance(m, nn.Conv2d | nn.Linear)]
        assert kinds == [("Conv2d", 16), ("Conv2d", 32), ("Linear", 64), ("Linear", 10)]

    @pytest.mark.parametrize("spec", ["digits-cnn", "vgg7:0.0625", "resnet", "mobilenet"])
    def test_every_convolution_feeds_a_batch_norm_and_has_no_bias(self, spec):
        modules = [m for m in build(spec, (3, 16, 16), 10).modules() if not list(m.children())]
        for module, after in pairwise(modules):
            if isinstance(module, nn.Conv2d):
                assert isinstance(after, nn.BatchNorm2d)
                assert module.bias is None

    def test_mobilenet_is_depthwise_separable(self):
        convolutions = [m for m in build("mobilenet", (3, 32, 32), 10).modules() if isinstance(m, nn.Conv2d)][1:]
        for depthwise, pointwise in zip(convolutions[::2], convolutions[1::2], strict=True):
            assert depthwise.groups == depthwise.in_channels
            assert pointwise.kernel_size == (1, 1)

    def test_residual_block_with_zero_convolutions_is_its_shortcut(self):
        block = ResNetSmall((1, 8, 8), 10)[3].eval()
        for module in block.body:
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.weight)
        x = torch.rand(2, 16, 8, 8)
        torch.testing.assert_close(block(x), x)

    def test_shared_add_is_the_same_network_before_it_is_quantized(self):
        plain, shared = (build(spec, (1, 8, 8), 10, seed=3).eval() for spec in ("resnet", "resnet:shared"))
        x = torch.rand(2, 1, 8, 8)
        torch.testing.assert_close(plain(x), shared(x))
        assert any(type(module).__name__ == "ResidualAdd" for module in shared.modules())

    def test_transformer_tells_the_order_of_its_tokens(self):
        # Without positions the mean over tokens would be the same for permuted rows.
        model = TransformerSmall((1, 8, 8), 10).eval()
        x = torch.rand(1, 1, 8, 8)
        assert not torch.allclose(model(x), model(x.flip(2)), atol=1e-6)

    def test_mlp_flattens_images_only(self):
        assert isinstance(MLP((1, 8, 8), 3)[0], nn.Flatten)
        assert isinstance(MLP((5,), 3)[0], nn.Linear)


class TestBuild:
    def test_seed_decides_the_weights_and_the_global_state_stays(self):
        before = torch.get_rng_state()
        first, second, other = (build("digits-cnn", (1, 8, 8), 10, seed) for seed in (1, 1, 2))
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(first[0].weight, second[0].weight)
        assert not torch.equal(first[0].weight, other[0].weight)

    @pytest.mark.parametrize(
        ("spec", "shape", "message"),
        [
            ("lenet", (1, 8, 8), "no network 'lenet'; did you mean 'lenet5'"),
            ("digits-cnn", (13,), r"needs images .* shape \(13,\)"),
            ("vgg7", (1, 4, 4), "at least 8 x 8 pixels"),
            ("vgg7:wide", (3, 32, 32), "'vgg7:wide': the width is a factor"),
            ("vgg7:-1", (3, 32, 32), "the width is a factor"),
            ("mlp:64,x", (13,), "whole numbers"),
            ("mlp:0", (13,), "at least one unit"),
            ("transformer:3", (1, 8, 8), "the patch must divide both sides"),
            ("transformer:x", (1, 8, 8), "the patch is a whole number"),
            ("resnet:shard", (1, 8, 8), "'resnet:shard'"),
            ("no_such_module_here:make", (3,), "cannot import 'no_such_module_here'"),
            ("torch.nn:Linaer", (3,), "did you mean 'Linear'"),
            ("math:pi", (3,), "is a float, not a function"),
        ],
    )
    def test_bad_specs_are_one_line(self, spec, shape, message):
        with pytest.raises(InputError, match=message) as caught:
            build(spec, shape, 10)
        assert "\n" not in str(caught.value)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write a module of the user's into the current folder; its name is new for each test."""
    monkeypatch.chdir(tmp_path)
    name = f"user_{abs(hash(str(tmp_path)))}"

    def write(text):
        (tmp_path / f"{name}.py").write_text("from torch import nn\nimport torch\n" + text)
        return name

    return write


class TestFactory:
    @pytest.mark.parametrize(
        "text",
        [
            "def make(in_shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(in_shape[0], classes))",
            "def make(*, classes, width=3): return nn.Linear(width, classes)",
            "class make(nn.Linear):\n    def __init__(self, classes, seed): super().__init__(3, classes)",
        ],
    )
    def test_is_called_with_what_it_takes(self, user_module, text):
        model = build(f"{user_module(text)}:make", (3,), 5)
        assert model(torch.zeros(2, 3)).shape == (2, 5)

    def test_draws_from_the_seed(self, user_module):
        name = user_module("def make(classes): return nn.Linear(3, classes)")
        weights = [build(f"{name}:make", (3,), 5, seed).weight for seed in (0, 0, 1)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("def make(depth): return nn.Linear(3, 5)", "needs 'depth', which is not known here"),
            ("def make(): return 3", "returned a int"),
            ("def make(): raise RuntimeError('no\\nluck')", "fails: RuntimeError: no luck"),
            ("1 / 0", "importing .* fails: ZeroDivisionError"),
            ("def other(): pass", "has no 'make'"),
        ],
    )
    def test_faults_are_one_line(self, user_module, text, message):
        with pytest.raises(InputError, match=message) as caught:
            build(f"{user_module(text)}:make", (3,), 5)
        assert "\n" not in str(caught.value)


class TestLoadWeights:
    @pytest.fixture
    def source(self):
        return build("digits-cnn", (1, 8, 8), 10, seed=5)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"state_dict": state, "epoch": 3},
            lambda state: {"model": state},
            lambda state: {f"module.{name}": value for name, value in state.items()},
            lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
        ],
    )
    def test_takes_what_people_save(self, source, wrap, tmp_path):
        torch.save(wrap(source.state_dict()), tmp_path / "weights.pt")
        model = load_weights(build("digits-cnn", (1, 8, 8), 10, seed=6), tmp_path / "weights.pt")
        for name, value in source.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)

    def test_takes_safetensors(self, source, tmp_path):
        save_file(source.state_dict(), tmp_path / "weights.safetensors")
        model = load_weights(build("digits-cnn", (1, 8, 8), 10, seed=6), tmp_path / "weights.safetensors")
        assert torch.equal(model[0].weight, source[0].weight)

    def test_strips_module_only_where_it_is_a_prefix_of_all(self, tmp_path):
        model = nn.ModuleDict({"module": nn.Linear(2, 2)})
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        load_weights(model, tmp_path / "weights.pth")

    def test_names_what_does_not_fit(self, source, tmp_path):
        path = tmp_path / "weights.pt"
        state = source.state_dict()
        state["head.bias"] = state.pop("0.weight")
        torch.save(state, path)
        with pytest.raises(InputError, match=r"lacks '0.weight' and has 'head.bias'"):
            load_weights(source, path)

    def test_names_a_wrong_shape(self, source, tmp_path):
        torch.save(source.state_dict(), tmp_path / "weights.pt")
        with pytest.raises(
            InputError, match=r"'0.weight' has shape \(16, 1, 3, 3\) and the model's has \(8, 1, 3, 3\)"
        ):
            load_weights(build("digits-cnn:0.5", (1, 8, 8), 10), tmp_path / "weights.pt")

    def test_refuses_code_in_a_pickle(self, tmp_path):
        torch.save({"0.weight": print}, tmp_path / "weights.pt")
        with pytest.raises(InputError, match="could run code"):
            load_weights(MLP((2,), 2), tmp_path / "weights.pt")

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x08\0\0\0\0\0\0\0{}"])
    def test_refuses_damaged_files(self, suffix, content, tmp_path):
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            load_weights(MLP((2,), 2), path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {}])
    def test_refuses_what_is_no_state_dict(self, content, tmp_path):
        torch.save(content, tmp_path / "weights.pt")
        with pytest.raises(InputError, match="holds no state dict"):
            load_weights(MLP((2,), 2), tmp_path / "weights.pt")

    def test_refuses_nan(self, tmp_path):
        model = MLP((2,), 2)
        with torch.no_grad():
            model[0].bias[0] = torch.nan
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        with pytest.raises(InputError, match=r"'0.bias' holds NaN"):
            load_weights(MLP((2,), 2), tmp_path / "weights.pt")

    def test_says_what_it_reads(self, tmp_path):
        with pytest.raises(InputError, match=r"give weights as \.safetensors"):
            load_weights(MLP((2,), 2), tmp_path / "weights.h5")
        with pytest.raises(InputError, match="No such file"):
            load_weights(MLP((2,), 2), tmp_path / "absent.pt")

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from srq_dropbits.bits import bit_penalty, freeze_bits, truncate
from srq_dropbits.config import METHODS, DropBits, LearnBits, QuantConfig
from srq_dropbits.deploy import convert
from srq_dropbits.errors import PackedFormatError, SrqError
from srq_dropbits.packing import save_packed
from srq_dropbits.qat import calibrate, param_groups, prepare, set_dropbits
from srq_dropbits.saving import FORMAT, load, read_config, save
from srq_dropbits.structure import quantizers


class Net(nn.Module):
    """A convolution, batch norm, a residual sum and a linear layer."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.again = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width * 16, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.head((x + self.again(x)).relu().flatten(1))


class Tied(nn.Module):
    """An embedding that is the output layer, too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.body(self.embed(x)).tanh())


def seeded(make, seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def images(seed: int = 0):
    return torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def prepared(*, steps: int = 3, **options):
    """A model in the middle of its training, in training mode."""
    x = images()
    model = prepare(seeded(Net), QuantConfig(**options), x[:1])
    if options.get("act_bits", 4):
        calibrate(model, [x])
    train(model, steps)
    return model


def train(model, steps: int):
    optimizer = torch.optim.SGD(param_groups(model, lr=0.05, scale_lr=0.05, gate_lr=1.0))
    target = torch.arange(16) % 3
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.train()
        for step in range(steps):
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(images(step)), target) + bit_penalty(model)).backward()
            optimizer.step()


def round_trip(model, path, make=Net):
    save(model, path)
    return load(path, seeded(make, 9))


def assert_same(model, other, x):
    """The same outputs in both modes to the bit, the same state, grids and switches."""
    assert other.quant_config == model.quant_config
    mine, theirs = model.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    for first, second in zip(quantizers(model), quantizers(other), strict=True):
        for key in ("base_grid", "grid", "ready", "frozen", "gates", "dropping", "macs", "off", "estimator"):
            assert getattr(first, key, None) == getattr(second, key, None), key
        for (name, one), (_, two) in zip(first.named_parameters(), second.named_parameters(), strict=True):
            assert one.requires_grad == two.requires_grad, name
    assert str(other.report()) == str(model.report())
    assert other.training == model.training
    first, second = copy.deepcopy(model), copy.deepcopy(other)
    for training in (False, True):
        results = []
        for each in (first, second):
            each.train(training)
            with torch.random.fork_rng():
                torch.manual_seed(3)
                results.append(each(x))
        assert torch.equal(*results)


CASES = {
    "default": {},
    "three bits, full grid": {"weight_bits": 3, "act_bits": 2, "symmetric": False},
    "per channel": {"per_channel": True},
    "weights only": {"act_bits": None},
    "input left alone": {"quantize_input": 0},
    "dropbits": {"dropbits": DropBits(p_keep=0.6)},
    "learned dropbits of activations": {"dropbits": DropBits(learn=True, activations=True)},
    "end points": {"dropbits": DropBits(sharing="endpoint"), "estimator": "mcste"},
    "learned bits": {"dropbits": DropBits(), "learn_bits": LearnBits(target_bits=2.5)},
    "learned bits within bytes": {"learn_bits": LearnBits(target_bytes=220, min_bits=1)},
    "sums": {"quantize_adds": True},
    "overrides": {"overrides": {"head": {"weight_bits": 8, "act_bits": 6, "estimator": "lsq"}, "again": "skip"}},
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_in_training_comes_back_to_the_bit(name, tmp_path):
    model = prepared(**CASES[name])
    assert_same(model, round_trip(model, tmp_path / "m.safetensors"), images(7))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_comes_back_to_the_bit(name, tmp_path):
    config = QuantConfig.method(name, 3, 3)
    model = prepared(**{key: getattr(config, key) for key in QuantConfig.model_fields}, steps=1)
    assert_same(model, round_trip(model, tmp_path / "m.safetensors"), images(7))


def test_training_goes_on_as_if_uninterrupted(tmp_path):
    model = prepared(dropbits=DropBits(p_keep=0.5), learn_bits=LearnBits(target_bits=2.5))
    other = round_trip(model, tmp_path / "m.safetensors")
    for each in (model, other):
        train(each, 3)
    assert_same(model, other, images(7))


def test_frozen_bits_and_truncated_grids(tmp_path):
    model = prepared(learn_bits=LearnBits(max_bits=4, min_bits=2, penalty=20.0), steps=12)
    bits = freeze_bits(model)
    assert min(bits.values()) < 4
    set_dropbits(model, False)
    other = round_trip(model, tmp_path / "m.safetensors")
    assert_same(model, other, images(7))
    assert {row.name: row.weight_bits for row in other.report().rows if row.weight_bits is not None} == bits
    model = prepared(weight_bits=4).eval()
    truncate(model, 2)
    assert_same(model, round_trip(model, tmp_path / "m.safetensors"), images(7))


def test_a_pruned_layer(tmp_path):
    model = prepared(learn_bits=LearnBits(max_bits=3, min_bits=1))
    part = model.again.parametrizations.weight[0]
    part.freeze(part.base_grid.upto(0))
    other = round_trip(model, tmp_path / "m.safetensors")
    assert not other.again.weight.any()
    assert_same(model, other, images(7))


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model = prepare(seeded(Tied), QuantConfig(weight_bits=3))
    x = torch.arange(11).reshape(1, -1)
    calibrate(model, [x])
    path = tmp_path / "m.safetensors"
    other = round_trip(model, path, Tied)
    assert_same(model, other, x)
    assert sum(value.shape == (11, 6) for value in load_file(path).values()) == 1
    weights = [layer.parametrizations.weight for layer in (other.embed, other.out)]
    assert weights[0].original is weights[1].original
    assert weights[0][0] is weights[1][0]


def test_attention_and_a_converted_model(tmp_path):
    def make():
        return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    model = prepare(seeded(make), QuantConfig(weight_bits=4))
    calibrate(model, [x])
    other = round_trip(model, tmp_path / "m.safetensors", make)
    assert_same(model, other, x)
    assert torch.equal(convert(model.eval())(x), convert(other.eval())(x))


def test_the_given_model_and_the_random_state_are_left_alone(tmp_path):
    path = tmp_path / "m.safetensors"
    save(prepared(), path)
    fresh = seeded(Net, 9)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    state = torch.get_rng_state()
    other = load(path, fresh)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(fresh) is Net
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    with torch.no_grad():
        other.head.bias.add_(1)
    assert torch.equal(load(path, fresh).head.bias + 1, other.head.bias)


def test_the_file_is_the_same_every_time_and_holds_plain_values(tmp_path):
    model = prepared(overrides={"head": {"weight_bits": 8}})
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path in (first, second):
        save(model, path)
    assert first.read_bytes() == second.read_bytes()
    assert read_config(first) == model.quant_config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_fresh_weights_of_zero_do_not_warn(tmp_path):
    path = tmp_path / "m.safetensors"
    model = prepared()
    save(model, path)
    fresh = seeded(Net)
    nn.init.zeros_(fresh.head.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(model, load(path, fresh), images(7))


def test_multiplications_are_counted_where_the_file_lacks_them(tmp_path):
    path = tmp_path / "m.safetensors"
    save(prepare(seeded(Net), QuantConfig(act_bits=None)), path)
    assert load(path, seeded(Net)).report().macs == 0
    found = load(path, seeded(Net), images()[:1]).report()
    assert found.macs == 16 * 9 * 4 + 16 * 9 * 16 + 64 * 3


# ---- what cannot be saved or loaded


def test_only_prepared_models_are_saved(tmp_path):
    for model in (nn.Linear(2, 2), nn.Sequential(prepared())):
        with pytest.raises(SrqError, match="needs a model that prepare returned"):
            save(model, tmp_path / "m.safetensors")

    class Counts(nn.Linear):
        def get_extra_state(self):
            return {"seen": 3}

        def set_extra_state(self, state):
            del state

    model = prepare(nn.Sequential(Counts(2, 2)), QuantConfig(act_bits=None))
    with pytest.raises(SrqError, match=r"'0\._extra_state'.* is a dict; only tensors"):
        save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


class Other(Net):
    def __init__(self):
        super().__init__()
        self.extra = nn.LayerNorm(3)


class Double(Net):
    def __init__(self):
        super().__init__()
        self.norm.double()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Net(5), r"'conv\.bias' has shape \(4,\) and the model's has \(5,\)"),
        (Other, r"lacks tensor 'extra\.weight'"),
        (Double, r"'norm\.weight' is torch\.float32 and the model's is torch\.float64"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), r"lacks tensor '0\.bias'"),
        (lambda: nn.Sequential(nn.ReLU()), "cannot be loaded into this model: Sequential has no layer to quantize"),
        (lambda: prepare(Net(), QuantConfig()), "prepared already"),
    ],
)
def test_another_architecture_is_named_by_its_first_difference(make, message, tmp_path):
    path = tmp_path / "m.safetensors"
    save(prepared(), path)
    with pytest.raises(SrqError, match=message) as caught:
        load(path, seeded(make))
    assert "\n" not in str(caught.value)
    assert "m.safetensors" in str(caught.value)


def test_a_smaller_architecture(tmp_path):
    path = tmp_path / "m.safetensors"
    model = prepare(seeded(Other), QuantConfig(act_bits=None))
    save(model, path)
    with pytest.raises(SrqError, match=r"has tensor 'extra\.(bias|weight)', which the model lacks"):
        load(path, Net())


def test_patterns_of_another_architecture(tmp_path):
    path = tmp_path / "m.safetensors"
    save(prepared(exclude=("head",)), path)
    with pytest.raises(SrqError, match="cannot be loaded into this model: pattern 'head' matches no layer"):
        load(path, nn.Sequential(nn.Linear(2, 2)))


def test_files_of_another_kind(tmp_path):
    model = prepared().eval()
    packed = tmp_path / "packed.safetensors"
    save_packed(convert(model), packed)
    with pytest.raises(PackedFormatError, match="packed weights: use load_packed"):
        load(packed, Net())
    plain = tmp_path / "plain.safetensors"
    save_file({"w": torch.zeros(2)}, plain)
    with pytest.raises(PackedFormatError, match=r"plain\.safetensors: expected 'srq-checkpoint'.*found none"):
        load(plain, Net())
    with pytest.raises(PackedFormatError, match=r"cannot read .*nowhere\.safetensors"):
        load(tmp_path / "nowhere.safetensors", Net())
    (tmp_path / "text.safetensors").write_text("weights, I am told")
    with pytest.raises(PackedFormatError, match=r"text\.safetensors: damaged, or not a safetensors file"):
        load(tmp_path / "text.safetensors", Net())


def rewrite(path, **changes):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[FORMAT])
    for key, value in changes.items():
        if value is None:
            del about[key]
        else:
            about[key] = value
    save_file(load_file(path), path, metadata={FORMAT: json.dumps(about)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "expected version 1, found 2"),
        ({"format": "other"}, "expected format 'srq-checkpoint', found 'other'"),
        ({"aliases": None}, "no 'aliases'"),
        ({"training": "yes"}, "no 'training'"),
        ({"crc32": 1}, "do not match their checksum"),
        ({"aliases": {"head.bias": "nothing"}}, "lacks tensor 'nothing'"),
    ],
)
def test_a_header_that_is_not_ours(changes, message, tmp_path):
    path = tmp_path / "m.safetensors"
    save(prepared(steps=0), path)
    rewrite(path, **changes)
    with pytest.raises(PackedFormatError, match=message):
        load(path, Net())


def test_a_config_that_this_release_does_not_know(tmp_path):
    path = tmp_path / "m.safetensors"
    save(prepared(steps=0), path)
    rewrite(path, config={"weight_bits": 4, "colour": "blue"})
    with pytest.raises(SrqError, match=r"m\.safetensors.*unknown setting 'colour'"):
        load(path, Net())


def test_damage_is_noticed_wherever_it_is(tmp_path):
    path = tmp_path / "m.safetensors"
    save(prepared(steps=0), path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(PackedFormatError, match=r"m\.safetensors"):
            load(path, Net())
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start, len(whole), max((len(whole) - start) // 40, 1)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(PackedFormatError, match="checksum"):
            load(path, Net())

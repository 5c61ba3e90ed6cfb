from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_core.errors import InputError
from stamp.encoders import Attention, Instances, Pooling, Subsample, make_encoder

SHAPES = [(6,), (2, 20), (1, 8, 8), (3, 16, 12), (2, 4, 5), (1, 4, 9, 4)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=7, shape=(3, 12, 10), seed=1):
    return torch.rand(n, *shape, generator=seeded(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_makes_convex_mixtures(shape):
    encoder = make_encoder("attention", pseudo=5, input_shape=shape, generator=seeded())
    assert isinstance(encoder, Attention)
    x = images(7, shape)
    weights = encoder.weights(x)
    assert weights.shape == (5, 7)
    assert bool((weights > 0).all())
    assert torch.allclose(weights.sum(1), torch.ones(5), atol=1e-6)
    mixed = encoder(x)
    by_hand = np.tensordot(weights.detach().numpy(), x.numpy(), 1)
    assert np.abs(mixed.detach().numpy() - by_hand).max() <= 1e-6
    assert bool((mixed <= x.amax(0) + 1e-6).all())
    assert bool((mixed >= x.amin(0) - 1e-6).all())
    assert torch.allclose(encoder(x[:1].expand(4, *shape)), x[:1].expand(5, *shape), atol=1e-6)


def test_attention_follows_its_formula():
    encoder = make_encoder("attention", pseudo=4, input_shape=(2, 16, 16), generator=seeded())
    with torch.no_grad():
        encoder.keys.norm.weight.uniform_(0.5, 1.5, generator=seeded(2))
        encoder.keys.norm.bias.uniform_(-1.0, 1.0, generator=seeded(3))
    x = images(6, (2, 16, 16))
    weights = encoder.weights(x).detach().numpy()
    pooled = x.numpy().reshape(6, 2, 8, 2, 8, 2).mean((3, 5)).reshape(6, -1)
    standard = (pooled - pooled.mean(1, keepdims=True)) / np.sqrt(pooled.var(1, keepdims=True) + 1e-5)
    state = {name: value.numpy() for name, value in encoder.state_dict().items()}
    normed = standard * state["keys.norm.weight"] + state["keys.norm.bias"]
    keys = normed @ state["keys.linear.weight"].T + state["keys.linear.bias"]
    assert keys.shape == (6, 64)
    scores = np.exp(state["seeds"] @ keys.T / 8)
    assert np.abs(weights - scores / scores.sum(1, keepdims=True)).max() <= 1e-5


def attended(state, queries, z, heads, name="pool."):
    """MAB of the Set Transformer as the specification writes it: full-width scale, residual of the projected query."""

    def linear(x, layer):
        return x @ state[f"{name}{layer}.weight"].T + state[f"{name}{layer}.bias"]

    def normed(x, k):
        standard = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        return standard * state[f"{name}norms.{k}.weight"] + state[f"{name}norms.{k}.bias"]

    q, k, v = linear(queries, "query"), linear(z, "key"), linear(z, "value")
    width = q.shape[1] // heads
    out = np.zeros_like(q)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(q.shape[1]))
        out[:, part] = q[:, part] + scores / scores.sum(1, keepdims=True) @ v[:, part]
    out = normed(out, 0)
    return normed(out + np.maximum(linear(out, "out"), 0), 1)


@pytest.mark.parametrize(("heads", "blocks"), [(4, 0), (2, 2), (1, 0)])
def test_pooling_is_that_of_the_set_transformer(heads, blocks):
    shape = (1, 4, 4)
    encoder = Pooling(shape, 3, 16, heads, blocks, generator=seeded()).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=seeded(4), dtype=torch.float64)
    x = images(6, shape).double()
    state = {name: value.numpy() for name, value in encoder.state_dict().items()}
    flat = x.numpy().reshape(6, -1)
    standard = (flat - flat.mean(1, keepdims=True)) / np.sqrt(flat.var(1, keepdims=True) + 1e-5)
    normed = standard * state["keys.norm.weight"] + state["keys.norm.bias"]
    z = normed @ state["keys.linear.weight"].T + state["keys.linear.bias"]
    for block in range(blocks):
        z = attended(state, z, z, heads, f"blocks.{block}.")
    pooled = attended(state, state["seeds"], z, heads)
    wanted = (pooled @ state["out.weight"].T + state["out.bias"]).reshape(3, *shape)
    assert np.abs(encoder(x).detach().numpy() - wanted).max() <= 1e-10


@pytest.mark.parametrize("name", ["attention", "pma"])
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), times=st.integers(2, 4))
def test_order_and_repetition_say_nothing(name, shape, seed, times):
    encoder = make_encoder(name, pseudo=3, input_shape=shape, generator=seeded())
    x = images(5, shape, seed)
    shown = encoder(x)
    assert shown.shape == (3, *shape)
    assert (encoder(x[torch.randperm(5, generator=seeded(seed))]) - shown).abs().max() <= 1e-6
    assert (encoder(x.repeat(times, *[1] * len(shape))) - shown).abs().max() <= 1e-6
    assert (encoder(images(5, shape, seed + 1)) - shown).abs().max() > 1e-4


def test_sets_of_any_size_and_images_of_other_sizes():
    for name in ("attention", "pma"):
        encoder = make_encoder(name, pseudo=4, input_shape=(3, 12, 10), generator=seeded())
        assert all(encoder(images(n)).shape == (4, 3, 12, 10) for n in (1, 2, 300))
    attention = make_encoder("attention", pseudo=4, input_shape=(3, 12, 10), generator=seeded())
    for size in ((24, 24), (8, 8), (5, 30)):
        x = images(6, (3, *size))
        assert attention(x).shape == (4, 3, *size)
    # Pixels doubled in both directions are the same image: nothing about the mixture changes.
    x = images(6, (3, 16, 16))
    other = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    square = make_encoder("attention", pseudo=4, input_shape=(3, 16, 16), generator=seeded())
    assert torch.allclose(square.weights(x), square.weights(other), atol=1e-6)


def test_parameters_do_not_grow_with_images():
    sizes = [
        sum(p.numel() for p in make_encoder("attention", input_shape=(3, n, n), generator=seeded()).parameters())
        for n in (8, 32, 224)
    ]
    assert len(set(sizes)) == 1


def test_double_precision_is_shown_in_double_precision():
    for name in ("attention", "pma"):
        encoder = make_encoder(name, pseudo=4, input_shape=(3, 12, 10), generator=seeded())
        x = images()
        shown = encoder(x.double())
        assert shown.dtype == torch.float64
        assert torch.allclose(shown.float(), encoder(x), atol=1e-6)


@pytest.mark.parametrize("name", ["attention", "pma"])
def test_gradients_reach_every_parameter(name):
    encoder = make_encoder(name, pseudo=4, input_shape=(3, 12, 10), generator=seeded())
    weights = torch.randn(4, 3, 12, 10, generator=seeded(5))
    (encoder(images()) * weights).sum().backward()
    # A constant added to all keys shifts all scores of a seed alike, which the softmax does not see.
    still = {"keys.linear.bias", "keys.norm.bias"} if name == "attention" else {"pool.key.bias"}
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.abs().max() > 1e-6) != (key in still)


def test_subsample_draws_without_replacement_and_every_instance_alike():
    encoder = make_encoder("subsample", pseudo=3, generator=seeded())
    assert isinstance(encoder, Subsample)
    assert not list(encoder.parameters())
    x = torch.arange(8.0)[:, None]
    counts = torch.zeros(8)
    generator = seeded()
    for _ in range(1000):
        drawn = encoder(x, generator).flatten().long()
        assert len(set(drawn.tolist())) == 3
        counts[drawn] += 1
    # Four standard deviations of a binomial variable of 1000 draws at 3 / 8.
    assert bool(((counts - 375).abs() <= 4 * (1000 * 0.375 * 0.625) ** 0.5).all())
    assert torch.equal(encoder(x, seeded(7)), encoder(x, seeded(7)))
    assert torch.equal(encoder(x), x[:3])
    assert sorted(encoder(x[:2], seeded()).flatten().tolist()) == [0.0, 1.0]


def test_instances_are_the_set():
    encoder = make_encoder("instances", pseudo=2, generator=seeded())
    assert isinstance(encoder, Instances)
    x = images()
    assert encoder(x) is x


def test_the_seed_decides_all_parameters():
    for name in ("attention", "pma"):
        made = [make_encoder(name, input_shape=(1, 8, 8), generator=seeded(k)).state_dict() for k in (0, 0, 1)]
        assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
        assert any(not torch.equal(made[0][key], made[2][key]) for key in made[0])
    spread = make_encoder("attention", pseudo=200, input_shape=(1, 8, 8), generator=seeded()).seeds
    assert abs(float(spread.detach().std()) - 0.3) < 0.01


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused():
    for name in ("attention", "pma"):
        with pytest.raises(InputError, match=rf"'{name}' needs input_shape="):
            make_encoder(name, generator=seeded())
        encoder = make_encoder(name, input_shape=(3, 12, 10), generator=seeded())
        for shape in ((1, 12, 10), (3, 12), (3,), (3, 12, 10, 2)):
            with pytest.raises(InputError, match=r"made for inputs \(3, 12, 10\), and got \("):
                encoder(images(4, shape))
        flat = make_encoder(name, input_shape=(6,), generator=seeded())
        with pytest.raises(InputError, match=r"made for inputs \(6,\), and got \(7,\)"):
            flat(images(4, (7,)))
    with pytest.raises(InputError, match=r"encoder: must be .*, got 'mean'"):
        make_encoder("mean", input_shape=(1, 8, 8), generator=seeded())
    with pytest.raises(InputError, match="pseudo: must be at least 1, got 0"):
        make_encoder("subsample", pseudo=0, generator=seeded())
    with pytest.raises(InputError, match="heads: 3 do not divide the width 16"):
        Pooling((1, 4, 4), 3, 16, 3, generator=seeded())

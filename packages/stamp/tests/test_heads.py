from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit, logit

from shared_core.errors import InputError
from stamp.heads import ChannelHead, ClampHead, FreeHead, MlpHead, make_head
from stamp.observing import Features

WIDTHS = {"a": 6, "b": 3}
NAMES = ["channel", "mlp", "clamp", "free"]
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def features(width=6, n=9, seed=1, scale=1.0):
    generator = seeded(seed)
    mean, std, nonzero = (torch.rand(n, width, generator=generator) for _ in range(3))
    return Features(scale * mean, scale * std, nonzero)


def head_of(name, **options):
    head = make_head(name, WIDTHS, generator=seeded(), **options)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(3))
    return head


def arranged(found, order=None, channels=None):
    order = slice(None) if order is None else order
    channels = slice(None) if channels is None else channels
    return Features(*(value[order][:, channels] for value in (found.mean, found.std, found.nonzero)))


# ---- all of them


@pytest.mark.parametrize("name", NAMES)
def test_a_set_has_no_order_and_repetition_says_nothing(name):
    head = head_of(name)
    for seed in range(5):
        head.learn_statistics("a", features(seed=seed))
    shown = features(seed=20)
    order = torch.randperm(9, generator=seeded(2))
    logits = head.logits("a", shown)
    assert logits.shape == (6,)
    assert torch.allclose(head.logits("a", arranged(shown, order)), logits, atol=1e-6)
    assert torch.allclose(head.logits("a", arranged(shown, order.repeat(3))), logits, atol=1e-6)
    assert torch.allclose(head.logits("a", features(seed=21)), logits, atol=1e-3) == (name == "free")


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_goes_into_the_features_and_some_into_every_parameter_of_the_group(name):
    head = head_of(name)
    head.learn_statistics("a", features(seed=5))
    shown = Features(*(value.requires_grad_() for value in vars(features()).values()))
    static = torch.rand(6, getattr(head, "static", 2), generator=seeded(4), requires_grad=name != "channel")
    torch.sigmoid(head.logits("a", shown, None, static)).sum().backward()
    assert all(value.grad is None for value in vars(shown).values())
    assert any(bool(parameter.grad is not None and parameter.grad.any()) for parameter in head.parameters())
    for key, parameter in head.named_parameters():
        other = key.split(".")[1:2] == ["1"]
        assert (parameter.grad is None) == other, key


@pytest.mark.parametrize("name", NAMES)
def test_reading_changes_no_statistics(name):
    head = head_of(name)
    before = copy.deepcopy(head.state_dict())
    head.logits("a", features())
    assert all(torch.equal(before[key], value) for key, value in head.state_dict().items())
    head.learn_statistics("a", features())
    assert any(not torch.equal(before[key], value) for key, value in head.state_dict().items()) == (
        name in ("channel", "clamp")
    )


@pytest.mark.parametrize("name", NAMES)
def test_double_precision_is_the_same_function(name):
    head = head_of(name)
    head.learn_statistics("a", features(seed=5))
    logits = head.logits("a", features())
    double = copy.deepcopy(head).double()
    shown = Features(*(value.double() for value in vars(features()).values()))
    assert torch.allclose(double.logits("a", shown).float(), logits, atol=1e-5)


# ---- the running statistics, through the clamp head, whose numbers show them


def test_statistics_are_plain_averages_at_first():
    head = ClampHead(WIDTHS)
    sets = [features(seed=seed, n=5 + seed) for seed in range(60)]
    for shown in sets:
        head.learn_statistics("a", shown)
    means = np.stack([shown.mean.numpy().astype(np.float64).mean(0) for shown in sets])
    assert np.abs(head.statistics[0].mean[:, 0].numpy() - means.mean(0)).max() <= 1e-5
    assert int(head.statistics[0].sets) == 60
    assert int(head.statistics[1].sets) == 0
    # Uniform numbers in [0, 1] have variance 1 / 12.
    assert np.abs(head.statistics[0].variance[:, 0].numpy() * 12 - 1).max() < 0.15


def test_later_they_forget_a_hundredth_a_set():
    head = ClampHead(WIDTHS)
    head.learn_statistics("a", features())
    head.statistics[0].sets.fill_(5000.0)
    mean, variance = (head.statistics[0].state_dict()[key].clone() for key in ("mean", "variance"))
    for seed in range(30):
        shown = features(seed=seed)
        head.learn_statistics("a", shown)
        variance = 0.99 * variance + 0.01 * (shown.mean[..., None] - mean).square().mean(0)
        mean = 0.99 * mean + 0.01 * shown.mean.mean(0)[:, None]
    assert torch.allclose(head.statistics[0].mean, mean, atol=1e-6)
    assert torch.allclose(head.statistics[0].variance, variance, atol=1e-6)


def test_statistics_forget_where_they_started_and_follow_what_comes():
    head = ClampHead(WIDTHS)
    for seed in range(300):
        head.learn_statistics("a", features(seed=seed, scale=1.0))
    for seed in range(700):
        shown = features(seed=seed)
        head.learn_statistics("a", Features(5 + 2 * shown.mean, shown.std, shown.nonzero))
    assert bool(((head.statistics[0].mean - 6).abs() < 0.1).all())
    assert bool(((head.statistics[0].variance * 3 - 1).abs() < 0.25).all())


def test_statistics_are_kept_with_the_head():
    head = head_of("channel")
    head.learn_statistics("a", features())
    other = make_head("channel", WIDTHS, generator=seeded(9))
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.logits("a", features(seed=2)), head.logits("a", features(seed=2)))


# ---- clamp


def own_statistics(shown):
    """A clamp head that knows no set but this one."""
    head = ClampHead({"a": shown.mean.shape[1]}, beta=0.5).double()
    with torch.no_grad():
        head.beta[0].uniform_(0.4, 0.6, generator=seeded(6))
        head.gamma[0].uniform_(0.01, 0.05, generator=seeded(7))
    head.learn_statistics("a", shown)
    return head


def doubled(shown):
    return Features(*(value.double() for value in vars(shown).values()))


def test_statistics_of_the_set_itself_erase_it():
    # The trap of the specification, 2.4: the mean of what was standardised by its own mean is 0.
    betas = []
    for seed in range(3):
        shown = doubled(features(seed=seed))
        head = own_statistics(shown)
        pi = torch.sigmoid(head.logits("a", shown))
        assert (pi - head.beta[0]).abs().max() <= 1e-12
        betas.append(pi)
    assert torch.allclose(betas[0], betas[2], atol=1e-12)


def test_running_statistics_keep_it():
    head = own_statistics(doubled(features(seed=0)))
    for seed in range(20):
        head.learn_statistics("a", doubled(features(seed=seed)))
    pis = [torch.sigmoid(head.logits("a", doubled(features(seed=seed, n=4)))) for seed in (30, 31)]
    assert all((pi - head.beta[0]).abs().max() > 1e-3 for pi in pis)
    assert (pis[0] - pis[1]).abs().max() > 1e-3


def test_clamp_follows_its_formula():
    head = head_of("clamp")
    for seed in range(5):
        head.learn_statistics("a", features(seed=seed))
    shown = features(seed=9)
    state = {key: value.numpy() for key, value in head.state_dict().items()}
    mean, deviation = state["statistics.0.mean"][:, 0], np.sqrt(state["statistics.0.variance"][:, 0])
    each = state["gamma.0"] * (shown.mean.numpy() - mean) / deviation + state["beta.0"]
    assert ((each < 0) | (each > 1)).mean() > 0.2
    wanted = np.clip(each, 0, 1).mean(0).clip(1e-4, 1 - 1e-4)
    found = head.logits("a", shown).detach().numpy()
    # The deviation has a floor of a thousandth of the activations, so that rounding is not blown up.
    assert np.abs(expit(found) - wanted).max() <= 5e-3
    assert np.abs(found - logit(wanted)).max() <= 0.05


def test_the_clamp_passes_gradients_where_it_is_active():
    head = ClampHead(WIDTHS, beta=3.0)
    head.learn_statistics("a", features())
    pi = torch.sigmoid(head.logits("a", features()))
    assert torch.allclose(pi, torch.full((6,), 1 - 1e-4), atol=1e-6)
    # Dragged out of saturation by a loss that wants channels gone: without the pass-through nothing would move.
    optimizer = torch.optim.SGD(head.parameters(), lr=0.2)
    for _ in range(3):
        optimizer.zero_grad()
        head.logits("a", features()).sum().backward()
        optimizer.step()
    assert bool((torch.sigmoid(head.logits("a", features())) < 0.5).all())


# ---- mlp


def test_mlp_follows_its_formula():
    head = head_of("mlp")
    shown = features()
    state = {key: value.numpy().astype(np.float64) for key, value in head.state_dict().items()}
    h = shown.mean.numpy().astype(np.float64)
    u = h / (np.sqrt((h**2).mean(1, keepdims=True)) + 1e-5)
    v = np.concatenate([u.mean(0), u.std(0)])
    hidden = np.maximum(state["first.0.weight"] @ v + state["first.0.bias"], 0)
    wanted = state["second.0.weight"] @ hidden + state["second.0.bias"]
    assert np.abs(head.logits("a", shown).detach().numpy() - wanted).max() <= 1e-5


def test_mlp_starts_as_specified():
    head = MlpHead({"a": 200, "b": 5}, generator=seeded())
    assert [layer.out_features for layer in head.first] == [64, 5]
    assert abs(float(head.second[0].weight.detach().std()) - 0.3) < 0.01
    assert bool((head.second[0].bias == 1).all())


def test_mlp_sees_no_scale():
    # Normalised across channels: a brighter set of the same pattern gets the same mask.
    head = head_of("mlp")
    logits = head.logits("a", features(scale=1.0))
    assert torch.allclose(head.logits("a", features(scale=30.0)), logits, atol=1e-4)


# ---- free


def test_free_reads_nothing():
    head = FreeHead(WIDTHS)
    assert torch.equal(head.logits("a", features()), torch.ones(6))
    assert head.logits("b", features(3)) is head.free[1]


# ---- channel


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_channels_have_no_order(seed):
    head = make_head("channel", WIDTHS, generator=seeded(seed))
    order = torch.randperm(6, generator=seeded(seed))
    shown, static = features(seed=seed), torch.rand(6, head.static, generator=seeded(seed))
    logits = head.logits("a", shown, None, static)
    # With equal histories and equal logits of their own, as they start:
    assert torch.allclose(head.logits("a", arranged(shown, None, order), None, static[order]), logits[order], atol=1e-5)
    # A history belongs to its channel:
    head.learn_statistics("a", features(seed=seed + 1))
    head.learn_statistics("a", features(seed=seed + 2))
    logits = head.logits("a", shown, None, static)
    with torch.no_grad():
        head.free[0].copy_(torch.rand(6, generator=seeded(seed)))
    moved = head.logits("a", shown, None, static)
    assert torch.allclose(moved - logits, head.free[0] - 1, atol=1e-5)


def test_the_network_is_shared_and_does_not_grow():
    small, large = (ChannelHead({"a": width, "b": 3}, generator=seeded()) for width in (6, 600))
    shared = [sum(p.numel() for k, p in h.named_parameters() if not k.startswith("free")) for h in (small, large)]
    assert shared[0] == shared[1]
    assert sum(p.numel() for k, p in large.named_parameters() if k.startswith("free")) == 603


def test_a_dead_network_is_a_free_head():
    head = make_head("channel", WIDTHS, generator=seeded())
    with torch.no_grad():
        head.second.weight.zero_()
        head.second.bias.zero_()
    assert torch.equal(head.logits("a", features()), head.free[0])


class Reading(torch.nn.Module):
    """In place of the head's first layer: notes what it is given, column by column."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def forward(self, x):
        self.read = x.detach().numpy()
        return self.first(x)


@pytest.mark.parametrize("labels", [False, True])
def test_what_the_channel_head_reads(labels):
    head = make_head("channel", WIDTHS, labels=labels, generator=seeded())
    kinds = 4 + labels
    sets = [features(seed=seed, n=9) for seed in range(6)]
    for shown in sets:
        head.learn_statistics("a", shown, LABELS if labels else None)

    def described(shown):
        mean, std, nonzero = (value.numpy().astype(np.float64) for value in vars(shown).values())
        columns = [mean.mean(0), mean.std(0), std.mean(0), nonzero.mean(0)]
        if labels:
            y = LABELS.numpy()
            inner = sum(((mean[y == k] - mean[y == k].mean(0)) ** 2).sum(0) for k in range(3))
            columns.append(1 - inner / ((mean - mean.mean(0)) ** 2).sum(0))
        return np.stack(columns, 1)

    past = np.stack([described(shown) for shown in sets])
    shown = features(seed=50)
    found = described(shown)
    head.first = Reading(head.first)
    head.logits("a", shown, LABELS if labels else None)
    read = head.first.read
    among = np.clip(found / np.abs(found).mean(0), -1, 6) - 1
    assert np.abs(read[:, kinds : 2 * kinds] - among).max() <= 1e-4
    # Running variances are within the small-sample factor of the sample's.
    usual = np.clip((found - past.mean(0)) / past.std(0), -4, 4)
    assert np.abs(read[:, :kinds] - usual).max() / np.abs(usual).max() < 0.5
    assert np.corrcoef(read[:, :kinds].ravel(), usual.ravel())[0, 1] > 0.95
    # Without them, what does not depend on the data is as if it were the group's mean: 0; the same for all channels.
    assert not read[:, 2 * kinds : 2 * kinds + head.static].any()
    assert np.ptp(read[:, 2 * kinds + head.static :], 0).max() == 0


def test_the_share_between_classes_is_that_of_the_analysis_of_variance():
    head = make_head("channel", WIDTHS, labels=True, generator=seeded())
    shown, y = features(n=40), torch.arange(40) % 7
    y = torch.where(y > 3, 9, y)  # numbers with gaps are classes all the same
    mean = shown.mean.clone()
    mean[:, 0] = y.float()  # all of its variance lies between classes
    mean[:, 1] = 0.25  # it has none
    shown = Features(mean, shown.std, shown.nonzero)
    head.learn_statistics("a", shown, y)
    share = head.statistics[0].mean[:, 4].numpy()
    for c in range(2, 6):
        parts = [mean[y == k, c].numpy().astype(np.float64) for k in y.unique()]
        ratio = stats.f_oneway(*parts).statistic * (len(parts) - 1) / (40 - len(parts))
        assert abs(share[c] - ratio / (1 + ratio)) <= 2e-5
    assert abs(share[0] - 1) <= 2e-5
    assert abs(share[1]) <= 2e-5


def test_rounding_has_no_share_between_classes():
    # As behind a ReLU6 that is always saturated.
    head = make_head("channel", WIDTHS, labels=True, generator=seeded())
    shown, y = features(n=6), torch.tensor([0, 0, 1, 1, 2, 2])
    flat = torch.full((6, 6), 6.0)
    flat[y == 1] = torch.nextafter(flat[y == 1], torch.tensor(7.0))
    head.learn_statistics("a", Features(flat, shown.std, shown.nonzero), y)
    assert bool((head.statistics[0].mean[:, 4] < 1e-3).all())


def test_labels_must_be_there():
    head = make_head("channel", WIDTHS, labels=True, generator=seeded())
    for call in (head.logits, head.learn_statistics):
        with pytest.raises(InputError, match="give it the classes too, y="):
            call("a", features())
    plain = make_head("channel", WIDTHS, generator=seeded())
    assert torch.equal(plain.logits("a", features(), LABELS), plain.logits("a", features()))


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="head: must be channel, mlp, clamp or free, got 'linear'"):
        make_head("linear", WIDTHS, generator=seeded())
    for name in ("mlp", "clamp", "free"):
        with pytest.raises(InputError, match=f"only the head 'channel' reads them, not '{name}'"):
            make_head(name, WIDTHS, labels=True, generator=seeded())
    for name in NAMES:
        with pytest.raises(InputError, match="no group of channels that can be pruned"):
            make_head(name, {}, generator=seeded())


def test_constant_channels_blow_nothing_up():
    for name in NAMES:
        head = head_of(name)
        dead = Features(*(torch.zeros(9, 6) for _ in range(3)))
        for _ in range(3):
            head.learn_statistics("a", dead)
        assert bool(head.logits("a", dead).isfinite().all())
        assert bool(head.logits("a", features(scale=1e-20)).isfinite().all())
        assert bool(head.logits("a", features(scale=1e6)).isfinite().all())

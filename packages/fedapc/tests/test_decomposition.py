"""Effective weights, against loops over their entries, and what becomes of a user's network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from networks import Convolutional, mlp
from torch import nn

from fedapc.decomposition import DecomposedModel, Layout, effective_weight, gate, initial_base
from fedapc.errors import ModelMismatchError, TaskError
from fedapc.sparse import SparseStack, SparseTensor
from shared_core.errors import InputError, UnknownKeyError


def parts(shape, count, seed=0, density=0.3):
    random = torch.Generator().manual_seed(seed)
    return [
        SparseTensor.of(torch.randn(shape, generator=random) * (torch.rand(shape, generator=random) < density))
        for _ in range(count)
    ]


def made(net=None, **options):
    net = net or mlp()
    layout = Layout.of(net, norm=options.pop("norm", "refuse"))
    return DecomposedModel(net, layout, initial_base(net, layout), **options)


def knowledge(model, count, seed=0):
    return [
        {name: parts(shape, count, seed + place)[k] for place, (name, shape) in enumerate(model.layout.layers.items())}
        for k in range(count)
    ]


@pytest.mark.parametrize("shape", [(5, 4), (4, 3, 2, 2)])
def test_effective_weights_are_those_of_a_loop(shape):
    random = torch.Generator().manual_seed(0)
    base, adaptive = (torch.randn(shape, generator=random) for _ in range(2))
    mask, alpha = torch.randn(shape[0], generator=random), torch.randn(3, generator=random)
    received = parts(shape, 3)
    foreign = SparseStack(received, shape, base).weighted_sum(alpha)
    found = effective_weight(base, gate(mask), adaptive, foreign).numpy()
    for place in np.ndindex(*shape):
        expected = base[place] / (1 + np.exp(-mask[place[0]].item())) + adaptive[place]
        expected += sum(alpha[k] * received[k].dense()[place] for k in range(3))
        np.testing.assert_allclose(found[place], expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_exact():
    random = torch.Generator().manual_seed(1)
    shape = (3, 4)
    received = [SparseTensor(p.index, p.values.double(), p.shape) for p in parts(shape, 2, density=0.6)]
    stack = SparseStack(received, shape, torch.zeros(1).double())
    base, adaptive = (torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(2))
    mask, alpha = (torch.randn(size, generator=random, dtype=torch.float64) for size in (3, 2))
    leaves = [value.requires_grad_() for value in (base, mask, adaptive, alpha)]

    def weight(base, mask, adaptive, alpha):
        return effective_weight(base, gate(mask), adaptive, stack.weighted_sum(alpha))

    assert torch.autograd.gradcheck(weight, leaves)
    upstream = torch.randn(shape, generator=random, dtype=torch.float64)
    found = torch.autograd.grad((weight(*leaves) * upstream).sum(), leaves)
    slope = gate(mask) * (1 - gate(mask))
    torch.testing.assert_close(found[1], slope * (upstream * base).sum(1))
    for k in range(2):
        torch.testing.assert_close(found[3][k], (upstream * received[k].dense()).sum())


def test_masks_far_out_have_finite_gates_and_no_gradient():
    mask = torch.tensor([-1e30, 31.0, 0.0], requires_grad=True)
    gate(mask).sum().backward()
    assert torch.isfinite(gate(mask)).all()
    assert mask.grad.tolist() == [0.0, 0.0, 0.25]


def test_masks_learn_from_the_data():
    model = made()
    model.begin(0, 3)
    logits = model.run(model.training_weights(), 0, torch.randn(20, 6), training=True)
    torch.nn.functional.cross_entropy(logits, torch.arange(20) % 3).backward()
    assert all(mask.grad.abs().min() > 0 or mask.grad.abs().sum() > 0 for mask in model.running[1].mask.values())


@pytest.mark.parametrize("convolutional", [False, True])
def test_logits_are_those_of_the_network_with_the_weights_written_out(convolutional):
    net = Convolutional() if convolutional else mlp()
    model = made(net, transfer="learned", attention_init="scaled")
    model.begin(0, 4, knowledge(model, 2))
    x = torch.randn(5, 2, 8, 8) if convolutional else torch.randn(5, 6)
    running = model.running[1]
    plain = copy.deepcopy(net)
    head = "classifier" if convolutional else "4"
    setattr(plain, head, nn.Linear(plain.get_submodule(head).in_features, 4))
    with torch.no_grad():
        for name in model.layout.layers:
            mask = running.mask[name].sigmoid()
            written = model.base[name] * mask.view(-1, *[1] * (model.base[name].ndim - 1))
            written += running.adaptive[name] * (running.adaptive[name].abs() > 1e-3)
            for k, part in enumerate(knowledge(model, 2)):
                written += running.attention[name][k] * part[name].dense()
            plain.get_parameter(name).copy_(written)
        for name, value in running.own.items():
            plain.get_parameter(name).copy_(value)
        expected = plain(x)
    torch.testing.assert_close(model(x, task=0), expected)
    exported = model.export(0)
    assert type(exported) is type(net)
    torch.testing.assert_close(exported(x), expected)
    assert model(x, task=0).shape == (5, 4)


@pytest.mark.parametrize("transfer", ["learned", "mean", "none"])
def test_finishing_a_task_changes_no_logit(transfer):
    model = made(transfer=transfer, attention_init="scaled")
    model.begin(0, 3, knowledge(model, 4), [("b", k) for k in range(4)])
    x = torch.randn(50, 6)
    before = model(x, task=0)
    done = model.finish()
    torch.testing.assert_close(model(x, task=0), before, atol=1e-6, rtol=1e-5)
    assert done.slots == (() if transfer == "none" else tuple(("b", k) for k in range(4)))
    assert all(part.values.abs().min() > 1e-3 for part in done.adaptive.values())
    if transfer == "mean":
        assert all(value.tolist() == [0.25] * 4 for value in done.attention.values())


def test_past_tasks_use_the_base_as_it_is_now():
    model = made()
    model.begin(0, 3)
    model.finish()
    x = torch.randn(9, 6)
    before = model(x, task=0)
    model.base["0.weight"] = model.base["0.weight"] + 1
    assert (model(x, task=0) - before).abs().max() > 1e-2


def test_full_compensation_keeps_past_tasks_exactly():
    model = made(threshold=0.0)
    for task in range(2):
        model.begin(task, 3)
        model.finish()
    x = torch.randn(30, 6)
    before = [model(x, task=task) for task in range(2)]
    for name, base in model.base.items():
        change = torch.randn(base.shape)
        change /= change.norm()
        model.base[name] = base + change
        model.compensation[name] = change
    for task in range(2):
        torch.testing.assert_close(model(x, task=task), before[task], atol=1e-5, rtol=1e-5)
    model.settle()
    assert not model.compensation
    for task in range(2):
        torch.testing.assert_close(model(x, task=task), before[task], atol=1e-5, rtol=1e-5)


def test_initial_values_have_the_deviations_of_the_specification():
    net = nn.Sequential(nn.Linear(400, 500), nn.ReLU(), nn.Linear(500, 300), nn.ReLU(), nn.Linear(300, 2))
    layout = Layout.of(net)
    base = initial_base(net, layout, seed=3)
    assert base["0.weight"].std().item() == pytest.approx(400**-0.5, rel=0.01)
    assert base["0.weight"].abs().max().item() <= 2 * 400**-0.5 / 0.8796 + 1e-6
    assert torch.equal(initial_base(net, layout, seed=3)["2.weight"], base["2.weight"])
    assert not torch.equal(initial_base(net, layout, seed=4)["2.weight"], base["2.weight"])
    assert torch.equal(initial_base(net, layout, how="module")["0.weight"], net[0].weight)
    model = DecomposedModel(net, layout, base, attention_init="scaled")
    model.begin(0, 5, [{name: SparseTensor.of(value, 9.0) for name, value in base.items()}] * 400)
    running = model.running[1]
    assert torch.equal(running.adaptive["0.weight"], base["0.weight"] / 3)
    assert running.mask["0.weight"].std().item() == pytest.approx(500**-0.5, rel=0.1)
    assert running.own["0.bias"].std().item() == pytest.approx(500**-0.5, rel=0.1)
    assert running.attention["0.weight"].std().item() == pytest.approx(400**-0.5, rel=0.1)
    assert running.own["4.weight"].abs().max().item() <= (6 / 305) ** 0.5
    assert running.own["4.weight"].std().item() == pytest.approx((2 / 305) ** 0.5, rel=0.05)
    assert running.own["4.bias"].abs().max() == 0


def test_the_users_network_is_not_changed():
    net = Convolutional()
    before = copy.deepcopy(net.state_dict())
    model = made(net)
    model.begin(0, 3)
    model.run(model.training_weights(), 0, torch.randn(3, 2, 8, 8), training=True).sum().backward()
    model.finish()
    model.export(0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_statistics_are_a_task_each_or_frozen_or_refused():
    net = Convolutional(norm=True)
    with pytest.raises(InputError, match="'norm' keeps running statistics"):
        Layout.of(net)
    x = torch.randn(20, 2, 8, 8)
    model = made(net, norm="per-task")
    model.begin(0, 3)
    model.run(model.training_weights(), 0, x, training=True)
    model.finish()
    first = {name: value.clone() for name, value in model.finished[0].buffers.items()}
    assert first["norm.num_batches_tracked"] == 1
    model.begin(1, 3)
    for _ in range(2):
        model.run(model.training_weights(), 1, 5 + x, training=True)
    assert all(torch.equal(model.finished[0].buffers[name], value) for name, value in first.items())
    assert model.running[1].buffers["norm.num_batches_tracked"] == 2
    torch.testing.assert_close(model.export(1)(x), model(x, task=1))
    assert net.norm.num_batches_tracked == 0
    frozen = made(net, norm="frozen")
    frozen.begin(0, 3)
    frozen.run(frozen.training_weights(), 0, x, training=True)
    assert net.norm.num_batches_tracked == 0
    torch.testing.assert_close(frozen.export(0)(x), frozen(x, task=0))


def test_tied_and_frozen_and_excluded_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.again = nn.Linear(4, 4, bias=False)
            self.again.weight = self.first.weight
            self.fixed = nn.Linear(4, 4)
            self.fixed.requires_grad_(False)
            self.free = nn.Linear(4, 4)
            self.out = nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.free(self.fixed(self.again(self.first(x)))))

    net = Tied()
    layout = Layout.of(net, exclude=["free"])
    assert list(layout.layers) == ["first.weight"]
    assert layout.own == ("free.weight", "free.bias")
    model = DecomposedModel(net, layout, initial_base(net, layout))
    model.begin(0, 3)
    x = torch.randn(5, 4)
    weight, own = model.weights(0)["first.weight"], model.running[1].own
    hidden = (x @ weight.T @ weight.T) @ net.fixed.weight.T + net.fixed.bias
    expected = (hidden @ own["free.weight"].T + own["free.bias"]) @ own["out.weight"].T + own["out.bias"]
    torch.testing.assert_close(model(x, task=0), expected)
    torch.testing.assert_close(model.export(0)(x), expected)


def test_states_come_back():
    model = made(attention_init="scaled")
    model.begin(0, 3, knowledge(model, 2), [("b", 0), ("c", 0)])
    model.finish()
    model.begin(2, 4, knowledge(model, 3, seed=9), [("b", 0), ("b", 1), ("c", 0)])
    tensors, about = model.state()
    other = made(mlp())
    other.load_state(tensors, about)
    x = torch.randn(4, 6)
    for task in (0, 2):
        assert torch.equal(other(x, task=task), model(x, task=task))
    assert all(value.requires_grad for value in other.running[1].attention.values())
    again, about_again = other.state()
    assert about_again == about
    assert all(torch.equal(again[name], value) for name, value in tensors.items())
    with pytest.raises(ModelMismatchError, match="other layers"):
        made(Convolutional()).load_state(tensors, about)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="no linear layer"):
        Layout.of(nn.Sequential(nn.ReLU()))
    with pytest.raises(InputError, match="no weight to decompose"):
        Layout.of(nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))
    with pytest.raises(InputError, match="no module 'head'; there are 0, 1"):
        Layout.of(mlp(), head="head")
    with pytest.raises(InputError, match="is a ReLU"):
        Layout.of(mlp(), head="1")
    model = made()
    with pytest.raises(TaskError, match="no task runs"):
        model.finish()
    with pytest.raises(TaskError, match="at least two"):
        model.begin(0, 1)
    model.begin(0, 2)
    with pytest.raises(TaskError, match="still runs"):
        model.begin(1, 2)
    model.finish()
    with pytest.raises(TaskError, match="comes after"):
        model.begin(0, 2)
    with pytest.raises(UnknownKeyError, match=r"there is no task 7; there are \[0\]"):
        model(torch.randn(1, 6), task=7)
    with pytest.raises(ModelMismatchError, match="other layers"):
        model.begin(1, 2, [{}])
    with pytest.raises(ModelMismatchError, match="for a layer of"):
        model.begin(1, 2, [{name: SparseTensor.of(torch.ones(2, 2)) for name in model.layout.layers}])

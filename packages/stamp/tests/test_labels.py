from __future__ import annotations

import pytest
import torch
import zoo
from torch import fx, nn

from stamp.groups import trace
from stamp.labels import Labeller


class Shapes(fx.Interpreter):
    """The shapes of all that a network computes."""

    def __init__(self, graph) -> None:
        super().__init__(graph)
        self.seen = {}

    def run_node(self, n):
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.seen[n.name] = value.shape, value.dtype
        return value


class Followed(Labeller):
    def run_node(self, n):
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.seen[n.name] = value.shape, value.dtype
        return value


def followed(model, x):
    graph = fx.symbolic_trace(model.eval())
    labeller = Followed(graph, frozenset(name for name, _ in model.named_parameters()))
    labeller.seen = {}
    real = Shapes(graph)
    with torch.no_grad():
        labeller.run(x.clone())
        real.run(x.clone())
    return labeller.seen, real.seen


def traceable(name):
    try:
        fx.symbolic_trace(zoo.build(name)[0])
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", [*filter(traceable, zoo.ZOO)])
def test_numbers_that_are_not_computed_have_the_shape_of_those_that_are(name):
    assert len(set(map(str, followed(*zoo.build(name))))) == 1


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(2, 3, 4, stride=3, padding=2, dilation=2), (2, 2, 17)),
        (nn.Conv2d(2, 4, (3, 5), stride=(2, 1), padding=(1, 0), groups=2), (2, 2, 9, 12)),
        (nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(3, 2), padding_mode="reflect"), (2, 2, 9, 7)),
        (nn.Conv2d(2, 3, 4, padding="valid"), (2, 2, 9, 7)),
        (nn.Conv3d(2, 3, 2, stride=2), (2, 2, 5, 4, 6)),
        (nn.ConvTranspose1d(2, 3, 3, stride=3, padding=1, output_padding=2, dilation=2), (2, 2, 5)),
        (nn.ConvTranspose2d(2, 4, (2, 3), stride=(2, 3), output_padding=(1, 0), groups=2), (2, 2, 5, 4)),
        (nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 4, 2)),
        (nn.Linear(7, 5), (2, 3, 7)),
        (nn.BatchNorm1d(4), (6, 4)),
    ],
)
def test_every_layer_has_the_shape_that_torch_gives_it(layer, shape):
    ours, real = followed(nn.Sequential(layer), torch.rand(shape))
    assert ours == real


def test_tracing_computes_no_layer_and_changes_nothing():
    model, x = zoo.build("resnet")
    state, before, given = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}, x.clone()
    called = []
    with torch.no_grad():
        model.stem[0].weight.fill_(float("nan"))
    model.layers[0].conv1.register_forward_pre_hook(lambda module, args: called.append(bool(args[0].isnan().any())))
    groups = trace(model, x)
    assert groups.prunable
    assert set(called) == {False}
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, given)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items() if key != "stem.0.weight")


class Fused(nn.Module):
    """A module that nobody looks into, with a name and a weight like a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x[:, :2] if x.sum() > 0 else x[:, 2:]


def test_a_module_that_is_not_looked_into_computes_its_own():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), Fused(), nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))
    groups = trace(net, torch.rand(1, 3, 4, 4), opaque=["1"])
    assert list(groups.widths()) == ["2"]
    assert groups["0"].frozen is not None

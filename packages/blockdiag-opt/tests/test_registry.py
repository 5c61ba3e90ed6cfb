"""Specs become the optimizers they name; what is wrong with one is said in a line, with the nearest right names."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

import blockdiag_opt
from blockdiag_opt.registry import describe, known_optimizers, lr_centre, make_optimizer, parse_spec
from shared_core.errors import InputError


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 12, generator=random)).square().mean().backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.fixture
def peer(monkeypatch):
    """Stand in for pytorch-optimizer by a module with the two functions that are used."""

    class Soap(torch.optim.SGD):
        def __init__(self, params, lr=3e-3, precondition_frequency=10, **kwargs):
            if kwargs:
                raise TypeError(f"unexpected {sorted(kwargs)}")
            super().__init__(params, lr=lr)
            self.precondition_frequency = precondition_frequency

    module = types.ModuleType("pytorch_optimizer")
    module.get_supported_optimizers = lambda: ["soap", "adabound"]
    module.load_optimizer = lambda name: Soap
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", module)
    return Soap


@pytest.mark.parametrize(
    ("spec", "kind", "options"),
    [
        ("adam", torch.optim.Adam, {"betas": (0.9, 0.999)}),
        ("AdamW:weight_decay=0.5", torch.optim.AdamW, {"weight_decay": 0.5}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
        ("sgd:momentum=0.95,nesterov=true", torch.optim.SGD, {"momentum": 0.95, "nesterov": True}),
        (" adam : betas=0.8/0.9 , amsgrad=True ", torch.optim.Adam, {"betas": (0.8, 0.9), "amsgrad": True}),
        ("NAdam", torch.optim.NAdam, {}),
        ("radam:eps=1e-6", torch.optim.RAdam, {"eps": 1e-6}),
        ("adagrad:foreach=none", torch.optim.Adagrad, {"foreach": None}),
    ],
)
def test_torch_optimizers_by_name(model, spec, kind, options):
    optimizer = make_optimizer(spec, model, 0.25)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert {key: optimizer.param_groups[0][key] for key in options} == options


@pytest.mark.parametrize(
    ("spec", "kind", "options"),
    [
        ("block-adam", "BlockAdam", {"block_size": 10, "update_interval": 1, "clip": None}),
        ("block-adam:b=25,K=5,lr_scale=sqrt_block", "BlockAdam", {"block_size": 25, "update_interval": 5}),
        ("block-adamw:weight_decay=0.5", "BlockAdamW", {"weight_decay": 0.5}),
        ("block-adagrad:b=4", "BlockAdagrad", {"block_size": 4}),
        ("block-rmsprop:alpha=0.5", "BlockRMSprop", {}),
        ("block-amsgrad", "BlockAMSGrad", {}),
        ("block-adafom", "BlockAdaFom", {}),
        ("adablock", "AdaBlock", {}),
        ("radablock:layers_per_step=2", "RandomizedBlockAdam", {}),
        ("ggt:window=7", "GGT", {}),
        ("adabound:final_lr=0.2", "AdaBound", {}),
        ("amsbound", "AMSBound", {}),
    ],
)
def test_our_optimizers_by_name(model, spec, kind, options):
    optimizer = make_optimizer(spec, model, 0.01)
    assert isinstance(optimizer, getattr(blockdiag_opt, kind))
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in options} == options
    assert torch.isfinite(trained(model, optimizer)).all()


def test_clip_is_a_number_and_gamma_goes_with_it(model):
    clip = parse_spec("block-adam:clip=0.25,gamma=0.01").options["clip"]
    assert (clip.final_lr, clip.gamma) == (0.25, 0.01)
    by_spec = make_optimizer("block-adam:clip=0.25,gamma=0.01", model, 0.01)
    by_class = blockdiag_opt.BlockAdam(model.parameters(), clip=blockdiag_opt.SpectrumClip(0.25, 0.01))
    assert by_spec.param_groups[0]["clip"] == by_class.param_groups[0]["clip"]
    with pytest.raises(InputError, match="option 'clip' is the final learning rate"):
        parse_spec("block-adam:clip=yes")


def test_a_model_and_its_parameters_give_the_same_training():
    """Dense layers are grouped alike whether or not the layer is known."""

    def fresh() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))

    one, two, direct = fresh(), fresh(), fresh()
    by_model = trained(one, make_optimizer("block-adam:b=4", one, 0.01))
    by_list = trained(two, make_optimizer("block-adam:b=4", list(two.parameters()), 0.01))
    by_class = trained(direct, blockdiag_opt.BlockAdam(direct.parameters(), lr=0.01, block_size=4))
    torch.testing.assert_close(by_model, by_class)
    torch.testing.assert_close(by_list, by_class)


def test_known_optimizers_are_all_makeable(model):
    for name in known_optimizers():
        if name == "muon":
            continue
        assert make_optimizer(name, model, lr_centre(name)).param_groups[0]["lr"] == lr_centre(name)


def test_a_refusal_becomes_one_line(model):
    with pytest.raises(InputError, match=r"optimizer 'muon' with learning rate 0.1: Muon only supports 2D parameters"):
        make_optimizer("muon", model, 0.1)
    with pytest.raises(InputError, match=r"optimizer 'adam:eps=-1' with learning rate 0.1: Invalid epsilon"):
        make_optimizer("adam:eps=-1", model, 0.1)
    with pytest.raises(InputError, match=r"optimizer 'block-adam:b=0' with learning rate 0.1: "):
        make_optimizer("block-adam:b=0", model, 0.1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "has no name"),
        ("adma", "no optimizer 'adma'; did you mean 'adam.*pip install 'blockdiag-opt"),
        ("block-adan", "no optimizer 'block-adan'; did you mean 'block-adam'"),
        ("soap:precondition_frequency=5", r"pip install 'blockdiag-opt\[peers\]'"),
        (
            "adam:weigth_decay=1",
            "optimizer 'adam:weigth_decay=1': no option 'weigth_decay'; did you mean 'weight_decay'",
        ),
        ("adam:b=3", "no option 'b'"),
        ("block-adam:blocksize=3", "no option 'blocksize'; did you mean 'block_size'"),
        ("block-adam:b=3,block_size=4", "option 'block_size' is given twice"),
        ("adam:eps=1,eps=2", "option 'eps' is given twice"),
        ("adam:eps", "option 'eps' is not name=value"),
        ("adam:eps=", "option 'eps=' is not name=value"),
        ("adam:lr=3", "the learning rate is not part of it"),
        ("lbfgs", "optimizer 'lbfgs' does not take one dense gradient a step"),
    ],
)
def test_a_wrong_spec_is_explained(monkeypatch, spec, message):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(InputError, match=message) as caught:
        parse_spec(spec)
    assert "\n" not in str(caught.value)


def test_peers_are_looked_up_last(peer, model):
    optimizer = make_optimizer("soap:precondition_frequency=5", model, 0.1)
    assert type(optimizer) is peer
    assert optimizer.precondition_frequency == 5
    assert parse_spec("adabound").origin == "ours"
    assert parse_spec("pytorch_optimizer.adabound").origin == "pytorch-optimizer"
    with pytest.raises(InputError, match="no optimizer 'sopa'; did you mean 'soap'"):
        parse_spec("sopa")
    with pytest.raises(InputError, match=r"soap:x=1' with learning rate 0.1: unexpected"):
        make_optimizer("soap:x=1", model, 0.1)


def test_the_peer_is_not_imported_unless_asked(monkeypatch):
    monkeypatch.delitem(sys.modules, "pytorch_optimizer", raising=False)
    for name in ("adam", "block-adam:b=3", "sgd:nesterov=true"):
        describe(name)
    assert "pytorch_optimizer" not in sys.modules


def test_frozen_weights_are_left_out(model):
    model[0].weight.requires_grad_(False)
    for spec in ("adam", "block-adam"):
        given = [p for group in make_optimizer(spec, model, 0.1).param_groups for p in group["params"]]
        assert not any(p is model[0].weight for p in given)


def test_descriptions():
    assert describe("block-adam:b=4,K=5") == "BlockAdam of blockdiag-opt (block_size=4, update_interval=5)"
    assert describe("adam") == "Adam of torch"


def test_centres_do_not_depend_on_options():
    assert lr_centre("block-adam:b=25") == lr_centre("BLOCK-ADAM") == 0.02
    assert all(lr_centre(name) > 0 for name in known_optimizers())

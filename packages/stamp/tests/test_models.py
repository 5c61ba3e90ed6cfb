"""Networks by name, with weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shared_core.errors import InputError
from stamp.models import WeightsError, load_weights, open_model
from stamp.plan import PlanError, save_weights


def test_weights_come_back_with_the_head_that_they_have(tmp_path):
    model = open_model("smallconv", num_classes=7, in_channels=1, width=0.25, seed=3)
    save_weights(model, tmp_path / "w.safetensors")
    again = open_model("smallconv", tmp_path / "w.safetensors", in_channels=1, width=0.25)
    assert again[-1].out_features == 7
    assert not again.training
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(again(x), model(x))


def test_a_network_that_is_itself_the_head():
    model = load_weights(nn.Linear(3, 2), {"weight": torch.ones(4, 3), "bias": torch.zeros(4)}, "w")
    assert model(torch.ones(1, 3)).tolist() == [[3.0] * 4]


def test_options_that_a_factory_does_not_take_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "own_nets_a.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(3, 2)\n")
    monkeypatch.chdir(tmp_path)
    assert open_model("own_nets_a:net", num_classes=5, in_channels=3).out_features == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("1.bias"), "w.st: lacks '1.bias' of Sequential"),
        (lambda state: state.update(extra=torch.zeros(1)), "w.st: has 'extra', and Sequential has not"),
        (lambda state: state.update({"0.weight": torch.zeros(8, 3, 3, 3)}), r"has shape \(8, 3, 3, 3\), and the"),
    ],
)
def test_weights_of_another_network(change, message):
    model = open_model("smallconv")
    state = model.state_dict()
    change(state)
    with pytest.raises(WeightsError, match=message):
        load_weights(model, state, "w.st")


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(InputError, match="did you mean 'smallconv'"):
        open_model("smalconv")
    with pytest.raises(PlanError, match=r"none\.safetensors: cannot be read"):
        open_model("smallconv", tmp_path / "none.safetensors")

from __future__ import annotations

import pytest
import torch
from torch import nn

from shared_core.errors import InputError
from stamp.timing import call_ms, evaluating, time_together


def test_networks_take_turns_after_the_warm_up_and_only_what_follows_counts():
    asked, clock = [], iter(range(1000))
    nets = {"a": nn.Linear(2, 2), "b": nn.Dropout()}

    def measure(module, inputs):
        assert not module.training
        asked.append(module)
        return float(next(clock))

    found = time_together(nets, torch.ones(1, 2), warmup=2, repeats=5, measure=measure)
    assert asked == [nets["a"], nets["b"]] * 7
    assert found.samples["a"].tolist() == [4.0, 6.0, 8.0, 10.0, 12.0]
    assert (found.p50("a"), found.p50("b")) == (8.0, 9.0)
    assert found.p90("a") == pytest.approx(11.2)
    assert found.speedup("b", "a") == pytest.approx(9 / 8)
    assert (found.device, found.dtype, found.threads) == ("cpu", "float32", torch.get_num_threads())
    assert all(net.training for net in nets.values())


def test_the_dtype_is_the_weights_where_the_input_has_another():
    found = time_together({"a": nn.Embedding(3, 2).double()}, torch.tensor([1]), repeats=1, measure=lambda *_: 1.0)
    assert found.dtype == "float64"


def test_modes_are_put_back_one_by_one_after_a_failure_too():
    net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3).eval())
    with evaluating(net):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == [True, True, False]
    with pytest.raises(RuntimeError), evaluating(net):
        net(torch.ones(2, 4))
    assert [module.training for module in net.modules()] == [True, True, False]


def test_a_call_is_timed_without_gradients():
    seen = []
    net = nn.Linear(2, 2)
    net.register_forward_hook(lambda module, args, output: seen.append(output))
    assert call_ms(net, (torch.ones(1, 2),)) > 0
    assert seen[0].is_inference()


def test_nothing_cannot_be_timed():
    with pytest.raises(InputError, match="modules has 0 entries"):
        time_together({}, torch.ones(1))
    with pytest.raises(InputError, match="repeats=0"):
        time_together({"a": nn.Identity()}, torch.ones(1), repeats=0)

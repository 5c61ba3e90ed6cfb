from __future__ import annotations

import json

import pytest
import torch
import zoo
from torch import nn

from shared_core.errors import InputError
from stamp.counting import macs, parameters
from stamp.groups import trace
from stamp.report import Size, report, suggest_round_to, warnings_of
from stamp.surgery import cut
from stamp.timing import time_together


def halved(name="vgg"):
    model, x, groups = zoo.traced(name)
    keep = {name: torch.arange(width) < width // 2 for name, width in groups.widths().items()}
    return model, cut(model, groups, keep), x


def by_macs(module, inputs) -> float:
    return macs(module, inputs) / 1000


def test_figures_are_those_counted_and_timed():
    model, small, x = halved()
    model.train()
    found = report(model, small, (3, 8, 8), batch_size=5, warmup=1, repeats=3, measure=by_macs)
    for size, network in ((found.dense, model), (found.small, small)):
        assert size.params == parameters(network)
        assert size.macs == macs(network, x[:1])
        assert size.flops == 2 * size.macs
        assert size.bytes == sum(t.numel() * t.element_size() for t in network.state_dict().values())
        assert size.p50_ms == size.p90_ms == pytest.approx(5 * size.macs / 1000)
        assert size.gmacs == pytest.approx(1e-3)
    assert found.ratios["macs"] == found.small.macs / found.dense.macs
    assert found.speedup == pytest.approx(1 / found.ratios["p50_ms"])
    assert (found.batch_size, found.device, found.dtype) == (5, "cpu", "float64")
    assert found.threads == torch.get_num_threads()
    assert model.training


def test_it_is_written_as_text_and_as_json():
    model, small, _ = halved()
    found = report(model, small, (3, 8, 8), batch_size=2, warmup=0, repeats=1, measure=by_macs)
    again = json.loads(json.dumps(found.as_dict()))
    assert again["small"]["flops"] == 2 * again["small"]["macs"] == found.small.flops
    assert again["ratios"] == found.ratios
    assert again["warnings"] == list(found.warnings)
    lines = found.table().splitlines()
    assert f"{found.dense.params:,}" in lines[2]
    assert lines[2].split()[-1] == f"{found.ratios['params']:.3f}"
    assert any(line.startswith("multiply-adds") and f"{found.small.macs:,}" in line for line in lines)
    assert f"{found.speedup:.2f} x faster: batch 2 on cpu" in lines[9]
    assert sum(line.startswith("warning: ") for line in lines) == len(found.warnings) > 0
    assert str(found) == found.table()


def test_an_example_may_be_given_and_several_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, index, x):
            return self.a(self.embed(index) + x)

    given = torch.randint(7, (6, 2), generator=torch.Generator().manual_seed(0)), torch.rand(6, 2, 4)
    found = report(Two(), Two(), (), example=given, warmup=0, repeats=1, measure=by_macs)
    assert found.batch_size == 6
    assert found.dense.macs == 2 * 4 * 3
    with pytest.raises(InputError, match="batch_size=0 has no example"):
        report(Two(), Two(), (3,), batch_size=0)


SIZE = Size(100, 1000, 400, 10.0, 11.0, 1.0)


@pytest.mark.parametrize(
    ("small", "options", "said"),
    [
        (Size(50, 250, 200, 4.0, 5.0, 1.0), {}, []),
        (Size(50, 250, 200, 9.8, 5.0, 1.0), {}, ["multiply-adds fall to 25% but the time only to 98%"]),
        (Size(100, 990, 200, 9.9, 5.0, 1.0), {}, []),
        (
            Size(50, 250, 200, 4.0, 5.0, 1.0),
            {"widths": {"a": 32, "b": 24, "c": 7}},
            ["2 of 3 layers that were cut have widths that are no multiple of 16 (e.g. 'b': 24)"],
        ),
        (
            Size(50, 250, 200, 4.0, 5.0, 1.0),
            {"widths": {"a": 32, "b": 24, "c": 7}, "device": "cuda"},
            ["1 of 3 layers that were cut have widths that are no multiple of 8 (e.g. 'c': 7)"],
        ),
        (
            Size(50, 250, 200, 4.0, 5.0, 1.0),
            {"device": "cuda:0", "batch_size": 1},
            ["a batch of 1 on a GPU waits for launches"],
        ),
        (Size(50, 250, 200, 4.0, 5.0, 1.0), {"batch_size": 1}, []),
    ],
)
def test_warnings_say_what_the_figures_call_for(small, options, said):
    found = warnings_of(SIZE, small, **{"batch_size": 64, "device": "cpu", "widths": {}} | options)
    assert len(found) == len(said)
    assert all(line.startswith(start) and "\n" not in line for line, start in zip(found, said, strict=True))


def test_widths_that_were_cut_are_found_and_a_new_classifier_is_none():
    model, small, _ = halved("resnet")
    small.fc = nn.Linear(small.fc.in_features, 3).double()
    found = report(model, small, (3, 8, 8), batch_size=2, warmup=0, repeats=1, measure=by_macs)
    widths = [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)]
    odd = sum(width % 16 > 0 for width in widths)
    assert 0 < odd < len(widths)
    assert found.warnings[0].startswith(f"{odd} of {len(widths)} layers that were cut have widths")


@pytest.mark.parametrize(("good", "expected"), [(1, 1), (4, 4), (8, 8)])
def test_the_multiple_suggested_is_the_smallest_that_the_machine_does_well(good, expected):
    model = zoo.vgg((64, 48, "M", 96), 8)
    x = torch.rand(2, 3, 8, 8)
    groups = trace(model, x)

    def measure(module, inputs):
        # A machine that works in blocks of so many channels.
        blocks = [-(-m.out_channels // good) * good / m.out_channels for m in module if isinstance(m, nn.Conv2d)]
        return by_macs(module, inputs) * sum(blocks)

    found = suggest_round_to(model, groups, x, (8, 4, 1, 2), warmup=0, repeats=1, measure=measure)
    assert found.value == expected
    assert list(found.gmacs) == [8, 4, 1, 2]
    assert all(found.gmacs[m] >= 0.97 * max(found.gmacs.values()) for m in (8, 4, 2, 1) if m % good == 0)


def test_narrow_groups_stay_whole_and_odd_candidates_are_refused():
    model, x, groups = zoo.traced("vgg")
    seen = []

    def measure(module, inputs):
        seen.append(module[0].out_channels)
        return by_macs(module, inputs)

    suggest_round_to(model, groups, x, (1, 2, 64), warmup=0, repeats=1, measure=measure)
    assert seen[1] == seen[0] // 2 * 2
    assert seen[2] == seen[0] > 0
    for candidates in ((), (0, 4)):
        with pytest.raises(InputError, match="are no multiples"):
            suggest_round_to(model, groups, x, candidates)


def test_the_same_turns_are_used_for_both():
    model, small, x = halved()
    timings = time_together({"dense": model, "small": small}, x, warmup=1, repeats=2)
    assert timings.samples["dense"].shape == timings.samples["small"].shape == (2,)
    assert float(timings.samples["dense"].min()) > 0

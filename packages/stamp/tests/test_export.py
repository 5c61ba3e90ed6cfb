from __future__ import annotations

import builtins
import importlib
import warnings

import pytest
import torch
import zoo
from torch import nn

from shared_core.errors import InputError
from stamp.export import ExportError, to_onnx, to_safetensors, to_torchscript
from stamp.groups import trace
from stamp.networks import mobilenetv2, resnet20, smallconv, vit
from stamp.plan import PrunePlan


def small_network(make):
    model, x = make(), torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    groups = trace(model, x)
    return PrunePlan(zoo.random_keep(groups, 0), groups).apply(model, num_classes=4), x


MAKERS = {
    "smallconv": lambda: smallconv(channels=(4, 6)),
    "resnet20": lambda: resnet20(width=0.25),
    "mobilenetv2": lambda: mobilenetv2(width=0.25),
    "vit": lambda: vit(width=0.25, depth=1),
}


class Random(nn.Module):
    def forward(self, x):
        return x + torch.rand(len(x), 1)


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if len(x) > 1 else x * 3


@pytest.mark.parametrize("name", MAKERS)
def test_torchscript_says_what_the_small_network_says(name, tmp_path):
    small, x = small_network(MAKERS[name])
    small.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        difference = to_torchscript(small, x, tmp_path / "net.pt")
    assert small.training
    small.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = torch.jit.load(str(tmp_path / "net.pt"))
    other = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        assert (loaded(other) - small(other)).abs().max() <= 1e-5
    assert difference <= 1e-5


# Writing ONNX takes seconds for every network with many layers.
@pytest.mark.parametrize("name", ["smallconv", "vit"])
def test_onnx_says_what_the_small_network_says(name, tmp_path, capfd):
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'stamp[onnx]'")
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'stamp[onnx]'")
    small, x = small_network(MAKERS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        difference = to_onnx(small.double(), x[:1], tmp_path / "net.onnx", class_names=("a", "b", "c", "d"))
    assert capfd.readouterr() == ("", "")
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    assert session.get_modelmeta().custom_metadata_map["classes"] == "a\nb\nc\nd"
    other = torch.rand(5, 3, 32, 32)
    (found,) = session.run(["logits"], {"input": other.numpy()})
    with torch.no_grad():
        assert (torch.from_numpy(found) - small.eval()(other.double())).abs().max() <= 1e-4
    assert difference <= 1e-4


def test_safetensors_holds_the_bits(tmp_path):
    from safetensors.torch import load_file

    small, _ = small_network(MAKERS["smallconv"])
    assert to_safetensors(small, tmp_path / "net.safetensors") == 0.0
    loaded = load_file(tmp_path / "net.safetensors")
    assert loaded.keys() == small.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in small.state_dict().items())


@pytest.mark.parametrize("network", [Random(), Branching()])
def test_a_file_that_says_something_else_is_not_written(network, tmp_path):
    for write, name in ((to_torchscript, "net.pt"), (to_onnx, "net.onnx")):
        if write is to_onnx:
            pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'stamp[onnx]'")
            pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'stamp[onnx]'")
        with pytest.raises(ExportError) as caught:
            write(network, torch.rand(3, 4), tmp_path / name)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_examples_that_are_no_batch_are_refused(tmp_path):
    with pytest.raises(ExportError, match="give a batch"):
        to_torchscript(nn.Linear(3, 2), torch.rand(0, 3), tmp_path / "net.pt")
    with pytest.raises(ExportError, match="cannot trace"):
        to_torchscript(nn.Linear(3, 2), torch.rand(2, 4), tmp_path / "net.pt")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    whole = importlib.import_module

    def without(name, *args):
        if name == "onnxruntime":
            raise ImportError(name)
        return whole(name, *args) if name != "onnx" else builtins

    monkeypatch.setattr("stamp.export.importlib.import_module", without)
    with pytest.raises(InputError, match=r"writing ONNX needs onnxruntime, .*pip install 'stamp\[onnx\]'"):
        to_onnx(nn.Linear(3, 2), torch.rand(2, 3), tmp_path / "net.onnx")

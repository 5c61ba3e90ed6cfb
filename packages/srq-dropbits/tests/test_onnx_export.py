"""ONNX files: valid, with integers of the smallest type for real, and the same outputs from onnxruntime."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from srq_dropbits import onnx_export
from srq_dropbits.config import QuantConfig
from srq_dropbits.deploy import build_layer, convert, integer_layers
from srq_dropbits.errors import ExportError, NothingToQuantizeError
from srq_dropbits.grid import Grid
from srq_dropbits.layers import ResidualAdd
from srq_dropbits.onnx_export import Container, export_onnx, runnable_containers
from srq_dropbits.packing import pack_bits
from srq_dropbits.qat import calibrate, prepare

onnx = pytest.importorskip("onnx", reason="needs the extra 'onnx'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def converted(model, x, **changes):
    config = QuantConfig(**{"weight_bits": 3, "act_bits": 4, "estimator": "lsq", **changes})
    qmodel = prepare(model.eval(), config, x)
    calibrate(qmodel, [x])
    return convert(qmodel.eval(), x)


def run(path, *values):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return session.run(None, dict(zip(names, [value.numpy() for value in values], strict=True)))[0]


def mlp():
    return nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 5))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.same = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.add = ResidualAdd()
        self.head = nn.Linear(8 * 9, 10)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        x = nn.functional.max_pool2d(self.add(x, self.same(x).relu()), 2)
        return self.head(x.flatten(1))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(2, 6, 3, stride=2)
        self.deep = nn.Conv1d(6, 6, 3, groups=6)
        self.point = nn.Conv1d(6, 12, 1)
        self.up = nn.ConvTranspose1d(12, 4, 2, stride=2, groups=2)
        self.norm = nn.BatchNorm1d(4)
        self.down = nn.ConvTranspose1d(4, 3, 2)

    def forward(self, x):
        x = self.point(self.deep(self.stem(x).relu()).relu()).relu()
        return self.down(self.norm(self.up(x)).relu()).mean(-1)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, index):
        x = self.words(index)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.out((x + self.down(nn.functional.gelu(self.up(self.norm(x))))).mean(1))


def spread_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=generator(1)).mul_(0.2)
            module.running_var.uniform_(0.2, 1.0, generator=generator(2))
            # A negative gain makes the folded scale negative.
            module.weight.data.normal_(generator=generator(3))
    return model


CASES = {
    "mlp": (mlp, lambda n: torch.rand(n, 12, generator=generator(n)), {"weight_bits": 4, "quantize_input": 3}),
    "conv": (ConvNet, lambda n: torch.rand(n, 1, 8, 8, generator=generator(n)), {"weight_bits": 3, "act_bits": 4}),
    "depthwise": (
        Depthwise,
        lambda n: torch.randn(n, 2, 20, generator=generator(n)),
        {"per_channel": True, "weight_bits": 2, "act_bits": 8, "overrides": {"up": {"per_channel": False}}},
    ),
    "transformer": (
        Transformer,
        lambda n: torch.randint(0, 20, (n, 7), generator=generator(n)),
        {"per_channel": True, "weight_bits": 2, "act_bits": 6},
    ),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Each net once: its integer model, file, report and examples."""
    made = {}

    def give(name):
        if name not in made:
            make, examples, changes = CASES[name]
            imodel = converted(spread_statistics(seeded(make)), examples(6), **{"act_bits": 3, **changes})
            path = tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
            made[name] = (imodel, path, export_onnx(imodel, path, examples(6)), examples)
        return made[name]

    return give


class TestNets:
    @pytest.mark.parametrize("name", CASES)
    def test_onnxruntime_gives_the_same_outputs_at_any_batch_size(self, exported, name):
        imodel, path, report, examples = exported(name)
        onnx.checker.check_model(str(path), full_check=True)
        assert report.file_bytes == path.stat().st_size
        assert report.max_difference < 1e-4 * report.output_scale
        assert report.argmax_agreement == 1.0
        for count in (1, 9):
            expected = imodel(examples(count)).detach()
            found = torch.as_tensor(run(path, examples(count)))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

    def test_weights_are_integers_behind_a_dequantize_and_nothing_is_left_in_float(self, exported):
        imodel, path, report, _ = exported("conv")
        graph = onnx.load(path).graph
        initializers = {tensor.name: tensor for tensor in graph.initializer}
        floats = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
        assert all(math.prod(tensor.dims) <= 10 for tensor in floats)
        dequantized = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
        for row in report.rows:
            integer, _ = dequantized[f"{row.name}.weight"].input
            layer = dict(integer_layers(imodel))[row.name]
            assert row.container == "int4"
            assert initializers[integer].data_type == onnx.TensorProto.INT4
            # onnx reads its own packing back.
            values = onnx.numpy_helper.to_array(initializers[integer]).astype(np.int64)
            assert np.array_equal(values, layer.weight_codes().numpy())
            assert row.bytes == len(initializers[integer].raw_data) == math.ceil(layer.weight_codes().numel() / 2)

    def test_inputs_are_clipped_to_their_grid(self, exported):
        # 3-bit inputs in a uint8: beyond the grid's end, the type alone would go on to 255 steps.
        imodel, path, _, examples = exported("mlp")
        far = examples(4) * 50
        torch.testing.assert_close(torch.as_tensor(run(path, far)), imodel(far), rtol=1e-4, atol=1e-4)
        kinds = [node.op_type for node in onnx.load(path).graph.node]
        assert kinds.count("QuantizeLinear") == kinds.count("Clip") == 3

    def test_four_bit_weights_take_an_eighth(self, exported):
        _, _, report, _ = exported("mlp")
        assert report.weight_bytes == 4 * (12 * 30 + 30 * 20 + 20 * 5) // 8
        assert report.file_bytes < report.weight_bytes + 5000

    def test_nothing_about_the_machine_is_in_the_file(self, exported):
        data = exported("mlp")[1].read_bytes()
        assert b".py" not in data
        assert b"torch.export" not in data

    def test_the_report_reads_as_a_table(self, exported):
        _, path, report, _ = exported("mlp")
        assert f"file: {path.stat().st_size} bytes" in str(report)
        assert "weights below 8 bits save disk and memory, not time" in str(report)
        assert report.to_dict()["rows"][0]["container"] == "int4"

    def test_keyword_examples(self, tmp_path):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(4, 3)

            def forward(self, x, shift):
                return self.a(x) + shift

        x, shift = torch.randn(5, 4, generator=generator(0)), torch.randn(5, 3, generator=generator(1))
        config = QuantConfig(weight_bits=3, act_bits=None, estimator="lsq")
        imodel = convert(prepare(seeded(Two), config, (x, shift)).eval())
        report = export_onnx(imodel, tmp_path / "net.onnx", {"x": x, "shift": shift})
        assert report.max_difference < 1e-5


def single(weight_grid, shape=(4, 6), input_grid=None):
    stored = torch.randint(0, weight_grid.size, shape, generator=generator(0))
    module = nn.Linear(shape[1], shape[0], bias=False)
    layer = build_layer(
        module,
        "linear",
        weight_grid=weight_grid,
        weight_shape=shape,
        codes=pack_bits(stored, weight_grid.bits) if weight_grid.bits else torch.zeros(0, dtype=torch.uint8),
        scale=torch.rand(shape[0], generator=generator(1)) - 0.5,
        input_grid=input_grid,
        input_scale=None if input_grid is None else torch.tensor(0.1),
    )
    return layer.eval()


class Side(nn.Module):
    """Layers beside each other, each on its own scale of inputs."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], 1)


GRIDS = [
    (Grid(0, 0, 0), ["int2", "int4", "int8"]),
    (Grid.signed(2), ["int2", "int4", "int8"]),
    (Grid.signed(2, symmetric=False), ["int2", "int4", "int8"]),
    (Grid.odd(1), ["int2", "int4", "int8"]),
    (Grid.odd(2), ["int4", "int8"]),
    (Grid.signed(3), ["int4", "int8"]),
    (Grid.signed(4, symmetric=False), ["int4", "int8"]),
    (Grid.odd(4), ["int8"]),
    (Grid.signed(5), ["int8"]),
    (Grid.signed(8), ["int8"]),
    (Grid.odd(8), ["int16"]),
]
ALL_RUN = dict.fromkeys(["int2", "int4", "int8", "int16"])


class TestContainers:
    def test_auto_takes_the_smallest_that_runs_for_grids_of_weights_and_inputs(self, tmp_path):
        runs = runnable_containers()
        x = torch.randn(30, 6, generator=generator(2)) * 20
        of_inputs = [Grid(4, -3, 12), Grid(8, -100, 155), Grid.signed(8, symmetric=False), Grid(3, 4, 11)]
        layers = [single(grid) for grid, _ in GRIDS] + [single(Grid.signed(4), input_grid=grid) for grid in of_inputs]
        model = Side(layers)
        report = export_onnx(model, tmp_path / "net.onnx", x)
        for row, (_, names) in zip(report.rows, GRIDS + [GRIDS[6]] * len(of_inputs), strict=True):
            assert row.container == next(name for name in names if runs[name] is None)
            assert row.bytes == math.ceil(24 * int(row.container.removeprefix("int")) / 8)
        found, expected = torch.as_tensor(run(tmp_path / "net.onnx", x)), model(x)
        for part, (a, b) in enumerate(zip(found.split(4, 1), expected.split(4, 1), strict=True)):
            limit = 1e-5 if part < len(GRIDS) else 1e-4
            assert float((a - b).abs().max()) <= limit * float(b.abs().max()), layers[part]
        assert any("smallest" in note for note in report.notes)

    def test_a_grid_that_fits_no_type_of_inputs_is_refused(self, tmp_path):
        with pytest.raises(ExportError, match=r"inputs on -300\.\.-45 fit neither int8 nor uint8"):
            export_onnx(single(Grid.signed(4), input_grid=Grid(8, -300, -45)), tmp_path / "n.onnx", torch.ones(1, 6))

    def test_a_type_too_narrow_falls_back_and_says_so(self):
        chosen, notes = onnx_export._choose({"a": single(Grid.signed(5))}, "int4", ALL_RUN)
        assert chosen["a"].name == "int8"
        assert "layer 'a' is stored as int8: its integers -15..15 do not fit int4" in notes

    @pytest.mark.parametrize("weight_type", ["auto", "int2"])
    def test_a_type_the_runtime_lacks_falls_back_with_the_reason(self, weight_type):
        lacking = {**ALL_RUN, "int2": "this runtime has no int2"}
        chosen, notes = onnx_export._choose({"a": single(Grid.signed(2))}, weight_type, lacking)
        assert chosen["a"].name == "int4"
        assert any("this runtime has no int2" in note for note in notes)

    def test_a_type_that_this_graph_cannot_have_falls_back_with_the_reason(self, tmp_path, monkeypatch):
        refusals = iter(["no kernel for int2", None])
        monkeypatch.setattr(onnx_export, "runnable_containers", lambda: ALL_RUN)
        monkeypatch.setattr(onnx_export, "_refusal", lambda data: next(refusals))
        report = export_onnx(single(Grid.signed(2)), tmp_path / "n.onnx", torch.ones(2, 6))
        assert report.rows[0].container == "int4"
        assert report.opset == 21
        assert any("refused in this graph: no kernel for int2" in note for note in report.notes)

    def test_a_wider_type_may_be_asked_for(self):
        chosen, notes = onnx_export._choose({"a": single(Grid.signed(2))}, "int8", ALL_RUN)
        assert chosen["a"].name == "int8"
        assert not any("speed" in note for note in notes)

    def test_a_grid_that_no_type_holds_is_refused(self):
        runs = {**ALL_RUN, "int16": "missing"}
        with pytest.raises(ExportError, match=r"layer 'a': no ONNX type that runs here holds -255\.\.255"):
            onnx_export._choose({"a": single(Grid.odd(8))}, "auto", runs)

    def test_a_trial_finds_types_that_do_not_run(self):
        assert "has no int3" in (onnx_export._trial(Container("int3", 3, 21)) or "")
        assert "ends before opset 999" in (onnx_export._trial(Container("int8", 8, 999)) or "")
        assert "refuses int2" in (onnx_export._trial(Container("int2", 2, 13)) or "")


class TestErrors:
    def test_without_the_extra_the_command_is_given(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(ValueError, match=r"needs onnxruntime.*pip install 'srq-dropbits\[onnx\]'"):
            export_onnx(single(Grid.signed(4)), tmp_path / "n.onnx", torch.ones(1, 6))

    def test_an_operation_without_a_form_is_named(self, tmp_path):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(4, 4)

            def forward(self, x):
                return torch.linalg.eigvals(self.a(x).reshape(-1, 2, 2)).abs()

        x = torch.randn(4, 4, generator=generator(0))
        imodel = converted(seeded(Odd), x)
        with pytest.raises(ExportError, match="eig") as error:
            export_onnx(imodel, tmp_path / "n.onnx", x)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "n.onnx").exists()

    def test_float_models_are_refused(self, tmp_path):
        with pytest.raises(NothingToQuantizeError, match="Linear has no integer layer"):
            export_onnx(nn.Linear(2, 2), tmp_path / "n.onnx", torch.ones(1, 2))

    @pytest.mark.parametrize(("option", "value"), [("weight_type", "int3"), ("act_type", "int4")])
    def test_unknown_types_are_refused(self, tmp_path, unchecked, option, value):
        with pytest.raises(ExportError, match=f"{option} is '{value}'"):
            export_onnx(single(Grid.signed(4)), tmp_path / "n.onnx", torch.ones(1, 6), **{option: value})

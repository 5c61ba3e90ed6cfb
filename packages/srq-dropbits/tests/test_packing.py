"""Bit streams and packed files: against Python's big integers, to the byte, and with every kind of damage."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from srq_dropbits.config import QuantConfig
from srq_dropbits.deploy import convert
from srq_dropbits.errors import InvalidBitsError, PackedFormatError
from srq_dropbits.grid import Grid
from srq_dropbits.packing import inspect_packed, load_packed, pack_bits, save_packed, unpack_at, unpack_bits
from srq_dropbits.qat import calibrate, prepare
from srq_dropbits.structure import weight_quantizer


def generator(seed):
    return torch.Generator().manual_seed(seed)


class LeNet(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(1, 20, 5, bias=False)
            self.norm1 = nn.BatchNorm2d(20)
            self.conv2 = nn.Conv2d(20, 50, 5)
            self.norm2 = nn.BatchNorm2d(50, affine=False)
            self.hidden = nn.Linear(800, 500)
            self.scale = nn.LayerNorm(500)
            self.out = nn.Linear(500, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.norm1(self.conv1(x)).relu(), 2)
        x = nn.functional.max_pool2d(self.norm2(self.conv2(x)).relu(), 2)
        return self.out(self.scale(self.hidden(x.flatten(1))).relu())


def images(count=8, seed=1):
    return torch.rand(count, 1, 28, 28, generator=generator(seed))


def lenet(seed=0, **changes):
    """A quantized LeNet whose batch norms have seen data."""
    model = LeNet(seed)
    model.train()
    with torch.no_grad():
        for step in range(3):
            model(images(32, step))
    config = QuantConfig(**{"weight_bits": 3, "act_bits": 3, "estimator": "lsq", **changes})
    qmodel = prepare(model.eval(), config, images())
    calibrate(qmodel, [images()])
    return qmodel.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "net.safetensors"
    imodel = convert(lenet(), images())
    return path, imodel, save_packed(imodel, path)


def oracle(codes, bits):
    word = sum(code << (bits * place) for place, code in enumerate(codes))
    return list(word.to_bytes(math.ceil(len(codes) * bits / 8), "little"))


class TestStream:
    @pytest.mark.parametrize("bits", range(1, 9))
    def test_every_short_length_is_the_little_endian_number_of_its_codes(self, bits):
        for count in range(66):
            codes = torch.randint(0, 2**bits, (count,), generator=generator(count))
            packed = pack_bits(codes, bits)
            assert packed.tolist() == oracle(codes.tolist(), bits)
            assert torch.equal(unpack_bits(packed, bits, count).long(), codes)

    @given(st.integers(1, 8).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1)))))
    @settings(max_examples=50, deadline=None)
    def test_any_codes(self, case):
        bits, values = case
        packed = pack_bits(torch.tensor(values, dtype=torch.uint8), bits)
        assert packed.tolist() == oracle(values, bits)
        assert unpack_bits(packed, bits, len(values)).tolist() == values

    @pytest.mark.parametrize("bits", range(1, 9))
    def test_single_codes_are_read_where_they_lie(self, bits):
        codes = torch.randint(0, 2**bits, (37,), generator=generator(bits))
        places = torch.randint(0, 37, (5, 7), generator=generator(9))
        assert torch.equal(unpack_at(pack_bits(codes, bits), bits, places).long(), codes[places])

    def test_shape_does_not_matter(self):
        codes = torch.randint(0, 8, (3, 4, 5), generator=generator(0))
        assert torch.equal(pack_bits(codes, 3), pack_bits(codes.flatten(), 3))

    def test_a_code_that_does_not_fit_is_refused(self):
        with pytest.raises(InvalidBitsError, match=r"codes run from 0 to 8; codes of 3 bits lie in 0\.\.7"):
            pack_bits(torch.tensor([0, 8]), 3)
        with pytest.raises(InvalidBitsError, match="from -1 to 2"):
            pack_bits(torch.tensor([-1, 2]), 3)

    @pytest.mark.parametrize("bits", [0, 9, -1])
    def test_a_width_that_is_none_is_refused(self, bits):
        with pytest.raises(InvalidBitsError, match="from 1 to 8"):
            pack_bits(torch.tensor([0]), bits)
        with pytest.raises(InvalidBitsError, match="from 1 to 8"):
            unpack_bits(torch.zeros(1, dtype=torch.uint8), bits, 1)

    def test_a_stream_of_another_length_is_refused(self):
        with pytest.raises(PackedFormatError, match="10 codes of 3 bits take 4 bytes, the stream has 5"):
            unpack_bits(torch.zeros(5, dtype=torch.uint8), 3, 10)


class TestFile:
    def test_every_byte_is_accounted_for(self, saved):
        path, _, report = saved
        size = path.stat().st_size
        assert report.total == size == report.header_bytes + sum(row.bytes for row in report.rows)
        assert report == inspect_packed(path)
        rows = {row.name: row for row in report.rows}
        tensors = load_file(path)
        assert set(rows) == set(tensors)
        assert all(rows[name].bytes == tensor.numel() * tensor.element_size() for name, tensor in tensors.items())
        assert rows["conv2.weight.codes"].shape == (50, 20, 5, 5)
        assert rows["conv2.weight.codes"].bits == 3

    def test_a_three_bit_lenet_takes_its_bits_and_no_more(self, saved):
        path, _, _ = saved
        plain = LeNet()
        floats = sum(4 * tensor.numel() for tensor in plain.state_dict().values() if tensor.ndim < 2)
        codes = sum(math.ceil(3 * tensor.numel() / 8) for tensor in plain.state_dict().values() if tensor.ndim >= 2)
        whole = sum(4 * tensor.numel() for tensor in plain.state_dict().values())
        assert path.stat().st_size <= codes + floats + 4096
        assert path.stat().st_size <= 0.105 * whole

    def test_the_integer_model_comes_back_bit_for_bit(self, saved):
        path, imodel, _ = saved
        back = load_packed(path, LeNet(seed=5))
        assert torch.equal(back(images(4, 7)), imodel(images(4, 7)))
        assert not any(parameter.requires_grad for parameter in back.parameters())
        again = path.with_name("again.safetensors")
        save_packed(back, again)
        assert again.read_bytes() == path.read_bytes()

    @pytest.mark.parametrize("folded", [True, False])
    def test_float_tensors_go_into_the_plain_model(self, tmp_path, folded):
        qmodel = lenet(act_bits=None, quantize_input=False)
        save_packed(convert(qmodel, images() if folded else None) if folded else qmodel, tmp_path / "w.safetensors")
        plain = LeNet(seed=5).eval()
        plain.load_state_dict(load_packed(tmp_path / "w.safetensors"))
        expected = qmodel(images(4, 7)).detach()
        torch.testing.assert_close(plain(images(4, 7)).detach(), expected, rtol=1e-5, atol=1e-5)

    def test_a_prepared_model_is_converted_first(self, tmp_path):
        qmodel = lenet()
        report = save_packed(qmodel, tmp_path / "net.safetensors")
        assert any(row.name == "hidden.weight.codes" and row.bits == 3 for row in report.rows)
        back = load_packed(tmp_path / "net.safetensors", LeNet(seed=5))
        torch.testing.assert_close(back(images()), qmodel(images()).detach(), rtol=1e-4, atol=1e-4)

    def test_tied_float_tensors_are_stored_once(self, tmp_path):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Linear(4, 4)
                self.a = nn.LayerNorm(4)
                self.b = nn.LayerNorm(4)
                self.b.weight = self.a.weight

            def forward(self, x):
                return self.b(self.inner(self.a(x)))

        x = torch.rand(3, 4, generator=generator(0))
        qmodel = prepare(Tied(), QuantConfig(weight_bits=2, act_bits=None, estimator="lsq"), x)
        imodel = convert(qmodel.eval(), x)
        report = save_packed(imodel, tmp_path / "t.safetensors")
        assert sum(row.name in {"a.weight", "b.weight"} for row in report.rows) == 1
        assert torch.equal(load_packed(tmp_path / "t.safetensors", Tied())(x), imodel(x))
        assert set(load_packed(tmp_path / "t.safetensors")) == set(Tied().state_dict())

    @pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}])
    @pytest.mark.parametrize("bias", [True, False])
    def test_attention_comes_back_in_either_form(self, tmp_path, sizes, bias):
        class Plain(nn.Module):
            def __init__(self, seed):
                super().__init__()
                with torch.random.fork_rng():
                    torch.manual_seed(seed)
                    self.inner = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True, **sizes)
                    self.out = nn.Linear(8, 3)

            def forward(self, x):
                values = torch.cat([x, x], -1)[..., : sizes.get("vdim", 8)]
                return self.out(self.inner(x, x[..., : sizes.get("kdim", 8)], values)[0])

        x = torch.randn(4, 5, 8, generator=generator(0))
        qmodel = prepare(Plain(0), QuantConfig(weight_bits=4, act_bits=None, estimator="lsq"), x).eval()
        imodel = convert(qmodel, x)
        save_packed(imodel, tmp_path / "a.safetensors")
        assert torch.equal(load_packed(tmp_path / "a.safetensors", Plain(1))(x), imodel(x))
        plain = Plain(1).eval()
        plain.load_state_dict(load_packed(tmp_path / "a.safetensors"))
        torch.testing.assert_close(plain(x).detach(), qmodel(x).detach(), rtol=1e-5, atol=1e-6)

    def test_a_pruned_layer_stores_no_codes(self, tmp_path):
        x = torch.randn(4, 6, generator=generator(0))
        make = lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))  # noqa: E731
        qmodel = prepare(make(), QuantConfig(weight_bits=4, act_bits=None, estimator="lsq"), x).eval()
        weight_quantizer(qmodel[0]).freeze(Grid(0, 0, 0))
        imodel = convert(qmodel, x)
        report = save_packed(imodel, tmp_path / "p.safetensors")
        assert {row.name for row in report.rows} == {"0.bias", "1.bias", "1.weight.codes", "1.weight.scale"}
        assert torch.equal(load_packed(tmp_path / "p.safetensors", make())(x), imodel(x))
        state = load_packed(tmp_path / "p.safetensors")
        assert torch.equal(state["0.weight"], torch.zeros(5, 6))
        assert report.float_bytes == 4 * (30 + 5 + 15 + 3)

    def test_a_layer_alone(self, tmp_path):
        x = torch.randn(4, 6, generator=generator(0))
        qmodel = prepare(nn.Linear(6, 5), QuantConfig(weight_bits=4, act_bits=8, estimator="lsq"), x)
        calibrate(qmodel, [x])
        report = save_packed(qmodel.eval(), tmp_path / "l.safetensors")
        assert {row.name for row in report.rows} == {"bias", "weight.codes", "weight.scale"}
        assert torch.equal(load_packed(tmp_path / "l.safetensors", nn.Linear(6, 5))(x), convert(qmodel)(x))

    def test_sums_that_prepare_made_modules_of(self, tmp_path):
        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

            def forward(self, x):
                return x + self.b(self.a(x).relu())

        x = torch.randn(4, 6, generator=generator(0))
        config = QuantConfig(weight_bits=4, act_bits=6, estimator="lsq", quantize_adds=True)
        qmodel = prepare(Residual(), config, x)
        calibrate(qmodel, [x])
        imodel = convert(qmodel.eval(), x)
        save_packed(imodel, tmp_path / "r.safetensors")
        assert torch.equal(load_packed(tmp_path / "r.safetensors", Residual())(x), imodel(x))
        torch.testing.assert_close(imodel(x), qmodel(x).detach(), rtol=1e-4, atol=1e-4)

    def test_one_layer_under_two_names(self, tmp_path):
        def make():
            shared = nn.Linear(6, 6)
            return nn.Sequential(shared, nn.Tanh(), shared)

        x = torch.randn(4, 6, generator=generator(0))
        imodel = convert(prepare(make(), QuantConfig(weight_bits=4, act_bits=None, estimator="lsq"), x).eval(), x)
        report = save_packed(imodel, tmp_path / "s.safetensors")
        assert sum(row.name.endswith("codes") for row in report.rows) == 1
        assert torch.equal(load_packed(tmp_path / "s.safetensors", make())(x), imodel(x))
        plain = make()
        plain.load_state_dict(load_packed(tmp_path / "s.safetensors"))
        torch.testing.assert_close(plain(x).detach(), imodel(x), rtol=1e-5, atol=1e-6)

    def test_the_table_names_every_tensor_and_the_total(self, saved):
        path, _, report = saved
        text = str(report)
        assert "conv1.weight.codes" in text
        assert str(path.stat().st_size) in text
        assert report.to_dict()["total"] == report.total


def rewrite(path, target, change):
    """Write the file again with its header changed, and nothing else."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return target


def about(change):
    """Change the JSON that tells what the file holds."""

    def rewritten(header):
        parts = json.loads(header["__metadata__"]["srq-packed"])
        change(parts)
        header["__metadata__"]["srq-packed"] = json.dumps(parts)

    return rewritten


def meta(key, value):
    return about(lambda parts: parts.__setitem__(key, value))


def drop(key):
    return about(lambda parts: parts.pop(key))


def text(value):
    return lambda header: header["__metadata__"].__setitem__("srq-packed", value)


def grid(**changes):
    return about(lambda parts: parts["tensors"]["out.weight"].update(changes))


def without_scale(header):
    """Drop a tensor and its bytes' place."""
    begin, end = header.pop("out.weight.scale")["data_offsets"]
    header["unknown"] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


class TestDamage:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (meta("format", "pt"), "expected format 'srq-packed', found 'pt'"),
            (meta("version", 2), "expected version 1, found 2"),
            (lambda header: header.pop("__metadata__"), "expected 'srq-packed' in the header's metadata, found none"),
            (drop("tensors"), "has no 'tensors'"),
            (drop("layers"), "has no 'layers'"),
            (meta("layers", []), "has no 'layers'"),
            (text("{"), "'srq-packed' is no JSON"),
            (text("[]"), "expected format 'srq-packed', found None"),
            (grid(bits=4), "tensor 'out.weight.codes': expected 2500 bytes .* found 1875"),
            (grid(bits=1), "tensor 'out.weight': no such grid"),
            (grid(n_lo="x"), "tensor 'out.weight': no such grid"),
            (grid(shape=[10, 501]), "tensor 'out.weight.codes': expected 1879 bytes"),
            (without_scale, "tensor 'out.weight.scale' is missing"),
            (lambda header: header.pop("out.weight.scale"), "expected at byte|expected .* bytes, found"),
            (lambda header: header["out.bias"].update(shape=[11]), "tensor 'out.bias': expected 44 bytes, found 40"),
            (lambda header: header["out.bias"].pop("dtype"), "tensor 'out.bias': no dtype"),
        ],
    )
    def test_a_header_that_does_not_fit_names_what_is_wrong(self, saved, tmp_path, change, message):
        broken = rewrite(saved[0], tmp_path / "broken.safetensors", change)
        for read in (inspect_packed, load_packed):
            with pytest.raises(PackedFormatError, match=message) as error:
                read(broken)
            assert str(broken) in str(error.value)
            assert "\n" not in str(error.value)

    @pytest.mark.parametrize("keep", [0, 3, 8, 100, -1, -1000])
    def test_a_truncated_file_says_so(self, saved, tmp_path, keep):
        data = saved[0].read_bytes()
        (tmp_path / "cut.safetensors").write_bytes(data[:keep])
        with pytest.raises(PackedFormatError, match=r"truncated|not a safetensors file"):
            load_packed(tmp_path / "cut.safetensors")

    def test_a_longer_file_says_so(self, saved, tmp_path):
        (tmp_path / "long.safetensors").write_bytes(saved[0].read_bytes() + b"x")
        with pytest.raises(PackedFormatError, match="longer than its header says"):
            inspect_packed(tmp_path / "long.safetensors")

    @pytest.mark.parametrize("data", [b"PK\x03\x04" * 10, b"\x02" + b"\0" * 7 + b"[]", b"\x04" + b"\0" * 7 + b"nope"])
    def test_another_format_says_so(self, tmp_path, data):
        (tmp_path / "net.pt").write_bytes(data)
        with pytest.raises(PackedFormatError, match="not a safetensors file"):
            inspect_packed(tmp_path / "net.pt")

    def test_plain_safetensors_are_not_packed(self, tmp_path):
        save_file({"weight": torch.zeros(3)}, tmp_path / "plain.safetensors")
        with pytest.raises(PackedFormatError, match="found none; write it with save_packed"):
            load_packed(tmp_path / "plain.safetensors")

    def test_a_missing_file_says_so(self, tmp_path):
        with pytest.raises(PackedFormatError, match="No such file"):
            load_packed(tmp_path / "none.safetensors")

    def test_a_code_beyond_the_grid_is_found(self, saved, tmp_path):
        data = bytearray(saved[0].read_bytes())
        (length,) = struct.unpack("<Q", data[:8])
        begin, _ = json.loads(bytes(data[8 : 8 + length]))["out.weight.codes"]["data_offsets"]
        # Three-bit codes of the grid -3..3 end at 6.
        data[8 + length + begin] |= 7
        (tmp_path / "codes.safetensors").write_bytes(data)
        with pytest.raises(PackedFormatError, match=r"'out.weight.codes': code 7, but the grid has 7 points"):
            load_packed(tmp_path / "codes.safetensors")

    def test_another_architecture_names_the_layer(self, saved):
        class Wider(LeNet):
            def __init__(self):
                super().__init__()
                self.out = nn.Linear(500, 11)

        with pytest.raises(
            PackedFormatError, match=r"layer 'out': expected a weight of \(11, 500\), found \(10, 500\)"
        ):
            load_packed(saved[0], Wider())
        with pytest.raises(PackedFormatError, match="layer 'conv1' is not in the model"):
            load_packed(saved[0], nn.Sequential(nn.Linear(3, 3)))
        other = LeNet()
        other.hidden = nn.Conv1d(500, 800, 1)
        with pytest.raises(PackedFormatError, match="layer 'hidden': expected conv1d, found linear"):
            load_packed(saved[0], other)
        other = LeNet()
        other.scale = nn.LayerNorm(50)
        with pytest.raises(PackedFormatError, match=r"tensor 'scale.weight': the model has 50, the file 500"):
            load_packed(saved[0], other)
        other = LeNet()
        other.extra = nn.LayerNorm(5)
        with pytest.raises(PackedFormatError, match=r"tensor 'extra.weight' of the model is not in the file"):
            load_packed(saved[0], other)
        other = LeNet()
        other.scale = nn.Identity()
        with pytest.raises(PackedFormatError, match=r"tensor 'scale.*' is not in the model"):
            load_packed(saved[0], other)

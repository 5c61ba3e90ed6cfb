"""What prepare makes of a user's model: torch's manners, attention, ties, masks, compiled and distributed training."""

from __future__ import annotations

import copy
import pickle
import socket
import textwrap
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from shared_core.testing import Program
from srq_dropbits.bits import freeze_bits
from srq_dropbits.config import METHODS, DropBits, LearnBits, QuantConfig
from srq_dropbits.deploy import convert, size_table
from srq_dropbits.errors import (
    CalibrationError,
    InvalidBitsError,
    NonFiniteError,
    NothingToQuantizeError,
    OverrideError,
    SrqError,
)
from srq_dropbits.grid import Grid
from srq_dropbits.layers import ResidualAdd, SplitAttention
from srq_dropbits.qat import (
    calibrate,
    input_quantizer,
    param_groups,
    prepare,
    quantized_layers,
    reestimate_bn,
    set_dropbits,
    weight_quantizer,
)
from srq_dropbits.quantizers import WeightQuantizer
from srq_dropbits.structure import quantizers


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


class Residual(nn.Module):
    """A network whose sums are found by tracing, or are modules."""

    def __init__(self, found: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.add = None if found else ResidualAdd()

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(a.relu())
        return self.last(a + b if self.add is None else self.add(a, b))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.embedding(x))


def mlp(seed: int = 0) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), seed)


def ready(config: QuantConfig, model: nn.Module | None = None, x: Tensor | None = None) -> nn.Module:
    qmodel = prepare(mlp() if model is None else model, config)
    calibrate(qmodel, [normal(32, 6) if x is None else x])
    return qmodel


def step_size(module: nn.Module) -> Tensor:
    part = weight_quantizer(module)
    assert part is not None
    return part.alpha.detach()


class TestPrepare:
    def test_the_users_model_is_left_alone_unless_inplace(self):
        model = mlp()
        before = copy.deepcopy(model.state_dict())
        qmodel = prepare(model, QuantConfig())
        assert type(model) is nn.Sequential
        assert isinstance(qmodel, nn.Sequential)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert prepare(model, QuantConfig(), inplace=True) is model

    @pytest.mark.parametrize("training", [False, True])
    def test_the_mode_is_the_models(self, training):
        model = Residual().train(training)
        qmodel = prepare(model, QuantConfig(quantize_adds=True, dropbits=DropBits(p_keep=0.1, activations=True)))
        assert {part.training for part in quantizers(qmodel)} == {training}

    def test_quantizers_are_where_the_model_is(self, monkeypatch):
        monkeypatch.setattr(WeightQuantizer, "initialize", lambda *_: True)
        model = Residual().to("meta")
        for config in (QuantConfig(quantize_adds=True, learn_bits=LearnBits()), QuantConfig.method("lsq+", 4, 4)):
            qmodel = prepare(model, config)
            assert {value.device.type for value in [*qmodel.parameters(), *qmodel.buffers()]} == {"meta"}

    def test_only_the_global_random_state_is_safe_from_it(self):
        state = torch.get_rng_state()
        qmodel = ready(QuantConfig(dropbits=DropBits()))
        qmodel.train()(normal(4, 6))
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("make", [lambda: nn.Conv1d(4, 6, 3), lambda: nn.Conv2d(4, 6, (3, 2), groups=2)])
    @pytest.mark.parametrize("per_channel", [False, True])
    def test_convolutions_equal_torchs_with_weights_on_the_grid(self, make, per_channel):
        layer = seeded(make)
        x = normal(2, 4, 9) if isinstance(layer, nn.Conv1d) else normal(2, 4, 9, 8)
        qlayer = prepare(layer, QuantConfig(weight_bits=3, act_bits=None, per_channel=per_channel))
        shape = (6, *(1,) * (layer.weight.dim() - 1)) if per_channel else ()
        assert step_size(qlayer).shape == shape
        grid = step_size(qlayer) * (layer.weight / step_size(qlayer)).round().clamp(-3, 3)
        expected = copy.deepcopy(layer)
        expected.weight = nn.Parameter(grid.detach())
        assert torch.allclose(qlayer(x), expected(x), atol=1e-6)

    def test_transposed_convolutions_have_their_channels_second(self):
        qlayer = prepare(seeded(lambda: nn.ConvTranspose2d(4, 6, 3)), QuantConfig(act_bits=None, per_channel=True))
        assert step_size(qlayer).shape == (1, 6, 1, 1)
        with pytest.raises(OverrideError, match="grouped transposed"):
            prepare(nn.ConvTranspose2d(4, 6, 3, groups=2), QuantConfig(per_channel=True))

    def test_a_single_output_may_have_steps_a_channel(self):
        qmodel = prepare(nn.Linear(6, 1), QuantConfig(act_bits=None, per_channel=True))
        qmodel(normal(3, 6)).sum().backward()
        assert weight_quantizer(qmodel).log_alpha.grad.shape == (1, 1)

    @pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm", "orthogonal"])
    def test_other_parametrizations_stay_and_the_quantizer_sees_their_result(self, kind):
        layer = seeded(lambda: nn.Linear(8, 8))
        with torch.no_grad():
            layer.weight.mul_(50)
        model = nn.Sequential(getattr(parametrizations, kind)(layer)).eval()
        before = model[0].weight.detach()
        qmodel = prepare(model, QuantConfig(weight_bits=4, act_bits=None))
        error = (qmodel[0].weight - before).square().sum() / before.square().sum()
        assert error.item() < 0.02
        qmodel.train()(normal(3, 8)).sum().backward()
        assert qmodel.report().avg_bits == 4
        assert all(value.grad is not None for value in qmodel.parameters() if value.requires_grad)

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
    def test_old_style_hooks_are_refused(self):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))
        with pytest.raises(SrqError, match="parametrizations"):
            prepare(model, QuantConfig())
        with pytest.raises(OverrideError, match=r"'0'.*old-style"):
            prepare(model, QuantConfig(), inplace=True)

    def test_a_depthwise_convolution_with_one_step_at_few_bits_is_warned_about(self):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
        with pytest.warns(UserWarning, match=r"'0'.*depthwise.*per_channel"):
            prepare(model, QuantConfig(weight_bits=3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prepare(model, QuantConfig(weight_bits=3, per_channel=True))
            prepare(model, QuantConfig(weight_bits=4))

    def test_zero_weights_are_warned_about_and_nan_weights_are_refused(self):
        model = mlp()
        nn.init.zeros_(model[2].weight)
        with pytest.warns(UserWarning, match=r"'2'.*zero"):
            assert float(step_size(prepare(model, QuantConfig())[2])) == 1
        nn.init.constant_(model[2].weight, float("nan"))
        with pytest.raises(NonFiniteError, match="'2'"):
            prepare(model, QuantConfig())


class TestChoice:
    def names(self, **settings: object) -> list[str]:
        return [name for name, _ in quantized_layers(prepare(mlp(), QuantConfig(**settings)))]

    def test_patterns(self):
        assert self.names() == ["0", "2", "4"]
        assert self.names(include=("0", "4")) == ["0", "4"]
        assert self.names(exclude=("[02]",)) == ["4"]
        assert self.names(overrides={"2": "skip"}) == ["0", "4"]
        assert self.names(overrides={"*": "skip", "2": {"weight_bits": 2}}) == ["2"]

    def test_overrides_change_single_layers(self):
        changes = {"0": {"weight_bits": 8, "act_bits": 0}, "2": {"estimator": "lsq", "per_channel": True}}
        qmodel = prepare(mlp(), QuantConfig(weight_bits=3, act_bits=2, overrides=changes))
        assert [weight_quantizer(qmodel[i]).grid.bits for i in (0, 2, 4)] == [8, 3, 3]
        assert input_quantizer(qmodel[0]) is None
        assert weight_quantizer(qmodel[2]).estimator == "lsq"
        assert step_size(qmodel[2]).shape == (8, 1)

    @pytest.mark.parametrize("where", ["include", "exclude", "overrides"])
    def test_a_pattern_that_matches_nothing_gets_close_names(self, where):
        value = {"secnd": "skip"} if where == "overrides" else ("secnd",)
        with pytest.raises(OverrideError, match=r"'secnd' matches no layer.*second"):
            prepare(Residual(), QuantConfig(**{where: value}))

    def test_nothing_to_quantize(self):
        with pytest.raises(NothingToQuantizeError, match="BatchNorm1d, ReLU"):
            prepare(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)))
        with pytest.raises(NothingToQuantizeError, match="none of the layers"):
            prepare(mlp(), QuantConfig(exclude=("*",)))

    @pytest.mark.parametrize("bits", [0, 1, 9, True, 2.5, -3])
    def test_bits_that_do_not_exist(self, bits):
        with pytest.raises(InvalidBitsError, match="weight_bits"):
            QuantConfig(weight_bits=bits)
        with pytest.raises(InvalidBitsError, match=r"overrides\.fc.*weight_bits"):
            QuantConfig(overrides={"fc": {"weight_bits": bits}})

    @pytest.mark.parametrize("estimator", ["pact", "ste-minmax", "ptq"])
    def test_an_estimator_without_levels_is_refused_where_levels_drop(self, estimator):
        config = QuantConfig(dropbits=DropBits(), overrides={"2": {"estimator": estimator}})
        with pytest.raises(OverrideError, match="'2'"):
            prepare(mlp(), config)

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_models_that_cannot_be_prepared(self):
        with pytest.raises(SrqError, match="prepared already"):
            prepare(prepare(mlp()))
        with pytest.raises(SrqError, match="lazy"):
            prepare(nn.Sequential(nn.LazyLinear(3)))
        with pytest.raises(SrqError, match="script"):
            prepare(torch.jit.script(mlp()))


class TestCalibrate:
    def test_uncalibrated_and_empty(self):
        qmodel = prepare(mlp(), QuantConfig())
        with pytest.raises(CalibrationError, match=r"'0'.*calibrate"):
            qmodel(normal(2, 6))
        with pytest.raises(CalibrationError, match="empty"):
            calibrate(qmodel, [])
        with pytest.raises(SrqError, match="prepare"):
            calibrate(mlp(), [normal(2, 6)])

    def test_nan_in_data_names_the_layer_and_leaves_no_trace(self):
        qmodel = prepare(mlp(), QuantConfig())
        bad = normal(4, 6)
        bad[1, 2] = float("nan")
        with pytest.raises(NonFiniteError, match="'0'"):
            calibrate(qmodel, [-normal(4, 6).abs(), bad])
        calibrate(qmodel, [normal(4, 6).abs()])
        assert not input_quantizer(qmodel[0]).grid.is_signed

    def test_a_layer_that_is_never_reached_is_named(self):
        class Half(Residual):
            def forward(self, x: Tensor) -> Tensor:
                return self.first(x)

        with pytest.raises(CalibrationError, match="'second'"):
            calibrate(prepare(Half(), QuantConfig()), [normal(4, 6)])

    @pytest.mark.parametrize(("setting", "bits"), [(8, 8), (None, 3), (0, None), (False, None), (2, 2)])
    def test_the_networks_own_input_has_its_own_bits(self, setting, bits):
        qmodel = ready(QuantConfig(act_bits=3, quantize_input=setting))
        found = [None if (part := input_quantizer(qmodel[i])) is None else part.grid.bits for i in (0, 2, 4)]
        assert found == [bits, 3, 3]
        qmodel(normal(3, 6)).sum().backward()

    def test_it_sees_floating_point_activations(self):
        model = mlp()
        qmodel = ready(QuantConfig(weight_bits=2, act_bits=8), model)
        hidden = model[:2](normal(32, 6))
        assert float(input_quantizer(qmodel[2]).alpha.detach()) == pytest.approx(
            float(hidden.detach().flatten().quantile(0.999)) / 255, rel=0.02
        )

    def test_batches_of_any_form_and_no_more_than_asked(self):
        x, grids = normal(32, 6), []
        for batch in (x, (x, torch.zeros(32)), [x], {"input": x, "labels": x}):
            qmodel = prepare(mlp(), QuantConfig())
            calibrate(qmodel, [batch])
            grids.append(float(input_quantizer(qmodel[4]).alpha.detach()))
        assert len(set(grids)) == 1

        def endless():
            while True:
                yield x

        calibrate(prepare(mlp(), QuantConfig()), endless(), max_batches=3)

    def test_modes_come_back(self):
        qmodel = prepare(mlp(), QuantConfig()).train()
        qmodel[2].eval()
        before = [module.training for module in qmodel.modules()]
        calibrate(qmodel, [normal(4, 6)])
        assert [module.training for module in qmodel.modules()] == before

    def test_all_zero_input_is_warned_about(self):
        with pytest.warns(UserWarning, match=r"'0'.*zero"):
            calibrate(prepare(mlp(), QuantConfig()), [torch.zeros(4, 6)])

    def test_batch_norm_statistics_are_plain_averages(self):
        model = seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
        qmodel = ready(QuantConfig(weight_bits=2, dropbits=DropBits(p_keep=0.1)), model)
        batches = [normal(16, 6, seed=seed) for seed in range(5)]
        qmodel.train()
        assert reestimate_bn(qmodel, batches) == 1
        assert all(module.training for module in qmodel.modules())
        qmodel.eval()
        with torch.no_grad():
            hidden = [qmodel[0](batch) for batch in batches]
        mean = torch.stack([h.mean(0) for h in hidden]).mean(0)
        variance = torch.stack([h.var(0) for h in hidden]).mean(0)
        assert torch.allclose(qmodel[1].running_mean, mean, atol=1e-5)
        assert torch.allclose(qmodel[1].running_var, variance, rtol=1e-4)
        with pytest.raises(CalibrationError, match="empty"):
            reestimate_bn(qmodel, [])
        assert torch.allclose(qmodel[1].running_mean, mean, atol=1e-5)
        assert qmodel[1].momentum == 0.1


def attention_pair(**options: object) -> tuple[nn.MultiheadAttention, SplitAttention]:
    plain = seeded(lambda: nn.MultiheadAttention(8, 2, **options)).eval()
    for value in plain.parameters():
        with torch.no_grad():
            value.add_(0.1 * normal(*value.shape))
    return plain, SplitAttention(plain)


class TestAttention:
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 6}, {"bias": False}])
    @pytest.mark.parametrize("mask", ["none", "bool", "float", "heads"])
    @pytest.mark.parametrize("padding", ["none", "bool", "float"])
    def test_it_is_torchs(self, batch_first, sizes, mask, padding):
        plain, split = attention_pair(batch_first=batch_first, **sizes)
        q = normal(3, 4, 8)
        k, v = normal(3, 5, sizes.get("kdim", 8), seed=1), normal(3, 5, sizes.get("vdim", 8), seed=2)
        if not batch_first:
            q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        hidden = torch.zeros(4, 5, dtype=torch.bool)
        hidden[:, 3] = hidden[0, 0] = True
        floating = normal(4, 5, seed=3)
        masks = {"none": None, "bool": hidden, "float": floating, "heads": normal(6, 4, 5, seed=4)}
        padded = torch.tensor([[False] * 5, [False] * 4 + [True], [True, True, False, False, False]])
        paddings = {"none": None, "bool": padded, "float": 3 * normal(3, 5, seed=5)}
        if padding == "bool" and mask in {"float", "heads"}:
            paddings["bool"] = torch.zeros(3, 5).masked_fill(padded, -torch.inf)
        if padding == "float" and mask == "bool":
            masks["bool"] = torch.zeros(4, 5).masked_fill(hidden, -torch.inf)
        for average in (True, False):
            options = {
                "attn_mask": masks[mask],
                "key_padding_mask": paddings[padding],
                "average_attn_weights": average,
            }
            for one, other in zip(plain(q, k, v, **options), split(q, k, v, **options), strict=True):
                assert torch.allclose(one, other, atol=1e-5)
            assert split(q, k, v, **options, need_weights=False)[1] is None

    @pytest.mark.parametrize("average", [False, True])
    def test_without_a_batch(self, average):
        plain, split = attention_pair()
        q, k = normal(4, 8), normal(5, 8, seed=1)
        options = {
            "attn_mask": normal(2, 4, 5, seed=4),
            "key_padding_mask": torch.tensor([0.0, 0.0, 0.0, 0.0, -torch.inf]),
            "average_attn_weights": average,
        }
        for one, other in zip(plain(q, k, k, **options), split(q, k, k, **options), strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one, other, atol=1e-5)

    def test_causal_alone_and_with_padding(self):
        plain, split = attention_pair(batch_first=True)
        x = normal(2, 5, 8)
        causal = nn.Transformer.generate_square_subsequent_mask(5)
        padding = torch.zeros(2, 5).masked_fill(torch.arange(5) == 4, -torch.inf)
        for padded in (None, padding):
            expected = plain(x, x, x, attn_mask=causal, key_padding_mask=padded, is_causal=True)[0]
            for mask in (causal, None):
                found = split(x, x, x, attn_mask=mask, key_padding_mask=padded, is_causal=True)[0]
                assert torch.allclose(found, expected, atol=1e-5)

    def test_what_is_not_supported_is_named(self):
        for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
            with pytest.raises(OverrideError, match="'attention'"):
                prepare(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, **options)}))

    def test_alone_shared_and_in_part(self):
        x = normal(3, 2, 8)
        alone = prepare(seeded(lambda: nn.MultiheadAttention(8, 2)), QuantConfig(act_bits=None))
        assert [name for name, _ in quantized_layers(alone)] == ["q_proj", "k_proj", "v_proj", "out_proj"]
        assert alone(x, x, x)[0].shape == x.shape
        one = nn.MultiheadAttention(8, 2)
        twice = prepare(nn.ModuleDict({"a": one, "b": one}))
        assert isinstance(twice["a"], SplitAttention)
        assert twice["a"] is twice["b"]
        part = prepare(nn.ModuleDict({"a": one}), QuantConfig(exclude=("a.out_proj",)))
        assert [name for name, _ in quantized_layers(part)] == ["a.q_proj", "a.k_proj", "a.v_proj"]

    @pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
    @pytest.mark.parametrize("layers", [0, 2])
    @pytest.mark.parametrize("exclude", [(), ("*self_attn",)])
    def test_torchs_fused_path_does_not_pass_the_quantizers_by(self, layers, exclude):
        def make() -> nn.Module:
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            return nn.TransformerEncoder(layer, layers) if layers else layer

        model = seeded(make)
        x = normal(4, 5, 8)
        qmodel = prepare(model, QuantConfig(weight_bits=3, act_bits=3, exclude=exclude))
        calibrate(qmodel, [x])
        padding = torch.zeros(4, 5, dtype=torch.bool)
        padding[:, 4] = True
        name = "src_key_padding_mask"
        trained = qmodel.train()(x, **{name: padding})
        with torch.no_grad():
            evaluated = qmodel.eval()(x, **{name: padding})
            floating = model.eval()(x, **{name: padding})
        assert torch.allclose(trained[:, :4], evaluated[:, :4], atol=1e-5)
        assert not torch.allclose(floating[:, :4], evaluated[:, :4], atol=1e-2)


class TestTies:
    def test_one_weight_has_one_quantizer(self):
        qmodel = prepare(seeded(Tied), QuantConfig(weight_bits=3, act_bits=None, dropbits=DropBits(p_keep=0.5)))
        assert weight_quantizer(qmodel.embedding) is weight_quantizer(qmodel.decoder)
        for _ in range(5):
            qmodel(torch.arange(7)).square().sum().backward()
            assert torch.equal(qmodel.embedding.weight, qmodel.decoder.weight)
        optimizer = torch.optim.SGD(param_groups(qmodel, 0.1))
        optimizer.step()
        lists = qmodel.embedding.parametrizations.weight, qmodel.decoder.parametrizations.weight
        assert lists[0].original is lists[1].original
        assert qmodel.report().rows[0].weights == 28
        assert qmodel.report().rows[1].weights == 0

    def test_a_layer_used_twice(self):
        layer = seeded(lambda: nn.Linear(6, 6))
        qmodel = ready(QuantConfig(), nn.Sequential(layer, nn.ReLU(), layer))
        assert qmodel[0] is qmodel[2]
        qmodel(normal(3, 6)).sum().backward()


class TestResidualAdds:
    @pytest.mark.parametrize("found", [True, False])
    def test_both_terms_are_on_one_grid(self, found):
        model = seeded(lambda: Residual(found))
        qmodel = ready(QuantConfig(quantize_adds=found, act_bits=4), model).eval()
        module = qmodel.residual_add_0 if found else qmodel.add
        seen: list[Tensor] = []
        module.register_forward_hook(lambda module, args, output: seen.append(output))
        with torch.no_grad():
            qmodel(normal(20, 6))
        ratio = seen[0] / input_quantizer(module).alpha
        assert torch.allclose(ratio, ratio.round(), atol=1e-3)

    def test_tracing_keeps_class_copies_and_pickles(self):
        model = seeded(Residual)
        config = QuantConfig(quantize_adds=True, dropbits=DropBits(p_keep=0.5))
        qmodel = ready(config, model)
        assert isinstance(qmodel, Residual)
        assert not hasattr(model, "residual_add_0")
        for other in (copy.deepcopy(qmodel), copy.deepcopy(copy.deepcopy(qmodel)), pickle.loads(pickle.dumps(qmodel))):
            same = copy.deepcopy(qmodel)
            for _ in range(3):
                assert torch.equal(other.train()(normal(4, 6)), same.train()(normal(4, 6)))
            assert other.quant_config == config

    def test_without_quantizers_the_traced_model_is_the_users(self):
        model = seeded(Residual)
        qmodel = prepare(model, QuantConfig(quantize_adds=True))
        for part in quantizers(qmodel):
            part.enabled = False
        assert torch.equal(qmodel(normal(4, 6)), model(normal(4, 6)))

    def test_code_that_tracing_would_change_or_cannot_follow_is_refused(self):
        class Functional(Residual):
            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.dropout(super().forward(x), 0.5, self.training)

        class Branching(Residual):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x if x.sum() > 0 else -x)

        class Moody(Residual):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * (10 if self.training else 1)

        class Writing(Residual):
            def forward(self, x: Tensor) -> Tensor:
                a = self.first(x)
                a.add_(self.second(x))
                return self.last(a)

        refused = ((Functional, "dropout"), (Branching, "cannot trace"), (Moody, "evaluation"), (Writing, "in place"))
        for kind, message in refused:
            with pytest.raises(SrqError, match=message):
                prepare(kind(), QuantConfig(quantize_adds=True))

    def test_sums_of_sizes_stay_and_names_that_are_taken_do_too(self):
        class Own(nn.Linear):
            pass

        class Counting(Residual):
            def __init__(self) -> None:
                super().__init__()
                self.second, self.residual_add_0 = Own(6, 6), nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                cells = x.shape[0] * x.shape[1] + x.size(1)
                return self.residual_add_0(super().forward(x)) + cells / (x.shape[0] + 1)

        model = seeded(Counting)
        qmodel = ready(QuantConfig(weight_bits=8, act_bits=8, quantize_adds=True), model).eval()
        adds = [name for name, module in qmodel.named_modules() if isinstance(module, ResidualAdd)]
        assert adds == ["residual_add_1"]
        with torch.no_grad():
            assert torch.allclose(qmodel(normal(7, 6)), model(normal(7, 6)), atol=0.2)


METHOD_CONFIGS = [
    QuantConfig.method(name, 3, 3, **changes)
    for name in METHODS
    for changes in ({}, {"per_channel": True})
    if not (changes and name in {"ste-minmax", "pact"})
]


class TestState:
    @pytest.mark.parametrize("config", METHOD_CONFIGS, ids=lambda config: f"{config.estimator}-{config.per_channel}")
    def test_a_fresh_model_loads_it_strictly_and_computes_the_same(self, config):
        qmodel = ready(config)
        optimizer = torch.optim.Adam(param_groups(qmodel, 1e-2))
        for _ in range(2):
            optimizer.zero_grad()
            (qmodel(normal(8, 6)).square().sum() + qmodel.bit_penalty()).backward()
            optimizer.step()
        if config.learn_bits is not None:
            freeze_bits(qmodel)
        other = prepare(mlp(5), config)
        other.load_state_dict(copy.deepcopy(qmodel.state_dict()))
        x = normal(9, 6, seed=3)
        assert torch.equal(qmodel.eval()(x), other.eval()(x))
        if config.estimator not in {"rq", "rq-st", "rq-local", "sr", "mode-gumbel"}:
            assert torch.equal(qmodel.train()(x), other.train()(x))
        assert str(qmodel.report()) == str(other.report())

    def test_a_copy_trains_by_itself(self):
        qmodel = ready(QuantConfig(dropbits=DropBits(p_keep=0.5, learn=True)))
        before = copy.deepcopy(qmodel.state_dict())
        other = copy.deepcopy(qmodel)
        optimizer = torch.optim.SGD(param_groups(other, 0.1))
        for _ in range(3):
            other(normal(8, 6)).square().sum().backward()
            optimizer.step()
        assert all(torch.equal(value, before[key]) for key, value in qmodel.state_dict().items())
        assert not torch.equal(other.eval()(normal(3, 6)), qmodel.eval()(normal(3, 6)))

    def test_pickles_keep_switches_and_types(self):
        qmodel = ready(QuantConfig(dropbits=DropBits(p_keep=0.3))).train()
        set_dropbits(qmodel, False)
        weight_quantizer(qmodel[0]).log_alpha.requires_grad_(False)
        qmodel.double()
        weight_quantizer(qmodel[2]).set_alpha(torch.tensor(1 / 3, dtype=torch.float64))
        other = pickle.loads(pickle.dumps(qmodel))
        for (name, value), again in zip(qmodel.named_parameters(), other.parameters(), strict=True):
            assert (again.dtype, again.requires_grad) == (value.dtype, value.requires_grad), name
        x = normal(5, 6).double()
        for mode in (True, False):
            assert torch.equal(other.train(mode)(x), qmodel.train(mode)(x))

    @torch.no_grad()
    def test_evaluation_follows_every_change_of_the_weights(self):
        qmodel = ready(QuantConfig(quantize_input=False, act_bits=None)).eval()
        x = normal(5, 6)

        def fresh() -> Tensor:
            return copy.deepcopy(qmodel)(x)

        first = qmodel(x)
        assert torch.equal(first, qmodel(x))
        other = prepare(mlp(9), QuantConfig(act_bits=None, quantize_input=False))
        qmodel.load_state_dict(other.state_dict())
        assert not torch.equal(qmodel(x), first)
        assert torch.equal(qmodel(x), other.eval()(x))
        qmodel[0].parametrizations.weight.original.add_(0.3)
        assert torch.equal(qmodel(x), fresh())
        weight_quantizer(qmodel[2]).set_alpha(torch.tensor(0.5))
        assert torch.equal(qmodel(x), fresh())
        x = x.double()
        qmodel.double()
        assert qmodel(x).dtype == torch.float64
        assert torch.equal(qmodel(x), fresh())

    def test_parameter_groups_hold_every_trained_parameter_once(self):
        for config in METHOD_CONFIGS:
            qmodel = ready(config)
            groups = param_groups(qmodel, 1e-3, 2e-3, 3e-3)
            found = [id(value) for group in groups for value in group["params"]]
            assert sorted(found) == sorted(id(value) for value in qmodel.parameters() if value.requires_grad)
            for group in groups:
                names = {"weights": (1e-3, 1e-4), "others": (1e-3, 0), "scales": (2e-3, 0), "gates": (3e-3, 0)}
                assert (group["lr"], group["weight_decay"]) == names[group["name"]]
            inside = {id(value) for part in quantizers(qmodel) for value in part.parameters()}
            decayed = [id(value) for group in groups if group["weight_decay"] for value in group["params"]]
            assert not inside & set(decayed)

    @pytest.mark.parametrize("config", METHOD_CONFIGS, ids=lambda config: f"{config.estimator}-{config.per_channel}")
    def test_every_trained_parameter_gets_a_gradient(self, config):
        qmodel = ready(config).train()
        (qmodel(normal(8, 6)).square().sum() + qmodel.bit_penalty()).backward()
        assert [name for name, value in qmodel.named_parameters() if value.requires_grad and value.grad is None] == []


class TestMasks:
    def make(self, **changes: object) -> nn.Module:
        drops = DropBits(p_keep=0.6, activations=True)
        config = QuantConfig(weight_bits=4, dropbits=drops, quantize_input=None, **changes)
        return ready(config, x=normal(32, 6).abs()).train()

    def masks(self, qmodel: nn.Module) -> list[tuple[float, ...]]:
        return [tuple(part.masks().tolist()) for part in quantizers(qmodel) if part.gates]

    def test_one_draw_a_step_in_training_and_none_in_evaluation(self):
        qmodel = self.make()
        history = []
        for _ in range(20):
            qmodel(normal(2, 6))
            history.append(tuple(self.masks(qmodel)))
        assert len(set(history)) == 20
        qmodel.eval()
        first = qmodel(normal(2, 6))
        assert torch.equal(first, qmodel(normal(2, 6)))
        assert tuple(self.masks(qmodel)) == history[-1]

    def test_the_seed_decides_and_layers_and_their_inputs_differ(self):
        runs = []
        for seed in (0, 0, 1, 2**31 - 1):
            qmodel = self.make(seed=seed)
            run = []
            for _ in range(10):
                qmodel(normal(2, 6))
                run.append(self.masks(qmodel))
            runs.append(run)
        assert runs[0] == runs[1]
        assert runs[0] != runs[2]
        assert runs[2] != runs[3]
        places = [tuple(step[place][:1] for step in runs[0]) for place in range(len(runs[0][0]))]
        assert len(places) == 6
        assert len(set(places)) == 6

    def test_set_dropbits_turns_them_off(self):
        qmodel = self.make()
        set_dropbits(qmodel, False)
        with torch.no_grad():
            assert torch.equal(qmodel(normal(4, 6)), qmodel.eval()(normal(4, 6)))

    def test_recomputed_activations_see_the_same_masks(self):
        from torch.utils.checkpoint import checkpoint

        grads = []
        for recompute in (False, True):
            qmodel = ready(QuantConfig(weight_bits=4, dropbits=DropBits(p_keep=0.5), act_bits=None)).train()
            qmodel(normal(2, 6))
            hidden = normal(4, 8)
            block = qmodel[2]
            out = checkpoint(block, hidden, use_reentrant=False) if recompute else block(hidden)
            out.square().sum().backward()
            grads.append(block.parametrizations.weight.original.grad)
        assert torch.equal(*grads)


COMPILED = """
    import copy
    import torch
    from torch import nn
    from srq_dropbits import DropBits, LearnBits, QuantConfig, bit_penalty, calibrate, freeze_bits, prepare

    torch.set_num_threads(1)
    plain_config = QuantConfig.method("srq", 3, 3, per_channel=True)
    drops = DropBits(p_keep=0.6, activations=True)
    gated_config = QuantConfig(dropbits=drops, learn_bits=LearnBits(), quantize_input=None)
    for config, layers in ((plain_config, 1), (gated_config, 2)):
        torch.manual_seed(0)
        plain = prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))[: 2 * layers - 1], config)
        calibrate(plain, [torch.randn(32, 6)])
        inner = copy.deepcopy(plain)
        compiled = torch.compile(inner, backend="eager", fullgraph=True)
        batches, losses = torch.randn(2, 8, 6), []
        for step in range(4):
            for model in (plain, compiled):
                model.zero_grad()
                loss = model(batches[step % 2]).square().sum() + bit_penalty(model)
                loss.backward()
                losses.append(loss.item())
            for (name, one), two in zip(plain.named_parameters(), inner.parameters()):
                if one.requires_grad:
                    torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(losses[1::2], losses[::2], rtol=1e-5, atol=0)
        # The same input again: other masks where there are any.
        assert (losses[0] != losses[4]) == (config.dropbits is not None), losses
        # Until then the grid of evaluation depends on values of gates, and one graph cannot hold it.
        for model in (plain, inner):
            freeze_bits(model)
        with torch.no_grad():
            torch.testing.assert_close(compiled.eval()(batches[0]), plain.eval()(batches[0]))
"""


DISTRIBUTED = """
    import os
    import sys
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from srq_dropbits import DropBits, LearnBits, QuantConfig, bit_penalty, calibrate, prepare, update_controller
    from srq_dropbits.structure import quantizers

    torch.set_num_threads(1)
    rank, port = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    config = QuantConfig(dropbits=DropBits(p_keep=0.5), learn_bits=LearnBits(target_bits=3.0))
    qmodel = prepare(model, config)
    calibrate(qmodel, [torch.randn(32, 6)])
    wrapped = DistributedDataParallel(qmodel)
    parameters = [value for value in wrapped.parameters() if value.requires_grad]
    draw = torch.Generator().manual_seed(rank)
    for _ in range(4):
        wrapped.zero_grad()
        loss = wrapped(torch.randn(16, 6, generator=draw)).square().mean() + bit_penalty(wrapped)
        loss.backward()
        with torch.no_grad():
            for value in parameters:
                value -= 0.05 * value.grad
        update_controller(wrapped)
        own = torch.cat([part.masks().flatten() for part in quantizers(qmodel) if part.gates])
        both = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(both, own)
        assert torch.equal(*both), "masks"
    for name, value in qmodel.named_parameters():
        both = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(both, value.detach())
        assert torch.equal(*both), name
    dist.barrier()
    # All has been checked: threads of gloo that outlive the interpreter now and then abort its end.
    os._exit(0)
"""


@pytest.fixture(scope="module")
def errors_of_scripts(tmp_path_factory) -> dict[str, list[str]]:
    """Run both scripts side by side, in processes of their own, where annotations are not checked."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    scripts = (("compiled", COMPILED), ("ddp", DISTRIBUTED, "0"), ("ddp", DISTRIBUTED, "1"))
    folder = tmp_path_factory.mktemp("scripts")
    workers = [(name, Program(textwrap.dedent(script), *rank, port, folder=folder)) for name, script, *rank in scripts]
    found: dict[str, list[str]] = {"compiled": [], "ddp": []}
    for name, worker in workers:
        done = worker.finish(240)
        if done.returncode:
            found[name].append(done.stderr)
    return found


def test_compiled_in_one_graph_losses_gradients_and_masks_are_the_same(errors_of_scripts):
    assert errors_of_scripts["compiled"] == []


def test_processes_that_train_together_draw_the_same_masks(errors_of_scripts):
    assert errors_of_scripts["ddp"] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_types_train(dtype):
    qmodel = prepare(mlp().to(dtype), QuantConfig(weight_bits=3, act_bits=3, dropbits=DropBits()))
    x = normal(8, 6).to(dtype)
    calibrate(qmodel, [x])
    out = qmodel(x)
    out.square().sum().backward()
    assert out.dtype == dtype
    for name, value in qmodel.named_parameters():
        if value.requires_grad:
            assert bool(value.grad.isfinite().all()), name


def test_autocast_trains_with_float_grids():
    qmodel = ready(QuantConfig(weight_bits=3, act_bits=3)).train()
    x = normal(8, 6)
    plain = qmodel(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = qmodel(x)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(plain, half.float(), atol=0.1 * float(plain.detach().abs().max()))
    half.float().square().sum().backward()
    assert all(bool(value.grad.isfinite().all()) for value in qmodel.parameters() if value.requires_grad)


def test_grids_of_inputs_follow_their_sign():
    qmodel = ready(QuantConfig(act_bits=3, quantize_input=None))
    assert input_quantizer(qmodel[0]).grid == Grid.signed(3, symmetric=False)
    assert input_quantizer(qmodel[2]).grid == Grid.unsigned(3)


@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm"])
def test_conversion_keeps_other_parametrizations(kind):
    layer = seeded(lambda: nn.Linear(8, 8))
    with torch.no_grad():
        layer.weight.mul_(20)
    x = normal(9, 8)
    qmodel = ready(QuantConfig(), nn.Sequential(getattr(parametrizations, kind)(layer)).eval(), x).eval()
    with torch.no_grad():
        imodel = convert(qmodel)
        assert torch.allclose(imodel(x), qmodel(x), atol=1e-4)
    row = size_table(qmodel, imodel).rows[0]
    # A weight norm's own numbers, one a row, belong to the layer as well.
    assert row.bytes_before == 4 * (64 + 8 + (8 if kind == "weight_norm" else 0))
    assert row.dtype_before == "float32"


@torch.no_grad()
def test_evaluation_follows_weights_written_through_data():
    qmodel = ready(QuantConfig()).eval()
    before = qmodel[0].weight.clone()
    qmodel[0].parametrizations.weight.original.data.mul_(-1)
    assert torch.equal(qmodel[0].weight, -before)


@pytest.mark.parametrize("estimator", ["mcste", "lsq+"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dropping", [False, True])
def test_every_learned_gate_gets_a_gradient_in_use_or_not(estimator, signed, dropping):
    """Distributed training waits for one; calibration or ``set_dropbits`` may have put gates out of use."""
    path = "prob" if estimator == "mcste" else "value"
    drops = DropBits(learn=True, activations=True, mask_path=path)
    x = normal(32, 6)
    qmodel = ready(QuantConfig(dropbits=drops, estimator=estimator), x=x if signed else x.abs())
    set_dropbits(qmodel, dropping)
    qmodel(normal(8, 6)).square().sum().backward()
    trained = {name: value for name, value in qmodel.named_parameters() if value.requires_grad}
    assert sum("phi" in name for name in trained) == 6
    assert [name for name, value in trained.items() if value.grad is None] == []
    if not dropping:
        assert not any(value.grad.any() for name, value in trained.items() if "phi" in name)

from __future__ import annotations

import copy
import math
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import NotFittedError
from torch import nn
from torch.autograd import gradcheck
from torch.utils.data import DataLoader, TensorDataset

from shared_core.errors import InputError
from shared_core.testing import Program
from sparsity_norm.functional import masked_conv2d, observed_count, sparsity_normalize
from sparsity_norm.nn import (
    HiddenSparsityNorm,
    MaskedConv1d,
    MaskedConv2d,
    MaskedLinear,
    NaNInput,
    SparsityNorm,
    drop_observed,
    input_importance,
    recalibrate,
    wrap,
)

NAN = math.nan
VARIANTS = [
    {},
    {"center": "column"},
    {"center": "global"},
    {"power": "learn"},
    {"power": 0.5, "tau": 2.0},
    {"concat_mask": True},
    {"groups": [7, 7, -1, -1, 3, 3]},
    {"momentum": 0.1},
    {"K": 2.0, "center": "column"},
]


def table(seed, rows=40, features=6, rate=0.5, dtype=torch.float32):
    """Random numbers around 2, NaN where missing, the first row empty."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 + torch.randn(rows, features, generator=generator, dtype=dtype)
    x[torch.rand(rows, features, generator=generator) > rate] = NAN
    x[0] = NAN
    return x


def as_csr(x):
    mask = ~x.isnan()
    crow = nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    return torch.sparse_csr_tensor(crow, mask.nonzero()[:, 1], x[mask], x.shape, check_invariants=True)


class TestFit:
    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10_000), st.booleans())
    def test_k_is_the_mean_count_by_numpy(self, seed, count_empty):
        x = table(seed, dtype=torch.float64)
        counts = (~np.isnan(x.numpy())).sum(1)
        expected = counts.mean() if count_empty else counts[counts > 0].mean()
        layer = SparsityNorm(count_empty=count_empty).fit(x)
        assert float(layer.K) == pytest.approx(expected, abs=1e-12)
        assert int(layer.n_seen) == len(x)

    @pytest.mark.parametrize("options", VARIANTS)
    def test_batches_give_what_the_whole_gives(self, options):
        x = table(0)
        whole = SparsityNorm(**options).fit(x).eval()
        loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=7)
        parts = SparsityNorm(**options).fit_loader(loader).eval()
        torch.testing.assert_close(parts.K, whole.K)
        torch.testing.assert_close(parts(x), whole(x))

    def test_sparse_input_gives_what_dense_gives(self):
        x = table(0)
        for options in ({}, {"center": "column"}, {"center": "global"}, {"groups": [0, 0, 1, 1, 2, 2]}):
            dense, sparse = SparsityNorm(**options).fit(x), SparsityNorm(**options).fit(as_csr(x))
            torch.testing.assert_close(sparse.K, dense.K)
            torch.testing.assert_close(sparse(as_csr(x)).to_dense(), dense(x))

    def test_centres_are_means_of_observed_entries(self):
        x = table(0, dtype=torch.float64)
        x[:, 4] = NAN
        values = x.numpy()
        column = SparsityNorm(center="column").fit(x)
        expected = np.array([np.nanmean(values[:, j]) if j != 4 else np.nanmean(values) for j in range(6)])
        np.testing.assert_allclose(column.center.numpy(), expected, rtol=1e-12)
        assert float(SparsityNorm(center="global").fit(x).center) == pytest.approx(np.nanmean(values), abs=1e-12)

    def test_images_are_centred_by_position(self):
        x = 3 + torch.randn(20, 2, 3, 3, generator=torch.Generator().manual_seed(0))
        x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = NAN
        layer = SparsityNorm(center="column", dim=(1, 2, 3)).fit(x)
        flat = SparsityNorm(center="column").fit(x.flatten(1))
        torch.testing.assert_close(layer(x).flatten(1), flat(x.flatten(1)))

    def test_given_masks_and_nonzero_masks(self):
        x, mask = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]), torch.tensor([[1, 1, 0], [0, 0, 1]])
        assert SparsityNorm(mask="given").fit(x, mask).K == 1.5
        assert SparsityNorm(mask="given").fit_loader([(x, mask, "target")]).K == 1.5
        assert SparsityNorm(mask="nonzero").fit(x).K == 1.5
        assert SparsityNorm().fit(x).K == 3
        assert torch.equal(SparsityNorm(mask="nonzero", K=3.0)(x), torch.tensor([[1.5, 0, 3], [0, 0, 9]]))

    def test_the_second_element_of_a_batch_is_a_mask_only_for_given_masks(self):
        x = torch.tensor([[1.0, NAN]])
        assert SparsityNorm().fit_loader([(x, torch.zeros(1, 2))]).K == 1

    def test_weighted_masks_count_confidence(self):
        x, confidence = torch.tensor([[4.0, 8.0]]), torch.tensor([[0.5, 0.25]])
        layer = SparsityNorm(weighted=True, center="global", min_count=0.1).fit(x, confidence)
        assert layer.K == 0.75
        assert layer.center.item() == pytest.approx((4 * 0.5 + 8 * 0.25) / 0.75)

    def test_processes_reduce_to_the_same_result_as_one(self, tmp_path):
        x = table(0)
        torch.save(x, tmp_path / "x.pt")
        script = textwrap.dedent("""
            import sys, torch
            from sparsity_norm.nn import SparsityNorm
            folder = sys.argv[1]
            torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=1, world_size=2)
            x = torch.load(f"{folder}/x.pt", weights_only=True)
            layer = SparsityNorm(center="column").fit_loader(x[1::2].split(6))
            torch.save({"K": layer.K, "center": layer.center, "n_seen": layer.n_seen}, f"{folder}/found.pt")
            torch.distributed.destroy_process_group()
        """)
        other = Program(script, tmp_path)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=2)
        try:
            layer = SparsityNorm(center="column").fit_loader(x[::2].split(7))
        finally:
            torch.distributed.destroy_process_group()
        assert other.finish().returncode == 0
        one = SparsityNorm(center="column").fit(x)
        for found in (
            {"K": layer.K, "center": layer.center, "n_seen": layer.n_seen},
            torch.load(tmp_path / "found.pt", weights_only=True),
        ):
            torch.testing.assert_close(found["K"], one.K)
            torch.testing.assert_close(found["center"], one.center)
            assert int(found["n_seen"]) == len(x)


class TestSparsityNorm:
    @pytest.mark.parametrize("options", VARIANTS)
    def test_state_copies_and_double_keep_what_was_fitted(self, options):
        x = table(0)
        layer = SparsityNorm(**options).fit(x).eval()
        loaded = SparsityNorm(**options)
        loaded.load_state_dict(layer.state_dict())
        assert torch.equal(loaded.eval()(x), layer(x))
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
        torch.testing.assert_close(copy.deepcopy(layer).double()(x.double()).float(), layer(x))

    def test_state_keeps_the_precision_of_the_fit(self):
        layer = SparsityNorm().fit(table(0, rows=7, dtype=torch.float64))
        loaded = SparsityNorm()
        loaded.load_state_dict(layer.state_dict())
        assert loaded.K.dtype == torch.float64
        assert torch.equal(loaded.K, layer.K)

    def test_half_precision_modules_keep_k_exact(self):
        layer = SparsityNorm(K=59.45)
        before = layer.K.clone()
        assert torch.equal(nn.Sequential(layer).bfloat16()[0].K, before)
        assert layer(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16

    def test_forward_is_the_function_with_the_fitted_constants(self):
        x = table(0)
        layer = SparsityNorm(power=0.7, center="column", tau=1.0, min_count=2.0).fit(x)
        torch.testing.assert_close(
            layer(x), sparsity_normalize(x, K=layer.K, power=0.7, center=layer.center, tau=1.0, min_count=2.0)
        )

    def test_evaluation_does_not_depend_on_the_company_of_an_instance(self):
        x = table(0, dtype=torch.float64)
        model = nn.Sequential(SparsityNorm(center="column"), nn.Linear(6, 3).double()).eval()
        model[0].fit(x)
        K = model[0].K.clone()
        whole = model(x)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model(x[order]), whole[order], rtol=1e-14, atol=1e-14)
        singly = torch.cat([model(row[None]) for row in x])
        torch.testing.assert_close(singly, whole, rtol=1e-14, atol=1e-14)
        assert torch.equal(model[0].K, K)

    def test_an_empty_instance_gives_the_networks_output_at_zero(self):
        model = nn.Sequential(SparsityNorm(K=3.0), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
        assert torch.equal(model(torch.full((1, 4), NAN)), model[1:](torch.zeros(1, 4)))

    def test_before_fit_it_says_so_in_training_and_in_evaluation(self):
        x = table(0)
        for layer in (
            SparsityNorm(),
            SparsityNorm(K=2.0, center="column"),
            NaNInput("mean"),
            SparsityNorm(momentum=0.1).eval(),
        ):
            with pytest.raises(NotFittedError, match="call fit"):
                layer(x)
        assert isinstance(SparsityNorm(K=1.0)(x), torch.Tensor)

    def test_a_given_k_survives_the_fit_of_centres(self):
        assert SparsityNorm(K=5.0, center="column").fit(table(0)).K == 5

    def test_running_mean_is_bias_corrected_and_freezes_in_evaluation(self):
        layer = SparsityNorm(momentum=0.3)
        batches = table(0, rows=40).split(10)
        running = 0.0
        for step, batch in enumerate(batches, start=1):
            counts = observed_count(batch)
            running = 0.7 * running + 0.3 * float(counts[counts > 0].mean())
            layer(batch)
            assert float(layer.K) == pytest.approx(running / (1 - 0.7**step), rel=1e-5)
        before = layer.K.clone()
        layer.eval()(batches[0])
        assert torch.equal(layer.K, before)
        layer.train()(torch.full((3, 6), NAN))
        assert torch.equal(layer.K, before)

    def test_learned_power_starts_at_one_and_gets_the_right_gradient(self):
        x = table(0, dtype=torch.float64)
        layer = SparsityNorm(power="learn").double().fit(x)
        assert layer.power.item() == pytest.approx(1.0)
        raw = layer.raw_power.detach().clone().requires_grad_()
        assert gradcheck(lambda raw: torch.func.functional_call(layer, {"raw_power": raw}, (x,)), (raw,))
        assert not layer.static
        assert SparsityNorm(K=1.0).static

    def test_appended_mask(self):
        x = table(0)
        layer = SparsityNorm(K=3.0, concat_mask=True)
        out = layer(x)
        assert torch.equal(out[:, 6:], (~x.isnan()).float())
        assert torch.equal(out[:, :6], SparsityNorm(K=3.0)(x))
        assert layer.out_features(6) == 12

    def test_importance_of_equal_columns_is_plain_normalization(self):
        x = table(0)
        plain = SparsityNorm().fit(x)
        torch.testing.assert_close(SparsityNorm(importance=torch.ones(6)).fit(x)(x), plain(x))
        importance = torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0, 3.0])
        weighted = SparsityNorm(importance=importance).fit(x)
        counts = (importance * ~x.isnan()).sum(1)
        torch.testing.assert_close(weighted.K, counts[counts > 0].mean())

    def test_under_vmap_and_functional_call(self):
        x = table(0)
        layer = SparsityNorm(center="column").fit(x)
        torch.testing.assert_close(torch.vmap(layer)(x), layer(x))

    @pytest.mark.parametrize("options", [{}, {"center": "column", "power": "learn"}, {"momentum": 0.5}])
    def test_compiles_without_graph_breaks(self, unchecked, options):
        x = table(0)
        torch._dynamo.reset()
        layer, twin = SparsityNorm(**options).fit(x), SparsityNorm(**options).fit(x)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), twin(x))
        torch.testing.assert_close(compiled(x[:20]), twin(x[:20]))
        torch.testing.assert_close(layer.K, twin.K)

    def test_repr_says_what_it_is(self):
        assert repr(SparsityNorm()) == "SparsityNorm(K=?, power=1)"
        assert (
            repr(SparsityNorm(4, "learn", tau=1.0, mask="nonzero"))
            == "SparsityNorm(K=4, power='learn', tau=1, mask='nonzero')"
        )


class TestNaNInput:
    @pytest.mark.parametrize(("fill", "statistic"), [("mean", np.nanmean), ("median", np.nanmedian)])
    def test_fills_are_those_of_numpy(self, fill, statistic):
        x = table(0, rows=31, dtype=torch.float64)
        x[:, 2] = NAN
        values = x.numpy()
        expected = [statistic(values[:, j]) if j != 2 else statistic(values) for j in range(6)]
        layer = NaNInput(fill).fit(x)
        np.testing.assert_allclose(layer.fill.numpy(), expected)
        np.testing.assert_allclose(layer(x).numpy(), np.where(np.isnan(values), expected, values))

    def test_zero_and_numbers_need_no_fit(self):
        x = torch.tensor([[1.0, NAN]])
        assert NaNInput()(x).tolist() == [[1.0, 0.0]]
        assert NaNInput(-1)(x).tolist() == [[1.0, -1.0]]
        assert NaNInput(concat_mask=True)(x).tolist() == [[1.0, 0.0, 1.0, 0.0]]

    def test_state_round_trip(self):
        x = table(0)
        loaded = NaNInput("median")
        loaded.load_state_dict(NaNInput("median").fit(x).state_dict())
        assert torch.equal(loaded(x), NaNInput("median").fit(x)(x))


class TestMaskedLayers:
    @pytest.mark.parametrize("options", [option for option in VARIANTS if "concat_mask" not in option])
    def test_masked_linear_is_norm_then_linear(self, options):
        x = table(0, dtype=torch.float64)
        layer = MaskedLinear(6, 4, **options).double().fit(x)
        for mode in (True, False):
            layer.train(mode)
            expected = nn.functional.linear(copy.deepcopy(layer.norm)(x), layer.weight, layer.bias)
            torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)

    def test_masked_linear_takes_csr(self):
        x = table(0, dtype=torch.float64)
        layer = MaskedLinear(6, 4).double().fit(x)
        torch.testing.assert_close(layer(as_csr(x)), layer(x), rtol=1e-12, atol=1e-12)
        assert torch.equal(layer(x)[0], layer.bias)

    @pytest.mark.parametrize("form", ["window", "instance"])
    def test_convolutions_are_the_functions_with_the_fitted_constant(self, form):
        x = torch.randn(5, 2, 6, 7, generator=torch.Generator().manual_seed(0))
        x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.4] = NAN
        layer = MaskedConv2d(2, 3, (3, 2), padding=1, form=form, return_mask=True).fit(x)
        out, mask = layer(x)
        expected, expected_mask = masked_conv2d(x, None, layer.weight, layer.bias, padding=1, form=form, K=layer.norm.K)
        assert torch.equal(out, expected)
        assert torch.equal(mask, expected_mask)
        line = MaskedConv1d(2, 3, 2, form=form).fit(x[:, :, 0])
        assert line(x[:, :, 0]).shape == (5, 3, 6)

    def test_a_pixel_mask_and_nan_mean_the_same_in_the_instance_form(self):
        x = torch.randn(5, 2, 6, 7, generator=torch.Generator().manual_seed(0))
        pixels = torch.rand(5, 1, 6, 7, generator=torch.Generator().manual_seed(1)) < 0.6
        layer = MaskedConv2d(2, 3, 3, form="instance").fit(x, pixels)
        with_nan = x.masked_fill(~pixels, NAN)
        torch.testing.assert_close(layer(x, pixels), layer(with_nan))
        torch.testing.assert_close(layer(x, pixels[:, 0]), layer(with_nan))
        assert layer.norm.K == layer.fit(with_nan).norm.K

    def test_masked_layers_chain(self):
        x = torch.randn(2, 1, 9, 9, generator=torch.Generator().manual_seed(0))
        x[:, :, 2:] = NAN
        first = MaskedConv2d(1, 4, 3, return_mask=True)
        second = MaskedConv2d(4, 2, 3, return_mask=True)
        out, mask = second(*first(x))
        assert mask.any()
        assert not mask.all()
        assert out.masked_select(~mask).eq(0).all()


class TestHidden:
    def test_drop_observed_drops_only_observed_entries_at_the_given_rate(self):
        mask = torch.rand(200, 100, generator=torch.Generator().manual_seed(0)) < 0.5
        kept = drop_observed(mask, 0.3, torch.Generator().manual_seed(1))
        assert not (kept & ~mask).any()
        assert kept.sum() / mask.sum() == pytest.approx(0.7, abs=0.02)
        assert torch.equal(kept, drop_observed(mask, 0.3, torch.Generator().manual_seed(1)))

    def test_the_sum_over_units_is_kept_whatever_was_dropped(self):
        hidden = torch.ones(50, 20)
        out = HiddenSparsityNorm(0.6)(hidden, generator=torch.Generator().manual_seed(0))
        assert (out.sum(1) - 20).abs().max() < 1e-4
        assert len(out.max(1).values.unique()) > 3

    def test_evaluation_is_the_identity_and_masks_are_honoured(self):
        hidden = torch.randn(3, 4)
        layer = HiddenSparsityNorm(0.5).eval()
        assert layer(hidden) is hidden
        mask = torch.tensor([[1, 1, 0, 0]])
        torch.testing.assert_close(layer(hidden, mask), hidden * mask * 2)

    def test_inverted_dropout_is_the_case_of_one_known_rate(self):
        """With exactly the expected number of units kept, the factor is 1 / (1 - p)."""
        kept = torch.arange(10).expand(3, 10) < 5
        torch.testing.assert_close(HiddenSparsityNorm(0.5).eval()(torch.ones(3, 10), kept), kept.float() / (1 - 0.5))


class TestWrap:
    def test_same_call_plus_mask(self):
        class Two(nn.Module):
            def forward(self, x, scale, *, shift=0.0):
                return x * scale + shift

        x = table(0)
        model = wrap(Two(), fit_on=x)
        expected = SparsityNorm().fit(x)(x) * 3 + 1
        torch.testing.assert_close(model(x, 3.0, shift=1.0), expected)
        torch.testing.assert_close(model(x.nan_to_num(9e9), 3.0, shift=1.0, mask=~x.isnan()), expected)

    def test_recalibration_finds_the_optimal_constant_and_touches_nothing_else(self):
        x = table(0, rows=200)
        model = wrap(nn.Linear(6, 1, bias=False), K=1.0).train()
        nn.init.constant_(model.module.weight, 0.5)
        unit = model(x).detach()
        target = 4.2 * unit + 0.1 * torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
        best = float((unit * target).sum() / unit.square().sum())
        weight = model.module.weight.clone()
        assert recalibrate(model, x, target) == pytest.approx([best], rel=1e-4)
        assert float(model.norm.K) == pytest.approx(best, rel=1e-4)
        assert torch.equal(model.module.weight, weight)
        assert model.training

    def test_recalibration_never_makes_it_worse(self):
        x = table(0)
        model = wrap(nn.Linear(6, 1), K=2.0)
        assert recalibrate(model, x, model(x).detach()) == pytest.approx([2.0], rel=1e-6)
        assert recalibrate(model, x, x[:, :1], loss=lambda output, target: (output * NAN).sum()) == pytest.approx([2.0])

    def test_importance_is_the_mean_contribution(self):
        x = table(0, dtype=torch.float64)
        weight = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        size = np.nanmean(np.abs(x.numpy()), axis=0) * weight.abs().mean(0).numpy()
        np.testing.assert_allclose(input_importance(x, weight).numpy(), size / size.mean())


class TestBadInput:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: SparsityNorm(K=0.0), "K is 0; it must be positive"),
            (lambda: SparsityNorm(K=-3), "K is -3"),
            (lambda: SparsityNorm(power="sqrt"), "power is 'sqrt'; give a number or 'learn'"),
            (lambda: SparsityNorm(power=math.inf), "power is inf"),
            (lambda: SparsityNorm(center="row"), "center is 'row'; choose one of None, 'column', 'global'"),
            (lambda: SparsityNorm(mask="zero"), "mask is 'zero'; choose one of 'nan', 'nonzero', 'given'"),
            (lambda: SparsityNorm(momentum=0), "momentum is 0"),
            (lambda: SparsityNorm(min_count=0), "min_count is 0"),
            (lambda: SparsityNorm(groups=torch.ones(3)), "groups has shape .3,. and dtype torch.float32"),
            (lambda: SparsityNorm(dim=(1, 2), concat_mask=True), "concat_mask needs one counted dimension"),
            (lambda: SparsityNorm().fit(torch.full((3, 2), NAN)), "no entry is observed in any of the 3 training"),
            (lambda: SparsityNorm().fit(torch.tensor([[1.0, math.inf]])), "x is infinite at row 0, column 1"),
            (lambda: SparsityNorm().fit(torch.ones(2, 40))(torch.ones(2, 39)), "expected 40 features, got 39"),
            (
                lambda: SparsityNorm().fit_loader([torch.ones(2, 3), torch.ones(2, 4)]),
                "expected 3 features, got 4",
            ),
            (lambda: SparsityNorm().fit(np.ones((2, 3))), "x is a ndarray; give a torch tensor"),
            (lambda: SparsityNorm(K=1.0)(np.ones((2, 3))), "x is a ndarray"),
            (lambda: SparsityNorm().fit_loader([{"x": torch.ones(2, 3)}]), "a batch of the loader is a dict"),
            (lambda: SparsityNorm().fit_loader([]), "no entry is observed in any of the 0"),
            (lambda: SparsityNorm(mask="given").fit(torch.ones(2, 3)), "mask is missing"),
            (lambda: SparsityNorm(mask="given").fit_loader([(torch.ones(2, 3),)]), "a batch of the loader has 1 elem"),
            (lambda: SparsityNorm(K=1.0, mask="given")(torch.ones(2, 3)), "mask is missing"),
            (
                lambda: SparsityNorm(K=1.0, concat_mask=True)(torch.eye(2).to_sparse_csr()),
                "concat_mask needs a dense x",
            ),
            (
                lambda: SparsityNorm(K=1.0)(torch.tensor([[NAN]]), torch.tensor([[1]])),
                "x is NaN at row 0, column 0 although mask says observed",
            ),
            (lambda: MaskedLinear(3, 2, dim=0), "dim and concat_mask are not for MaskedLinear"),
            (lambda: MaskedLinear(3, 2, K=1.0)(torch.ones(1, 4)), "expected 3 features, got 4"),
            (lambda: MaskedConv2d(1, 1, 3, form="global"), "form is 'global'"),
            (lambda: NaNInput("mode"), "fill is 'mode'"),
            (lambda: NaNInput("mean").fit(torch.full((2, 2), NAN)), "no entry is observed"),
            (lambda: HiddenSparsityNorm(1.0), "p is 1"),
            (lambda: drop_observed(torch.ones(2).bool(), -0.1), "p is -0.1"),
            (lambda: wrap(nn.Linear(2, 1), K=1.0, fit_on=torch.ones(2, 2)), "both K and fit_on are given"),
            (lambda: recalibrate(nn.Linear(2, 1), torch.ones(2, 2), torch.ones(2, 1)), "holds no SparsityNorm"),
            (lambda: input_importance(torch.zeros(2, 2), torch.ones(1, 2)), "every column has importance 0"),
        ],
    )
    def test_message_names_the_place_and_the_remedy(self, unchecked, call, message):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)

    def test_a_state_of_another_kind_is_refused(self):
        with pytest.raises(RuntimeError, match="Missing key"):
            SparsityNorm(center="column").load_state_dict(SparsityNorm(K=1.0).state_dict())

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from shared_core.errors import InputError
from sparsity_norm.functional import (
    masked_conv1d,
    masked_conv2d,
    masked_linear,
    masked_mse,
    mean_observed_count,
    observe,
    observed_count,
    sampled_decode,
    sparse_linear,
    sparsity_normalize,
    sparsity_scale,
)

NAN = math.nan


def draw(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw_mask(seed, *shape, rate=0.5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < rate


def holes(x, mask):
    return x.masked_fill(~mask, NAN)


def csr(x, mask):
    """The observed entries of x as torch CSR, stored zeros included."""
    crow = nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    return torch.sparse_csr_tensor(crow, mask.nonzero()[:, 1], x[mask], x.shape, check_invariants=True)


def scipy_csr(x, mask):
    crow = np.r_[0, mask.sum(1).cumsum(0).numpy()]
    return scipy.sparse.csr_array((x[mask].numpy(), mask.nonzero()[:, 1].numpy(), crow), shape=tuple(x.shape))


def normalize_by_hand(x, weight, K, *, power=1.0, min_count=1.0, tau=0.0, center=None, groups=None, importance=None):
    """Section by section what the docstring says, one number at a time."""
    rows, features = x.shape
    out = torch.zeros_like(x)
    for i in range(rows):
        largest: dict[int, float] = {}
        for j in range(features):
            part = float(weight[i, j]) * (1.0 if importance is None else float(importance[j]))
            group = j if groups is None else int(groups[j])
            largest[group] = max(largest.get(group, 0.0), part)
        scale = (K / max(sum(largest.values()) + tau, min_count)) ** power
        for j in range(features):
            if weight[i, j]:
                shift = 0.0 if center is None else float(center[j])
                out[i, j] = (float(x[i, j]) - shift) * float(weight[i, j]) * scale
    return out


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "power": st.sampled_from([0, 0.5, 1, 1.7]),
        "min_count": st.sampled_from([0.5, 1, 3]),
        "tau": st.sampled_from([0, 1.5]),
        "center": st.just("vector"),
        "groups": st.just("blocks"),
        "importance": st.just("vector"),
    },
)


def resolve(options, features, seed):
    found = dict(options)
    if "center" in found:
        found["center"] = draw(seed + 10, features)
    if "groups" in found:
        found["groups"] = torch.arange(features) // 2
    if "importance" in found:
        found["importance"] = draw(seed + 11, features).abs()
    return found


class TestSparsityNormalize:
    @settings(max_examples=20, deadline=None)
    @given(OPTIONS, st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 6), st.floats(0.1, 20))
    def test_every_layout_equals_the_definition(self, options, seed, rows, features, K):
        x, mask = draw(seed, rows, features), draw_mask(seed, rows, features)
        options = resolve(options, features, seed)
        expected = normalize_by_hand(x, mask, K, **options)
        torch.testing.assert_close(sparsity_normalize(x, mask, K, **options), expected)
        torch.testing.assert_close(sparsity_normalize(holes(x, mask), K=K, **options), expected)
        torch.testing.assert_close(sparsity_normalize(x, mask.to(torch.int32), K, **options), expected)
        torch.testing.assert_close(sparsity_normalize(csr(x, mask), K=K, **options).to_dense(), expected)
        torch.testing.assert_close(
            torch.from_numpy(sparsity_normalize(scipy_csr(x, mask), K=K, **options).toarray()), expected
        )

    @settings(max_examples=15, deadline=None)
    @given(OPTIONS, st.integers(0, 10_000))
    def test_confidence_masks_equal_the_definition(self, options, seed):
        x = draw(seed, 4, 6)
        confidence = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)) * draw_mask(seed, 4, 6)
        options = resolve(options, 6, seed)
        torch.testing.assert_close(
            sparsity_normalize(x, confidence, 3.0, weighted=True, **options),
            normalize_by_hand(x, confidence, 3.0, **options),
            atol=1e-6,
            rtol=1e-6,
        )

    def test_full_mask_and_k_of_all_features_is_the_identity(self):
        x = draw(0, 5, 7)
        assert torch.equal(sparsity_normalize(x, torch.ones(5, 7, dtype=torch.bool), 7.0), x)
        assert torch.equal(sparsity_normalize(x, K=7), x)

    def test_power_zero_is_zero_imputation_and_needs_no_k(self):
        x, mask = draw(0, 5, 7), draw_mask(0, 5, 7)
        assert torch.equal(sparsity_normalize(x, mask, power=0), torch.where(mask, x, 0))

    def test_output_is_linear_in_k(self):
        x, mask = draw(0, 5, 7), draw_mask(0, 5, 7)
        torch.testing.assert_close(sparsity_normalize(x, mask, 6.0), 3 * sparsity_normalize(x, mask, 2.0))

    def test_constant_values_and_unit_weights_give_k_times_the_value_at_every_count(self):
        x = torch.full((9, 9), 2.5, dtype=torch.float64)
        mask = torch.tril(torch.ones(9, 9, dtype=torch.bool))
        total = sparsity_normalize(x, mask, 4.0).sum(1)
        torch.testing.assert_close(total, torch.full((9,), 10.0, dtype=torch.float64))

    def test_permuting_features_together_changes_nothing(self):
        x, mask, weight = draw(0, 5, 7), draw_mask(0, 5, 7), draw(1, 3, 7)
        order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(
            masked_linear(x[:, order], mask[:, order], weight[:, order], K=3.0), masked_linear(x, mask, weight, K=3.0)
        )

    @pytest.mark.parametrize("garbage", [NAN, math.inf, -math.inf, 1e30])
    def test_what_lies_under_a_zero_of_the_mask_changes_nothing_forward_or_backward(self, garbage):
        x, mask, weight = draw(0, 5, 7), draw_mask(0, 5, 7), draw(1, 3, 7)
        results = []
        for value in (0.0, garbage):
            inputs = x.masked_fill(~mask, value).requires_grad_()
            w = weight.clone().requires_grad_()
            out = masked_linear(inputs, mask, w, K=3.0, center=draw(2, 7))
            out.square().sum().backward()
            assert (inputs.grad[~mask] == 0).all()
            results.append((out.detach(), inputs.grad, w.grad))
        for clean, dirty in zip(*results, strict=True):
            assert torch.equal(clean, dirty)

    def test_gradient_is_the_scale_on_observed_entries(self):
        x, mask = draw(0, 5, 7), draw_mask(0, 5, 7)
        x = holes(x, mask).requires_grad_()
        sparsity_normalize(x, K=3.0).sum().backward()
        expected = mask * 3.0 / mask.sum(1, keepdim=True).clamp(min=1)
        torch.testing.assert_close(x.grad, expected.double())

    def test_an_instance_with_nothing_observed_becomes_zeros(self):
        for options in ({}, {"tau": 2.0}, {"center": 1.0}, {"power": 0.5}):
            out = sparsity_normalize(torch.full((2, 3), NAN), K=2.0, **options)
            assert torch.equal(out, torch.zeros(2, 3))

    def test_dimensions_other_than_the_last(self):
        x, mask = draw(0, 4, 3, 5), draw_mask(0, 4, 3, 5)
        torch.testing.assert_close(
            sparsity_normalize(x, mask, 2.0, dim=1, center=draw(1, 3)),
            sparsity_normalize(x.movedim(1, -1), mask.movedim(1, -1), 2.0, center=draw(1, 3)).movedim(-1, 1),
        )
        torch.testing.assert_close(
            sparsity_normalize(x, mask, 2.0, dim=(1, 2)),
            sparsity_normalize(x.flatten(1), mask.flatten(1), 2.0).reshape(x.shape),
        )

    def test_mask_broadcasts(self):
        x, mask = draw(0, 4, 6), draw_mask(0, 1, 6)
        assert torch.equal(sparsity_normalize(x, mask, 2.0), sparsity_normalize(x, mask.expand(4, 6), 2.0))

    def test_power_may_be_learned(self):
        x, mask = draw(0, 5, 7), draw_mask(0, 5, 7)
        power = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda p: sparsity_normalize(x, mask, 3.0, power=p), (power,))
        torch.testing.assert_close(
            sparsity_normalize(x, mask, 3.0, power=power), sparsity_normalize(x, mask, 3.0, power=0.8)
        )

    def test_sparse_pattern_dtype_and_class_are_kept(self):
        x, mask = draw(0, 5, 7), draw_mask(0, 5, 7)
        x[mask.nonzero()[0][0], mask.nonzero()[0][1]] = 0.0
        out = sparsity_normalize(csr(x, mask).float(), K=2.0)
        assert out.dtype == torch.float32
        assert out.values().shape == (int(mask.sum()),)
        for build in (scipy.sparse.csr_matrix, scipy.sparse.csr_array):
            matrix = build(scipy_csr(x, mask)).astype(np.float32)
            matrix.data.flags.writeable = False
            before = matrix.data.copy()
            result = sparsity_normalize(matrix, K=2.0)
            assert type(result) is build
            assert result.dtype == np.float32
            assert result.nnz == matrix.nnz
            assert np.array_equal(matrix.data, before)
            assert not np.shares_memory(result.indices, matrix.indices)
        assert sparsity_normalize(matrix.astype(np.int64), K=2.0).dtype == np.float64

    def test_unsorted_columns_are_no_duplicates(self):
        matrix = scipy.sparse.csr_array((np.ones(3), [2, 0, 1], [0, 2, 3]), shape=(2, 3))
        assert np.array_equal(sparsity_normalize(matrix, K=2.0).toarray(), [[1, 0, 1], [0, 2, 0]])

    def test_gradient_reaches_csr_values(self):
        x, mask = draw(0, 5, 7), draw_mask(0, 5, 7)
        values = x[mask].clone().requires_grad_()
        pattern = csr(x, mask)

        def apply(stored):
            matrix = torch.sparse_csr_tensor(pattern.crow_indices(), pattern.col_indices(), stored, x.shape)
            return sparsity_normalize(matrix, K=2.0).values()

        assert gradcheck(apply, (values,))


class TestCounts:
    def test_counts_are_exact_in_half_precision_and_under_autocast(self):
        x = torch.ones(2, 1001, dtype=torch.bfloat16)
        x[0, 0] = NAN
        with torch.autocast("cpu", dtype=torch.bfloat16):
            counts = observed_count(x)
            assert counts.dtype == torch.float32
            assert counts.tolist() == [1000.0, 1001.0]
            normalized = sparsity_normalize(x, K=1001.0)
        assert normalized.dtype == torch.bfloat16
        assert normalized[1].eq(1).all()

    def test_counts_follow_the_layout(self):
        x, mask = draw(0, 5, 7), draw_mask(0, 5, 7)
        for found in (
            observed_count(x, mask),
            observed_count(holes(x, mask)),
            observed_count(csr(x, mask)),
            observed_count(scipy_csr(x, mask)),
        ):
            assert found.dtype == torch.float64
            assert torch.equal(found, mask.sum(1).double())

    def test_a_missing_one_hot_block_is_one_missing_feature(self):
        x = torch.tensor([[1.0, 0.0, 0.0, 5.0], [NAN, NAN, NAN, 5.0]])
        assert observed_count(x, groups=torch.tensor([0, 0, 0, 1])).tolist() == [2.0, 1.0]

    def test_mean_count_leaves_empty_instances_out_unless_asked(self):
        counts = torch.tensor([0.0, 2.0, 4.0])
        assert mean_observed_count(counts) == 3
        assert mean_observed_count(counts, count_empty=True) == 2

    def test_observe_gives_values_mask_and_counts(self):
        values, mask, counts = observe(torch.tensor([[1.0, NAN], [NAN, NAN]]), center=torch.tensor([0.5, 9.0]))
        assert values.tolist() == [[0.5, 0.0], [0.0, 0.0]]
        assert mask.tolist() == [[True, False], [False, False]]
        assert counts.tolist() == [[1.0], [0.0]]


class TestMaskedLinear:
    @settings(max_examples=15, deadline=None)
    @given(OPTIONS, st.integers(0, 10_000))
    def test_equals_the_linear_layer_of_normalized_input(self, options, seed):
        x, mask, weight, bias = draw(seed, 5, 6), draw_mask(seed, 5, 6), draw(seed + 1, 3, 6), draw(seed + 2, 3)
        options = resolve(options, 6, seed)
        expected = nn.functional.linear(sparsity_normalize(x, mask, 2.5, **options), weight, bias)
        close = {"atol": 1e-12, "rtol": 1e-12}
        torch.testing.assert_close(masked_linear(x, mask, weight, bias, 2.5, **options), expected, **close)
        torch.testing.assert_close(masked_linear(csr(x, mask), None, weight, bias, 2.5, **options), expected, **close)

    def test_leading_dimensions(self):
        x, mask, weight = draw(0, 2, 3, 5), draw_mask(0, 2, 3, 5), draw(1, 4, 5)
        out = masked_linear(x, mask, weight, K=2.0)
        torch.testing.assert_close(out[1], masked_linear(x[1], mask[1], weight, K=2.0))

    def test_an_empty_instance_gives_the_bias(self):
        bias = torch.tensor([1.0, -2.0])
        assert torch.equal(masked_linear(torch.full((1, 3), NAN), None, torch.randn(2, 3), bias, 2.0)[0], bias)

    def test_gradients(self):
        mask, center = draw_mask(0, 3, 4), draw(9, 4)
        inputs = tuple(draw(seed, *shape).requires_grad_() for seed, shape in enumerate([(3, 4), (2, 4), (2,)]))
        function = lambda x, weight, bias: masked_linear(x, mask, weight, bias, 2.5, center=center)  # noqa: E731
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs, fast_mode=True)

    def test_autocast_multiplies_in_bfloat16(self):
        x, mask, weight = draw(0, 64, 700).float(), draw_mask(0, 64, 700), draw(1, 8, 700).float()
        expected = masked_linear(x, mask, weight, K=300.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = masked_linear(x, mask, weight, torch.zeros(8), 300.0)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, atol=0.3, rtol=0.05)


class TestSparse:
    def pattern(self, seed, rows=6, features=8):
        x, mask = draw(seed, rows, features), draw_mask(seed, rows, features, rate=0.4)
        mask[2] = False
        return x, mask, nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)), mask.nonzero()[:, 1]

    @pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("index", [torch.int32, torch.int64])
    def test_sparse_linear_and_its_gradients_equal_the_dense_path(self, power, index):
        x, mask, crow, cols = self.pattern(0)
        weight, bias = draw(1, 8, 3).requires_grad_(), draw(2, 3).requires_grad_()
        values = x[mask].clone().requires_grad_()
        out = sparse_linear(crow.to(index), cols.to(index), values, weight, bias, 2.5, power=power)
        dense_x = x.clone().requires_grad_()
        expected = masked_linear(dense_x, mask, weight.t(), bias, 2.5, power=power)
        torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
        found = torch.autograd.grad(out.square().sum(), [values, weight, bias])
        wanted = torch.autograd.grad(expected.square().sum(), [dense_x, weight, bias])
        torch.testing.assert_close(found[0], wanted[0][mask], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(found[1:], wanted[1:], atol=1e-10, rtol=1e-10)

    def test_sparse_linear_gradients_of_both_orders(self):
        x, mask, crow, cols = self.pattern(3, rows=4, features=4)
        inputs = (x[mask].clone().requires_grad_(), draw(1, 4, 2).requires_grad_(), draw(2, 2).requires_grad_())
        function = lambda values, weight, bias: sparse_linear(crow, cols, values, weight, bias, 2.5)  # noqa: E731
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs, fast_mode=True)

    def test_order_within_a_row_does_not_matter(self):
        crow = torch.tensor([0, 3])
        weight = draw(0, 5, 2)
        one = sparse_linear(crow, torch.tensor([0, 2, 4]), torch.tensor([1.0, 2.0, 3.0]).double(), weight, K=2.0)
        other = sparse_linear(crow, torch.tensor([4, 0, 2]), torch.tensor([3.0, 1.0, 2.0]).double(), weight, K=2.0)
        torch.testing.assert_close(one, other)

    def test_given_counts_replace_the_stored_ones(self):
        crow, cols = torch.tensor([0, 2]), torch.tensor([0, 1])
        out = sparse_linear(crow, cols, torch.ones(2), torch.ones(4, 1), K=3.0, count=torch.tensor([6.0]))
        assert out.item() == 1.0

    @pytest.mark.parametrize("rising", [True, False])
    def test_sampled_decode_and_its_gradients_equal_the_full_product(self, rising):
        generator = torch.Generator().manual_seed(0)
        rows, cols = torch.randint(3, (8,), generator=generator), torch.randint(4, (8,), generator=generator)
        rows = rows.sort().values if rising else rows
        inputs = tuple(draw(seed, *shape).requires_grad_() for seed, shape in enumerate([(3, 2), (4, 2), (4,)]))
        sampled = sampled_decode(*inputs, rows, cols)
        full = nn.functional.linear(*inputs)[rows, cols]
        torch.testing.assert_close(sampled, full, atol=1e-12, rtol=1e-12)
        for found, wanted in zip(
            torch.autograd.grad(sampled.square().sum(), inputs),
            torch.autograd.grad(full.square().sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
        function = lambda hidden, weight, bias: sampled_decode(hidden, weight, bias, rows, cols)  # noqa: E731
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs, fast_mode=True)

    def test_autoencoder_step_on_observed_cells_equals_the_dense_masked_one(self):
        x, mask, crow, cols = self.pattern(5)
        rows = mask.nonzero()[:, 0]
        encoder, decoder = draw(1, 8, 4).requires_grad_(), draw(2, 8, 4).requires_grad_()

        hidden = torch.sigmoid(sparse_linear(crow, cols, x[mask], encoder, K=3.0))
        loss = (sampled_decode(hidden, decoder, None, rows, cols) - x[mask]).square().sum()
        dense_hidden = torch.sigmoid(masked_linear(x, mask, encoder.t(), K=3.0))
        dense_loss = masked_mse(dense_hidden @ decoder.t(), x, mask, reduction="sum")
        torch.testing.assert_close(loss, dense_loss, atol=1e-10, rtol=1e-10)
        for found, wanted in zip(
            torch.autograd.grad(loss, [encoder, decoder]),
            torch.autograd.grad(dense_loss, [encoder, decoder]),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)

    def test_half_precision_goes_through_the_gathered_path(self):
        hidden, weight = draw(0, 5, 3).bfloat16(), draw(1, 7, 3).bfloat16()
        rows, cols = torch.arange(5), torch.tensor([6, 0, 3, 3, 1])
        out = sampled_decode(hidden, weight, None, rows, cols)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), (hidden.float() @ weight.float().t())[rows, cols], atol=0.05, rtol=0.05)

    def test_nothing_stored(self):
        crow, cols, values = torch.zeros(4, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0)
        assert torch.equal(sparse_linear(crow, cols, values, torch.ones(2, 3), torch.ones(3), 1.0), torch.ones(3, 3))
        assert sampled_decode(torch.ones(3, 2), torch.ones(4, 2), None, cols, cols).shape == (0,)


def partial_convolution_by_hand(x, mask, weight, bias, stride, padding, dilation, groups):
    """Window form, one output at a time, over entries; padding is not observed."""
    x, mask = (nn.functional.pad(part, [padding] * 4) for part in (torch.where(mask, x, 0), mask.double()))
    outputs, per_group, height, width = weight.shape
    rows = (x.shape[2] - dilation * (height - 1) - 1) // stride + 1
    columns = (x.shape[3] - dilation * (width - 1) - 1) // stride + 1
    out = torch.zeros(len(x), outputs, rows, columns, dtype=x.dtype)
    for n in range(len(x)):
        for o in range(outputs):
            first = (o // (outputs // groups)) * per_group
            for r in range(rows):
                for c in range(columns):
                    window = (
                        n,
                        slice(first, first + per_group),
                        slice(r * stride, r * stride + dilation * (height - 1) + 1, dilation),
                        slice(c * stride, c * stride + dilation * (width - 1) + 1, dilation),
                    )
                    count = mask[window].sum()
                    if count:
                        ratio = weight[o].numel() / count
                        out[n, o, r, c] = (x[window] * weight[o]).sum() * ratio + (0 if bias is None else bias[o])
    return out


class TestConvolution:
    @pytest.mark.parametrize(
        ("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 1, 1, 1), (1, 2, 2, 1), (1, 1, 1, 2)]
    )
    def test_window_form_equals_partial_convolution_by_hand(self, stride, padding, dilation, groups):
        x, mask = draw(0, 2, 4, 5, 6), draw_mask(0, 2, 4, 5, 6, rate=0.3)
        weight, bias = draw(1, 6, 4 // groups, 3, 2), draw(2, 6)
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        out, mask_out = masked_conv2d(x, mask, weight, bias, **options)
        expected = partial_convolution_by_hand(x, mask, weight, bias, **options)
        torch.testing.assert_close(out, expected)
        assert torch.equal(out == 0, ~mask_out.expand_as(out))

    def test_full_mask_is_the_plain_convolution_in_the_interior(self):
        x, weight, bias = draw(0, 2, 3, 8, 9), draw(1, 5, 3, 3, 3), draw(2, 5)
        full = torch.ones(2, 8, 9)
        out, mask_out = masked_conv2d(x, full, weight, bias)
        torch.testing.assert_close(out, nn.functional.conv2d(x, weight, bias))
        assert mask_out.all()
        padded = masked_conv2d(x, full, weight, bias, padding=1)[0]
        plain = nn.functional.conv2d(x, weight, bias, padding=1)
        torch.testing.assert_close(padded[:, :, 1:-1, 1:-1], plain[:, :, 1:-1, 1:-1])
        torch.testing.assert_close(masked_conv2d(x, full, weight, bias, padding="same")[0], padded)

    def test_a_mask_of_pixels_equals_the_same_mask_for_every_channel(self):
        x, pixels, weight = draw(0, 2, 4, 5, 6), draw_mask(1, 2, 1, 5, 6), draw(1, 6, 2, 2, 2)
        one, one_mask = masked_conv2d(x, pixels, weight, groups=2)
        many, many_mask = masked_conv2d(x, pixels.expand(2, 4, 5, 6), weight, groups=2)
        torch.testing.assert_close(one, many)
        assert one_mask.shape[1] == 1
        assert torch.equal(one_mask.expand_as(many_mask), many_mask)
        assert torch.equal(one, masked_conv2d(x, pixels[:, 0], weight, groups=2)[0])

    def test_instance_form_is_the_convolution_of_normalized_input(self):
        x, mask, weight, bias = draw(0, 3, 2, 5, 5), draw_mask(0, 3, 2, 5, 5), draw(1, 4, 2, 3, 3), draw(2, 4)
        mask[1] = False
        out, _ = masked_conv2d(x, mask, weight, bias, padding=1, form="instance", K=20.0)
        normalized = sparsity_normalize(x, mask, 20.0, dim=(1, 2, 3))
        torch.testing.assert_close(out, nn.functional.conv2d(normalized, weight, bias, padding=1))

    def test_one_dimension_equals_two_with_a_height_of_one(self):
        x, mask, weight = draw(0, 2, 3, 9), draw_mask(0, 2, 3, 9), draw(1, 4, 3, 3)
        for form in ("window", "instance"):
            line, line_mask = masked_conv1d(holes(x, mask), None, weight, draw(2, 4), stride=2, form=form, K=9.0)
            plane, plane_mask = masked_conv2d(
                x[:, :, None], mask[:, :, None], weight[:, :, None], draw(2, 4), stride=(1, 2), form=form, K=9.0
            )
            torch.testing.assert_close(line, plane[:, :, 0])
            assert torch.equal(line_mask, plane_mask[:, :, 0])

    @pytest.mark.parametrize("form", ["window", "instance"])
    def test_gradients_and_garbage(self, form):
        x, mask = draw(0, 1, 2, 3, 3), draw_mask(0, 1, 2, 3, 3)
        weight = draw(1, 1, 2, 2, 2).requires_grad_()
        function = lambda x, weight: masked_conv2d(x, mask, weight, form=form, K=9.0)[0]  # noqa: E731
        assert gradcheck(function, (x.clone().requires_grad_(), weight))
        dirty = x.masked_fill(~mask, math.inf).requires_grad_()
        out = function(dirty, weight)
        assert torch.equal(out, function(x, weight))
        out.sum().backward()
        assert (dirty.grad[~mask] == 0).all()

    def test_window_counts_are_exact_under_autocast(self):
        x, weight = torch.ones(1, 64, 8, 8), torch.ones(2, 64, 5, 5)
        mask = draw_mask(0, 1, 64, 8, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, _ = masked_conv2d(x, mask, weight)
        torch.testing.assert_close(out.float(), torch.full_like(out, 1600.0).float(), rtol=0.01, atol=0)


class TestMaskedMse:
    def test_averages_over_observed_targets(self):
        prediction, target, mask = draw(0, 5, 4), draw(1, 5, 4), draw_mask(0, 5, 4)
        expected = ((prediction - target)[mask] ** 2).mean()
        torch.testing.assert_close(masked_mse(prediction, target, mask), expected)
        torch.testing.assert_close(masked_mse(prediction, holes(target, mask)), expected)
        torch.testing.assert_close(masked_mse(prediction, target, mask, reduction="sum"), expected * mask.sum())
        assert masked_mse(prediction, target, mask, reduction="none")[~mask].eq(0).all()

    def test_neither_nan_nor_gradient_leaks(self):
        prediction = torch.tensor([1.0, NAN, 2.0], requires_grad=True)
        loss = masked_mse(prediction, torch.tensor([3.0, NAN, NAN]))
        loss.backward()
        assert loss.item() == 4.0
        assert prediction.grad.tolist() == [-4.0, 0.0, 0.0]

    def test_nothing_observed_is_zero(self):
        assert masked_mse(torch.ones(3), torch.full((3,), NAN)) == 0


class TestTransforms:
    def test_vmap_over_instances_equals_the_batch(self):
        x, mask, weight = draw(0, 5, 6), draw_mask(0, 5, 6), draw(1, 3, 6)
        groups = torch.arange(6) // 2

        def one(x, mask):
            return masked_linear(x, mask, weight, K=2.0, groups=groups)

        torch.testing.assert_close(torch.vmap(one)(x, mask), masked_linear(x, mask, weight, K=2.0, groups=groups))

    def test_per_instance_gradients_with_torch_func(self):
        x, mask, weight = draw(0, 5, 6), draw_mask(0, 5, 6), draw(1, 1, 6)
        jacobian = torch.vmap(torch.func.grad(lambda w, x, m: masked_linear(x, m, w, K=2.0).sum()), (None, 0, 0))
        torch.testing.assert_close(jacobian(weight, x, mask)[:, 0], sparsity_normalize(x, mask, 2.0))

    def test_sampled_decode_under_vmap(self):
        hidden, weight = draw(0, 3, 4, 2), draw(1, 5, 2)
        rows, cols = torch.tensor([0, 3, 3]), torch.tensor([4, 0, 1])
        found = torch.vmap(lambda h: sampled_decode(h, weight, None, rows, cols))(hidden)
        torch.testing.assert_close(found, torch.stack([(h @ weight.t())[rows, cols] for h in hidden]))

    def test_compiles_without_graph_breaks(self, unchecked):
        x, mask, weight = draw(0, 5, 6), draw_mask(0, 5, 6), draw(1, 3, 6)
        rows, cols = mask.nonzero(as_tuple=True)

        def step(x, mask, weight):
            hidden = masked_linear(x, mask, weight, K=2.0, center=0.5, tau=1.0)
            return sampled_decode(hidden, weight.t(), None, rows, cols)

        compiled = torch.compile(step, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, mask, weight), step(x, mask, weight))


class TestBadInput:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (
                lambda: sparsity_normalize(torch.ones(2, 3), torch.ones(3, 2), 1.0),
                r"mask has shape \(3, 2\) but x has \(2, 3\)",
            ),
            (
                lambda: sparsity_normalize(torch.ones(2), torch.ones(2, 2), 1.0),
                r"mask has shape \(2, 2\) but x has \(2,\)",
            ),
            (
                lambda: sparsity_normalize(torch.ones(1, 2), torch.tensor([[1.0, 0.5]]), 1.0),
                "mask is 0.5 at row 0, column 1",
            ),
            (
                lambda: sparsity_normalize(torch.ones(1, 2), torch.tensor([[1.0, NAN]]), 1.0, weighted=True),
                "mask is nan at row 0, column 1",
            ),
            (
                lambda: sparsity_normalize(torch.ones(1, 2), torch.tensor([[2, 0]]), 1.0),
                "mask is 2 at row 0, column 0",
            ),
            (
                lambda: sparsity_normalize(torch.tensor([[1.0, 1.0], [1.0, NAN]]), torch.ones(2, 2), 1.0),
                "x is NaN at row 1, column 1 although mask says observed",
            ),
            (
                lambda: sparsity_normalize(torch.tensor([[1.0, NAN, -math.inf]]), K=1.0),
                "x is infinite at row 0, column 2",
            ),
            (
                lambda: sparsity_normalize(torch.full((1, 1, 2), math.inf), torch.ones(2), 1.0),
                r"x is infinite at index \(0, 0, 0\)",
            ),
            (lambda: sparsity_normalize(torch.ones(1, 2)), "K is missing"),
            (lambda: sparsity_normalize(torch.ones(1, 2), K=0), "K is 0; it must be positive"),
            (lambda: sparsity_normalize(torch.ones(1, 2), K=torch.tensor(-2.0)), "K is -2; it must be positive"),
            (lambda: sparsity_normalize(torch.ones(1, 2), K=NAN), "K is nan"),
            (lambda: sparsity_normalize(torch.ones(1, 2), K=1.0, min_count=0), "min_count is 0"),
            (lambda: sparsity_normalize(torch.ones(1, 2), K=1.0, tau=-1), "tau is -1"),
            (lambda: sparsity_normalize(torch.ones(1, 2), K=1.0, center=torch.ones(3)), "center: expected 2 features"),
            (
                lambda: sparsity_normalize(torch.ones(1, 2), K=1.0, importance=torch.ones(3)),
                "importance: expected 2 features, got 3",
            ),
            (
                lambda: sparsity_normalize(torch.ones(1, 2), K=1.0, groups=torch.tensor([0])),
                r"groups has shape \(1,\)",
            ),
            (
                lambda: sparsity_normalize(torch.ones(1, 2), K=1.0, groups=torch.tensor([0, 2])),
                r"groups holds 2; group numbers must lie in 0..1",
            ),
            (
                lambda: sparsity_normalize(torch.ones(1, 2), K=1.0, groups=torch.ones(2)),
                "groups has dtype torch.float32",
            ),
            (lambda: sparsity_normalize(torch.ones(1, 2, dtype=torch.long), K=1.0), "x has dtype torch.int64"),
            (
                lambda: sparsity_normalize(torch.eye(2).to_sparse_csr(), torch.ones(2, 2), 1.0),
                "mask is not for a sparse x",
            ),
            (lambda: sparsity_normalize(torch.eye(2).to_sparse(), K=1.0), "layout torch.sparse_coo"),
            (lambda: sparsity_normalize(np.ones((2, 2)), K=1.0), "x is a ndarray; give a torch tensor"),
            (lambda: observed_count([[1.0]]), "x is a list; give a torch tensor"),
            (lambda: masked_linear(np.ones((2, 2)), None, torch.ones(1, 2), K=1.0), "x is a ndarray"),
            (
                lambda: sparsity_normalize(scipy.sparse.csr_array([[0.0, NAN]]), K=1.0),
                "x is NaN at row 0, column 1 although it is stored",
            ),
            (
                lambda: sparsity_normalize(torch.tensor([[0.0, 0.0], [3.0, math.inf]]).to_sparse_csr(), K=1.0),
                "x is infinite at row 1, column 1",
            ),
            (lambda: sparsity_normalize(scipy.sparse.csc_array(np.eye(2)), K=1.0), "format csc"),
            (
                lambda: sparsity_normalize(
                    scipy.sparse.csr_array((np.ones(4), [0, 2, 1, 2], [0, 1, 4]), shape=(2, 3)), K=1.0
                ),
                "x stores row 1, column 2 more than once",
            ),
            (lambda: mean_observed_count(torch.zeros(3)), "no entry is observed in any of the 3 instances"),
            (lambda: sparsity_scale(torch.ones(2), K=math.inf), "K is inf"),
            (lambda: masked_linear(torch.ones(1, 39), None, torch.ones(2, 40), K=1.0), "expected 40 features, got 39"),
            (
                lambda: masked_linear(torch.ones(2, 3).to_sparse_csr(), None, torch.ones(2, 4), K=1.0),
                "expected 4 features, got 3",
            ),
            (
                lambda: sparse_linear(torch.tensor([0, 2]), torch.tensor([0]), torch.ones(1), torch.ones(2, 1), K=1.0),
                "crow does not fit cols",
            ),
            (
                lambda: sparse_linear(torch.tensor([0, 1]), torch.tensor([5]), torch.ones(1), torch.ones(2, 1), K=1.0),
                "cols holds 5; columns must lie in 0..1",
            ),
            (
                lambda: sampled_decode(torch.ones(2, 1), torch.ones(3, 1), None, torch.tensor([2]), torch.tensor([0])),
                "rows holds 2; it must lie in 0..1",
            ),
            (
                lambda: sampled_decode(torch.ones(2, 1), torch.ones(3, 1), None, torch.tensor([1]), torch.tensor([-1])),
                "cols holds -1",
            ),
            (
                lambda: sampled_decode(
                    torch.ones(2, 1), torch.ones(3, 1), None, torch.tensor([0, 1]), torch.tensor([0])
                ),
                "rows has 2 entries but cols has 1",
            ),
            (lambda: masked_conv2d(torch.ones(3, 4, 4), None, torch.ones(2, 3, 2, 2)), "give .batch, channels, height"),
            (lambda: masked_conv1d(torch.ones(1, 2, 4), None, torch.ones(2, 3, 2)), "expected 3 channels, got 2"),
            (
                lambda: masked_conv2d(torch.ones(1, 3, 4, 4), None, torch.ones(2, 3, 2, 2), form="instance"),
                "K is missing",
            ),
            (lambda: masked_mse(torch.ones(2), torch.ones(3)), r"prediction has shape \(2,\) but target has \(3,\)"),
        ],
    )
    def test_message_names_the_place_and_the_remedy(self, unchecked, call, message):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert isinstance(caught.value, ValueError)
        assert "\n" not in str(caught.value)

    def test_unchecked_values_that_are_observed_are_not_hidden(self):
        x, mask = torch.tensor([[1.0, math.inf, NAN, NAN]]), torch.tensor([[1, 1, 1, 0]])
        assert sparsity_normalize(x, K=1.0, validate=False).isinf().tolist() == [[False, True, False, False]]
        for center in (None, 1.0):
            out = sparsity_normalize(x, mask, 3.0, center=center, validate=False)
            assert out.isfinite().tolist() == [[True, False, False, True]]

    def test_large_finite_values_are_not_taken_for_infinite(self):
        x = torch.full((1, 4), 3e38)
        assert torch.equal(sparsity_normalize(x, K=4.0), x)

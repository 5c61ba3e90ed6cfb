"""What the theory says of expected outputs, and the experiment in closed form that it was made for."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from scipy import integrate
from sklearn.linear_model import Ridge
from torch import nn

from sparsity_norm.ampute import ampute
from sparsity_norm.audit import vsp_report
from sparsity_norm.functional import observe, sparsity_normalize
from sparsity_norm.impute import make_transformer


def theorem_a(S, mean_x, mean_w, mean_b, widths, a, c):
    """Expected output of an affine net whose first layer sees S observed entries' worth of input."""
    expected = a * (mean_w[0] * mean_x * S + mean_b[0]) + c
    for layer in range(1, len(mean_w)):
        expected = a * (mean_w[layer] * widths[layer] * expected + mean_b[layer]) + c
    return expected


class TestTheoremA:
    A, C, MEAN_X, K = 0.7, 0.2, 1.3, 14.0
    MEAN_W, MEAN_B = (0.05, 0.11, 0.3), (0.1, -0.2, 0.4)

    def outputs(self, widths, s, power, draws=5000):
        """Outputs over random weights, features and masks with s entries observed; a mean over units is a mean."""
        generator = torch.Generator().manual_seed(100 * len(widths) + s)

        def normal(mean, sd, *shape):
            return mean + sd * torch.randn(*shape, dtype=torch.float64, generator=generator)

        x = normal(self.MEAN_X, 0.5, draws, widths[0])
        order = torch.rand(draws, widths[0], generator=generator).argsort(1)
        h = sparsity_normalize(x, order < s, self.K, power=power)
        for layer, (size, width) in enumerate(pairwise(widths)):
            weight = normal(self.MEAN_W[layer], 0.2, draws, width, size)
            bias = normal(self.MEAN_B[layer], 0.1, draws, width)
            h = self.A * (torch.einsum("nij,nj->ni", weight, h) + bias) + self.C
        return h.mean(1)

    @pytest.mark.parametrize("widths", [(30, 4), (30, 8, 3), (30, 8, 5, 1)])
    @pytest.mark.parametrize("s", [5, 30])
    @pytest.mark.parametrize(("power", "free_of_s"), [(0, False), (1, True)])
    def test_recursion_holds_within_four_standard_errors(self, widths, s, power, free_of_s):
        out = self.outputs(widths, s, power)
        depth = len(widths) - 1
        expected = theorem_a(
            self.K if free_of_s else s, self.MEAN_X, self.MEAN_W[:depth], self.MEAN_B, widths, self.A, self.C
        )
        error = out.std() / len(out) ** 0.5
        assert abs(out.mean() - expected) < 4 * error
        # The test could fail: the standard error is small beside what the count does to zero imputation.
        if depth == 3 and not free_of_s:
            assert abs(expected - theorem_a(35 - s, self.MEAN_X, self.MEAN_W, self.MEAN_B, widths, self.A, self.C)) > (
                10 * error
            )

    def test_slope_in_the_count_is_the_product_of_the_formula(self):
        widths = (30, 8, 5, 1)
        values = [theorem_a(s, self.MEAN_X, self.MEAN_W, self.MEAN_B, widths, self.A, self.C) for s in (10, 11)]
        slope = self.MEAN_X * self.A**3 * np.prod(self.MEAN_W) * 8 * 5
        np.testing.assert_allclose(values[1] - values[0], slope, rtol=1e-12)


class TestTheoremB:
    def test_a_relu_net_drifts_with_the_count_and_normalized_it_does_not(self):
        generator = torch.Generator().manual_seed(0)
        draws, n0 = 4000, 40
        x = 1 + 0.5 * torch.randn(draws, n0, generator=generator)
        weight = 0.05 + 0.1 * torch.randn(draws, 16, n0, generator=generator)
        order = torch.rand(draws, n0, generator=generator).argsort(1)
        means = {
            power: [
                torch.einsum("nij,nj->ni", weight, sparsity_normalize(x, order < s, 20.0, power=power)).relu().mean()
                for s in (5, 10, 20, 40)
            ]
            for power in (0, 1)
        }
        assert all(later > earlier for earlier, later in pairwise(means[0]))
        assert means[0][-1] > 3 * means[0][0]
        assert max(means[1]) < 1.2 * min(means[1])


class TestFirstPreactivation:
    N0, K = 8, 3.0

    def enumerated(self, w, x, s, power):
        """Mean and variance of w . h over all C(n0, s) observed sets."""
        masks = torch.zeros(len(list(combinations(range(self.N0), s))), self.N0, dtype=torch.bool)
        for row, observed in enumerate(combinations(range(self.N0), s)):
            masks[row, list(observed)] = True
        products = sparsity_normalize(x.expand(len(masks), -1), masks, self.K, power=power) @ w
        return products.mean(), products.var(correction=0)

    @pytest.mark.parametrize("s", range(1, 9))
    def test_mean_and_variance_formulas_are_exact(self, s):
        w = torch.randn(self.N0, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
        mean_x = 1.7
        x = torch.full((self.N0,), mean_x, dtype=torch.float64)
        spread = s * mean_x**2 * (1 - s / self.N0) * w.var(correction=1)
        for power in (0.0, 0.5, 1.0):
            scale = (self.K / s) ** power
            mean, variance = self.enumerated(w, x, s, power)
            torch.testing.assert_close(mean, scale * s * w.mean() * mean_x, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(variance, scale**2 * spread, rtol=1e-10, atol=1e-12)

    def test_variance_with_random_features(self):
        """The sd_x term: enumerate the sets, and two-point features of mean mu and variance sd^2, exactly."""
        n0, s, mu, sd, K = 4, 2, 0.7, 1.3, 2.5
        w = torch.tensor([0.5, -1.0, 2.0, 0.3], dtype=torch.float64)
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * n0)
        products = torch.cat(
            [
                sparsity_normalize(
                    mu + sd * signs, torch.isin(torch.arange(n0), torch.tensor(chosen)).expand(len(signs), n0), K
                )
                @ w
                for chosen in combinations(range(n0), s)
            ]
        )
        expected = K**2 / s * (sd**2 * w.square().mean() + mu**2 * (1 - s / n0) * w.var(correction=1))
        torch.testing.assert_close(products.var(correction=0), expected)

    def test_the_square_root_keeps_the_second_moment_where_weights_have_mean_zero(self):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(100_000, self.N0, dtype=torch.float64, generator=generator)
        second = [
            (
                weight
                * sparsity_normalize(torch.ones(1, self.N0).double(), (torch.arange(self.N0) < s)[None], 3.0, power=0.5)
            )
            .sum(1)
            .square()
            .mean()
            for s in (1, 4, 8)
        ]
        torch.testing.assert_close(torch.stack(second), torch.full((3,), 3.0).double(), rtol=0.03, atol=0)


def latent_level(seed):
    """E1: every feature is 3 + z + noise; a row's rate of observation is its own; predict z."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=4000)
    # A row with nothing observed is predicted by the bias alone, whatever the method; it would only add noise.
    x, mask = ampute(3 + z[:, None] + rng.normal(size=(4000, 50)), 0.05, 1.0, random_state=rng, min_observed=1)
    return x, mask.sum(1), z


class TestLatentLevel:
    METHODS = ("zero", "sqrt", "zero+mask", "mean", "sn", "sn-center")

    @pytest.mark.parametrize("seed", range(5))
    def test_normalization_comes_close_to_the_bayes_predictor(self, seed):
        x, count, z = latent_level(seed)
        train, test = slice(2000), slice(2000, None)
        rmse, drift = {}, {}
        for method in self.METHODS:
            transformer = make_transformer(method).fit(x[train])
            model = Ridge(1.0).fit(transformer.transform(x[train]), z[train])
            predicted = model.predict(transformer.transform(x[test]))
            rmse[method] = np.sqrt(np.mean((predicted - z[test]) ** 2))
            if method in ("zero", "sn"):
                drift[method] = vsp_report(predicted, count[test], z[test], n_resamples=50)
        bayes = np.sqrt(np.mean((np.nansum(x[test] - 3, axis=1) / (count[test] + 1) - z[test]) ** 2))

        assert rmse["sn"] < 1.15 * bayes
        assert rmse["sn-center"] < 1.15 * bayes
        assert rmse["sn"] < 0.62 * rmse["mean"]
        assert rmse["mean"] < rmse["sqrt"] < rmse["zero"]
        assert rmse["zero+mask"] < rmse["sqrt"]
        assert drift["zero"].pearson.value > 0.7
        assert drift["zero"].verdict == "biased"
        assert abs(drift["sn"].pearson.value) < 0.05
        assert drift["sn"].verdict == "unbiased"

    def test_bayes_predictor_is_the_shrunken_mean(self):
        """tau = noise variance / signal variance: where K, tau and the weights come from in this experiment."""
        x, _, z = latent_level(0)
        values, _, counts = observe(torch.from_numpy(x), center=3.0)
        shrunk = (values / (counts + 1)).sum(1)
        normalized = sparsity_normalize(torch.from_numpy(x), K=50.0, center=3.0, tau=1.0).sum(1) / 50
        torch.testing.assert_close(normalized, shrunk)
        errors = {
            tau: (
                (sparsity_normalize(torch.from_numpy(x), K=1.0, center=3.0, tau=tau).sum(1) - torch.from_numpy(z)) ** 2
            )
            .mean()
            .item()
            for tau in (0.0, 0.5, 1.0, 2.0, 4.0)
        }
        assert min(errors, key=errors.get) == 1.0
        # And its error is E[1 / (1 + s)] in closed form: with rate r, E[1/(1+s)] = (1 - (1-r)^51) / (51 r).
        closed = integrate.quad(lambda r: (1 - (1 - r) ** 51) / (51 * r), 0.05, 1.0)[0] / 0.95
        np.testing.assert_allclose(errors[1.0], closed, rtol=0.1)


def test_sigmoid_autoencoder_input_scale_keeps_units_out_of_saturation():
    """Dividing by s alone shrinks inputs by K: the constant is what keeps the layer's scale that of the data."""
    x = torch.full((4, 100), 3.0)
    mask = torch.arange(100).expand(4, 100) < torch.tensor([[10], [20], [40], [80]])
    layer = nn.Linear(100, 1, bias=False)
    nn.init.constant_(layer.weight, 0.01)
    with torch.no_grad():
        means = layer(sparsity_normalize(x, mask, 37.5))
    torch.testing.assert_close(means, torch.full((4, 1), 0.01 * 37.5 * 3))

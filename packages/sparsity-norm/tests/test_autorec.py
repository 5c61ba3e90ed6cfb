from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shared_core.errors import InputError
from shared_core.runs import load_tree, save_tree
from sparsity_norm import autorec
from sparsity_norm.autorec import AutoRec, AutoRecTrainer, SparseRows, batch_gradients, choose_path

ACTIVATIONS = ["identity", "sigmoid", "tanh", "relu"]


def random_table(rows, columns, density, seed):
    """Ratings 1..5, NaN where not observed."""
    generator = np.random.default_rng(seed)
    table = generator.integers(1, 6, (rows, columns)).astype(np.float64)
    table[generator.random((rows, columns)) > density] = np.nan
    return torch.from_numpy(table)


def sparse_rows(table, targets=None, dtype=torch.float64):
    observed = ~table.isnan()
    indptr = nn.functional.pad(observed.sum(1).cumsum(0), (1, 0))
    values = table[observed]
    return SparseRows.of(
        indptr, observed.nonzero()[:, 1], values, None if targets is None else targets[observed], dtype=dtype
    )


def random_model(features, hidden, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    model = AutoRec(features, hidden, seed=generator, dtype=torch.float64, **options)
    with torch.no_grad():
        for bias in (model.encoder_bias, model.decoder_bias):
            bias.normal_(generator=generator)
    return model


def loss_by_autograd(model, table, reg, targets=None):
    """The objective of section 2.6 written down on the dense table."""
    observed = ~table.isnan()
    wanted = table if targets is None else targets
    error = torch.where(observed, model(table) - torch.where(observed, wanted, 0), 0)
    penalty = model.V.square().sum() + model.W.square().sum()
    return (0.5 * error.square().sum() + 0.5 * reg * penalty) / len(table)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 9),
    density=st.sampled_from([0.2, 0.6, 1.0]),
    f=st.sampled_from(ACTIVATIONS),
    g=st.sampled_from(ACTIVATIONS),
    power=st.sampled_from([0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
    residual=st.booleans(),
)
def test_both_paths_give_the_gradient_of_the_objective(rows, columns, density, f, g, power, seed, residual):
    table = random_table(rows, columns, density, seed)
    targets = table - 2.5 if residual else None
    sparse = sparse_rows(table, targets)
    model = random_model(columns, 3, seed, power=power, hidden_activation=f, output_activation=g)
    model.observed_mean.fill_(2.5)
    loss = loss_by_autograd(model, table, 0.7, targets)
    expected = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True)
    )
    for path in ("sparse", "dense"):
        found = batch_gradients(model, sparse, reg=0.7, path=path)
        torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-10, atol=1e-10)
        for name, gradient in expected.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-10, atol=1e-10)


def test_gradient_agrees_with_finite_differences():
    table = random_table(5, 6, 0.5, 1)
    table[2] = math.nan
    model = random_model(6, 3).fit_counts((~table.isnan()).sum(1))
    names, parameters = zip(*model.named_parameters(), strict=True)

    def objective(*values):
        return torch.func.functional_call(
            _Objective(model), {f"model.{name}": value for name, value in zip(names, values, strict=True)}, (table,)
        )

    assert torch.autograd.gradcheck(objective, parameters)


class _Objective(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, table):
        return loss_by_autograd(self.model, table, 0.3)


def test_values_that_are_not_observed_have_no_part_in_anything():
    table = random_table(6, 5, 0.6, 3)
    observed = ~table.isnan()
    model = random_model(5, 4).fit_counts(observed.sum(1))
    expected = torch.autograd.grad(loss_by_autograd(model, table, 0.1), list(model.parameters()))
    for junk in (0.0, 1e30, math.inf, math.nan):
        filled = torch.where(observed, table, junk)
        error = torch.where(observed, model(filled, observed) - torch.where(observed, filled, 0), 0)
        penalty = model.V.square().sum() + model.W.square().sum()
        loss = (0.5 * error.square().sum() + 0.05 * penalty) / 6
        for found, wanted in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
            assert torch.equal(found, wanted)


def test_linear_autorec_reaches_the_optimum_that_lbfgs_finds():
    table = random_table(6, 5, 0.7, 5)
    observed = ~table.isnan()
    values, mask = torch.where(observed, table, 0).numpy(), observed.numpy()
    reg, features = 0.4, 5
    counts = mask.sum(1)
    scaled = values * (counts[counts > 0].mean() / np.maximum(counts, 1))[:, None]

    def objective(flat):
        V, W = flat[:25].reshape(5, 5), flat[25:50].reshape(5, 5)
        mu, b = flat[50:55], flat[55:]
        codes = scaled @ V + mu
        error = (codes @ W + b - values) * mask
        delta = error @ W.T
        loss = 0.5 * (error**2).sum() + 0.5 * reg * (V**2).sum() + 0.5 * reg * (W**2).sum()
        gradient = np.concatenate(
            [(scaled.T @ delta + reg * V).ravel(), (codes.T @ error + reg * W).ravel(), delta.sum(0), error.sum(0)]
        )
        return loss / len(values), gradient / len(values)

    rows = sparse_rows(table)
    model = AutoRec(features, features, hidden_activation="identity", dtype=torch.float64).fit_counts(rows.counts)
    order = ("encoder_weight", "decoder_weight", "encoder_bias", "decoder_bias")

    def ours(flat):
        for name, part in zip(order, np.split(flat, [25, 50, 55]), strict=True):
            parameter = getattr(model, name)
            parameter.data.copy_(torch.from_numpy(part).reshape(parameter.shape))
        found = batch_gradients(model, rows, reg=reg)
        return float(found.loss), torch.cat([found.gradients[name].flatten() for name in order]).numpy()

    generator = np.random.default_rng(0)
    options = {"jac": True, "method": "L-BFGS-B", "options": {"maxiter": 2500, "ftol": 1e-14}}
    best = scipy.optimize.minimize(objective, generator.normal(0, 0.5, 60), **options)
    found = scipy.optimize.minimize(ours, generator.normal(0, 0.5, 60), **options)
    assert found.fun == pytest.approx(best.fun, rel=2e-3)
    assert objective_in_our_order(objective, found.x) == pytest.approx(found.fun, rel=1e-10)


def objective_in_our_order(objective, flat):
    """Our decoder weights are stored features first."""
    encoder, decoder, biases = np.split(flat, [25, 50])
    return objective(np.concatenate([encoder, decoder.reshape(5, 5).T.ravel(), biases]))[0]


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_a_step_is_one_of_adam_on_the_whole_objective(path):
    table = random_table(9, 6, 0.6, 8)
    rows = sparse_rows(table)
    model = AutoRec(6, 3, dtype=torch.float64, seed=4)
    reference = AutoRec(6, 3, dtype=torch.float64, seed=4).fit_counts(rows.counts)
    AutoRecTrainer(model, rows, reg=2.0, lr=0.05, batch_size=9, epochs=6, path=path).run()
    adam = torch.optim.Adam(reference.parameters(), lr=0.05)
    for _ in range(6):
        adam.zero_grad()
        loss_by_autograd(reference, table, 2.0).backward()
        adam.step()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_dense_sparse_and_csr_inputs_are_coded_alike(power):
    table = random_table(7, 6, 0.5, 2)
    table[3] = math.nan
    rows = sparse_rows(table)
    model = random_model(6, 4, power=power).fit_counts(rows.counts)
    expected = model.encode(table)
    torch.testing.assert_close(model.encode_rows(rows), expected, rtol=1e-12, atol=1e-12)
    csr = torch.sparse_csr_tensor(rows.indptr, rows.columns, rows.values, tuple(table.shape))
    torch.testing.assert_close(model.encode(csr), expected, rtol=1e-12, atol=1e-12)
    cells = sparse_rows(random_table(7, 6, 0.3, 9))
    every = model.decode(expected)
    at_cells = every[torch.repeat_interleave(cells.counts), cells.columns]
    torch.testing.assert_close(model.decode_cells(expected, cells), at_cells, rtol=1e-12, atol=1e-12)


def test_an_instance_without_entries_is_predicted_by_the_biases():
    model = random_model(4, 3).fit_counts(torch.tensor([2, 0, 4]))
    assert float(model.observed_mean) == 3.0
    expected = torch.sigmoid(model.encoder_bias) @ model.W + model.decoder_bias
    torch.testing.assert_close(model(torch.full((1, 4), math.nan, dtype=torch.float64))[0], expected)


def test_constant_ratings_are_summed_to_the_same_at_every_count():
    model = AutoRec(5, 1, hidden_activation="identity", dtype=torch.float64).fit_counts(torch.tensor([3]))
    with torch.no_grad():
        model.encoder_weight.fill_(1)
    table = torch.full((5, 5), 2.0, dtype=torch.float64).tril()
    table[table == 0] = math.nan
    torch.testing.assert_close(model.encode(table), torch.full((5, 1), 6.0, dtype=torch.float64))
    shrunk = AutoRec(5, 1, hidden_activation="identity", dtype=torch.float64, tau=2).fit_counts(torch.tensor([3]))
    torch.testing.assert_close(shrunk.input_scale(torch.tensor([0, 1, 4])), torch.tensor([1.5, 1.0, 0.5]).double())


def test_renaming_features_renames_predictions():
    table = random_table(4, 6, 0.6, 4)
    model = random_model(6, 3).fit_counts((~table.isnan()).sum(1))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    renamed = random_model(6, 3).fit_counts((~table.isnan()).sum(1))
    with torch.no_grad():
        renamed.encoder_weight.copy_(model.encoder_weight[order])
        renamed.decoder_weight.copy_(model.decoder_weight[order])
        renamed.decoder_bias.copy_(model.decoder_bias[order])
        renamed.encoder_bias.copy_(model.encoder_bias)
    torch.testing.assert_close(renamed(table[:, order]), model(table)[:, order])


def test_the_fitted_constant_goes_with_the_weights():
    model = random_model(3, 2).fit_counts(torch.tensor([1, 2]))
    other = random_model(3, 2, seed=9)
    other.load_state_dict(model.state_dict())
    x = random_table(2, 3, 0.8, 0)
    assert torch.equal(other(x), model(x))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_rows_are_cut_out_in_the_order_asked_for(seed):
    table = random_table(6, 4, 0.5, seed)
    chosen = torch.from_numpy(np.random.default_rng(seed).integers(0, 6, 5))
    expected = sparse_rows(table[chosen], table[chosen] * 2)
    found = sparse_rows(table, table * 2).select(chosen)
    for name in ("indptr", "columns", "values", "targets"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert found.targets is found.wanted


def test_kernels_for_other_devices_agree_with_the_fast_ones():
    rows = sparse_rows(random_table(8, 5, 0.4, 1))
    fast, order = autorec._transpose(rows, 5)
    slow, slow_order = autorec._transpose_by_sorting(rows, 5)
    for name in ("indptr", "columns"):
        assert torch.equal(getattr(fast, name).long(), getattr(slow, name).long())
    assert torch.equal(order.long(), slow_order.long())
    codes, table, bias = (torch.rand(n, dtype=torch.float64) for n in ((8, 3), (5, 3), (5,)))
    torch.testing.assert_close(
        autorec._gathered_products(rows, codes, table, bias, cells_at_once=3),
        autorec._cell_products(rows, codes, table, bias),
    )


def make_trainer(seed=0, dtype=torch.float64, **options):
    table = random_table(30, 12, 0.5, 7)
    held = torch.rand(table.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    train = torch.where(held, math.nan, table)
    held_out = torch.where(held, table, math.nan)
    options = {"lr": 0.02, "reg": 0.5, "batch_size": 8, "epochs": 9, "clip": (1, 5), **options}
    model = AutoRec(12, 4, dtype=dtype, seed=seed)
    return AutoRecTrainer(
        model, sparse_rows(train, dtype=dtype), validation=sparse_rows(held_out, dtype=dtype), seed=seed, **options
    )


def test_training_by_either_path_gives_the_same_model():
    sparse, dense = make_trainer(path="sparse", dropout=0.2), make_trainer(path="dense", dropout=0.2)
    assert sparse.path == "sparse"
    assert dense.path == "dense"
    for one, other in zip(sparse.run(), dense.run(), strict=True):
        assert one.train_rmse == pytest.approx(other.train_rmse, rel=1e-9)
        assert one.validation_rmse == pytest.approx(other.validation_rmse, rel=1e-9)
    for one, other in zip(sparse.model.parameters(), dense.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "schedule": "cosine", "path": "dense"}])
def test_a_run_that_is_taken_up_again_ends_bit_for_bit_as_one_without_a_break(tmp_path, options):
    unbroken = make_trainer(dtype=torch.float32, **options)
    reports = unbroken.run()
    broken = make_trainer(dtype=torch.float32, **options)
    first = [broken.run_epoch() for _ in range(4)]
    save_tree(tmp_path / "state.safetensors", broken.state())
    resumed = make_trainer(seed=0, dtype=torch.float32, **options)
    resumed.load_state(load_tree(tmp_path / "state.safetensors"))
    assert first + resumed.run() == reports
    for one, other in zip(unbroken.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_state_is_not_changed_by_training_on():
    trainer = make_trainer()
    trainer.run_epoch()
    state = trainer.state()
    weight, moment = state["model"]["encoder_weight"].clone(), state["adam"]["mean"]["encoder_weight"].clone()
    trainer.run_epoch()
    assert torch.equal(state["model"]["encoder_weight"], weight)
    assert torch.equal(state["adam"]["mean"]["encoder_weight"], moment)


def test_training_stops_without_progress_and_keeps_the_best_epoch():
    trainer = make_trainer(lr=0.3, epochs=200, patience=5)
    seen = []
    reports = trainer.run(seen.append)
    assert seen == reports
    errors = [report.validation_rmse for report in reports]
    best = int(np.argmin(errors)) + 1
    assert len(reports) == best + 5 < 200
    assert reports[-1].best_epoch == best
    codes = trainer.model.encode_rows(trainer.instances)
    predicted = trainer.model.decode_cells(codes, trainer.validation).clamp(1, 5)
    assert float((predicted - trainer.validation.values).square().mean().sqrt()) == pytest.approx(min(errors))


def test_fewer_epochs_than_the_schedule_is_laid_out_for():
    whole, part = make_trainer(schedule="cosine"), make_trainer(schedule="cosine")
    assert part.run(stop_after=3) == [whole.run_epoch() for _ in range(3)]


def test_the_error_reported_is_that_of_the_epoch():
    trainer = make_trainer(lr=1e-30, batch_size=1000)
    report = trainer.run_epoch()
    codes = trainer.model.encode_rows(trainer.instances)
    error = trainer.model.decode_cells(codes, trainer.instances) - trainer.instances.values
    assert report.train_rmse == pytest.approx(float(error.square().mean().sqrt()))


def test_instances_without_entries_do_not_thin_out_batches():
    table = random_table(6, 5, 0.8, 0)
    padded = torch.cat([table, torch.full((6, 5), math.nan, dtype=torch.float64)])
    models = []
    for instances in (table, padded):
        models.append(AutoRec(5, 3, dtype=torch.float64))
        AutoRecTrainer(models[-1], sparse_rows(instances), reg=1.0, batch_size=6, epochs=3).run()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reg": -1}, "reg: -1 must be"),
        ({"reg": math.nan}, "reg: nan"),
        ({"lr": 0}, "lr: 0 must be a positive"),
        ({"batch_size": 0}, "batch_size: 0 must be at least 1"),
        ({"epochs": 0}, "epochs: 0"),
        ({"patience": 0}, "patience: 0"),
        ({"dropout": 1.0}, "dropout: 1.0 must be at least 0 and below 1"),
        ({"schedule": "linear"}, "schedule: 'linear' is none of"),
        ({"path": "fast"}, "path: 'fast' is none of"),
    ],
)
def test_options_out_of_range_are_refused(unchecked, options, message):
    with pytest.raises(InputError, match=message):
        make_trainer(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 0}, "features: 0 is too small"),
        ({"hidden": 0}, "hidden: 0 is too small"),
        ({"power": -1}, "power: -1"),
        ({"tau": math.nan}, "tau: nan"),
        ({"hidden_activation": "swish"}, "hidden_activation: 'swish' is none of"),
        ({"output_activation": "swish"}, "output_activation: 'swish' is none of"),
    ],
)
def test_models_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        AutoRec(**{"features": 3, **options})


def test_input_that_does_not_fit_is_refused():
    model = AutoRec(3, 2).fit_counts(torch.tensor([2]))
    with pytest.raises(InputError, match="expected 3 features"):
        model(torch.ones(1, 4))
    with pytest.raises(InputError, match="mask has shape"):
        model(torch.ones(2, 3), torch.ones(5, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="row 0, column 1"):
        model(torch.tensor([[1.0, math.inf, 1.0]]))
    with pytest.raises(InputError, match="no training instance has an observed entry"):
        AutoRec(3, 2).fit_counts(torch.tensor([0, 0]))
    with pytest.raises(InputError, match="K is"):
        AutoRec(3, 2)(torch.ones(1, 3))
    with pytest.raises(InputError, match="column 3 does not exist; the model has 3"):
        AutoRecTrainer(model, SparseRows.of([0, 1], [3], [1.0]))


def test_divergence_is_reported_with_the_step_size():
    with pytest.raises(InputError, match=r"training diverged in epoch .* at lr=1e\+30; lower it"):
        make_trainer(lr=1e30, dtype=torch.float32).run()


def test_a_state_of_another_model_is_refused():
    state = make_trainer().state()
    other = AutoRecTrainer(AutoRec(7, 2), SparseRows.of([0, 1], [3], [1.0]))
    for wrong in (state, {}, {**state, "model": None}):
        with pytest.raises(InputError, match="state: it does not fit this training run"):
            other.load_state(wrong)


def test_the_path_is_chosen_by_density_and_size():
    options = {"itemsize": 4, "device": "cpu"}
    assert choose_path(100, 100, 300, **options) == "sparse"
    assert choose_path(100, 100, 9900, **options) == "dense"
    assert choose_path(100_000, 100_000, 9_900_000_000, **options) == "sparse"


def test_ranks_that_share_out_a_batch_take_the_steps_of_one(monkeypatch):
    alone = make_trainer(dropout=0.3)
    expected = alone.run()
    world, here = 3, threading.local()
    barrier, shares = threading.Barrier(world, timeout=60), {}

    def all_reduce(tensor):
        shares[here.rank] = tensor.clone()
        barrier.wait()
        tensor.copy_(torch.stack([shares[rank] for rank in range(world)]).sum(0))
        barrier.wait()

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(autorec, "_world", lambda: (here.rank, world))

    def train(rank):
        here.rank = rank
        trainer = make_trainer(dropout=0.3)
        return trainer.run(), trainer.model

    with ThreadPoolExecutor(world) as pool:
        results = list(pool.map(train, range(world)))
    for reports, model in results:
        for one, other in zip(reports, expected, strict=True):
            assert one.train_rmse == pytest.approx(other.train_rmse, rel=1e-9)
        for one, other in zip(model.parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)

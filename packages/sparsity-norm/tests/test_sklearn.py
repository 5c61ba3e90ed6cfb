from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from shared_core.errors import InputError
from shared_core.runs import save_tree
from sparsity_norm.functional import sparsity_normalize
from sparsity_norm.impute import METHODS, Method
from sparsity_norm.nn import SparsityNorm
from sparsity_norm.sklearn import SNClassifier, SNRegressor, SparsityNormalizer


def table(seed=0, rows=120, features=6, rate=0.6):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, features)) + 1
    y = x.mean(axis=1)
    x[rng.random(x.shape) > rate] = np.nan
    return x, y


def quick(kind=SNRegressor, **options):
    return kind(**{"hidden": (8,), "epochs": 4, "batch_size": 32, "random_state": 0, "device": "cpu", **options})


def labels(y):
    return np.where(y > 1, "high", "low")


# All checks that scikit-learn has for these kinds of estimators; none is left out. Enough epochs to pass its accuracy.
@parametrize_with_checks(
    [
        SparsityNormalizer(),
        SparsityNormalizer(center="column", tau=1.0),
        SNClassifier(hidden=(16,), lr=0.05, epochs=12, random_state=0, device="cpu"),
        SNRegressor(hidden=(16,), lr=0.05, epochs=12, random_state=0, device="cpu"),
    ]
)
def test_scikit_learn_checks(unchecked, estimator, check):
    check(estimator)


class TestSparsityNormalizer:
    @pytest.mark.parametrize(
        "options", [{}, {"power": 0.5, "tau": 1}, {"center": "column"}, {"center": "global", "K": 2.0}]
    )
    def test_is_the_function_with_the_fitted_constants(self, options):
        x, _ = table()
        x[3] = np.nan
        model = SparsityNormalizer(**options).fit(x)
        expected = sparsity_normalize(
            torch.from_numpy(x),
            K=model.K_,
            power=options.get("power", 1),
            tau=options.get("tau", 0),
            center=None if model.center_ is None else torch.from_numpy(model.center_),
        )
        np.testing.assert_allclose(model.transform(x), expected.numpy(), rtol=1e-14)
        assert pytest.approx(options.get("K", np.isfinite(x).sum(1)[np.isfinite(x).any(1)].mean())) == model.K_

    @pytest.mark.parametrize("build", [scipy.sparse.csr_matrix, scipy.sparse.csc_array, scipy.sparse.coo_array])
    def test_sparse_input_is_what_is_stored(self, build):
        x, _ = table()
        observed = np.isfinite(x)
        dense = SparsityNormalizer(center="column").fit(x)
        rows, columns = observed.nonzero()
        sparse = build(scipy.sparse.coo_array((x[observed], (rows, columns)), shape=x.shape))
        model = SparsityNormalizer(center="column").fit(sparse)
        assert pytest.approx(dense.K_) == model.K_
        out = model.transform(sparse)
        assert scipy.sparse.issparse(out)
        np.testing.assert_allclose(out.toarray(), dense.transform(x), rtol=1e-12, atol=1e-12)

    def test_frames_keep_their_names(self):
        x, _ = table()
        frame = pd.DataFrame(x, columns=list("abcdef"))
        model = SparsityNormalizer(add_mask=True).set_output(transform="pandas").fit(frame)
        out = model.transform(frame)
        assert list(out.columns) == [*"abcdef", *(f"{name}_observed" for name in "abcdef")]
        assert (out["a_observed"] == frame["a"].notna()).all()
        assert list(SparsityNormalizer().fit(frame).get_feature_names_out()) == list("abcdef")

    def test_float32_stays_float32(self):
        x = table()[0].astype(np.float32)
        assert SparsityNormalizer().fit_transform(x).dtype == np.float32

    def test_nonzero_masks_and_groups(self):
        x = np.array([[1.0, 0.0, 0.0, 2.0], [0.0, 1.0, 0.0, 0.0]])
        assert SparsityNormalizer(mask="nonzero").fit(x).K_ == 1.5
        x[1] = np.nan
        assert SparsityNormalizer(groups=[5, 5, 5, 9]).fit(x).K_ == 2
        assert SparsityNormalizer(groups=[5, 5, 5, 9], count_empty=True).fit(x).K_ == 1

    def test_in_a_pipeline_and_a_grid(self):
        x, y = table()
        grid = GridSearchCV(
            make_pipeline(SparsityNormalizer(center="column"), Ridge()),
            {"sparsitynormalizer__power": [0, 0.5, 1]},
            cv=3,
        ).fit(x, y)
        assert grid.best_params_["sparsitynormalizer__power"] in (0, 0.5, 1)
        assert clone(SparsityNormalizer(tau=2.0)).tau == 2

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: SparsityNormalizer(K=0).fit([[1.0]]), "K is 0; it must be positive"),
            (lambda: SparsityNormalizer(center="row").fit([[1.0]]), "center is 'row'"),
            (lambda: SparsityNormalizer().fit([[np.nan]]), "no entry is observed in any of the 1 training"),
            (lambda: SparsityNormalizer().fit([[np.inf]]), "infinity"),
            (lambda: SparsityNormalizer().fit([[1.0, 2.0]]).transform([[1.0]]), "expecting 2 features"),
            (lambda: SparsityNormalizer().fit(scipy.sparse.csr_array([[np.nan, 1.0]])), "x is NaN at row 0, column 0"),
            (
                lambda: SparsityNormalizer(add_mask=True).fit(np.eye(2)).transform(scipy.sparse.eye_array(2).tocsr()),
                "add_mask needs a dense table",
            ),
            (lambda: SparsityNormalizer(groups=[0]).fit(np.eye(2)), "groups has shape"),
        ],
    )
    def test_bad_input(self, unchecked, call, message):
        with pytest.raises(ValueError, match=message):
            call()

    def test_before_fit(self):
        with pytest.raises(NotFittedError):
            SparsityNormalizer().transform([[1.0]])


class TestTraining:
    @pytest.mark.parametrize("kind", [SNRegressor, SNClassifier])
    def test_same_seed_same_bits_and_global_state_untouched(self, kind):
        x, y = table()
        y = labels(y) if kind is SNClassifier else y
        torch.manual_seed(5)
        before = torch.get_rng_state()
        one = quick(kind, dropout=0.2, input_dropout=0.2, early_stopping=True).fit(x, y)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        other = quick(kind, dropout=0.2, input_dropout=0.2, early_stopping=True).fit(x, y)
        different = quick(kind, dropout=0.2, input_dropout=0.2, early_stopping=True, random_state=1).fit(x, y)
        assert torch.equal(one._raw(x), other._raw(x))
        assert not torch.equal(one._raw(x), different._raw(x))

    @pytest.mark.parametrize("method", list(METHODS))
    def test_every_method_trains_saves_and_predicts_what_was_never_seen(self, method, tmp_path):
        x, y = table()
        x[:, 5] = np.nan
        test = table(1, rows=20)[0]
        test[0] = np.nan
        model = quick(input=method).fit(x, y)
        predicted = model.predict(test)
        assert np.isfinite(predicted).all()
        model.save(tmp_path)
        assert np.array_equal(SNRegressor.load(tmp_path).predict(test), predicted)
        assert {path.name for path in tmp_path.iterdir()} == {"model.json", "model.safetensors"}

    @pytest.mark.parametrize("kind", [SNRegressor, SNClassifier])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"dropout": 0.3, "input_dropout": 0.2},
            {"input": "batchnorm"},
            {"input": "sn-learn", "weight_decay": 0.1},
            {"early_stopping": True, "patience": 2, "lr": 0.2, "random_state": None},
        ],
    )
    def test_resumed_training_is_uninterrupted_training_bit_for_bit(self, kind, options, tmp_path):
        x, y = table()
        y = labels(y) if kind is SNClassifier else y
        states = {}
        whole = quick(kind, epochs=8, **options)
        whole.fit(x, y, on_epoch=lambda epoch, info: states.update({epoch: whole.state()}) and None)
        save_tree(tmp_path / "state.safetensors", states[3])
        for source in (states[1], tmp_path / "state.safetensors", states[max(states)]):
            resumed = quick(kind, epochs=8, **options).fit(x, y, resume_from=source)
            assert torch.equal(resumed._raw(x), whole._raw(x))
            assert resumed.history_ == whole.history_

    def test_an_interrupt_leaves_the_last_finished_epoch_to_resume_from(self):
        x, y = table()
        model, states = quick(epochs=6), []

        def interrupt(epoch, info):
            states.append(model.state())
            if epoch == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            model.fit(x, y, on_epoch=interrupt)
        resumed = quick(epochs=6).fit(x, y, resume_from=states[-1])
        assert np.array_equal(resumed.predict(x), quick(epochs=6).fit(x, y).predict(x))

    def test_states_are_snapshots(self):
        x, y = table()
        model, states = quick(epochs=3), []
        model.fit(x, y, on_epoch=lambda epoch, info: states.append(model.state()))
        weights = [state["network"]["body.0.weight"] for state in states]
        assert not torch.equal(weights[0], weights[1])

    def test_a_state_of_something_else_is_refused(self, tmp_path):
        x, y = table()
        state = quick().fit(x, y).state()
        with pytest.raises(InputError, match=r"made with hidden=\[8\], now it is \[9\]"):
            quick(hidden=(9,)).fit(x, y, resume_from=state)
        with pytest.raises(InputError, match="made with rows=120, now it is 119"):
            quick().fit(x[1:], y[1:], resume_from=state)
        with pytest.raises(InputError, match="no training state"):
            quick().fit(x, y, resume_from={"epoch": 3})
        with pytest.raises(InputError, match="nowhere"):
            quick().fit(x, y, resume_from=tmp_path / "nowhere")
        with pytest.raises(NotFittedError, match="no training state"):
            pickle.loads(pickle.dumps(quick().fit(x, y))).state()

    def test_progress_callback_sees_every_epoch_and_may_stop(self):
        x, y = table()
        seen = []

        def watch(epoch, info):
            seen.append((epoch, info))
            return epoch == 3

        model = quick(epochs=9).fit(x[20:], y[20:], validation=(x[:20], y[:20]), on_epoch=watch)
        assert [epoch for epoch, _ in seen] == [1, 2, 3]
        assert model.n_epochs_ == 3
        assert set(seen[0][1]) == {"train_loss", "validation_loss"}
        assert [info for _, info in seen] == model.history_

    def test_validation_loss_is_that_of_the_model(self):
        x, y = table()
        model = quick(epochs=5).fit(x[20:], y[20:], validation=(x[:20], y[:20]))
        scale = y[20:].std()
        expected = np.mean((model.predict(x[:20]) - y[:20]) ** 2) / scale**2
        assert model.history_[-1]["validation_loss"] == pytest.approx(expected, rel=1e-4)

    def test_early_stopping_goes_back_to_the_best_epoch(self):
        x, y = table()
        model = quick(lr=0.3, epochs=60, early_stopping=True, patience=3)
        model.fit(x[40:], y[40:], validation=(x[:40], y[:40]))
        losses = [info["validation_loss"] for info in model.history_]
        best = int(np.argmin(losses)) + 1
        assert model.n_epochs_ == best + 3 < 60
        found = np.mean((model.predict(x[:40]) - y[:40]) ** 2) / y[40:].std() ** 2
        assert found == pytest.approx(min(losses), rel=1e-4)

    def test_constants_come_from_training_rows_only(self):
        x, y = table()
        x[60:] = np.where(np.arange(6) < 1, 1.0, np.nan)
        model = quick().fit(x[:60], y[:60], validation=(x[60:], y[60:]))
        assert float(model.network_.input.K) == pytest.approx(np.isfinite(x[:60]).sum(1).mean(), rel=1e-6)

    def test_predictions_do_not_depend_on_the_company(self):
        x, y = table()
        model = quick(input="batchnorm").fit(x, y)
        whole = model.predict(x)
        np.testing.assert_allclose(np.concatenate([model.predict(row[None]) for row in x]), whole, rtol=1e-12)
        np.testing.assert_allclose(model.predict(x[::-1])[::-1], whole, rtol=1e-12)

    def test_input_dropout_drops_from_the_mask_and_recounts(self):
        x = np.full((64, 10), 2.0)
        model = quick(hidden=(), input_dropout=0.5, epochs=1).fit(x, np.arange(64.0))
        network = model.network_.train()
        inputs = []
        network.body.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        network(torch.full((64, 10), 2.0))
        kept = (inputs[0] != 0).sum(1)
        assert kept.min() < 10
        torch.testing.assert_close(inputs[0].sum(1)[kept > 0], torch.full((64,), 20.0)[kept > 0])

    def test_cached_input_is_what_the_whole_network_computes(self, monkeypatch):
        """A static layer is applied once, one that is not in every step: the same numbers."""
        x, y = table()
        cached = quick(epochs=3).fit(x, y)
        assert cached.network_.static

        class Live(SparsityNorm):
            static = False

        monkeypatch.setitem(METHODS, "live", Method("live", "", "method", Live))
        live = quick(epochs=3, input="live").fit(x, y)
        for name, value in cached.network_.body.state_dict().items():
            assert torch.equal(live.network_.body.state_dict()[name], value)


class TestEstimators:
    def test_normalization_beats_zero_imputation_where_the_level_is_latent(self):
        rng = np.random.default_rng(0)
        z = rng.normal(size=600)
        x = 3 + z[:, None] + rng.normal(size=(600, 30))
        x[rng.random(x.shape) > rng.uniform(0.1, 1, (600, 1))] = np.nan
        scores = {
            method: SNRegressor(hidden=(16,), input=method, epochs=60, lr=0.01, random_state=0, device="cpu")
            .fit(x[:400], z[:400])
            .score(x[400:], z[400:])
            for method in ("sn", "zero")
        }
        assert scores["sn"] > 0.65
        assert scores["zero"] < scores["sn"] - 0.3

    def test_probabilities_and_labels_of_any_kind(self):
        x, y = table()
        for target in (labels(y), (y > 1).astype(int), np.digitize(y, [0.8, 1.2]) - 1, (y > 1)):
            model = quick(SNClassifier, epochs=30, lr=0.02).fit(x, target)
            probability = model.predict_proba(x)
            np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-12)
            assert np.array_equal(model.predict(x), model.classes_[probability.argmax(1)])
            assert model.score(x, target) > 0.7
            assert model.classes_.dtype == target.dtype

    def test_several_targets_come_back_on_their_scale(self):
        x, y = table()
        targets = np.column_stack([1000 + 100 * y, -y])
        model = quick(epochs=60, lr=0.02, hidden=(32,)).fit(x, targets)
        assert model.predict(x).shape == (120, 2)
        assert model.score(x, targets) > 0.5
        with pytest.warns(DataConversionWarning):
            assert quick().fit(x, y[:, None]).predict(x).shape == (120,)

    def test_power_and_options_reach_the_layer(self):
        x, y = table()
        assert quick(power=0.5).fit(x, y).network_.input.power == 0.5
        assert quick(power="learn").fit(x, y).network_.input.raw_power is not None
        model = quick(input="sn-center", input_options={"tau": 2.0}).fit(x, y)
        assert (model.network_.input.tau, model.network_.input.center_mode) == (2.0, "column")
        assert quick(input="knn", input_options={"n_neighbors": 1}).fit(x, y).imputer_.imputer.n_neighbors == 1

    def test_in_a_pipeline_and_a_grid(self):
        x, y = table()
        pipeline = make_pipeline(MinMaxScaler(), quick())
        grid = GridSearchCV(pipeline, {"snregressor__input": ["sn", "zero"], "snregressor__hidden": [(), (4,)]}, cv=2)
        assert np.isfinite(grid.fit(x, y).predict(x)).all()

    @pytest.mark.parametrize("kind", [SNRegressor, SNClassifier])
    def test_saved_models_say_the_same(self, kind, tmp_path):
        x, y = table()
        frame = pd.DataFrame(x, columns=list("abcdef"))
        model = quick(kind, input="sn-center+mask", random_state=np.random.RandomState(3))
        model.fit(frame, labels(y) if kind is SNClassifier else y)
        model.save(tmp_path / "model")
        loaded = kind.load(tmp_path / "model")
        assert np.array_equal(loaded.predict(frame), model.predict(frame))
        assert loaded.get_params()["hidden"] == (8,)
        assert list(loaded.feature_names_in_) == list("abcdef")
        clone(loaded).fit(frame, labels(y) if kind is SNClassifier else y)

    def test_damaged_and_foreign_folders(self, tmp_path):
        x, y = table()
        model = quick().fit(x, y)
        model.save(tmp_path)
        with pytest.raises(InputError, match="is of SNRegressor, format 1; expected SNClassifier"):
            SNClassifier.load(tmp_path)
        with pytest.raises(InputError, match=r"cannot read .*nowhere"):
            SNRegressor.load(tmp_path / "nowhere")
        weights = (tmp_path / "model.safetensors").read_bytes()
        config = (tmp_path / "model.json").read_text()
        for name, content in (
            ("model.safetensors", weights[:100]),
            ("model.json", config[:40].encode()),
            ("model.json", json.dumps({**json.loads(config), "params": {"hidden": [3], "nonsense": 1}}).encode()),
            ("model.json", json.dumps({**json.loads(config), "n_features_in": 9}).encode()),
        ):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(InputError) as caught:
                SNRegressor.load(tmp_path)
            assert "\n" not in str(caught.value)
            (tmp_path / "model.safetensors").write_bytes(weights)
            (tmp_path / "model.json").write_text(config)
        SNRegressor.load(tmp_path)
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="cannot write"):
            model.save(tmp_path / "file" / "model")

    def test_graph_takes_input_and_mask(self):
        x, y = table()
        for kind, target in ((SNRegressor, y), (SNClassifier, labels(y))):
            model = quick(kind).fit(x, target)
            observed = torch.from_numpy(np.isfinite(x))
            out = model.graph()(torch.from_numpy(np.nan_to_num(x, nan=9e9)).float(), observed)
            torch.testing.assert_close(out.double(), model._raw(x), rtol=1e-5, atol=1e-5)
        with pytest.raises(InputError, match="imputes outside the network"):
            quick(input="knn").fit(x, y).graph()

    @pytest.mark.parametrize("method", ["sn", "sn-center+mask", "promissing"])
    def test_onnx_runs_elsewhere(self, unchecked, method, tmp_path):
        for name in ("onnx", "onnxscript"):
            pytest.importorskip(name)
        runtime = pytest.importorskip("onnxruntime")
        x, y = table()
        x[2] = np.nan
        model = quick(SNClassifier, input=method).fit(x, labels(y))
        model.export_onnx(tmp_path / "model.onnx")
        session = runtime.InferenceSession(tmp_path / "model.onnx")
        for rows in (1, 120):
            feed = {"x": x[:rows].astype(np.float32), "mask": np.isfinite(x[:rows])}
            np.testing.assert_allclose(session.run(None, feed)[0], model.predict_proba(x[:rows]), atol=1e-5)
        assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda x, y: quick(input="magic").fit(x, y), "no method 'magic'"),
            (lambda x, y: quick(dropout=1.0).fit(x, y), "dropout is 1"),
            (lambda x, y: quick(input_dropout=-0.1).fit(x, y), "input_dropout is -0.1"),
            (lambda x, y: quick(input="knn", input_dropout=0.1).fit(x, y), "'knn' imputes before it"),
            (lambda x, y: quick(lr=0).fit(x, y), "lr is 0; it must be positive"),
            (lambda x, y: quick(epochs=0).fit(x, y), "epochs is 0"),
            (lambda x, y: quick(weight_decay=-1).fit(x, y), "weight_decay is -1"),
            (lambda x, y: quick(hidden=(4, 0)).fit(x, y), r"hidden is \(4, 0\)"),
            (lambda x, y: quick(early_stopping=True, validation_fraction=1.5).fit(x, y), "validation_fraction is 1.5"),
            (lambda x, y: quick(early_stopping=True).fit(x[:1], y[:1]), "needs rows to hold out"),
            (lambda x, y: quick(device="tpu").fit(x, y), "unknown device 'tpu'"),
            (lambda x, y: quick().fit(np.full_like(x, np.nan), y), "no entry is observed"),
            (lambda x, y: quick().fit(np.where(np.isnan(x), 1e300, x), y), "X is too large for torch.float32 at row"),
            (lambda x, y: quick().fit(x, np.where(y > 1, np.nan, y)), "contains NaN"),
            (lambda x, y: quick().fit(x, y[1:]), "inconsistent numbers of samples"),
            (lambda x, y: quick().fit(x, y).predict(x[:, 1:]), "is expecting 6 features"),
            (lambda x, y: quick(SNClassifier).fit(x, y), "Unknown label type"),
            (
                lambda x, y: quick(SNClassifier).fit(x, labels(y), validation=(x[:2], np.array(["low", "new"]))),
                "validation holds the class .*new.*, which training has not",
            ),
        ],
    )
    def test_bad_input(self, unchecked, call, message):
        with pytest.raises(ValueError, match=message) as caught:
            call(*table())
        if isinstance(caught.value, InputError):
            assert "\n" not in str(caught.value)

    def test_before_fit(self):
        for call in (quick().predict, quick(SNClassifier).predict_proba):
            with pytest.raises(NotFittedError):
                call([[math.nan]])

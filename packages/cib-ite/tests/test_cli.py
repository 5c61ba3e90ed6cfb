"""The command line on users' own files: what goes in, what comes out, what is said when it is wrong."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from cib_ite import cli, experiments, overlap
from cib_ite.cli import line
from cib_ite.data import NAMES
from cib_ite.estimator import CIB
from cib_ite.evaluate import in_words
from shared_core.cli import Outcome
from shared_core.runs import Run, Summary, read_summary
from shared_core.testing import Caller, figures, in_two_processes

FAST = ("--members", 2, "--width", 8, "--latent", 2, "--device", "cpu")
COLUMNS = ("--treatment", "arm", "--outcome", "days", "--exclude", "id")
_savefig = Figure.savefig


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Leave drawing and large forests to tests of their own: they would take nearly all of the time here."""

    def save(figure: Figure, path: Path, **options: object) -> None:
        path.write_bytes(b"a picture")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        patch.setattr(overlap, "_TREES", 25)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The folder that everything happens in; tests write under names of their own."""
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def call(home) -> Caller:
    return Caller(line, home)


@pytest.fixture(scope="module")
def done(call):
    return call.done


@pytest.fixture(scope="module")
def wrong(call):
    return call.wrong


def patients(n: int = 240, seed: int = 0) -> pd.DataFrame:
    """Numbers and categories with gaps, a treatment in words, and 20 rows without treatment and outcome."""
    random = np.random.default_rng(seed)
    age, lab = random.normal(50, 10, n), random.normal(size=n)
    treated = random.random(n) < 1 / (1 + np.exp(-(age - 50) / 10))
    days = age / 10 + treated * (1 + lab) + random.normal(size=n)
    frame = pd.DataFrame({"id": [f"p{i}" for i in range(n)], "age": age.round(2), "lab": lab.round(3)})
    frame["sex"], frame["ward"] = random.choice(["f", "m"], n), random.choice(["a", "b", "c"], n)
    frame["arm"], frame["days"] = np.where(treated, "drug", "placebo"), days.round(3)
    frame.loc[random.random(n) < 0.1, "lab"] = np.nan
    frame.loc[random.random(n) < 0.1, "ward"] = None
    frame.loc[frame.index[-20:], ["arm", "days"]] = None
    return frame


@pytest.fixture(scope="module")
def table(home) -> pd.DataFrame:
    frame = patients()
    frame.to_csv(home / "patients.csv", index=False, encoding="utf-8-sig")
    return frame


@pytest.fixture(scope="module")
def fitted(done, home, table) -> Summary:
    """A fit to the patients in the folder ``m``, long enough to leave a checkpoint on its way."""
    return done("fit", "patients.csv", *COLUMNS, *FAST, "--steps", 275, "--out", "m")


@pytest.fixture(scope="module")
def truth(done, home) -> str:
    """150 units of which the true effects are known, in the layout of the CFR files."""
    done("data", "simulate", "confounded", "--units", 150, "--output", "known.npz")
    return "known.npz"


@pytest.fixture(scope="module")
def tuned(done, truth) -> Summary:
    return done("tune", truth, *FAST, "--steps", 25, "--betas", "0.01,5", "--out", "t")


@pytest.fixture(scope="module")
def known(done, truth, tuned) -> Summary:
    """A fit to the units whose effects are known, in the folder ``k``, with what tuning chose."""
    return done("fit", truth, *FAST, "--steps", 25, "--config", "t/chosen.toml", "--out", "k")


def by_hand(frame: pd.DataFrame) -> np.ndarray:
    """Inputs of the patients: numbers, and a 0/1 column for each category, NaN where none of them is known."""
    columns = [frame["age"].to_numpy(float), frame["lab"].to_numpy(float)]
    for name, categories in (("sex", "fm"), ("ward", "abc")):
        values = frame[name]
        seen = values.isin(list(categories))
        columns += [np.where(seen, values == category, np.nan).astype(float) for category in categories]
    return np.column_stack(columns)


NAMED = ["age", "lab", "sex=f", "sex=m", "ward=a", "ward=b", "ward=c"]


def inputs(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(by_hand(frame), columns=NAMED)


# ---- fit and what follows


def test_fit_reads_a_messy_table_and_leaves_everything(fitted, home, table):
    assert set(fitted.artifacts) == {
        "model.safetensors", "schema.json", "training.json", "effects.csv", "curves.csv", "history.png",
        "metrics.json", "effects.png",
        "overlap.png", "withholding.png", "report.html",
    }  # fmt: skip
    assert all((home / "m" / name).stat().st_size > 0 for name in fitted.artifacts)
    model = CIB.load(home / "m/model.safetensors")
    assert list(model.feature_names_in_) == NAMED
    assert model.preprocessor_.indicators.tolist() == [False, True, False, False, True, True, True]
    assert json.loads((home / "m/schema.json").read_text())["control_name"] == "placebo"
    effects = pd.read_csv(home / "m/effects.csv")
    labelled = table[table["arm"].notna()]
    assert len(effects) == len(labelled) == 220
    np.testing.assert_allclose(effects["effect"], model.effect(inputs(labelled)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(effects[["mu0", "mu1"]], model.predict_outcomes(inputs(labelled)), rtol=1e-5)
    np.testing.assert_allclose(effects["effect"], effects["mu1"] - effects["mu0"], atol=1e-5)
    assert effects["decision"].tolist() == model.decide(inputs(labelled)).tolist()
    assert (effects[["lower", "effect", "upper"]].diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    metrics = json.loads((home / "m/metrics.json").read_text())
    assert metrics["ate"] == pytest.approx(effects["effect"].mean(), rel=1e-5)
    lines = [json.loads(text) for text in (home / "m/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in lines] == list(range(25, 276, 25))
    assert all(np.isfinite(entry["validation"]) for entry in lines)


def test_predict_is_pythons_own_on_columns_in_another_order(done, fitted, home):
    new = patients(90, seed=3).drop(columns=["arm", "days", "id"])
    new.loc[4, "ward"] = "z"
    new.assign(note="later")[["note", "ward", "lab", "sex", "age"]].to_csv(home / "new.csv", index=False)
    assert done("predict", "m", "new.csv", "--out", "p", "--cost", 0.5, "--alpha", 0.2).artifacts == ["effects.csv"]
    found = pd.read_csv(home / "p/effects.csv")
    model, x = CIB.load(home / "m/model.safetensors"), inputs(new)
    assert np.isnan(x.loc[4, "ward=a"])
    expected = model.effect_inference(x, 0.2).to_frame()
    assert len(found) == 90
    for column in expected:
        values = found[column].to_numpy()
        np.testing.assert_allclose(values, expected[column], rtol=1e-5, atol=1e-6, err_msg=column)
    np.testing.assert_allclose(found[["mu0", "mu1"]], model.predict_outcomes(x), rtol=1e-5)
    assert found["decision"].tolist() == model.decide(x, 0.5).tolist()
    done("predict", "m", "new.csv", "--output", "here.csv", "--max-defer", 1)
    assert set(pd.read_csv(home / "here.csv")["decision"]) == {"defer"}


def test_evaluate_measures_new_rows(done, fitted, home):
    new = patients(90, seed=4).iloc[:70]
    new.to_csv(home / "later.csv", index=False)
    found = done("evaluate", "m", "later.csv", "--out", "e")
    metrics = json.loads((home / "e/metrics.json").read_text())
    shown = {row.metric: row.mean for row in found.results}
    named = {in_words(name): value for name, value in metrics.items()}
    assert {name: named[name] for name in shown} == pytest.approx(shown)
    assert {"factual RMSE", "R loss", "factual withholding 20 %", "outcome coverage 90 %"} <= set(shown)
    assert not {"ATE", "treat share", "propensity AUC"} & set(shown)
    model, x = CIB.load(home / "m/model.safetensors"), inputs(new)
    factual = model.predict_outcomes(x)[np.arange(70), (new["arm"] == "drug").to_numpy(int)]
    assert metrics["factual_rmse"] == pytest.approx(np.sqrt(np.mean((factual - new["days"]) ** 2)))
    assert metrics["ate"] == pytest.approx(model.effect(x).mean())
    assert metrics["deferred_share"] == pytest.approx(np.mean(model.decide(x) == "defer"))
    assert {"curves.csv", "withholding.png"} <= set(found.artifacts)


def test_report_and_export_of_a_fit(done, call, fitted, home, table):
    done("report", "m", "--output", "page.html", "--title", "Our <ward>", "--cost", 0.25)
    page = (home / "page.html").read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")
    assert "Our &lt;ward&gt;" in page
    shown = call("export", "m", "--format", "torchscript", "--samples", 200, "--output", "model.pt")
    assert shown.returncode == 0, shown.stderr
    assert "x (n, 7) -> effect, std, mu0, mu1, rate" in shown.stdout
    x = by_hand(table)[:30]
    effect = torch.jit.load(str(home / "model.pt"))(torch.as_tensor(x, dtype=torch.float32))[0].numpy()
    expected = CIB.load(home / "m/model.safetensors").effect(inputs(table.iloc[:30]))
    np.testing.assert_allclose(effect, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["auto", "withhold", "calibration", "overlap", "effects", "history"])
def test_plot_draws_every_kind(done, known, home, kind):
    name = "effects" if kind == "auto" else kind
    assert done("plot", "k", "--kind", kind, "--out", f"plot-{kind}").artifacts == [f"{name}.png"]
    assert (home / f"plot-{kind}/{name}.png").exists()


def test_plot_writes_the_kind_of_picture_that_its_name_says(done, known, home, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", _savefig)
    done("plot", "k", "--kind", "history", "--output", "history.svg")
    assert "<svg" in (home / "history.svg").read_text()


def test_calibration_without_true_effects_is_refused(wrong, fitted):
    assert "needs true effects" in wrong("plot", "m", "--kind", "calibration")


def test_a_training_table_is_found_from_anywhere_and_missed_where_it_is_gone(wrong, fitted, known, home):
    for run in ("m", "k"):
        assert Path(json.loads((home / run / "training.json").read_text())["data"]).is_absolute()
    shutil.copytree(home / "m", home / "moved")
    kept = json.loads((home / "moved/training.json").read_text()) | {"data": str(home / "gone.csv")}
    (home / "moved/training.json").write_text(json.dumps(kept))
    assert "the training table is not where it was" in wrong("report", "moved")


# ---- data whose effects are known


def test_tuning_writes_what_fit_takes(tuned, known, home):
    chosen = tomllib.loads((home / "t/chosen.toml").read_text())
    losses = {row.method: row.mean for row in tuned.results if row.metric == "factual loss"}
    assert losses.keys() == {"beta 0.01 gamma 0.1", "beta 5 gamma 0.1"}
    assert f"beta {chosen['beta']:g} gamma {chosen['gamma']:g}" == min(losses, key=losses.__getitem__)
    rates = {row.method: row.mean for row in tuned.results if row.metric == "rate"}
    assert rates["beta 5 gamma 0.1"] < rates["beta 0.01 gamma 0.1"]
    assert known.config["beta"] == chosen["beta"]
    assert CIB.load(home / "k/model.safetensors").beta == chosen["beta"]


def test_files_of_arrays_go_the_whole_way(known, done, home, truth):
    arrays = np.load(home / truth)
    assert {"x", "t", "yf", "ycf", "mu0", "mu1"} <= set(arrays.files)
    model = CIB.load(home / "k/model.safetensors")
    frame = pd.DataFrame(arrays["x"], columns=list(model.feature_names_in_))
    metrics = {row.metric: row.mean for row in known.results}
    error = model.effect(frame) - (arrays["mu1"] - arrays["mu0"])
    assert metrics["sqrt PEHE"] == pytest.approx(np.sqrt(np.mean(error**2)))
    done("predict", "k", truth, "--out", "pk")
    np.testing.assert_allclose(pd.read_csv(home / "pk/effects.csv")["effect"], model.effect(frame), rtol=1e-5)
    again = done("evaluate", "k", truth, "--out", "ek")
    assert {row.metric: row.mean for row in again.results}["sqrt PEHE"] == pytest.approx(metrics["sqrt PEHE"])
    assert "calibration.png" in again.artifacts


def test_simulated_tables_come_back_in(call, done, home, truth):
    done("data", "simulate", "overlap-failure", "--units", 80, "--output", "sim.csv", "--seed", 3)
    frame = pd.read_csv(home / "sim.csv")
    assert list(frame.columns[:2]) == ["treatment", "outcome"]
    assert list(frame.columns[-2:]) == ["mu0", "mu1"]
    args = ("--treatment", "treatment", "--outcome", "outcome", "--exclude", "mu0,mu1")
    shown = call("data", "check", "sim.csv", *args)
    assert shown.returncode == 0, shown.stderr
    assert f"80 rows, 6 covariates, {frame['treatment'].sum()} treated, outcome continuous, 1 draws" in shown.stdout
    assert "true effects: known" in call("data", "check", truth).stdout


def test_data_list_names_all_and_says_which_are_not_here(call, tmp_path, monkeypatch):
    monkeypatch.setenv("SHARED_CORE_DATA", str(tmp_path))
    shown = call("data", "list")
    lines = {text.split(":")[0]: text for text in shown.stdout.splitlines()}
    assert set(NAMES) <= set(lines)
    assert "442 rows, 10 covariates" in lines["diabetes"]
    assert "not here" in lines["ihdp"]


# ---- compare


COMPARE = (
    "--methods",
    "ols2,cib",
    "--draws",
    2,
    "--steps",
    25,
    "--members",
    2,
    "--width",
    8,
    "--device",
    "cpu",
    "--no-tune",
)


def cells(folder: Path) -> dict[str, dict[str, dict[str, object]]]:
    """Everything a comparison found, save how long it took."""
    stored = json.loads((folder / "cells.json").read_text())
    return {m: {d: {k: c[k] for k in ("metrics", "setting")} for d, c in by.items()} for m, by in stored.items()}


def test_an_interrupted_comparison_goes_on_where_it_stopped(call, done, home, truth, monkeypatch):
    whole = done("compare", truth, *COMPARE, "--out", "c")
    assert {row.method for row in whole.results} == {"ols2", "cib"}
    assert {row.n for row in whole.results} == {2}
    assert [claim.text.split(":")[0] for claim in whole.claims] == ["known"]
    assert {"cells.json", "comparison.png"} <= set(whole.artifacts)

    fit, fits = experiments.fit_method, []

    def interrupted(name: str, *args: object, **more: object):
        fits.append(name)
        if fits == ["ols2", "cib"]:
            raise KeyboardInterrupt
        return fit(name, *args, **more)

    monkeypatch.setattr(experiments, "fit_method", interrupted)
    stopped = call("compare", truth, *COMPARE, "--out", "cp")
    assert stopped.returncode == 130, stopped.stderr
    assert "cib-ite compare --resume --out cp" in stopped.stderr
    done("compare", "--resume", "--out", "cp")
    assert fits == ["ols2", "cib", "cib"]
    assert cells(home / "cp") == cells(home / "c")
    # One draw only: the two are splits of the same rows.
    assert cells(home / "c")["ols2"]["0"]["metrics"] != cells(home / "c")["ols2"]["1"]["metrics"]
    assert done("plot", "c", "--out", "pc").artifacts == ["comparison.png"]


def test_workers_do_not_change_a_comparison(done, truth):
    args = ("compare", truth, *COMPARE, "--methods", "ols2,tarnet")
    one, two = (done(*args, "--workers", n, "--out", f"w{n}") for n in (1, 2))
    assert {row.method for row in two.results} == {"ols2", "tarnet"}
    # Their width follows the forest of the overlap, which is small in this process only.
    others, ours = ([row for row in figures(each) if not row.metric.startswith("ITE")] for each in (one, two))
    assert len(ours) > 20
    assert ours == others


def test_compare_on_the_papers_data(done, data_folder):
    if not (data_folder / "ihdp").is_dir():
        pytest.skip("needs ihdp in the data folder")
    found = done("compare", "ihdp", *COMPARE, "--methods", "ols2", "--draw", 1, "--out", "ci")
    error = next(row for row in found.results if row.metric == "sqrt PEHE out")
    assert error.n == 2
    assert 0.5 < error.mean < 10


def test_a_group_that_training_never_saw_is_looked_at(done, wrong, home, truth):
    arrays = dict(np.load(home / truth))
    far = np.random.default_rng(7).random(150) < 0.3
    arrays["x"] = np.column_stack([arrays["x"] + 3 * far[:, None], 1 - far])
    arrays["feature_names"] = np.append(arrays["feature_names"], "near")
    np.savez(home / "shift.npz", **arrays)
    args = ("--draws", 1, "--steps", 25, "--members", 1, "--device", "cpu")
    found = done("compare", "shift.npz", "--shift", "near", *args, "--out", "s")
    assert {"AUROC", "AUROC of the rate", "sqrt PEHE, unseen"} <= {row.metric for row in found.results}
    assert found.claims[0].holds
    assert "no covariate 'far'; " in wrong("compare", "shift.npz", "--shift", "far", *args)
    assert "'x1' is not a 0/1 covariate" in wrong("compare", "shift.npz", "--shift", arrays["feature_names"][0], *args)


def test_unknown_methods_list_the_known(wrong, truth):
    message = wrong("compare", truth, "--methods", "cib,oracle", "--draws", 1)
    assert "no method 'oracle'" in message
    assert all(name in message for name in experiments.METHODS)


# ---- interruption


def test_an_interrupted_fit_resumes_to_the_same_bytes(call, fitted, home, monkeypatch):
    """Ctrl-C after the first checkpoint; that a real signal ends in the same way is in the cross-package tests."""
    args = ("fit", "patients.csv", *COLUMNS, *FAST, "--steps", 275, "--out", "part")
    with monkeypatch.context() as patch:
        save = Run.save_checkpoint

        def interrupted(self: Run, state: object) -> None:
            save(self, state)
            raise KeyboardInterrupt

        patch.setattr(Run, "save_checkpoint", interrupted)
        stopped = call(*args)
    assert stopped.returncode == 130, stopped.stderr
    assert "cib-ite fit --resume --out part" in stopped.stderr
    assert len((home / "part/metrics.jsonl").read_text().splitlines()) == 10
    assert not (home / "part/effects.csv").exists()
    # What follows the fit is the same as ever, and takes longer than it.
    monkeypatch.setattr(cli, "_after_fit", lambda *args: Outcome())
    assert call("fit", "--resume", "--out", "part").returncode == 0
    for name in ("effects.csv", "model.safetensors", "metrics.jsonl"):
        assert (home / "m" / name).read_bytes() == (home / "part" / name).read_bytes(), name


# ---- several processes


def test_two_processes_share_the_members_and_fit_the_same(fitted, home, table):
    """``torchrun --nproc-per-node=2``: each trains its part of the members, and only one writes."""
    program = "from cib_ite import overlap\nfrom cib_ite.cli import main\n\noverlap._TREES = 25\nmain()\n"
    result = in_two_processes(home, program, "fit", "patients.csv", *COLUMNS, *FAST, "--steps", 275, "--out", "two")
    one, two = (CIB.load(home / run / "model.safetensors") for run in ("m", "two"))
    for (name, value), other in zip(one.stack_.named_parameters(), two.stack_.parameters(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-5, msg=name)
    for ours, others in zip(two.history_, one.history_, strict=True):
        assert ours == pytest.approx(others, rel=1e-4, abs=1e-5)
    first, second = (pd.read_csv(home / run / "effects.csv") for run in ("m", "two"))
    pd.testing.assert_frame_equal(first, second, rtol=1e-3, atol=1e-4)
    assert len((home / "two/metrics.jsonl").read_text().splitlines()) == 11
    assert len(result.stdout.split("run folder:")) == 2


# ---- wrong input


def test_wrong_tables_say_where(wrong, table, home):
    def fit(frame: pd.DataFrame, *more: object) -> str:
        frame.to_csv(home / "wrong.csv", index=False)
        message = wrong("fit", "wrong.csv", *(more or COLUMNS), *FAST, "--steps", 25, "--out", "w")
        assert not (home / "w/effects.csv").exists()
        return message

    frame = table[table["arm"].notna()].reset_index(drop=True)
    assert "row 6, column 'age': 'old' is not a number" in fit(
        frame.astype({"age": object}).assign(age=lambda f: f["age"].where(f.index != 5, "old"))
    )
    assert "row 3, column 'lab' is infinite" in fit(frame.assign(lab=frame["lab"].where(frame.index != 2, np.inf)))
    assert "row 8, column 'days' is infinite" in fit(frame.assign(days=frame["days"].where(frame.index != 7, np.inf)))
    third = frame.assign(arm=frame["arm"].where(frame.index % 3 > 0, "surgery"))
    assert "must have two values, found {drug,placebo,surgery}" in fit(third)
    assert "'drug' in every row; both arms are needed" in fit(frame.assign(arm="drug"))
    words = frame.assign(arm=np.where(frame["arm"] == "drug", "new", "old"))
    assert "'arm' is {new,old}; say which of them is the control, such as --control new" in fit(words)
    assert "did you swap it with 'arm'?" in fit(frame, "--treatment", "days", "--outcome", "arm")
    few = frame[(frame["arm"] == "placebo") | (frame.groupby("arm").cumcount() < 12)]
    assert "only 12 treated rows; at least 20 are needed" in fit(few)
    same = frame.assign(days=frame["days"].where(frame["arm"] == "placebo", 4.0))
    assert "the outcome of every treated row is 4" in fit(same)
    died = frame.assign(days=np.where(frame["days"] > 5, "yes", "no"))
    assert "say which of them counts as 1, such as --positive yes" in fit(died)
    assert "row 11: the outcome 'days' is empty and the treatment 'arm' is not" in fit(
        frame.assign(days=frame["days"].where(frame.index != 10))
    )
    assert "row 1: the treatment 'arm' is empty and the outcome 'days' is not" in fit(
        frame.assign(arm=frame["arm"].where(frame.index != 0))
    )
    assert "column 'id' has 220 different texts" in fit(frame, "--treatment", "arm", "--outcome", "days")
    assert "no column 'dose'; there are id, age" in fit(frame, "--treatment", "dose", "--outcome", "days")
    assert "--outcome is not given" in fit(frame, "--treatment", "arm")
    (home / "wrong.csv").write_text("age,age,arm,days\n1,2,drug,3\n")
    assert "wrong.csv" in wrong("fit", "wrong.csv", *COLUMNS[:4])
    (home / "wrong.csv").write_text("age,arm,days\n")
    assert "the table is empty" in wrong("fit", "wrong.csv", *COLUMNS[:4])
    assert "no-such.csv" in wrong("fit", "no-such.csv", *COLUMNS[:4])
    assert "no data set or file 'nonsense'" in wrong("fit", "nonsense")


def test_wrong_arrays_say_which(wrong, home, truth):
    arrays = dict(np.load(home / truth))

    def fit(**changes: np.ndarray) -> str:
        np.savez(home / "wrong.npz", **(arrays | changes))
        return wrong("fit", "wrong.npz", *FAST, "--steps", 25, "--out", "w")

    assert "'yf' has shape (149,) where x has (150, 10)" in fit(yf=arrays["yf"][:-1])
    assert "row 1: the treatment is 2.0" in fit(t=np.where(np.arange(150) == 0, 2.0, arrays["t"]))
    broken = arrays["x"].copy()
    broken[3, 1] = np.inf
    assert "'x' is inf at row 4, column 2" in fit(x=broken)
    assert "'yf' is nan at row 6" in fit(yf=np.where(np.arange(150) == 5, np.nan, arrays["yf"]))
    assert "--treatment is for tables" in wrong("fit", truth, "--treatment", "t", "--outcome", "yf")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--alpha", 1.5), ("--alpha", 0), ("--max-defer", -0.1), ("--beta", -1), ("--members", 0), ("--lr", 0)],
)
def test_options_out_of_range_are_named(wrong, table, option, value):
    message = wrong("fit", "patients.csv", *COLUMNS, option, value)
    assert option in message
    assert str(value) in message


def test_wrong_rows_to_predict_and_evaluate_say_where(wrong, fitted, home, table):
    def given(command: str, frame: pd.DataFrame) -> str:
        frame.to_csv(home / "given.csv", index=False)
        message = wrong(command, "m", "given.csv", "--out", "g")
        assert "given.csv" in message
        return message

    assert "no column 'lab', which the model was trained on" in given("predict", table.drop(columns="lab"))
    text = table.astype({"age": object}).assign(age=lambda f: f["age"].where(f.index != 1, "young"))
    assert "row 2, column 'age': 'young' is not a number" in given("predict", text)
    assert "no treatment column 'arm'" in given("evaluate", table.drop(columns="arm"))
    other = table.assign(arm=table["arm"].where(table.index != 2, "other"))
    assert "row 3: the treatment 'arm' is 'other'" in given("evaluate", other)
    assert "no row has a treatment and an outcome" in given("evaluate", table.iloc[-5:])
    (home / "given.xlsx").write_text("")
    assert "cannot tell what '.xlsx' is" in wrong("predict", "m", "given.xlsx")


def test_wrong_run_folders_say_what_to_give(wrong, fitted, tuned, home):
    assert "none: not a folder; give the run folder of 'cib-ite fit'" in wrong("predict", "none", "patients.csv")
    for command in (("predict", "t", "patients.csv"), ("report", "t"), ("export", "t"), ("evaluate", "t", "diabetes")):
        assert "t: has no model.safetensors; give the run folder of 'cib-ite fit'" in wrong(*command)
    assert "give a run folder or its summary" in wrong("plot", "none")
    shutil.copytree(home / "m", home / "damaged")
    (home / "damaged/schema.json").write_text("{")
    assert "schema.json or training.json is missing or damaged" in wrong("predict", "damaged", "patients.csv")
    weights = home / "damaged/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    assert "damaged" in wrong("predict", "damaged", "patients.csv")
    assert read_summary(home / "t").command == "tune"


def test_sets_without_what_an_option_needs_are_refused(wrong, monkeypatch, tmp_path):
    assert "--kappa is for confounded" in wrong("compare", "diabetes", "--kappa", 2, "--draws", 1)
    assert "SOURCE is missing" in wrong("data", "check")
    assert "'ihdp' is not simulated; choose confounded" in wrong("data", "simulate", "ihdp")
    assert "--treatment is for your own table" in wrong("fit", "diabetes", "--treatment", "a")
    monkeypatch.setenv("SHARED_CORE_DATA", str(tmp_path))
    message = wrong("compare", "twins", "--draws", 1)
    assert str(tmp_path) in message

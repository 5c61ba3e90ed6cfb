"""The command line on users' own files: what goes in, what comes out, what is said when it is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from shared_core.runs import Summary
from shared_core.testing import Caller
from spectral_mf import Ising, generate, read_model
from spectral_mf.cli import line
from spectral_mf.formats import read_mar, read_pr


def states(n: int) -> np.ndarray:
    return 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1) - 1


def brute(A: np.ndarray, b: np.ndarray) -> float:
    X = states(len(b))
    return float(np.logaddexp.reduce(0.5 * ((X @ A) * X).sum(1) + X @ b))


@pytest.fixture
def call(tmp_path):
    return Caller(line, tmp_path)


@pytest.fixture
def done(call):
    return call.done


@pytest.fixture
def wrong(call):
    return call.wrong


@pytest.fixture
def model(tmp_path) -> tuple[np.ndarray, np.ndarray]:
    A, b = generate("complete", 9, 0.5, 0)
    np.savez(tmp_path / "m.npz", A=A, b=b)
    return A, b


def value(summary: Summary, metric: str = "log Z") -> float:
    return next(row.mean for row in summary.results if row.metric == metric)


def test_logz_of_every_format(done, call, model, tmp_path):
    A, b = model
    for suffix in ("npz", "csv", "uai", "safetensors"):
        if suffix != "npz":
            assert call("convert", "m.npz", f"m.{suffix}", "--out", f"c-{suffix}").returncode == 0
        summary = done("logz", f"m.{suffix}", "--out", f"z-{suffix}")
        assert value(summary) == pytest.approx(brute(A, b), abs=1e-8)
        told = json.loads((tmp_path / f"z-{suffix}" / "logz.json").read_text())
        assert told["lower"] <= told["value"] <= told["upper"]
        assert told["n"] == 9
        assert read_pr(tmp_path / f"z-{suffix}" / "m.PR") == pytest.approx(brute(A, b), abs=1e-6)


def test_logz_by_method_with_opinions_and_clamping(done, model, tmp_path):
    A, b = model
    summary = done("logz", "m.npz", "--method", "spectral", "--opinions", "--clamp", "3", "--out", "r")
    bounds = {row.metric: row.mean for row in summary.results if "certified" in row.metric}
    assert bounds["certified lower bound"] <= brute(A, b) <= bounds["certified upper bound"]
    assert bounds["certified upper bound"] - bounds["certified lower bound"] < 2.0
    assert "opinions.png" in summary.artifacts
    asked = {row.method for row in summary.results if row.metric == "log Z"}
    assert {"spectral", "modes", "ais-modes", "bp-damped"} <= asked


def test_low_rank_to_a_tolerance(done, tmp_path):
    J = 0.02
    np.savez(tmp_path / "cw.npz", A=J * (np.ones((50, 50)) - np.eye(50)), b=np.full(50, 0.1))
    assert value(done("logz", "cw.npz", "--method", "low_rank", "--tol", "1e-6", "--out", "r")) == pytest.approx(
        37.072120239, abs=1e-6
    )


def test_evidence_and_floor(done, wrong, tmp_path):
    text = "MARKOV\n2\n2 2\n1\n2 0 1\n4\n1 2 3 0\n"
    (tmp_path / "m.uai").write_text(text)
    assert "floor" in wrong("logz", "m.uai", "--out", "r")
    assert value(done("logz", "m.uai", "--floor", "1e-12", "--out", "r")) == pytest.approx(np.log(6))
    (tmp_path / "m.uai.evid").write_text("1 0 0\n")
    summary = done("logz", "m.uai", "--evidence", "auto", "--out", "s")
    assert value(summary) == pytest.approx(np.log(3))


def test_marginals_and_pairs(done, model, tmp_path):
    A, b = model
    X = states(9)
    weight = np.exp(0.5 * ((X @ A) * X).sum(1) + X @ b - brute(A, b))
    done("marginals", "m.npz", "--pairs", "--out", "r")
    with np.load(tmp_path / "r" / "marginals.npz") as found:
        np.testing.assert_allclose(found["means"], weight @ X, atol=1e-9)
        np.testing.assert_allclose(found["pairs"], (X.T * weight) @ X, atol=1e-9)
    np.testing.assert_allclose(2 * np.asarray(read_mar(tmp_path / "r" / "m.MAR")) - 1, weight @ X, atol=1e-6)
    lines = (tmp_path / "r" / "marginals.csv").read_text().splitlines()
    assert len(lines) == 10
    assert (tmp_path / "r" / "marginals.png").stat().st_size > 0


def test_bounds_enclose_log_z_and_the_largest_energy(done, model):
    A, b = model
    summary = done("bounds", "m.npz", "--out", "r")
    best = float(np.max(Ising(A, b).energy(states(9))))
    for row in summary.results:
        truth = best if row.method == "largest energy" else brute(A, b)
        assert row.mean <= truth + 1e-9 if row.metric == "lower bound" else row.mean >= truth - 1e-9, row
    assert {"clamped", "sdp", "mean field"} <= {row.method for row in summary.results}


def test_generate_sample_fit_evaluate(done, tmp_path):
    done("generate", "--family", "sk", "--n", "8", "--strength", "0.8", "--file", "sk.npz", "--seed", "4", "--out", "g")
    made = read_model(tmp_path / "sk.npz")
    np.testing.assert_array_equal(made.A, generate("sk", 8, 0.8, 4)[0])
    done("sample", "sk.npz", "--k", "4000", "--out", "s")
    table = tmp_path / "s" / "samples.csv"
    summary = done("fit", table, "--out", "f", "--l2", "0.001")
    fitted = read_model(tmp_path / "f" / "model.npz")
    assert np.abs(fitted.A - made.A).max() < 0.25
    held = next(r for r in summary.results if r.method == "held out" and r.metric == "log-likelihood a row")
    assert held.low < held.mean < held.high
    again = done("evaluate", "f/model.npz", table, "--out", "e")
    X = np.loadtxt(table, delimiter=",", skiprows=1)
    expected = float(np.mean(Ising(fitted.A, fitted.b).energy(X)) - brute(fitted.A, fitted.b))
    assert value(again, "log-likelihood a row") == pytest.approx(expected, abs=1e-8)
    done("sample", "sk.npz", "--k", "50", "--coding", "01", "--out", "t")
    assert set(np.loadtxt(tmp_path / "t" / "samples.csv", delimiter=",", skiprows=1).ravel()) == {0.0, 1.0}


def test_evaluating_an_rbm(done, tmp_path):
    random = np.random.default_rng(0)
    W, bv, bh = random.normal(size=(6, 3)), random.normal(size=6), random.normal(size=3)
    save_file({"W": W, "bv": bv, "bh": bh}, tmp_path / "rbm.safetensors")
    V = (states(6) + 1) / 2
    np.savetxt(tmp_path / "v.csv", V, fmt="%d", delimiter=",")
    log_p = V @ bv + np.log1p(np.exp(V @ W + bh)).sum(1)
    expected = float(np.mean(log_p) - np.logaddexp.reduce(log_p))
    assert value(done("evaluate", "rbm.safetensors", "v.csv", "--out", "r"), "log-likelihood a row") == pytest.approx(
        expected, abs=1e-8
    )


@pytest.mark.parametrize("names", [("W", "v_bias", "h_bias"), ("rbm.weight", "rbm.vbias", "rbm.hbias")])
def test_an_rbm_under_common_names_and_turned(done, tmp_path, names):
    random = np.random.default_rng(0)
    W, bv, bh = random.normal(size=(6, 3)), random.normal(size=6), random.normal(size=3)
    save_file({names[0]: np.ascontiguousarray(W.T), names[1]: bv, names[2]: bh}, tmp_path / "rbm.safetensors")
    summary = done("logz", "rbm.safetensors", "--out", "r")
    assert value(summary) == pytest.approx(Ising.from_rbm(W, bv, bh).log_partition().value)


def test_compare_own_real_and_drawn(done, model):
    own = done("compare", "m.npz", "--methods", "spectral,modes,low-rank-2", "--out", "a")
    assert {row.metric for row in own.results} == {"error of log Z"}
    real = done("compare", "digits20", "--methods", "spectral,modes", "--seeds", "2", "--out", "b")
    assert {row.n for row in real.results} == {2}
    methods = "spectral,modes,bp-200,mean-field-1,mini-bucket"
    drawn = done("compare", "complete,er", "--n", "8", "--seeds", "2", "--strengths", "0.5,1", "--methods", methods,
                 "--sizes", "6,8", "--out", "c")  # fmt: skip
    assert {"time.png", "strength-er.png", "comparison.png"} <= set(drawn.artifacts)
    assert any("mean field" in claim.text for claim in drawn.claims)
    again = done("plot", "c", "--kind", "svg", "--out", "d")
    assert again.artifacts == ["comparison.svg"]
    assert done("plot", "m.npz", "--out", "e").artifacts == ["model.png"]


@pytest.mark.parametrize("what", [("m.npz",), ("complete,er", "--n", "8", "--seeds", "2", "--strengths", "0.5,1")])
def test_workers_find_what_one_process_finds(done, model, what):
    command = ("compare", *what, "--methods", "spectral,modes,ais,mean-field-20")
    one, two = done(*command, "--out", "a"), done(*command, "--workers", "2", "--out", "b")
    assert [row.model_dump(exclude={"seconds"}) for row in one.results] == [
        row.model_dump(exclude={"seconds"}) for row in two.results
    ]
    assert one.claims == two.claims


def test_compare_where_nothing_is_exact(done, tmp_path):
    A, b = generate("complete", 30, 0.1, 0)
    np.savez(tmp_path / "big.npz", A=A, b=b)
    summary = done("compare", "big.npz", "--methods", "spectral,mean-field-20", "--budget", "2", "--out", "r")
    assert {row.metric for row in summary.results} == {"log Z"}


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["logz", "nothing.npz"], "nothing.npz"),
        (["logz", "m.npz", "--method", "bethe"], "no method 'bethe'; there are auto, "),
        (["logz", "m.npz", "--method", "modes", "--tol", "-1"], "tol"),
        (["logz", "m.npz", "--clamp", "99"], "clamp"),
        (["logz", "m.xyz"], "m.xyz"),
        (["compare", "m.npz", "--methods", "nothing"], "no method 'nothing'; there are spectral, "),
        (["compare", "grid", "--n", "900", "--methods", "spectral", "--seeds", "1"], "exact"),
        (["demo", "--methods", "nothing"], "no method 'nothing'; there are spectral, "),
        (["generate", "--family", "tree"], "tree"),
        (["convert", "m.npz", "m.doc"], "m.doc"),
        (["marginals", "m.npz", "--method", "spectral"], "no marginals"),
        (["fit", "short.csv"], "short.csv"),
        (["fit", "holes.csv"], "row 2, column 1"),
        (["fit", "threes.csv"], "threes.csv"),
        (["evaluate", "m.npz", "ok.csv"], "2 columns, but the model has 9 spins"),
        (["plot", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input(wrong, model, tmp_path, args, told):
    (tmp_path / "short.csv").write_text("0,1\n")
    (tmp_path / "holes.csv").write_text("0,1\n,1\n1,0\n0,0\n")
    (tmp_path / "threes.csv").write_text("0,1\n3,1\n")
    (tmp_path / "ok.csv").write_text("0,1\n1,0\n")
    (tmp_path / "m.xyz").write_text("?")
    assert told in wrong(*args, "--out", "r")


def test_summaries_are_the_same_for_the_same_seed(done, model):
    first, second = (
        done("compare", "m.npz", "--methods", "ais,modes", "--seed", "3", "--out", f"r{k}") for k in (1, 2)
    )
    assert [r.mean for r in first.results] == [r.mean for r in second.results]


def test_help_names_every_family(call):
    shown = call("compare", "--help").stdout
    for family in ("complete", "hopfield", "digits20"):
        assert family in shown

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from cib_ite import report
from cib_ite.data import EffectTable, confounded
from cib_ite.estimator import CIB
from cib_ite.evaluate import evaluate_model
from cib_ite.metrics import Nuisances
from cib_ite.report import write_report
from shared_core.errors import InputError

VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; refuses tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in {"td", "th"}:
            self.rows[-1][-1] += data
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())

    def table(self, *head: str) -> list[list[str]]:
        """Rows of the first table that has these column heads."""
        start = next(place for place, row in enumerate(self.rows) if set(head) <= set(row))
        width = len(self.rows[start])
        found = []
        for row in self.rows[start + 1 :]:
            if len(row) != width:
                break
            found.append(row)
        return found


def write(tmp_path, model, table, **options) -> Page:
    path = tmp_path / "report.html"
    write_report(path, model, table, **options)
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def train() -> EffectTable:
    table = confounded(300, kappa=1.0, seed=0)
    return replace(table, feature_names=("<x1>", *table.feature_names[1:]))


@pytest.fixture(scope="module")
def model(train) -> CIB:
    made = CIB(n_members=2, steps=150, predict_samples=50, trunk=(32,), heads=(32,), latent=8, random_state=0)
    return made.fit(train.x, train.treatment, train.y)


@pytest.fixture(scope="module")
def page(model, train, tmp_path_factory) -> Page:
    options = {"unit": "points", "cost": 0.8, "treatment_name": "<i>course</i>", "outcome_name": "score & more"}
    return write(
        tmp_path_factory.mktemp("report"), model, train, run_config={"note": "<script>alert(1)</script>"}, **options
    )


@pytest.fixture(scope="module")
def evaluation(model, train):
    return evaluate_model(model, train)


@pytest.fixture
def words_only(monkeypatch):
    """Leave the pictures out, which take nearly all of the time."""
    monkeypatch.setattr(report, "_picture", lambda *_: "")


def unknown(table: EffectTable) -> EffectTable:
    return replace(table, mu0=None, mu1=None, y_counterfactual=None, propensity=None)


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(page):
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object"}
        for name in ("src", "href"):
            assert attributes.get(name, "data:image/svg+xml").startswith("data:image/svg+xml")
        if tag == "img":
            assert attributes["alt"]
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert sum(tag == "img" for tag, _ in page.tags) == 7


def test_what_users_name_is_escaped(page):
    assert not [tag for tag, _ in page.tags if tag in {"i", "x1"}]
    assert "Effect of <i>course</i> on score & more" in page.text
    assert "<script>alert(1)</script>" in page.text
    assert "<x1>" in page.text


def test_the_headline_has_the_numbers_of_the_model(page, model, train):
    decision = model.decide(train.x, 0.8)
    low, high = model.ate_interval(alpha=0.1)
    assert f"raises score & more by {(low + high) / 2:.2f} points (90 % interval {low:.2f} to {high:.2f})" in page.text
    assert "300 rows" in page.text
    for name, words in (("treat", "treat"), ("control", "do not treat"), ("defer", "look at by hand")):
        assert f"{int(np.sum(decision == name))}{words}" in page.text


def test_reasons_are_counted_and_the_most_doubtful_come_first(page, model, train):
    found = model.effect_inference(train.x)
    decision = model.decide(train.x, 0.8)
    waits = decision == "defer"
    counts = {row[0]: int(row[1]) for row in page.table("reason", "share of all")}
    assert counts["no overlap"] == int((found.no_overlap & waits).sum())
    assert counts["unlike training rows"] == int((found.unusual & waits).sum())
    doubtful = model.decide(train.x, 0.8, defer_flagged=False) == "defer"
    assert counts["doubtful sign"] == int(doubtful.sum())
    shown = page.table("row", "most unusual values")
    score = np.abs(found.effect - 0.8) / found.std
    expected = np.flatnonzero(waits)[np.argsort(score[waits], kind="stable")][:20]
    assert [row[0] for row in shown] == [str(place + 1) for place in expected]
    # All of them are listed too, without the covariates.
    assert f"All {int(waits.sum())} deferred rows" in page.text


def test_unusual_values_are_standard_deviations_from_the_training_mean(page, train):
    z = (train.x - train.x.mean(0)) / train.x.std(0)
    row = page.table("row", "most unusual values")[0]
    place = int(np.abs(z[int(row[0]) - 1]).argmax())
    away = f"{z[int(row[0]) - 1, place]:+.1f} sd".replace("-", "\N{MINUS SIGN}")
    assert row[-1].startswith(f"{train.feature_names[place]} = ")
    assert away in row[-1].split(";")[0]


def test_groups_are_quarters_of_what_goes_with_the_effect(page, model, train):
    rows = page.table("covariate", "doubly robust")
    assert len(rows) % 4 == 0
    first = train.feature_names.index(rows[0][0])
    effect, pseudo = model.effect(train.x), np.full(train.n, np.nan)
    pseudo[model.calibration_.rows] = model.calibration_.pseudo_effect
    part = np.digitize(train.x[:, first], np.quantile(train.x[:, first], [0.25, 0.5, 0.75]))
    for quarter in range(4):
        assert int(rows[quarter][2]) == int((part == quarter).sum())
        assert float(rows[quarter][3].replace("\N{MINUS SIGN}", "-")) == pytest.approx(
            effect[part == quarter].mean(), abs=6e-3
        )
        robust = float(rows[quarter][4].replace("\N{MINUS SIGN}", "-"))
        assert robust == pytest.approx(np.nanmean(pseudo[part == quarter]), abs=6e-3)


@pytest.mark.parametrize(
    ("rho", "ratio", "words"),
    [
        (0.6, 0.7, "It did, strongly"),
        (0.3, 0.9, "It did, moderately"),
        (0.3, 1.1, "Only in part"),
        (0.02, 1.0, "It did not, or the table is too small to tell"),
        (-0.5, 1.2, "the uncertainty pointed the wrong way"),
    ],
)
def test_words_about_the_uncertainty_follow_the_numbers(
    rho, ratio, words, model, train, evaluation, tmp_path, words_only
):
    told = replace(evaluation, metrics={**evaluation.metrics, "spearman": rho, "withhold_20_ratio": ratio})
    text = write(tmp_path, model, train, evaluation=told).text
    assert words in text
    assert f"changes the error by {100 * (ratio - 1):+.1f} %".replace("-", "\N{MINUS SIGN}") in text


def test_without_truth_the_limits_of_the_outcomes_error_are_named(model, train, tmp_path, words_only):
    table = unknown(train)
    mean = np.full(table.n, 0.5)
    made = evaluate_model(model, table, nuisances=Nuisances(mean, mean, mean, mean, chosen={}, loss={}))
    text = write(tmp_path, model, table, evaluation=made).text
    assert "by members that had not seen the row" in text
    assert "the error of the effect itself cannot be seen" in text.lower()
    assert "true effects are known" not in text
    wrong = replace(made, metrics={**made.metrics, "factual_spearman": -0.5})
    text = write(tmp_path, model, table, evaluation=wrong).text
    assert "There is no sign of it" in text
    assert "cannot settle the question" in text


def test_an_average_that_could_be_nothing_is_not_called_an_effect(model, train, evaluation, tmp_path, words_only):
    told = replace(evaluation, metrics={**evaluation.metrics, "aipw_ate": 0.1, "ate_low": -0.2, "ate_high": 0.4})
    text = write(tmp_path, model, train, evaluation=told).text
    assert "No average effect of treatment on outcome can be told from these data" in text
    assert "raises" not in text


def test_new_rows_are_named_by_their_ids_and_called_new(model, tmp_path, words_only):
    table = confounded(80, kappa=1.0, seed=5)
    made = write(tmp_path, model, table, ids=[f"patient <{k}>" for k in range(80)], title="Ward & co")
    assert "The model takes these rows for new." in made.text
    assert "Ward & co" in made.text
    assert all(row[0].startswith("patient <") for row in made.table("row", "most unusual values"))


def test_no_deferral_is_said_in_words(model, tmp_path, words_only):
    table = confounded(60, kappa=1.0, seed=5)
    calm = table.rows(~model.effect_inference(table.x).no_overlap & ~model.effect_inference(table.x).unusual)
    made = write(tmp_path, model, calm, max_defer=0.0, cost=-50.0)
    assert "No row is: the estimate decides all of them." in made.text


def test_binary_outcomes_speak_of_percentage_points_and_missing_values_are_named(tmp_path):
    base = confounded(300, kappa=0.5, seed=2)
    random = np.random.default_rng(0)
    x = base.x.copy()
    x[:, 3] = random.random(300) < 0.1
    x[::3, 5] = np.nan
    y = (random.random(300) < 1 / (1 + np.exp(-base.y))).astype(float)
    table = replace(unknown(base), x=x, y=y, outcome="binary")
    fitted = CIB(n_members=1, steps=100, predict_samples=20, trunk=(16,), heads=(16,), latent=4, allow_missing=True)
    fitted.fit(x, table.treatment, y)
    mean = np.full(300, 0.5)
    made = evaluate_model(fitted, table, nuisances=Nuisances(mean, mean, mean, mean, chosen={}, loss={}))
    page = write(tmp_path, fitted, table, evaluation=made, outcome_name="recovery")
    assert re.search(r"the probability of recovery", page.text)
    assert "percentage points" in page.text
    unusual = {row[0]: row[-1] for row in page.table("row", "most unusual values")}
    assert unusual
    for row, words in unusual.items():
        values = x[int(row) - 1]
        assert ("x6 missing" in words) == np.isnan(values[5])
        if values[3] == 1:
            assert "x4 = 1 (as" in words


def test_what_does_not_belong_together_is_refused(model, train, tmp_path):
    path = tmp_path / "r.html"
    with pytest.raises(InputError, match="2 names for 300 rows"):
        write_report(path, model, train, ids=["a", "b"])
    small = evaluate_model(model, train.rows(np.arange(100)))
    with pytest.raises(InputError, match="evaluate this table"):
        write_report(path, model, train, evaluation=small)
    with pytest.raises(InputError, match=r"alpha=0\.2"):
        write_report(path, model, train, evaluation=evaluate_model(model, train, alpha=0.2))
    assert not path.exists()

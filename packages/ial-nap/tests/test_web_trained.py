"""An expert in a browser, before a model trained on real measurements of tumours with a planted shortcut."""

from __future__ import annotations

import shutil

import pytest
from nap_served import Served, browser, fitted, network, split_of

from ial_nap.annotations import latest
from ial_nap.store import AnnotationStore

pytest.importorskip("fastapi", reason="needs ial-nap[web]")
pytest.importorskip("selenium", reason="needs selenium, to drive a browser")
if not shutil.which("chromium") or not shutil.which("chromedriver"):
    pytest.skip("needs chromium and chromedriver on the path", allow_module_level=True)

from nap_page import Page
from selenium.webdriver.common.keys import Keys

from ial_nap.web.model import ModelWorkbench


@pytest.fixture(scope="module")
def driver():
    started = browser()
    yield started
    started.quit()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fitted("cells", tmp_path_factory.mktemp("model") / "cells.safetensors", epochs=30)


def bench_of(model):
    split, outputs, cer = split_of("cells")
    return ModelWorkbench(network(model), split.train, split.audit, outputs=outputs, cer=cer)


def standing(path, bench):
    with AnnotationStore(path, bench.features, 3, units=bench.units, read_only=True) as store:
        assert latest(store.log()) == store.standing()
        return store.standing()


def test_an_expert_takes_a_shortcut_out_and_a_killed_server_loses_nothing(driver, model, tmp_path):
    path, twin = tmp_path / "verdicts.db", bench_of(model)
    served = Served(path, data="cells", model=model)
    try:
        page = Page(driver, served.links["ann"])
        queue = page.texts("#items button b")
        assert queue == [item.instance for item in twin.queue(10)]
        assert all("uncertain" in why and "moves it most" in why for why in page.texts("#items .why"))
        instance = queue[0]
        assert page.text("what") == "Probability of malignant"
        before, score = float(page.text("prediction")), float(page.text("score"))
        assert before == pytest.approx(twin.view(instance).prediction, abs=6e-3)
        # The shortcut, by mouse: a whole row at once.
        page.one("[data-all='1']").click()
        for name in ("site 1", "site 2"):
            page.one(f"#map th button[title='Select {name}']").click()
            page.one("[data-verdict='0']").click()
        page.quiet()
        page.until(lambda: page.text("score") != f"{score:.3f}")
        twin.update(standing(path, twin))
        assert float(page.text("is")) == pytest.approx(twin.view(instance).prediction, abs=6e-4)
        assert float(page.text("score")) == pytest.approx(twin.score().value, abs=6e-4)
        assert float(page.text("score")) > score
        page.until(lambda: "lies within" in page.text("gain"))
        assert page.marks() == {(name, step): "✕" for name in ("site 1", "site 2") for step in range(3)}
        # A slip by keyboard, and back.
        after = page.text("prediction"), page.text("score")
        page.cell(2, 0).click()
        page.press(Keys.SHIFT + Keys.ARROW_RIGHT)
        page.press("0")
        page.quiet()
        assert len(page.marks()) == 8
        page.press("u")
        page.quiet()
        page.until(lambda: (page.text("prediction"), page.text("score")) == after)
        assert len(page.marks()) == 6
        # The server dies outright while the expert works.
        served.kill()
        page.one("td[data-feature='area'][data-step='1']").click()
        page.press("1")
        page.until(lambda: "No connection" in page.text("line"))
        page.press("s")
        served = Served(path, port=served.port, data="cells", model=model)
        page.quiet()
        page.until(lambda: page.text("round") == "Round 2")
        assert len(standing(path, twin)) == 7
        # The next round's queue comes after its number.
        page.until(lambda: (left := page.texts("#items button b")) and instance not in left)
        twin.update(standing(path, twin))
        page.until(lambda: page.text("score") == f"{twin.score().value:.3f}")
    finally:
        served.kill()


def test_two_experts_who_disagree_leave_the_cell_open(driver, model, tmp_path):
    path, twin = tmp_path / "verdicts.db", bench_of(model)
    served = Served(path, data="cells", model=model)
    first = driver.current_window_handle
    try:
        page = Page(driver, served.links["ann"])
        instance = page.one("#items button[aria-current='true'] b").text
        feature = page.cell(0, 0).get_attribute("data-feature")
        page.cell(0, 0).click()
        page.press("0")
        page.quiet()
        twin.update(standing(path, twin))
        closed = twin.view(instance).prediction
        page.until(lambda: float(page.text("is")) == pytest.approx(closed, abs=6e-4))
        driver.switch_to.new_window("window")
        other = Page(driver, served.links["bob"] + "#" + instance.replace(" ", "%20"))
        assert other.text("who") == "bob"
        assert "ann: ignore" in other.cell(0, 0).get_attribute("aria-label")
        other.cell(0, 0).click()
        other.press("1")
        other.quiet()
        assert "≠" in other.cell(0, 0).text
        said = standing(path, twin)
        assert [(one.annotator, one.feature, one.verdict) for one in said] == [("ann", feature, 0), ("bob", feature, 1)]
        twin.update(said)
        assert twin.model.preference[0, twin.features.index(feature)] == 0
        assert float(other.text("is")) == pytest.approx(twin.view(instance).prediction, abs=6e-4)
        driver.close()
        driver.switch_to.window(first)
        page.until(lambda: "disagree on 1 cell" in page.text("splithead"))
        page.until(lambda: float(page.text("prediction")) == pytest.approx(twin.view(instance).prediction, abs=6e-3))
    finally:
        served.kill()
        driver.switch_to.window(first)


def test_many_steps_with_gaps_and_ends_and_a_class_to_choose(driver, tmp_path):
    model = fitted("wide", tmp_path / "wide.safetensors", epochs=0)
    served = Served(tmp_path / "verdicts.db", data="wide", model=model)
    try:
        # One with 30 steps of 48.
        page = Page(driver, served.links["ann"] + "#4")
        assert page.text("title").startswith("4")
        page.one("[data-all='1']").click()
        assert len(page.cells()) == 37 * 48
        # Of classes, the score is an accuracy.
        bench = ModelWorkbench(network(model), split_of("wide")[0].train, split_of("wide")[0].validation)
        assert page.text("metric").lower() == "validation accuracy"
        assert page.text("score") == f"{100 * bench.score().value:.1f} %"
        assert len(page.all("td.past")) == 37 * 18
        whole, seen, grid, room = driver.execute_script(WIDTHS)
        assert whole <= seen
        assert grid <= room
        gap = next(cell for cell in page.all("td.void")[:50])
        assert "no value" in gap.get_attribute("aria-label")
        assert "beyond the end" in page.all("td.past")[0].get_attribute("aria-label")
        # A row is selected as far as the instance goes.
        page.all("#map tbody th button")[0].click()
        assert page.text("chosen") == "30 cells selected"
        page.press("0")
        page.quiet()
        assert len(page.marks()) == 30
        # Values: the grid scrolls under names that stay.
        page.press("z")
        (top, _), (_, left) = driver.execute_script(CORNERS)
        driver.execute_script("document.querySelector('#scroller').scrollTo(400, 300)")
        (top_then, _), (_, left_then) = driver.execute_script(CORNERS)
        # They give way by the space between cells, and stay.
        assert (top_then, left_then) == pytest.approx((top, left), abs=10)
        for _ in range(3):
            page.press(Keys.ARROW_DOWN)
        assert driver.execute_script(IN_FRONT)
        # Of three classes, one after the other.
        chances = page.all("#chances button")
        assert len(chances) == 3
        numbers = [float(button.text.split("\n")[-1]) for button in chances]
        assert sum(numbers) == pytest.approx(1, abs=0.02)
        pressed = [button.get_attribute("aria-pressed") for button in chances]
        other = pressed.index("false")
        chances[other].click()
        page.until(lambda: page.text("what") == f"Prediction of class {other}")
        assert float(page.text("prediction")) == pytest.approx(numbers[other], abs=6e-3)
        page.press("u")
        page.quiet()
        page.until(lambda: not page.marks())
        assert page.text("what") == f"Prediction of class {other}"
    finally:
        served.kill()


WIDTHS = """
const grid = document.querySelector("#scroller");
return [document.scrollingElement.scrollWidth, innerWidth, grid.scrollWidth, grid.clientWidth];
"""
CORNERS = """
return ["#map thead th:nth-child(4)", "#map tbody tr:nth-child(3) th"].map((name) => {
  const box = document.querySelector(name).getBoundingClientRect(); return [box.top, box.left]; });
"""
IN_FRONT = """
const cell = document.activeElement, box = cell.getBoundingClientRect();
return cell.contains(document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2));
"""

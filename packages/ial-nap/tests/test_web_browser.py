from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import shutil
import threading
from urllib.parse import urlsplit

import pytest
from nap_served import Served, Threaded, browser, resize

from ial_nap.store import AnnotationStore
from ial_nap.web.linear import planted

pytest.importorskip("fastapi", reason="needs ial-nap[web]")
pytest.importorskip("selenium", reason="needs selenium, to drive a browser")
if not shutil.which("chromium") or not shutil.which("chromedriver"):
    pytest.skip("needs chromium and chromedriver on the path", allow_module_level=True)

from nap_page import Page
from selenium.webdriver.common.keys import Keys


@pytest.fixture
def served(request, tmp_path):
    # Only what is to be killed outright needs a process of its own.
    dies = any(word in request.node.name for word in ("killed", "outlives"))
    server = (Served if dies else Threaded)(tmp_path / "verdicts.db")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def driver():
    started = browser()
    yield started
    started.quit()


@pytest.fixture
def page(driver, served):
    driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": served.address, "storageTypes": "all"})
    return Page(driver, served.links["ann"])


def log(served, tmp_path):
    """The verdicts that stand in the file, read beside the server that writes it."""
    bench = planted()
    with AnnotationStore(
        tmp_path / "verdicts.db", bench.features, len(bench.steps), units=bench.units, read_only=True
    ) as store:
        return [(one.instance, one.feature, one.step, one.verdict) for one in store.standing()]


def test_the_queue_is_there_with_reasons_and_progress(page):
    assert len(page.all("#items button")) == 10
    assert all("uncertain" in reason for reason in page.texts("#items .why"))
    assert page.text("done") == "0 of 10 judged"
    assert len(page.cells()) == 8 * 4
    assert page.one("#items button[aria-current='true'] b").text in page.text("title")
    assert "token" not in page.driver.current_url


def test_verdicts_by_mouse_change_prediction_and_score_at_once(page, served, tmp_path):
    page.driver.execute_script("window.same = true")
    page.one("[data-all='1']").click()
    score, prediction = page.text("score"), page.text("prediction")
    ward = next(button for button in page.all("#map tbody th button") if button.text.startswith("ward A"))
    ward.click()
    assert page.text("chosen") == "4 cells selected"
    page.until(lambda: page.text("without") and page.text("without") != page.text("asis"))
    foreseen = page.text("without")
    page.one("[data-verdict='0']").click()
    page.quiet()
    page.until(lambda: page.text("score") != score)
    assert page.text("is") == foreseen
    assert page.text("was") != foreseen
    assert page.text("prediction") != prediction
    assert page.marks() == {("ward A", step): "✕" for step in range(4)}
    assert page.text("done") == "1 of 10 judged"
    assert page.driver.execute_script("return window.same")
    assert [(feature, step, verdict) for _, feature, step, verdict in log(served, tmp_path)] == [
        ("ward A", step, 0) for step in range(4)
    ]


def test_click_to_look_and_click_again_to_judge(page):
    page.cell(1, 2).click()
    assert page.text("chosen") == "1 cell selected"
    assert not page.marks()
    for mark in "✓✕?✓":
        page.cell(1, 2).click()
        page.quiet()
        assert list(page.marks().values()) == [mark]


def test_drag_and_column_headers_select_many(page):
    page.drag(page.cell(1, 1), page.cell(3, 2))
    assert page.text("chosen") == "6 cells selected"
    page.all("#map thead button")[3].click()
    assert page.text("chosen") == "8 cells selected"
    page.press("1")
    page.quiet()
    assert set(page.marks().values()) == {"✓"}
    assert len(page.marks()) == 8


def test_everything_by_keyboard(page, served, tmp_path):
    page.press(Keys.ARROW_DOWN)
    page.press("1")
    page.press(Keys.ARROW_RIGHT)
    page.press("0")
    page.press(Keys.ARROW_DOWN)
    page.press("?")
    page.quiet()
    assert sorted(page.marks().values()) == ["?", "✓", "✕"]
    page.press(Keys.SHIFT + Keys.ARROW_DOWN)
    page.press(Keys.SHIFT + Keys.ARROW_RIGHT)
    assert page.text("chosen") == "4 cells selected"
    page.press("u")
    page.quiet()
    page.until(lambda: sorted(page.marks().values()) == ["✓", "✕"])
    first = page.text("title")
    page.press("n")
    page.until(lambda: page.text("title") != first)
    page.press("p")
    page.until(lambda: page.text("title") == first)
    page.press("/")
    page.press("ward")
    page.until(lambda: len(page.cells()) == 8)
    page.press(Keys.ESCAPE)
    page.until(lambda: len(page.cells()) == 32)
    page.press("a")
    page.until(lambda: len(page.cells()) == 48)
    assert len(log(served, tmp_path)) == 2
    page.press("s")
    page.quiet()
    page.until(lambda: page.text("round") == "Round 2")
    assert page.text("done") == "0 of 10 judged"


def test_keys_in_the_note_are_text_and_the_note_is_kept(page, served):
    page.cell(0, 0).click()
    page.press("0")
    page.quiet()
    note = page.one("#note")
    note.click()
    note.send_keys("1 u 0 s ? not the illness")
    page.cell(0, 1).click()
    page.quiet()
    page.driver.refresh()
    page.until(lambda: note_of(page) == "1 u 0 s ? not the illness")
    assert list(page.marks().values()) == ["✕"]
    assert page.text("round") == "Round 1"


def note_of(page) -> str:
    return page.one("#note").get_attribute("value")


def test_the_label_is_hidden_until_asked_for(page):
    assert page.text("label") == "Show label"
    page.press("l")
    assert page.text("label") in {"Label: 0", "Label: 1"}
    page.press("n")
    page.until(lambda: page.text("label") == "Show label")


def test_the_colour_shows_what_is_asked_for(page):
    def shares():
        return [cell.value_of_css_property("background-color") for cell in page.cells()]

    seen = [shares()]
    for mode in ("attention", "uncertainty"):
        page.one(f"[data-mode='{mode}']").click()
        page.until(lambda: shares() not in seen)
        seen.append(shares())
    page.one("[data-mode='contributions']").click()
    assert page.all("td.doubt")
    page.press("n")
    page.one("[data-absolute='1']").click()
    assert page.one("[data-absolute='1']").get_attribute("aria-pressed") == "true"


def test_a_round_that_makes_it_worse_is_told_and_taken_back_by_one_click(page, served, tmp_path):
    before = page.text("score")
    page.one("[data-all='1']").click()
    for row in range(8):
        page.drag(page.cell(row, 0), page.cell(row, 3))
        page.press("0")
    page.quiet()
    page.until(lambda: page.one("#worse").is_displayed())
    assert "got worse in this round" in page.text("worseline")
    page.one("#revert").click()
    page.quiet()
    page.until(lambda: not page.one("#worse").is_displayed())
    assert page.text("score") == before
    assert not page.marks()
    assert not log(served, tmp_path)


def test_a_killed_server_loses_nothing_and_the_page_goes_on(page, served, tmp_path):
    page.cell(0, 0).click()
    page.press("1")
    page.quiet()
    served.kill()
    page.press(Keys.ARROW_RIGHT)
    page.press("0")
    page.until(lambda: "No connection" in page.text("line"))
    # The verdict shows, and waits.
    assert sorted(page.marks().values()) == ["✓", "✕"]
    again = Served(tmp_path / "verdicts.db", port=served.port)
    try:
        assert again.links == served.links
        page.quiet()
        page.until(lambda: len(log(again, tmp_path)) == 2)
        page.press(Keys.ARROW_RIGHT)
        page.press("?")
        page.quiet()
        assert [verdict for *_, verdict in log(again, tmp_path)] == [1, 0, -1]
        page.driver.refresh()
        page.until(lambda: sorted(page.marks().values()) == ["?", "✓", "✕"])
    finally:
        again.kill()


def test_what_waits_outlives_the_tab(page, served, tmp_path):
    page.cell(0, 0).click()
    served.kill()
    page.press("1")
    page.until(lambda: "No connection" in page.text("line"))
    again = Served(tmp_path / "verdicts.db", port=served.port)
    try:
        page.driver.get("about:blank")
        other = Page(page.driver, again.links["ann"])
        other.until(lambda: len(log(again, tmp_path)) == 1)
    finally:
        again.kill()


def test_two_annotators_at_once_see_each_other(page, driver, served):
    first = driver.current_window_handle
    page.cell(0, 0).click()
    page.press("1")
    page.quiet()
    instance = page.one("#items button[aria-current='true'] b").text
    driver.switch_to.new_window("window")
    try:
        other = Page(driver, served.links["bob"] + "#" + instance)
        assert (other.text("who"), page.text("who")) == ("bob", "bob")
        assert "an✓" in other.cell(0, 0).text
        other.cell(0, 0).click()
        other.press("0")
        other.quiet()
        assert "≠" in other.cell(0, 0).text
        other.until(lambda: "Annotators disagree on 1 cell" in other.text("splithead"))
        driver.switch_to.window(first)
        assert page.text("who") == "ann"
        page.until(lambda: "≠ bo✕" in page.cell(0, 0).text)
        page.until(lambda: page.one("#disagree").is_displayed())
        assert "✓ ann ✕ bob" in " ".join(page.text("splits").split())
        # One browser has one cookie, but every tab stays who it is.
        page.press(Keys.ARROW_RIGHT)
        page.press("1")
        page.quiet()
        driver.refresh()
        page.until(lambda: page.text("who") == "ann" and len(page.marks()) == 2)
        driver.switch_to.window(next(handle for handle in driver.window_handles if handle != first))
        driver.close()
    finally:
        driver.switch_to.window(first)


def test_nothing_leaves_the_machine_and_nothing_is_logged(page, served):
    page.press(Keys.ARROW_DOWN)
    page.press("1")
    page.quiet()
    asked = [
        json.loads(entry["message"])["message"]["params"]["request"]["url"]
        for entry in page.driver.get_log("performance")
        if '"Network.requestWillBeSent"' in entry["message"]
    ]
    asked = [url for url in asked if urlsplit(url).scheme not in {"data", "chrome", "about"}]
    assert len(asked) >= 4
    assert {url.partition("/?")[0].partition("/api")[0].rstrip("/") for url in asked} == {served.address}
    assert not page.driver.get_log("browser")


def test_another_site_cannot_ask_in_the_annotators_name(page, served, tmp_path):
    page.cell(0, 0).click()
    page.press("1")
    page.quiet()
    attack = f"""<script>
      const body = JSON.stringify({{}}), there = {served.address!r} + "/api/undo", done = [];
      for (const type of ["text/plain", "application/json"])
        done.push(fetch(there, {{method: "POST", body, mode: type === "text/plain" ? "no-cors" : "cors",
          credentials: "include", headers: {{"Content-Type": type}}}}).catch(() => 0));
      Promise.all(done).then(() => {{ document.title = "done"; }});
    </script>"""

    class Evil(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(attack.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Evil) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        # The same machine name: the cookie goes along, only the origin tells the pages apart.
        page.driver.get(f"http://127.0.0.1:{site.server_address[1]}/")
        page.until(lambda: page.driver.title == "done")
        site.shutdown()
    assert len(log(served, tmp_path)) == 1


@pytest.mark.parametrize(("header", "value"), [("Host", "evil.example"), ("Origin", "http://evil.example")])
def test_foreign_names_are_refused_on_the_wire(served, header, value):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)) as wire:
        headers = {"X-Token": served.tokens["ann"], "Content-Type": "application/json", header: value}
        wire.request("POST", "/api/undo", b"{}", headers)
        answer = wire.getresponse()
        assert (answer.status, header in json.loads(answer.read())["error"]) == (403, True)


def test_text_of_strangers_stays_text(driver, tmp_path):
    name = "<img src=x onerror=alert(1)>"
    served = Threaded(tmp_path / "verdicts.db", [name])
    try:
        page = Page(driver, served.links[name])
        page.cell(0, 0).click()
        page.press("1")
        page.quiet()
        page.until(lambda: "verdicts" in page.text("efforts"))
        assert page.text("who") == name
        assert not page.all("img")
    finally:
        served.kill()


def test_a_wrong_link_says_so(driver, served):
    driver.get(served.address + "/?token=wrong")
    assert "your own link" in driver.page_source


def test_the_stopwatch_stops_after_a_minute_without_a_move(page):
    times = page.driver.execute_script(
        """
        let now = 0;
        const watch = new ialNap.Stopwatch(() => now), seen = [];
        now = 5e5; seen.push(watch.total(), watch.running);
        watch.touch(); now += 30e3; watch.touch(); now += 10e3; seen.push(watch.total(), watch.running);
        seen.push(watch.take()); now += 49e3; seen.push(watch.running); now += 2e3; seen.push(watch.running);
        now += 1e6; seen.push(watch.take(), watch.take());
        watch.touch(); now += 1e3; watch.stop(); now += 1e3; seen.push(watch.take(), watch.running);
        return seen;
        """
    )
    assert times == [0, False, 40e3, True, 40e3, True, False, 50e3, 0, 1e3, False]


def test_everything_has_a_name_and_one_way_in_by_tab(page):
    nameless = page.driver.execute_script(
        """
        return [...document.querySelectorAll("button, input, textarea, [role=grid], nav, aside, section")].filter(one =>
          !(one.getAttribute("aria-label") || one.textContent.trim() || one.labels && one.labels.length)).length
        """
    )
    assert nameless == 0
    assert len(page.all("#map [tabindex='0']")) == 1
    label = page.cell(0, 0).get_attribute("aria-label")
    assert all(part in label for part in ("visit 1", "contribution", "not judged"))
    page.press(Keys.ARROW_DOWN)
    outline = page.driver.switch_to.active_element.value_of_css_property("outline-style")
    assert outline == "solid"


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800)])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_can_be_read(driver, served, width, height, dark):
    resize(driver, width, height, dark=dark)
    try:
        page = Page(driver, served.links["ann"])
        page.one("[data-all='1']").click()
        assert driver.execute_script("return document.scrollingElement.scrollWidth") <= width
        page.until(lambda: driver.execute_script(IN_SIGHT))
        # Colours change over a moment; contrast counts once they stand.
        for mode in ("contributions", "attention", "uncertainty", "contributions"):
            page.one(f"[data-mode='{mode}']").click()
            page.until(lambda: driver.execute_script("return !document.getAnimations().length"))
            ratios = driver.execute_script(CONTRAST)
            assert min(ratios.values()) >= 4.5, {name: ratio for name, ratio in ratios.items() if ratio < 4.5}
        if width < 600:
            cell = page.cell(0, 1)
            driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
            for _ in range(2):
                box = driver.execute_script("return arguments[0].getBoundingClientRect().toJSON()", page.cell(0, 1))
                at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
                driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [at]})
                driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
            page.until(lambda: list(page.marks().values()) == ["✓"])
    finally:
        resize(driver)


IN_SIGHT = """
return [...document.querySelectorAll("[data-verdict], #save")].every((one) => { const box = one.getBoundingClientRect();
  return box.top >= 0 && box.bottom <= innerHeight && box.left >= 0 && box.right <= innerWidth; });
"""
# The contrast of each text with what is behind it (WCAG 2.2, 1.4.3), painted on a canvas to get plain colours.
CONTRAST = """
const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
  .getContext("2d", {willReadFrequently: true});
const parents = (one) => one ? [...parents(one.parentElement), one] : [];
const light = (data) => [.2126, .7152, .0722].reduce((sum, share, k) => { const c = data[k] / 255;
  return sum + share * (c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4); }, 0);
const found = {};
for (const one of document.querySelectorAll("h1, h2, b, span, button, p, small, td, th")) {
  const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || !one.checkVisibility() || one.closest("dialog, :disabled")) continue;
  canvas.clearRect(0, 0, 1, 1);
  for (const part of parents(one)) {
    canvas.fillStyle = getComputedStyle(part).backgroundColor; canvas.fillRect(0, 0, 1, 1);
  }
  const behind = light(canvas.getImageData(0, 0, 1, 1).data);
  canvas.globalAlpha = parents(one).reduce((all, part) => all * getComputedStyle(part).opacity, 1);
  canvas.fillStyle = getComputedStyle(one).color; canvas.fillRect(0, 0, 1, 1); canvas.globalAlpha = 1;
  const before = light(canvas.getImageData(0, 0, 1, 1).data);
  const name = one.tagName + "." + one.className + "#" + one.id + ":" + one.textContent.trim().slice(0, 20);
  found[name] = (Math.max(before, behind) + .05) / (Math.min(before, behind) + .05);
}
return found;
"""

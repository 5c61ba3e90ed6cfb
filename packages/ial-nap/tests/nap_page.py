"""What a person sees of the annotation page, and does on it."""

from __future__ import annotations

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait


class Page:
    """The page in a browser.

    Parameters
    ----------
    driver : of the browser
    link : of an annotator
    """

    def __init__(self, driver, link: str) -> None:
        self.driver = driver
        # The page before this one must not speak into what is logged from here on.
        driver.get("about:blank")
        driver.get_log("browser")
        driver.get_log("performance")
        driver.get(link)
        self.until(lambda: self.cells())

    def until(self, holds):
        return WebDriverWait(self.driver, 20, 0.05, [Exception]).until(lambda _: holds())

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, name) -> str:
        return self.one(f"#{name}").text

    def texts(self, selector) -> list[str]:
        """Read all at one moment: the page may put others in their place before the second of them."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((part) => part.textContent)", selector
        )

    def cells(self):
        return self.all("#map td[data-step]")

    def cell(self, row: int, step: int):
        return self.one(f"#map tbody tr:nth-child({row + 1}) td[data-step='{step}']")

    def press(self, *keys) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def quiet(self) -> None:
        """Wait until everything is answered."""
        self.until(lambda: self.driver.execute_script("return ialNap.waiting() === 0"))

    def marks(self) -> dict[tuple[str, int], str]:
        found = self.driver.execute_script(
            "return [...document.querySelectorAll('#map .said')].map((mark) =>"
            " [mark.parentElement.dataset.feature, Number(mark.parentElement.dataset.step), mark.textContent])"
        )
        return {(feature, step): mark for feature, step, mark in found}

    def drag(self, start, end) -> None:
        ActionChains(self.driver, 20).click_and_hold(start).move_to_element(end).release().perform()

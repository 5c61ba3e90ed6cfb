"""Take a picture of the annotation page with a trained model and real data, after an expert has judged a column.

    python benchmarks/screenshot.py --out docs/page.png
    python benchmarks/screenshot.py --data digits --width 390 --height 844 --dark --out phone.png

Trains for some seconds; needs selenium, chromium and chromedriver (``scripts/setup-browser``).
"""

from __future__ import annotations

import argparse
import base64
import sys
import tempfile
from pathlib import Path

root = Path(__file__).parent.parent
sys.path[:0] = [str(root / "src"), str(root / "tests")]

from nap_served import Served, browser, fitted  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="cells", help="cells, digits or physionet2012")
    parser.add_argument("--model", type=Path, help="a file to keep the model in, or to take it from")
    parser.add_argument("--judge", default="site 1,site 2", help="features to rule out; empty for none")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--all", action="store_true", help="show all features")
    parser.add_argument("--values", action="store_true", help="show the values of wide data")
    parser.add_argument("--full", action="store_true", help="the whole page, not only what is in sight")
    parser.add_argument("--out", type=Path, required=True)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = settings.model or Path(folder) / "model.safetensors"
        if not model.exists():
            fitted(settings.data, model, settings.epochs)
        served = Served(Path(folder) / "verdicts.db", "Dr Anna Brandt", data=settings.data, model=model)
        page = browser(settings.width, settings.height, dark=settings.dark)
        try:

            def until(script: str) -> None:
                WebDriverWait(page, 60, 0.05, [Exception]).until(lambda _: page.execute_script("return " + script))

            def click(selector: str) -> None:
                page.execute_script(f"{selector}.scrollIntoView({{block: 'center'}}); {selector}.click()")

            page.get(next(iter(served.links.values())))
            until("document.querySelectorAll('#map td[data-step]').length")
            if settings.all:
                click("document.querySelector('[data-all=\"1\"]')")
            if settings.values:
                click("document.querySelector('[data-fit=\"0\"]')")
            for name in filter(None, settings.judge.split(",")):
                title = f"document.querySelector('#map th button[title=\"Select {name}\"]')"
                if page.execute_script(f"return !!{title}"):
                    click(title)
                    click("document.querySelector('[data-verdict=\"0\"]')")
                    until("ialNap.waiting() === 0")
            cell = page.find_elements(By.CSS_SELECTOR, "#map td[data-step]:not(.past)")[1]
            page.execute_script("arguments[0].focus()", cell)
            # The clock would otherwise differ in every picture.
            page.execute_script("document.activeElement.blur()")
            until("!document.getAnimations().length && ialNap.waiting() === 0")
            if settings.width < 600:
                page.execute_script("scrollTo(0, 0)")
            shot = page.execute_cdp_cmd(
                "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": settings.full}
            )
            settings.out.write_bytes(base64.b64decode(shot["data"]))
        finally:
            page.quit()
            served.kill()
    print(f"{settings.out}: {settings.out.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()

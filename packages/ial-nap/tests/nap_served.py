"""A server of the annotation page in a process of its own, and a browser to look at it with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"
CODE = """
import json, sys
from ial_nap.store import AnnotationStore
from ial_nap.web.app import serve
from ial_nap.web.linear import planted
path, port, people, size = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(","), int(sys.argv[4])
bench = planted(instances=size)
store = AnnotationStore(path, bench.features, len(bench.steps), units=bench.units)
serve(bench, store, people, port=port, announce=lambda links: print(json.dumps(links), flush=True))
"""


class Served:
    """The page of `planted` as a process; killed outright at the end."""

    def __init__(self, path: Path, people: str = "ann,bob", port: int = 0, instances: int = 200) -> None:
        search = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE, str(path), str(port), people, str(instances)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": search},
        )
        self.links: dict[str, str] = json.loads(self.process.stdout.readline())
        self.address = next(iter(self.links.values())).partition("/?")[0]
        self.port = int(self.address.rpartition(":")[2])
        self.tokens = {name: link.rpartition("=")[2] for name, link in self.links.items()}

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def browser(width: int = 1280, height: int = 800, *, dark: bool = False):
    """Start a headless browser, or skip with what is missing."""
    import pytest

    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, to drive a browser")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs chromium and chromedriver on the path")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "hide-scrollbars",
        "window-size=1280,900",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    phone = width < 600
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone},
    )
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
    )
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
    return page

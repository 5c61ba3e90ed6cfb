"""The page of all demos: whole in itself, nothing left out, nothing taken for markup."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contract import ROOT

HOSTILE = "<script>alert('&')</script>"


class Links(HTMLParser):
    """What a page asks for, and its visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in {"src", "href", "action", "data"}]

    def handle_data(self, data):
        self.text += data


def run_folder(folder: Path, package: str) -> None:
    folder.mkdir(parents=True)
    Image.fromarray(np.zeros((3, 4, 3), dtype=np.uint8)).save(folder / "a.png")
    row = {"unit": "1", "better": "lower", "n": 3, "seconds": 0.1, "dataset": "digits", "metric": "error"}
    summary = {
        "package": package, "version": "0.1.0", "command": "demo", "config": {}, "seed": 7, "device": "cpu",
        "threads": 1, "wall_seconds": 1.5,
        "results": [
            {**row, "method": HOSTILE, "mean": 0.25, "low": 0.15, "high": 0.35},
            {**row, "method": "baseline", "mean": 0.5, "low": None, "high": None},
        ],
        "claims": [
            {"text": "better than the baseline", "source": "paper", "holds": True, "value": 0.25, "threshold": 0.5},
            {"text": "better than everything", "source": "paper", "holds": False, "value": None, "threshold": None},
        ],
        "artifacts": ["a.png"],
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11.1", "versions": {"torch": "2"}}))


@pytest.fixture
def page(tmp_path) -> Links:
    for package in ("stamp", "cib-ite"):
        run_folder(tmp_path / package / "demo", package)
    command = [sys.executable, ROOT / "scripts" / "demos.py", "nowhere", tmp_path, "--page-only"]
    subprocess.run(command, check=True, capture_output=True)
    found = Links()
    found.feed((tmp_path / "report" / "index.html").read_text())
    return found


def test_it_is_whole_in_itself_and_takes_nothing_for_markup(page):
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert "script" not in page.tags
    assert HOSTILE in page.text


def test_it_shows_figures_claims_and_seeds(page):
    assert "Of 4 claims that were put to the test, 2 hold" in page.text
    assert page.text.count("stamp demo --seed 7") == 1
    assert re.search(r"0\.250.*±0\.100", page.text)
    assert page.tags.count("section") == 2
    # Each picture is there, and a small one of it in the gallery.
    assert page.tags.count("img") == 4


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins for demos are scripts with a first line")
def test_a_failed_demo_is_told_and_the_others_are_shown(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "stamp").write_text(f"#!{sys.executable}\nraise SystemExit('no luck')\n")
    (tools / "cib-ite").write_text(
        f"#!{sys.executable}\nimport sys, shutil\nshutil.copytree({str(tmp_path / 'made')!r}, sys.argv[-1])\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    run_folder(tmp_path / "made", "cib-ite")
    command = [sys.executable, ROOT / "scripts" / "demos.py", tools, tmp_path / "runs", "stamp", "cib-ite"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no luck" in done.stdout
    text = (tmp_path / "runs" / "report" / "index.html").read_text()
    assert "This demo failed: exit status 1: no luck" in text
    assert "better than the baseline" in text

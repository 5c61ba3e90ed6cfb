"""A server of the annotation page in a process of its own, and a browser to look at it with."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shared_core.testing import Program

HERE = str(Path(__file__).parent)
PLANTED = """
import json, sys
from ial_nap.store import AnnotationStore
from ial_nap.web.app import serve
from ial_nap.web.linear import planted
path, port, people, size = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(","), int(sys.argv[4])
bench = planted(instances=size)
store = AnnotationStore(path, bench.features, len(bench.steps), units=bench.units)
serve(bench, store, people, port=port, patience=float(sys.argv[5]),
      announce=lambda links: print(json.dumps(links), flush=True))
"""
TRAINED = """
import json, sys
import torch
torch.set_num_threads(1)
from nap_served import network, split_of
from ial_nap.store import AnnotationStore
from ial_nap.web.app import serve
from ial_nap.web.model import ModelWorkbench
path, port, people, name, model = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(","), sys.argv[4], sys.argv[5]
split, outputs, cer = split_of(name)
bench = ModelWorkbench(network(model), split.train, split.audit or split.validation, outputs=outputs, cer=cer)
store = AnnotationStore(path, bench.features, len(bench.steps), units=bench.units)
serve(bench, store, people, port=port, announce=lambda links: print(json.dumps(links), flush=True))
"""


def split_of(name: str):
    """Real data with two columns planted that tell the site, which gives the answer away in training only."""
    from ial_nap.data import load_data, plant
    from ial_nap.ranking import CER

    if name.startswith("shift:"):
        from ial_nap.dataset import Split
        from ial_nap.toys import shift_task

        train = shift_task(int(name.partition(":")[2]), shift=1.2, seed=0)
        held = shift_task(1000, shift=0.0, seed=1, like=train)
        return Split(train, held, held), None, CER()
    if name == "wide":
        return wide(), None, CER(samples=8)
    data = load_data(name)
    if name == "physionet2012":
        # Hours at which nearly nothing is measured yet would make a dull picture; so would a long training.
        split = data.split(0, validation=0.2)
        few = replace(split, train=split.train.part(range(600)), validation=split.validation.part(range(400)))
        return few, ["Probability of death"], CER(samples=8)
    split = plant(data.split(0, test=0.2, validation=0.5), audit=0.7)
    return split, None if data.kind == "multiclass" else [f"Probability of {data.classes[1]}"], CER()


def wide():
    """Series of 37 features and 48 steps, ragged and with gaps, of three classes."""
    import numpy as np

    from ial_nap.dataset import Split
    from ial_nap.series import make_series

    random = np.random.default_rng(0)
    x = random.normal(size=(60, 48, 37)).cumsum(1)
    x[random.random(x.shape) < 0.4] = np.nan
    lengths = [48 if k % 2 else 30 for k in range(60)]
    names = {"features": [f"lab {k}" for k in range(37)], "steps": [f"{k} h" for k in range(48)]}
    found = make_series(x, np.arange(60) % 3, lengths=lengths, missing="mask", **names)
    return Split(found.part(range(40)), found.part(range(40, 60)), found.part(range(40, 60)))


def fitted(name: str, path: Path, epochs: int = 40) -> Path:
    """Train on `split_of`, and keep the network in a file."""
    from safetensors.torch import save_file

    from ial_nap.nap import FeatureNAP
    from ial_nap.training import Episodic, Training

    split, _, _ = split_of(name)
    model = FeatureNAP.of(split.train, hidden=16, latent=8)
    if epochs:
        Training(model, Episodic(model), split.train, split.validation, batch_size=100, lr=1e-2, epochs=epochs).run()
    save_file(model.state_dict(), path, {"config": json.dumps(model.config)})
    return path


def network(path: str | Path):
    """Return what `fitted` kept."""
    from safetensors import safe_open

    from ial_nap.nap import FeatureNAP

    with safe_open(path, "pt") as file:
        model = FeatureNAP(**json.loads(file.metadata()["config"]))
        model.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    model.refresh()
    return model


class Served:
    """The page of `planted`, or of a trained model, as a process; killed outright at the end."""

    def __init__(
        self,
        path: Path,
        people: str = "ann,bob",
        port: int = 0,
        instances: int = 200,
        *,
        patience: float = 20.0,
        data: str = "",
        model: Path | None = None,
    ) -> None:
        what = [PLANTED, path, port, people, instances, patience]
        if model is not None:
            what = [f"import sys; sys.path.insert(0, {HERE!r})" + TRAINED, path, port, people, data, model]
        self.program = Program(*what)
        while not self.program.said.endswith("\n"):
            assert self.program.status is None, self.program.finish().stderr
            time.sleep(0.02)
        self.links: dict[str, str] = json.loads(self.program.said)
        self.address = next(iter(self.links.values())).partition("/?")[0]
        self.port = int(self.address.rpartition(":")[2])
        self.tokens = {name: link.rpartition("=")[2] for name, link in self.links.items()}

    def kill(self) -> None:
        self.program.send(signal.SIGKILL)
        self.program.finish()


class Threaded:
    """The page of `planted` in a thread of this process, which is there sooner; stopped at the end."""

    def __init__(self, path: Path, people: Sequence[str] = ("ann", "bob")) -> None:
        import uvicorn

        from ial_nap.store import AnnotationStore
        from ial_nap.web.app import create_app
        from ial_nap.web.linear import planted

        bench = planted()
        self.store = AnnotationStore(path, bench.features, len(bench.steps), units=bench.units)
        self.tokens = {name: self.store.token(name) for name in people}
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.links = {name: f"{self.address}/?token={token}" for name, token in self.tokens.items()}
        app = create_app(bench, self.store, list(people), port=self.port)
        self.server = uvicorn.Server(uvicorn.Config(app, ws="none", lifespan="off", log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    def kill(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()
        self.listener.close()
        self.store.close()


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
    resize(page, width, height, dark=dark)
    return page


def resize(page, width: int = 1280, height: int = 800, *, dark: bool = False) -> None:
    """Make a browser a phone's or a desk's."""
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

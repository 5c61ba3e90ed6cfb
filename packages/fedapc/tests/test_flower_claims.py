"""A real federation on the loopback, and a simulated one: TLS, authenticated nodes, and programs killed meanwhile."""

from __future__ import annotations

import json
import subprocess
import warnings

import pytest
from networks import same

pytest.importorskip("flwr", reason="Flower asks for an environment of its own: pip install 'fedapc[flower]'")

from flower_deployment import HOOK, Deployment, left_over

from fedapc.client import Client
from fedapc.config import FedAPCConfig
from fedapc.data import benchmark
from fedapc.decomposition import Layout, initial_base
from fedapc.engine import simulate
from fedapc.flower import write_project
from fedapc.flower._kept import read_state
from fedapc.ledger import Ledger
from fedapc.networks import network
from fedapc.server import Server
from fedapc.states import bytes_of

pytestmark = pytest.mark.claims

CONFIG = FedAPCConfig.preset("probed", rounds=1, epochs=1, batch_size=50, lr=9e-4)
DATA = {"clients": 2, "tasks": 2, "per_class": 6}


@pytest.fixture(scope="module")
def expected():
    """The same federation in one program."""
    data = benchmark("digits", **DATA)
    net = network(data.network, next(iter(data.tasks.values()))[0].x, classes=2)
    clients = [Client(name, net, tasks, CONFIG.learning()) for name, tasks in data.tasks.items()]
    at, accuracy = Server(initial_base(net, Layout.of(net)), dict.fromkeys(data.tasks, 2), **CONFIG.serving()), {}
    simulate(
        clients, at, after_round=lambda now: accuracy.update({str(now.round): {c.name: c.evaluate() for c in clients}})
    )
    return at, json.loads(json.dumps(accuracy).replace("NaN", "null"))


def test_nodes_and_server_killed_meanwhile_end_with_the_same_bits(expected, tmp_path):
    """Over TLS, with authenticated nodes; bytes on the loopback are those of the ledger and what comes on top."""
    app, out, holds = tmp_path / "app", tmp_path / "out", tmp_path / "holds"
    holds.mkdir()
    write_project(app, config=CONFIG, **DATA)
    with (app / "fedapc_app" / "client_app.py").open("a") as file:
        file.write(HOOK.format(folder=holds))
    (holds / "hold-client0-0").touch()
    (holds / "hold-client1-1").touch()
    settings = f'state-folder="{out}" resend=3000'
    with Deployment(tmp_path / "run") as deployed:
        deployed.superlink()
        for name in ("node1", "node2"):
            deployed.flwr("supernode", "register", str(deployed.folder / "certificates" / f"{name}.pub"), "deployed")
        deployed.supernode("node1", "partition-id=0")
        deployed.supernode("node2", "partition-id=1")
        deployed.run(app, settings)

        deployed.wait("the first client trains", (holds / "in-client0-0").exists)
        deployed.kill("node1")
        (holds / "hold-client0-0").unlink()
        deployed.supernode_again("node1", "partition-id=0")
        deployed.wait("the second client trains its second task", (holds / "in-client1-1").exists, 600.0)

        ledger = Ledger.from_jsonl(bytes_of(read_state(out / "server.safetensors")["ledger"]).decode())
        for way in ("up", "down"):
            counted = ledger.total("wire_bytes", direction=way)
            passed = sum(getattr(proxy, way) for proxy in deployed.proxies.values())
            warnings.warn(
                f"{way}: {counted} bytes of records in the ledger, {passed} on the loopback ({passed / counted:.2f} x)",
                stacklevel=1,
            )
            # What TLS and HTTP, looking for messages every few seconds, and the app itself take.
            assert counted < passed < counted + 600_000

        deployed.kill("superlink")
        (holds / "hold-client1-1").unlink()
        deployed.superlink()
        deployed.run(app, settings)
        deployed.wait("the federation ends", (out / "accuracy.json").exists, 600.0)
    at, accuracy = expected
    assert same(read_state(out / "base.safetensors"), at.base)
    assert json.loads((out / "accuracy.json").read_text()) == accuracy
    ended = Ledger.from_jsonl((out / "ledger.jsonl").read_text())
    # Requests were sent twice, and nothing was trained twice.
    assert ended.total("values", direction="up") == at.ledger.total("values", direction="up")
    assert ended.total("values", direction="down") >= at.ledger.total("values", direction="down")
    assert left_over(tmp_path / "run" / "home") == []


def test_a_written_project_is_simulated_as_it_is(expected, tmp_path):
    pytest.importorskip("ray", reason="simulation needs Ray: pip install 'fedapc[flower-simulation]'")
    out = tmp_path / "out"
    write_project(tmp_path / "app", config=CONFIG, **DATA)
    with Deployment(tmp_path / "run", nodes=()) as local:
        (local.home / "config.toml").unlink()
        local.env["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] = str(local.port)
        done = subprocess.run(
            [
                "flwr", "run", str(tmp_path / "app"), "--stream", "--federation-config",
                "num-supernodes=2 client-resources-num-cpus=1", "--run-config", f'state-folder="{out}"',
            ],
            env=local.env, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert (out / "accuracy.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    at, accuracy = expected
    assert same(read_state(out / "base.safetensors"), at.base)
    assert json.loads((out / "accuracy.json").read_text()) == accuracy
    ledger = Ledger.from_jsonl((out / "ledger.jsonl").read_text())
    assert ledger.events() == []
    assert ledger.total("encoded_bytes") == at.ledger.total("encoded_bytes") < ledger.total("wire_bytes")
    assert left_over(tmp_path / "run" / "home") == []

"""What holds without Flower: nobody imports it unasked, a project can be written, and the rest says what is missing."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from fedapc.config import FedAPCConfig
from fedapc.flower import write_project
from shared_core.errors import InputError

CODE = """
import sys, fedapc, fedapc.flower
fedapc.flower.write_project
assert "flwr" not in sys.modules
sys.modules["flwr"] = None
uses = {
    "client_app": [print], "server_app": [print], "FedAPCStrategy": [None], "LocalGrid": [None, []],
    "make_certificates": ["nowhere"],
}
for name, arguments in uses.items():
    try:
        getattr(fedapc.flower, name)(*arguments)
    except ValueError as error:
        print(str(error).endswith("pip install 'fedapc[flower]'"))
"""


def test_flower_is_imported_when_it_is_used_and_missed_with_a_word_on_how_to_get_it():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 5


def test_a_project_has_all_settings(tmp_path):
    config = FedAPCConfig.preset("reference", rounds=7)
    paths = write_project(tmp_path, benchmark="gaussian", clients=3, tasks=2, per_class=5, seed=4, config=config)
    assert all(path.is_file() for path in paths)
    assert "@@" not in "".join(path.read_text() for path in paths)
    found = tomllib.loads((tmp_path / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    settings = {name: found[name.replace("_", "-")] for name in FedAPCConfig.model_fields}
    assert FedAPCConfig.preset("probed", **settings) == config
    assert (found["clients"], found["benchmark-tasks"], found["seed"]) == (3, 2, 4)
    for path in paths:
        if path.suffix == ".py":
            compile(path.read_text(), str(path), "exec")
    readme = (tmp_path / "README.md").read_text()
    assert '"num-supernodes=3 client-resources-num-cpus=1"' in readme
    assert "partition-id=1 state-dir=" in readme


def test_a_network_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="takes images"):
        write_project(tmp_path / "app", benchmark="gaussian", clients=2, tasks=2, per_class=5, network="lenet")
    assert not (tmp_path / "app").exists()
    with pytest.raises(InputError, match="choose"):
        write_project(tmp_path / "app", benchmark="moon")


def test_a_users_network_is_named_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\ndef small(input_shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], 4), nn.ReLU(), nn.Linear(4, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    write_project("app", benchmark="gaussian", clients=2, tasks=2, per_class=5, network="mine.py:small")
    named = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]["network"]
    assert named == f"{tmp_path / 'mine.py'}:small"

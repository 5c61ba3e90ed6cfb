"""What holds without Flower: a project can be written. That the rest says what is missing is in test_cli.py."""

from __future__ import annotations

import tomllib

import pytest

from fedapc.config import FedAPCConfig
from fedapc.flower import write_project
from shared_core.errors import InputError


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
    with pytest.raises(InputError, match="no benchmark 'moon'"):
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

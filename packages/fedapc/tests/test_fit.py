"""A federation in a few lines: what it returns, keeps, takes up again, and refuses."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from networks import Convolutional, mlp, same, task
from torch import nn

import fedapc.federation
from fedapc.config import PRESETS, FedAPCConfig
from fedapc.engine import ProcessFleet
from fedapc.errors import ModelMismatchError, TaskError, WireError
from fedapc.federation import FedAPC, Federation, training_of
from fedapc.report import Report
from fedapc.tasks import Task
from shared_core.errors import InputError, UnknownKeyError
from shared_core.runs import load_tree, save_tree

CONFIG = FedAPCConfig(rounds=2, epochs=2, batch_size=8, lr=5e-4, upload_fraction=0.5)
ONCE = CONFIG.model_copy(update={"epochs": 1})


def with_test(seed, classes=3):
    """Clusters that are learnt at once, and others of the same to be tested on."""
    whole = task(seed, classes, 90)
    return Task(whole.x[:60], whole.y[:60], classes, test=(whole.x[60:], whole.y[60:]), name=f"clusters{seed}")


def tasks(clients=2, count=3):
    return {f"site{c}": [with_test(10 * c + k) for k in range(count - c)] for c in range(clients)}


@pytest.fixture(scope="module")
def fitted():
    federation, seen = FedAPC(mlp(), CONFIG), []
    report = federation.fit(tasks(), on_round=seen.append)
    return federation, report, seen


def test_the_report(fitted):
    federation, report, _ = fitted
    assert report.clients == ("site0", "site1")
    assert report.tasks["site1"] == ("clusters10", "clusters11")
    assert report.matrix.shape == (2, 3, 3)
    assert np.isnan(report.matrix[1, 2]).all()
    assert np.isnan(report.matrix[0, 0, 1:]).all()
    for name, own in tasks().items():
        last = [federation.clients[name].accuracy(*t.test, k) for k, t in enumerate(own)]
        assert report.of_client(name)[-1].tolist() == last
    assert report.accuracy == pytest.approx(
        np.mean([np.nanmean(report.of_client(name)[-1]) for name in report.clients])
    )
    assert set(report.attention("site0", 1)) == {"0.weight", "2.weight"}
    assert list(report.attention("site0", 1)["0.weight"]) == [("site1", 0)]
    assert report.attention("site0", 0) == {}
    assert 0 < report.density < 1
    assert np.isnan(report.gains[:, 0]).all()
    assert not np.isnan(report.gains[0, 1])
    assert report.ledger.total("messages") == 2 * (2 * 3 + 2 * 2)
    for wrong in (("site9", 0), ("site1", 2)):
        with pytest.raises(UnknownKeyError, match="site"):
            report.attention(*wrong)


def test_a_report_goes_to_a_folder_and_back(fitted, tmp_path):
    _, report, _ = fitted
    report.save(tmp_path)
    again = Report.load(tmp_path)
    np.testing.assert_array_equal(again.matrix, report.matrix)
    np.testing.assert_array_equal(again.gains, report.gains)
    assert again.attentions == report.attentions
    assert again.ledger == report.ledger
    assert (again.clients, again.tasks, again.method) == (report.clients, report.tasks, report.method)
    for text in ("{", '{"clients": []}', '{"matrix": 3}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(InputError, match=r"report\.json"):
            Report.load(tmp_path)
    with pytest.raises(InputError, match="run folder"):
        Report.load(tmp_path / "nowhere")


def test_export_is_a_plain_network(fitted):
    federation, *_ = fitted
    x = torch.randn(5, 6)
    for name, own in tasks().items():
        for number in range(len(own)):
            net = federation.export(name, number)
            assert type(net) is nn.Sequential
            torch.testing.assert_close(net(x), federation.predict(name, x, number))
    with pytest.raises(UnknownKeyError, match="site0, site1"):
        federation.export("nobody", 0)
    with pytest.raises(UnknownKeyError, match=r"task 7.*\[0, 1, 2\]"):
        federation.export("site0", 7)


@pytest.mark.parametrize("method", ["fedapc", "fedavg", "apd", "stl"])
def test_saved_and_opened_without_the_tasks(method, tmp_path, fitted):
    federation, *_ = fitted
    if method != "fedapc":
        federation = Federation(mlp(), method, config=ONCE)
        federation.fit(tasks())
    federation.save(tmp_path / "f.safetensors")
    again = Federation.open(tmp_path / "f.safetensors", mlp())
    x = torch.randn(4, 6)
    for name, own in tasks().items():
        for number in range(len(own)):
            assert torch.equal(again.predict(name, x, number), federation.predict(name, x, number))
    with_tasks = Federation(mlp(), method, config=federation.config)
    with_tasks.load(tmp_path / "f.safetensors", tasks())
    assert with_tasks.clients["site1"].evaluate() == federation.clients["site1"].evaluate()


def test_only_what_was_saved_is_opened(tmp_path, fitted):
    save_tree(tmp_path / "other.safetensors", {"kind": "cake"})
    with pytest.raises(InputError, match=r"other\.safetensors: is no saved federation"):
        Federation.open(tmp_path / "other.safetensors", mlp())
    fitted[0].save(tmp_path / "f.safetensors")
    with pytest.raises(InputError, match="other layers"):
        Federation.open(tmp_path / "f.safetensors", nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)))
    with pytest.raises(InputError, match="nothing was learnt"):
        FedAPC(mlp()).save(tmp_path / "g.safetensors")


class Stop(Exception):
    pass


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("method", ["fedapc", "fedweit", "scaffold", "ewc"])
def test_an_interrupted_run_goes_on_to_the_same_bits(method, tmp_path):
    whole = Federation(mlp(), method, config=ONCE)
    expected = whole.fit(tasks())
    file = tmp_path / "checkpoint.safetensors"
    after = [1, 2, 3, 5]
    for stop in after:

        def on_round(progress, stop=stop):
            if progress.round == stop:
                raise Stop

        with pytest.raises(Stop):
            Federation(mlp(), method, config=ONCE).fit(tasks(), checkpoint=file, on_round=on_round)
    last = Federation(mlp(), method, config=ONCE)
    seen = []
    report = last.fit(tasks(), checkpoint=file, on_round=lambda progress: seen.append(progress.round))
    assert seen == [5, 6]
    np.testing.assert_array_equal(report.matrix, expected.matrix)
    np.testing.assert_array_equal(report.gains, expected.gains)
    assert report.attentions == expected.attentions
    assert report.ledger == expected.ledger
    x = torch.randn(4, 6)
    assert torch.equal(last.predict("site0", x, 2), whole.predict("site0", x, 2))
    with pytest.raises(InputError, match="other clients"):
        Federation(mlp(), method, config=ONCE).fit(tasks(clients=1), checkpoint=file)
    assert load_tree(file)["kind"].startswith("fedapc")


class Asked(ProcessFleet):
    """Processes that are asked before they end."""

    found = None

    def close(self):
        names = list(self._home)
        states = {name: self.call(name, "state") for name in names}
        with pytest.raises(UnknownKeyError, match="there is no task 9"):
            self.call("site0", "export", 9)
        refusals = [type(answer) for _, answer in self.answers(names, lambda name: b"")]
        Asked.found = states, refusals
        super().close()


@pytest.mark.usefixtures("unchecked")
def test_processes_and_threads_change_nothing(monkeypatch):
    own = {**tasks(), "site2": [with_test(5), with_test(6)]}
    federation = FedAPC(mlp(), ONCE)
    expected = federation.fit(own)
    monkeypatch.setattr(fedapc.federation, "ProcessFleet", Asked)
    x = torch.randn(4, 6)
    for options in ({"processes": 2}, {"workers": 2}):
        other = FedAPC(mlp(), ONCE)
        report = other.fit(own, **options)
        np.testing.assert_array_equal(report.matrix, expected.matrix)
        assert report.attentions == expected.attentions
        assert report.ledger == expected.ledger
        assert same(other.server.state(), federation.server.state())
        assert torch.equal(other.predict("site1", x, 1), federation.predict("site1", x, 1))
    states, refusals = Asked.found
    assert all(same(states[name], client.state()) for name, client in federation.clients.items())
    assert refusals == [WireError] * 3
    with pytest.raises(InputError, match="workers"):
        Federation(mlp(), "fedavg", config=ONCE).fit(own, processes=2)


def test_progress(fitted):
    *_, seen = fitted
    assert [(p.round, p.rounds, p.task) for p in seen] == [(r, 6, (r - 1) // 2) for r in range(1, 7)]
    assert [np.isnan(p.accuracy) for p in seen] == [True, False] * 3
    assert all(a.megabytes < b.megabytes for a, b in pairwise(seen))


def test_presets():
    assert FedAPCConfig.preset("probed") == FedAPCConfig()
    assert FedAPCConfig.preset("fedweit").attention_init == "zeros"
    reference = FedAPCConfig.preset("reference", rounds=3)
    assert (reference.upload_fraction, reference.kb_policy, reference.retroactive) == (0.7, "last+self", "none")
    assert (reference.rounds, reference.serving()["rounds"]) == (3, 3)
    assert FedAPCConfig.preset("fed-apc").transfer == "mean"
    for name in PRESETS:
        assert FedAPCConfig.preset(name).learning().lr == pytest.approx(1e-3 / 3)
        assert training_of(FedAPCConfig.preset(name)).learning == FedAPCConfig.preset(name).learning()


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("fedweight", {}, "probed, fedweit"),
        ("fedweit", {"round": 3}, "round: Extra inputs"),
        ("fedweit", {"upload_fraction": 0.0}, "upload_fraction: .*greater than 0, got 0"),
        ("fedweit", {"kb_policy": "most"}, "kb_policy: .*sample:K"),
        ("fedweit", {"lr": float("nan")}, "lr: .*finite"),
    ],
)
def test_wrong_settings(name, settings, match):
    with pytest.raises(InputError, match=match):
        FedAPCConfig.preset(name, **settings)


def test_what_cannot_be_learnt_is_said_before_anything_runs():
    federation = FedAPC(mlp(), CONFIG)
    with pytest.raises(TaskError, match="no clients"):
        federation.fit({})
    with pytest.raises(TaskError, match="'empty': has no tasks"):
        federation.fit({**tasks(), "empty": []})
    wide = Task(torch.randn(9, 7), torch.arange(9) % 3, 3)
    with pytest.raises(
        ModelMismatchError, match=r"client 'site1', task 1: the network cannot take inputs of shape \(7,"
    ):
        federation.fit({"site0": [with_test(1)], "site1": [with_test(2), wide]})
    whole = Task(torch.randint(0, 9, (9, 6)), torch.arange(9) % 3, 3)
    with pytest.raises(ModelMismatchError, match="int64"):
        federation.fit({"site0": [whole]})
    with pytest.raises(UnknownKeyError, match="fedavg"):
        Federation(mlp(), "fedaverage").fit(tasks())
    with pytest.raises(InputError, match="running statistics"):
        FedAPC(Convolutional(norm=True))


@pytest.mark.usefixtures("unchecked")
def test_one_network_by_client():
    """What is not shared may differ; what is shared must not."""

    class Odd(nn.Module):
        def __init__(self, scale, hidden=7):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, hidden), nn.ReLU())
            self.head = nn.Linear(hidden, 3)
            self.scale = scale

        def forward(self, x):
            return self.head(self.body(self.scale * x))

    federation = FedAPC({"site0": Odd(1.0), "site1": Odd(2.0)}, CONFIG)
    federation.fit(tasks())
    assert federation.export("site1", 0).scale == 2.0
    with pytest.raises(ModelMismatchError, match=r"'site1': layer body\.2\.weight .*\(8, 10\).*'site0' \(7, 10\)"):
        FedAPC({"site0": Odd(1.0), "site1": Odd(1.0, hidden=8)})
    with pytest.raises(ModelMismatchError, match="'site1': has no network"):
        FedAPC({"site0": Odd(1.0)}, CONFIG).fit(tasks())
    with pytest.raises(InputError, match="no network"):
        FedAPC({})


def test_pretrained_weights_are_begun_with():
    net = mlp()
    federation = FedAPC(net, FedAPCConfig(rounds=1, lr=1e-12, weight_decay=0.0), start="module")
    federation.fit({"a": [with_test(0)]})
    for name in ("0.weight", "2.weight"):
        torch.testing.assert_close(federation.server.base[name], net.get_parameter(name).detach())

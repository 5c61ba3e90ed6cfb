"""What a report counts, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from networks import mlp, task

from fedapc.config import FedAPCConfig
from fedapc.federation import FedAPC, Federation
from fedapc.report import Report


def test_capacity_is_what_clients_hold(tmp_path):
    config = FedAPCConfig(rounds=1, batch_size=8, lr=5e-4)
    federation = FedAPC(mlp(), config)
    report = federation.fit({"a": [task(0), task(1)], "b": [task(2)]})
    for place, name in enumerate("ab"):
        model = federation.clients[name].model
        held = sum(int(base.count_nonzero()) for base in model.base.values())
        held += sum(int(part.dense().count_nonzero()) for t in model.tasks for part in model.part(t).values())
        assert report.capacities[place] == pytest.approx(held / model.layout.elements())
    assert report.capacity == pytest.approx(report.capacities.mean())
    assert 1 < report.capacity < 3
    report.save(tmp_path)
    np.testing.assert_array_equal(Report.load(tmp_path).capacities, report.capacities)
    plain = Federation(mlp(), "fedavg", config=config).fit({"a": [task(0)]})
    assert np.isnan(plain.capacity)
    assert np.isnan(plain.accuracy), "no test examples, no accuracy"

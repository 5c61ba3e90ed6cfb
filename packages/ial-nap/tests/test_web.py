from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import itertools
import re
import threading
import time
from importlib.resources import files

import numpy as np
import pytest
from nap_served import Served

from ial_nap.annotations import Annotation
from ial_nap.store import AnnotationStore
from shared_core.errors import InputError

pytest.importorskip("fastapi", reason="needs ial-nap[web]")
pytest.importorskip("httpx", reason="needs httpx, to talk to the server without a network")

from fastapi.testclient import TestClient

from ial_nap.web.app import create_app, serve
from ial_nap.web.linear import LinearWorkbench, planted

PORT = 8765


@pytest.fixture(scope="module")
def wired(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("wire") / "verdicts.db", patience=0.3)
    yield served
    served.kill()


HOST = {"Host": f"127.0.0.1:{PORT}"}


class World:
    def __init__(self, path) -> None:
        self.bench = planted()
        self.store = AnnotationStore(path, self.bench.features, 4, units=self.bench.units)
        self.client = self.started(self.bench)

    def started(self, bench) -> TestClient:
        app = create_app(bench, self.store, ["ann", "bob"], port=PORT)
        return TestClient(app, base_url=f"http://127.0.0.1:{PORT}", raise_server_exceptions=False)

    def get(self, path, who="ann", **headers):
        return self.client.get(path, headers={"X-Token": self.store.token(who), **headers})

    def post(self, path, body, who="ann", **headers):
        return self.client.post(path, json=body, headers={"X-Token": self.store.token(who), **headers})

    def judge(self, verdict, *, who="ann", instance="pid-3", feature="ward A", steps=(0, 1, 2, 3), **more):
        cells = [{"step": step, "feature": feature, "verdict": verdict} for step in steps]
        return self.post("/api/annotate", {"instance": instance, "cells": cells, **more}, who)


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path / "verdicts.db")
    yield made
    made.store.close()


def test_the_linear_bench_adds_up_and_obeys_exactly():
    bench = planted(1)
    view = bench.view("pid-7")
    assert view.prediction == pytest.approx(1 / (1 + np.exp(-view.contributions.sum())))
    assert view.low < view.prediction < view.high
    ward = bench.features.index("ward A")
    cells = [(step, ward) for step in range(4)]
    expected = bench.what_if("pid-7", cells)
    bench.update([Annotation("pid-0", step, "ward A", 0) for step in range(4)])
    after = bench.view("pid-7")
    assert (after.prediction, after.low, after.high) == expected
    assert not after.contributions[:, ward].any()
    bench.update([])
    assert bench.view("pid-7").prediction == view.prediction


def test_the_area_of_the_linear_bench_against_scikit_learn():
    from sklearn.metrics import roc_auc_score

    bench = planted(2)
    logits = np.einsum("ntr,tr->n", bench._held_out, bench._weights)
    assert bench.score().value == pytest.approx(roc_auc_score(bench._held_out_labels, logits))


def test_a_queue_with_reasons_names_and_score(world):
    queue = world.get("/api/queue").json()
    assert (queue["annotator"], queue["round"], len(queue["items"]), len(queue["features"])) == ("ann", 1, 10, 12)
    assert queue["features"][1] == {"name": "LDL", "unit": "mg/dL"}
    assert all(item["reason"] and len(item["features"]) == 8 and not item["given"] for item in queue["items"])
    assert queue["score"]["value"] == world.bench.score().value == queue["score"]["start"]


def test_a_verdict_is_in_the_model_and_on_disk_before_the_answer(world):
    seen = world.get("/api/instance/pid-3").json()
    expected = world.bench.what_if("pid-3", [(step, 10) for step in range(4)])
    answer = world.judge(0, seconds=4.0, note="a ward is no illness").json()
    assert (answer["prediction"], answer["low"], answer["high"]) == expected
    assert answer["before"]["prediction"] == seen["prediction"]
    assert answer["score"]["value"] > answer["score"]["start"]
    assert [(one.verdict, one.seconds, one.note) for one in world.store.log()] == [(0, 1.0, "a ward is no illness")] * 4
    # The next request of anybody sees it, on any instance.
    assert world.get("/api/instance/pid-9", "bob").json()["contributions"][0][10] == 0
    assert world.get("/api/metrics", "bob").json()["verdicts"] == 4


def test_undo_brings_back_what_was(world):
    before = world.get("/api/instance/pid-3").json()
    world.judge(0)
    assert world.post("/api/undo", {}, "bob").json()["undone"] == 0
    answer = world.post("/api/undo", {"key": "k"}).json()
    assert answer["undone"] == 4
    for name in ("prediction", "low", "high", "contributions", "mine"):
        assert answer[name] == before[name]
    assert world.post("/api/undo", {"key": "k"}).json()["undone"] == 0


def test_a_call_that_is_repeated_counts_once(world):
    first = world.judge(0, key="once").json()
    second = world.judge(0, key="once").json()
    assert (first["new"], second["new"], len(world.store.log())) == (True, False, 4)
    assert second["prediction"] == first["prediction"]


def test_what_if_writes_nothing(world):
    version = world.get("/api/metrics").json()["version"]
    found = world.post("/api/whatif", {"instance": "pid-3", "cells": [{"step": 0, "feature": "ward A"}]}).json()
    assert found["prediction"] == world.bench.what_if("pid-3", [(0, 10)])[0]
    assert world.get("/api/metrics").json()["version"] == version


def test_a_round_that_makes_it_worse_is_told_and_taken_back(world):
    assert "no verdict yet" in world.post("/api/round", {"action": "close"}).json()["error"]
    world.judge(0)
    closed = world.post("/api/round", {"action": "close"}).json()
    assert closed["round"] == 2
    better = closed["score"]["value"]
    for feature in ("smoking", "LDL", "HDL", "age"):
        worse = world.judge(0, feature=feature).json()
    assert worse["score"]["worse"]
    assert worse["score"]["start"] == better
    back = world.post("/api/round", {"action": "revert"}).json()
    assert (back["undone"], back["score"]["value"], back["score"]["worse"]) == (16, better, False)
    (kept,) = world.get("/api/metrics").json()["rounds"]
    assert (kept["number"], kept["verdicts"], kept["value"]) == (1, 4, better)


def test_the_queue_of_a_round_stays_and_the_next_one_is_new(world):
    first = world.get("/api/queue").json()
    world.judge(0, instance=first["items"][2]["instance"])
    again = world.get("/api/queue").json()
    assert [item["instance"] for item in again["items"]] == [item["instance"] for item in first["items"]]
    assert [item["given"] for item in again["items"]] == [0, 0, 4, 0, 0, 0, 0, 0, 0, 0]
    world.post("/api/round", {"action": "close"})
    assert [item["given"] for item in world.get("/api/queue").json()["items"]] == [0] * 10


def test_two_annotators_who_disagree(world):
    world.judge(0)
    world.judge(1, who="bob", steps=(0,))
    view = world.get("/api/instance/pid-3").json()
    assert view["others"] == [{"step": 0, "feature": "ward A", "verdict": 1, "annotator": "bob"}]
    metrics = world.get("/api/metrics").json()
    assert metrics["disagreeing"] == 1
    assert metrics["disagreements"][0]["attend"] == ["bob"]
    assert [one["verdicts"] for one in metrics["efforts"]] == [4, 1]
    # One against one: the model knows nothing about this cell, so it counts again.
    assert view["contributions"][0][10] != 0
    assert view["contributions"][1][10] == 0


def test_a_restart_goes_on_where_it_was(world):
    world.judge(0)
    before = world.get("/api/instance/pid-3").json()
    again = world.started(planted()).get("/api/instance/pid-3", headers={"X-Token": world.store.token("ann")}).json()
    assert {**again, "version": 0} == {**before, "version": 0}


def test_many_at_once_and_nothing_is_lost(world):
    def work(who: str, base: int) -> None:
        for number in range(15):
            answer = world.judge(number % 2, who=who, instance=f"pid-{base + number}", steps=(0,))
            assert answer.status_code == 200
            assert len(answer.json()["mine"]) == 1

    people = [threading.Thread(target=work, args=(("ab"[k % 2] == "a" and "ann") or "bob", 20 * k)) for k in range(4)]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert len(world.store.standing()) == 60
    fresh = planted()
    fresh.update(world.store.standing())
    assert world.get("/api/metrics").json()["score"]["value"] == fresh.score().value


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, "instance"),
        ({"instance": "pid-3", "cells": []}, "cells"),
        ({"instance": "pid-3", "cells": [{"step": 0, "feature": "LDL", "verdict": 2}]}, "cells.0.verdict"),
        ({"instance": "pid-3", "cells": [{"step": "0", "feature": "LDL", "verdict": 1}]}, "cells.0.step"),
        ({"instance": "pid-3", "cells": [{"step": -1, "feature": "LDL", "verdict": 1}]}, "cells.0.step"),
        ({"instance": "pid-3", "cells": [{"step": 0, "feature": "LDL", "verdict": 1, "x": 1}]}, "cells.0.x"),
        ({"instance": "pid-3", "cells": [{"step": 0, "feature": "LDL", "verdict": 1}], "seconds": -1.0}, "seconds"),
        ({"instance": "pid-3", "cells": [{"step": 0, "feature": "LDL", "verdict": 1}], "key": "a b"}, "key"),
        ({"instance": "pid-3", "cells": [{"step": 0, "feature": "LDL", "verdict": 1}], "note": "x" * 2001}, "note"),
        ([1], "body"),
    ],
)
def test_wrong_bodies_are_refused_in_one_line(world, body, place):
    answer = world.post("/api/annotate", body)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(place + ": ")
    assert "\n" not in answer.json()["error"]
    assert not world.store.log()


def test_what_is_not_there(world):
    assert world.get("/api/instance/pid-999").status_code == 404
    assert "pid-999" in world.judge(1, instance="pid-999").json()["error"]
    assert "feature 'LDH' is not known" in world.judge(1, feature="LDH").json()["error"]
    assert "there are 4 steps" in world.judge(1, steps=(4,)).json()["error"]
    assert world.get("/api/nothing").json() == {"error": "Not Found"}
    assert world.client.get("/docs", headers=HOST).status_code == 404
    assert not world.store.log()


def test_nobody_comes_in_without_a_token(world):
    for path in ("/", "/api/queue", "/api/instance/pid-3", "/api/metrics", "/?token=", "/?token=x"):
        answer = world.client.get(path, headers=HOST)
        assert answer.status_code == 401
        assert "your own link" in answer.json()["error"]
    for path in ("/api/annotate", "/api/undo", "/api/round", "/api/whatif"):
        assert world.client.post(path, json={}, headers={"X-Token": "é".encode()}).status_code in {401, 422}
    assert world.client.post("/api/undo", json={}, headers={"X-Token": "x"}).status_code == 401


def test_the_link_sets_a_cookie_that_other_sites_cannot_use(world):
    answer = world.client.get("/", params={"token": world.store.token("bob")})
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert world.client.get("/api/queue").json()["annotator"] == "bob"
    # A tab that still knows its own token stays itself, whoever else came by in this browser.
    assert world.get("/api/queue").json()["annotator"] == "ann"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1:1"},
        {"Host": f"127.0.0.1:{PORT}.evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{PORT + 1}"},
        {"Origin": f"http://evil.example://127.0.0.1:{PORT}"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_foreign_hosts_and_pages_are_refused(world, headers):
    for answer in (world.post("/api/undo", {}, **headers), world.get("/api/queue", **headers)):
        assert answer.status_code == 403
        assert next(iter(headers)) in answer.json()["error"]


def test_ones_own_page_is_not(world):
    for name in ("127.0.0.1", "localhost", "[::1]"):
        own = {"Host": f"{name}:{PORT}", "Origin": f"http://{name}:{PORT}", "Sec-Fetch-Site": "same-origin"}
        assert world.post("/api/undo", {}, **own).status_code == 200


def test_large_bodies_are_refused_whether_or_not_they_say_so(world):
    big = b'{"key": "' + b"x" * (1 << 20) + b'"}'
    kind = {"X-Token": world.store.token("ann"), "Content-Type": "application/json"}
    told = world.client.post("/api/undo", content=big, headers=kind)
    streamed = world.client.post(
        "/api/undo", content=(big[k : k + 9999] for k in range(0, len(big), 9999)), headers=kind
    )
    assert told.status_code == streamed.status_code == 413
    form = world.client.post("/api/undo", content=b"{}", headers={**kind, "Content-Type": "text/plain"})
    assert form.status_code == 415


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"key": "a"',
        b"\xff\xfe{}",
        b"null",
        b"NaN",
        b'"text"',
        b"[" * 100_000,
        b'{"key": ' + b"9" * 10_000 + b"}",
        b'{"key": "a", "key": 1}',
        b'{"output": 1e999}',
        b'{"output": -1}',
        b'{"__proto__": {}}',
    ],
)
def test_bodies_that_are_no_request(world, body):
    world.judge(0)
    kind = {"X-Token": world.store.token("ann"), "Content-Type": "application/json"}
    for path in ("/api/undo", "/api/annotate", "/api/whatif", "/api/round"):
        answer = world.client.post(path, content=body, headers=kind)
        assert answer.status_code in {400, 422}
        assert "\n" not in answer.json()["error"]
    assert len(world.store.standing()) == 4


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/api/instance/../../../etc/passwd",
        "/api/instance/..%2f..%2f..%2fetc%2fpasswd",
        "/api/instance/%2e%2e/%2e%2e/verdicts.db",
        "/page.html",
        "/.git/config",
        "/api/instance/%00",
        "/api/instance/pid-3?output=x",
        "/api/instance/pid-3?output=-1",
        "/api/instance/pid-3?output=7",
    ],
)
def test_paths_lead_to_no_file(world, path):
    answer = world.get(path)
    assert answer.status_code in {404, 422}
    assert set(answer.json()) == {"error"}
    assert "root:" not in answer.text


def test_a_close_that_is_sent_again_closes_once(world):
    world.judge(0)
    first = world.post("/api/round", {"action": "close", "key": "c"}).json()
    # The answer was lost; meanwhile a verdict of the next round is there.
    world.judge(1, feature="LDL")
    again = world.post("/api/round", {"action": "close", "key": "c"})
    assert (again.status_code, again.json()["round"], first["round"]) == (200, 2, 2)
    (kept,) = world.get("/api/metrics").json()["rounds"]
    assert kept["verdicts"] == 4
    assert world.post("/api/round", {"action": "revert", "key": "r"}).json()["undone"] == 4
    world.judge(1, feature="LDL")
    assert world.post("/api/round", {"action": "revert", "key": "r"}).json()["undone"] == 0


def test_the_gain_of_a_round_is_told_with_its_interval(world):
    answer = world.judge(0).json()["score"]
    assert answer["gain"]["value"] == pytest.approx(answer["value"] - answer["start"])
    assert answer["gain"]["low"] <= answer["gain"]["value"] <= answer["gain"]["high"]
    assert answer["beyond"] == (answer["gain"]["low"] > 0)


def test_those_judged_before_come_last_in_the_next_queue(world):
    first = [item["instance"] for item in world.get("/api/queue").json()["items"]]
    for instance in first[:3]:
        world.judge(1, instance=instance)
    world.post("/api/round", {"action": "close"})
    second = [item["instance"] for item in world.get("/api/queue").json()["items"]]
    assert not set(first[:3]) & set(second)


def test_numbers_are_sent_short_and_whole_where_they_are_whole():
    from ial_nap.web.app import _rows

    array = np.array([[1 / 3, 0.0, np.nan, 1234567.0], [-2e-9, np.inf, 127.0, 1e-320]])
    assert _rows(array)[0] == [0.33333, 0.0, None, 1234600.0]
    assert _rows(array, 7)[0] == [0.3333333, 0.0, None, 1234567.0]
    assert _rows(array)[1][:3] == [-2e-9, None, 127.0]


def drip(wire) -> None:
    for part in itertools.chain([b"GET / HTTP/1.1\r\nX: "], itertools.repeat(b"x", 3000)):
        wire.sendall(part)
        time.sleep(0.01)


def test_slow_requests_end_and_others_go_on(tmp_path):
    import socket

    served = Served(tmp_path / "verdicts.db", patience=0.3)
    token = f"X-Token: {served.tokens['ann']}\r\n"
    head = f"Host: 127.0.0.1:{served.port}\r\n{token}"
    post = f"POST /api/undo HTTP/1.1\r\n{head}Content-Type: application/json\r\nContent-Length: 2\r\n\r\n"

    def read(wire) -> bytes:
        found = b""
        with contextlib.suppress(ConnectionError):
            while part := wire.recv(4096):
                found += part
        return found

    try:
        waiting = [socket.create_connection(("127.0.0.1", served.port), 30) for _ in range(4)]
        for wire, sent in zip(
            waiting,
            ("GET / HTTP/1.1\r\nHost:", post + "{", f"GET /api/metrics HTTP/1.1\r\n{head}\r\nGET /", ""),
            strict=True,
        ):
            wire.sendall(sent.encode())
        # Whoever is quick is served meanwhile.
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)) as quick:
            quick.request("GET", "/api/metrics", headers={"X-Token": served.tokens["ann"]})
            assert quick.getresponse().status == 200
        answers = [read(wire) for wire in waiting]
        assert (answers[0], answers[3]) == (b"", b"")
        assert answers[1].startswith(b"HTTP/1.1 408 ")
        assert b"did not arrive within 0.3 s" in answers[1]
        assert answers[2].startswith(b"HTTP/1.1 200 ")
        # One that drips buys no time.
        with socket.create_connection(("127.0.0.1", served.port), 30) as wire, pytest.raises(ConnectionError):
            drip(wire)
        for wire in waiting:
            wire.close()
    finally:
        served.kill()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: HERE\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: HERE\r\n\r\n",
        b"GET /api/queue HTTP/1.1\r\nHost: HERE\r\nHost: evil.example\r\n\r\n",
        b"GET /api/queue HTTP/1.1\r\n\r\n",
        b"GET /api/queue\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: HERE\r\n\r\n",
        b"POST /api/undo HTTP/1.1\r\nHost: HERE\r\nContent-Type: application/json\r\nContent-Length: -1\r\n\r\n",
        b"POST /api/undo HTTP/1.1\r\nHost: HERE\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99999999999\r\n\r\n{}",
        b"TRACE /api/queue HTTP/1.1\r\nHost: HERE\r\n\r\n",
        b"OPTIONS /api/undo HTTP/1.1\r\nHost: HERE\r\nOrigin: http://evil.example\r\n\r\n",
    ],
)
def test_the_wire_takes_nothing_but_requests(wired, sent):
    import socket

    with socket.create_connection(("127.0.0.1", wired.port), 30) as wire:
        with contextlib.suppress(ConnectionError):
            wire.sendall(sent.replace(b"HERE", f"127.0.0.1:{wired.port}".encode()))
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := wire.recv(4096):
                answer += part
    status = int(answer.split()[1]) if answer else 400
    assert status in {400, 401, 403, 404, 405, 413, 415}
    assert b"access-control-allow-origin" not in answer.lower()
    assert b"root:" not in answer
    assert b"Traceback" not in answer


def test_a_fault_is_one_line_and_keeps_the_verdicts(world, monkeypatch):
    world.judge(0)

    def fail(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(world.bench, "view", fail)
    answer = world.get("/api/instance/pid-3")
    assert (answer.status_code, "RuntimeError" in answer.json()["error"]) == (500, True)
    monkeypatch.undo()
    assert len(world.get("/api/instance/pid-3").json()["mine"]) == 4


def test_a_verdict_that_the_model_cannot_obey_does_not_stay(world, monkeypatch):
    update = LinearWorkbench.update

    def picky(self, annotations):
        if len({one.step for one in annotations}) == 4:
            raise InputError("every step of an instance is ruled out; leave one")
        update(self, annotations)

    monkeypatch.setattr(LinearWorkbench, "update", picky)
    answer = world.judge(0)
    assert (answer.status_code, "leave one" in answer.json()["error"]) == (422, True)
    assert not world.store.standing()
    assert world.judge(0, steps=(0,)).status_code == 200


def test_numbers_that_are_none_go_out_as_none(world, monkeypatch):
    view = world.bench.view("pid-3")
    view.values[0, 0] = np.nan
    monkeypatch.setattr(world.bench, "view", lambda *_: view)
    assert world.get("/api/instance/pid-3").json()["values"][0][0] is None


def test_the_page_allows_itself_and_nothing_else(world):
    answer = world.client.get("/", params={"token": world.store.token("ann")})
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    (script,) = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    assert "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"


def test_the_page_names_no_address_and_runs_no_text():
    page = files("ial_nap.web").joinpath("page.html").read_text("utf-8")
    # The name space of SVG is a name, not an address.
    assert re.findall(r"https?://[^\s\"']*", page) == ["http://www.w3.org/2000/svg"]
    for danger in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        'src="',
        "@import",
        "url(",
    ):
        assert danger not in page
    assert not re.search(r"<[^>]*\son\w+=", page.partition("<script>")[0])


def test_annotators_and_ports_that_cannot_be(world):
    for people in ([], ["ann", "ann"], [""]):
        with pytest.raises(InputError, match="annotators"):
            create_app(world.bench, world.store, people, port=PORT)
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}: cannot be listened on"):
            serve(world.bench, world.store, ["ann"], port=port)

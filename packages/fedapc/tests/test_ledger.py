"""The log of bytes."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapc.ledger import Entry, Ledger
from shared_core.errors import InputError

ENTRIES = [
    Entry(
        round_,
        client,
        round_ // 2,
        direction,
        kind,
        values=3 * n,
        payload_bytes=12 * n,
        encoded_bytes=20 + n,
        messages=n % 2,
    )
    for n, (round_, client, direction, kind) in enumerate(
        itertools.product(range(3), ("a", "b"), ("up", "down"), ("base", "control"))
    )
]


def test_sums_are_those_of_a_loop():
    ledger = Ledger(ENTRIES)
    for by in itertools.chain.from_iterable(itertools.combinations(("round", "client", "kind"), k) for k in range(4)):
        found = ledger.sums(*by, amount="payload_bytes", direction="up")
        expected = {}
        for entry in ENTRIES:
            if entry.direction == "up":
                key = tuple(getattr(entry, name) for name in by)
                expected[key] = expected.get(key, 0) + entry.payload_bytes
        assert found == expected
        assert sum(found.values()) == ledger.total("payload_bytes", direction="up")
    assert ledger.total("values", client="nobody") == 0
    assert ledger.total("wire_bytes") == ledger.total()


@settings(deadline=None)
@given(st.text(max_size=8), st.text(max_size=8), st.integers(-1, 2**70), st.sampled_from(["", "late", "non_finite"]))
def test_lines_come_back(client, note, size, event):
    ledger = Ledger(
        [Entry(0, client, -1, "up", "control", encoded_bytes=abs(size), wire_bytes=size, event=event, note=note)]
    )
    text = ledger.to_jsonl()
    assert text.count("\n") == 1
    assert Ledger.from_jsonl(text) == ledger
    assert len(ledger.events()) == bool(event)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"round": "0"}, "line 1: round is '0', expected int"),
        ({"round": True}, "round is True"),
        ({"kind": "other"}, "kind is 'other'"),
        ({"direction": []}, "direction is"),
        ({"extra": 1}, "field 'extra' is missing or unknown"),
    ],
)
def test_lines_that_are_no_entry_are_refused(change, match):
    row = json.loads(Ledger(ENTRIES[:1]).to_jsonl())
    with pytest.raises(InputError, match=match):
        Ledger.from_jsonl(json.dumps(row | change))
    for text in ("{", "[]", "3", "{}"):
        with pytest.raises(InputError, match="line 1"):
            Ledger.from_jsonl(text)


def test_unknown_fields_are_refused():
    with pytest.raises(InputError, match="no field 'size'"):
        Ledger(ENTRIES).sums("size")
    with pytest.raises(InputError, match="no field 'who'"):
        Ledger(ENTRIES).total(who="a")

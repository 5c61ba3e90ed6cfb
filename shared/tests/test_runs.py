from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from shared_core.errors import InputError
from shared_core.runs import (
    Claim,
    Result,
    Run,
    Summary,
    atomic_path,
    interval,
    load_tree,
    read_document,
    read_lines,
    read_summary,
    save_tree,
    summarize,
    write_json,
)

HEAD = {"package": "shared-core", "version": "0", "command": "fit", "config": {"epochs": 3}}


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_interval_is_scipys(values):
    mean, low, high = interval(values)
    assert math.isclose(mean, np.mean(values), rel_tol=1e-9, abs_tol=1e-6)
    if np.ptp(values) > 1e-3:
        expected = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        np.testing.assert_allclose((low, high), expected, rtol=1e-6, atol=1e-5)


def test_interval_of_one_value_has_no_bounds_and_of_none_is_refused():
    assert interval([2.0]) == (2.0, None, None)
    with pytest.raises(InputError, match="at least one"):
        interval([])


def test_summary_refuses_what_json_cannot_say():
    row = summarize([1.0, 2.0], dataset="d", method="m", metric="rmse", better="lower")
    with pytest.raises(ValueError, match="finite"):
        Result(**{**row.model_dump(), "mean": math.nan})
    with pytest.raises(ValueError, match="extra"):
        Claim(text="t", source="s", holds=True, value=1.0, threshold=2.0, other=1)  # type: ignore[call-arg]


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=10,
)


@given(trees)
def test_tree_round_trip(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "t.safetensors"
    save_tree(path, tree)
    assert load_tree(path) == tree
    assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_tree_keeps_tensors_arrays_dtypes_sharing_and_optimizer_state(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    optimizer = torch.optim.Adam([weight])
    weight.square().sum().backward()
    optimizer.step()
    generator = torch.Generator().manual_seed(3)
    tree = {
        "optimizer": optimizer.state_dict(),
        "tied": [weight, weight.T],
        "generator": generator.get_state(),
        "array": np.arange(4, dtype=np.int16),
        "scalar": np.float32(0.5),
        "empty": torch.empty(0, 3),
    }
    save_tree(tmp_path / "s.safetensors", tree)
    back = load_tree(tmp_path / "s.safetensors")
    optimizer.load_state_dict(back["optimizer"])
    assert torch.equal(back["tied"][1], weight.T)
    assert back["tied"][0].dtype == torch.float64
    assert torch.equal(back["generator"], generator.get_state())
    assert back["array"].dtype == np.int16
    assert back["scalar"] == 0.5
    assert back["empty"].shape == (0, 3)


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"not a state at all", b"\xff" * 100])
def test_damaged_state_is_wrong_input(tmp_path, content):
    (tmp_path / "s.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        load_tree(tmp_path / "s.safetensors")
    save_tree(tmp_path / "good.safetensors", {"x": torch.arange(100)})
    whole = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-50])
    with pytest.raises(InputError, match="damaged"):
        load_tree(tmp_path / "cut.safetensors")
    with pytest.raises(InputError, match="none"):
        load_tree(tmp_path / "none.safetensors")


def test_objects_are_refused_and_leave_no_file(tmp_path):
    with pytest.raises(TypeError, match="cannot save a object"):
        save_tree(tmp_path / "x.safetensors", {"x": object()})
    with pytest.raises(TypeError, match="string or integer keys"):
        save_tree(tmp_path / "x.safetensors", {(1, 2): 1})
    assert not list(tmp_path.iterdir())


def test_atomic_path_keeps_the_old_file_when_writing_fails(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"version": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(target, {"version": math.nan})
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(target.read_text()) == {"version": 1}
    assert [child.name for child in tmp_path.iterdir()] == ["a.json"]


def test_checkpoint_drops_later_metric_lines_and_a_torn_one(tmp_path):
    run = Run(tmp_path / "r", **HEAD)
    for epoch in range(3):
        run.log(epoch=epoch, loss=math.inf if epoch == 0 else 1.0)
        if epoch < 2:
            run.save_checkpoint({"epoch": epoch})
    with (tmp_path / "r/metrics.jsonl").open("ab") as file:
        file.write(b'{"epoch": 3, "lo')
    again = Run(tmp_path / "r", **HEAD, resume=True)
    assert again.load_checkpoint() == {"epoch": 1}
    again.log(epoch=2)
    lines = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert lines == [{"epoch": 0, "loss": None}, {"epoch": 1, "loss": 1.0}, {"epoch": 2}]


def test_once_computes_a_piece_of_work_once_across_resumes(tmp_path):
    calls: list[str] = []

    def work(name: str) -> list[float]:
        calls.append(name)
        return [1.5, 2.0]

    run = Run(tmp_path / "r", **HEAD)
    assert run.once("a", lambda: work("a")) == run.once("a", lambda: work("a")) == [1.5, 2.0]
    with pytest.raises(KeyboardInterrupt):
        run.once("b", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    again = Run(tmp_path / "r", **HEAD, resume=True)
    again.once("a", lambda: work("a"))
    again.once("b", lambda: work("b"))
    assert calls == ["a", "b"]
    again.finish()
    assert not Run.interrupted(tmp_path / "r")
    Run(tmp_path / "r", **HEAD).once("a", lambda: work("a"))
    assert calls == ["a", "b", "a"]


def test_summary_on_disk_is_what_finish_returns(tmp_path):
    run = Run(tmp_path / "r", **HEAD, seed=7, device="cpu")
    run.artifact("plot.png").write_bytes(b"png")
    run.artifact("never-written.png")
    summary = run.finish([summarize([1.0, 2.0, 3.0], dataset="d", method="m", metric="rmse", better="lower")])
    assert summary.artifacts == ["plot.png"]
    assert (summary.seed, summary.config) == (7, {"epochs": 3})
    assert read_summary(tmp_path / "r") == summary == read_summary(tmp_path / "r/summary.json")
    assert isinstance(summary, Summary)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"package": 3}'])
def test_foreign_summary_is_wrong_input(tmp_path, content):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(InputError, match="not a run summary"):
        read_summary(tmp_path)


def test_resume_of_another_command_or_of_rubbish_is_wrong_input(tmp_path):
    Run(tmp_path / "r", **HEAD)
    with pytest.raises(InputError, match="not of 'shared-core demo'"):
        Run(tmp_path / "r", **{**HEAD, "command": "demo"}, resume=True)
    (tmp_path / "r/config.json").write_text("{")
    with pytest.raises(InputError, match="not a run's configuration"):
        Run(tmp_path / "r", **HEAD, resume=True)


def test_unwritable_folder_is_wrong_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        Run(tmp_path / "file" / "r", **HEAD)
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(InputError, match="cannot write"):
            Run(tmp_path / "locked" / "r", **HEAD)


def test_all_but_the_first_process_write_nothing(tmp_path):
    Run(tmp_path / "r", **HEAD).save_checkpoint({"x": 1})
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "r").iterdir())
    other = Run(tmp_path / "r", **HEAD, resume=True, writes=False)
    assert other.load_checkpoint() == {"x": 1}
    other.log(loss=1.0)
    other.save_checkpoint({"x": 2})
    other.artifact("model.txt").write_text("elsewhere")
    other.finish()
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "r").iterdir()) == before


# ---- documents of other kinds


@dataclass(frozen=True)
class Facts:
    size: int
    names: tuple[str, ...] = ()


def test_documents_are_what_they_should_be(tmp_path):
    path = tmp_path / "facts.json"
    write_json(path, {"size": 8, "names": ["a", "b"]})
    assert read_document(path, Facts, "facts") == Facts(8, ("a", "b"))
    write_json(path, {"size": "many"})
    with pytest.raises(InputError, match=r"facts.json is not facts: size: Input should be a valid integer"):
        read_document(path, Facts, "facts")
    path.write_bytes(b'{"size": 8, "names": ["\xff"]}')
    with pytest.raises(InputError, match=r"facts\.json is not facts: "):
        read_document(path, Facts, "facts")
    with pytest.raises(InputError, match=r"cannot read .*other.json: No such file or directory; give a folder"):
        read_document(tmp_path / "other.json", Facts, "facts", "a folder")


def test_a_wrong_line_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1.5}\n{"a": 2}\n')
    assert read_lines(path, dict[str, float], "a history") == [{"a": 1.5}, {"a": 2.0}]
    path.write_text('{"a": 1.5}\n{"a": [2]}\n')
    with pytest.raises(InputError, match=r"lines.jsonl is not a history: line 2: a: Input should be a valid number"):
        read_lines(path, dict[str, float], "a history")
    with pytest.raises(InputError, match="cannot read"):
        read_lines(tmp_path, dict[str, float], "a history")

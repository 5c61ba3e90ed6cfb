from __future__ import annotations

import gzip
import importlib.util
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from shared_core.errors import InputError
from shared_core.tables import TableSchema, read_table

FRAME = pd.DataFrame(
    {
        "age": [31.0, np.nan, 50.0, 40.0],
        "ward": ["a", "b", None, "a"],
        "empty": [np.nan] * 4,
        "dose": [1, 2, 3, 4],
        "dead": [0, 1, 0, 1],
    }
)


@pytest.fixture
def save(tmp_path):
    def write(name: str, content: str | bytes):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


needs_parquet = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow for Parquet")
ENDINGS = [".csv", ".tsv", ".csv.gz", ".npz", *([".parquet"] if importlib.util.find_spec("pyarrow") else [])]


@pytest.mark.parametrize("module", ["shared_core", "shared_core.data", "shared_core.cli", "shared_core.runs"])
def test_only_this_module_needs_pandas(module):
    code = f"import sys, {module}; sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_parquet
def test_parquet_reads_like_csv(tmp_path):
    frame = FRAME.drop(columns="empty")
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    schema = TableSchema.infer(frame, target="dead")
    read = [schema.features(read_table(tmp_path / name)) for name in ("t.csv", "t.parquet")]
    np.testing.assert_array_equal(*read)


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    def absent(*args: object, **kwargs: object) -> None:
        raise ImportError("no parquet engine")

    monkeypatch.setattr(pd, "read_parquet", absent)
    with pytest.raises(InputError, match="needs pyarrow; pip install pyarrow"):
        read_table(tmp_path / "t.parquet")


def test_every_format_reads_the_same(tmp_path):
    frame = FRAME.drop(columns="empty")
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    frame.to_csv(tmp_path / "t.csv.gz", index=False)
    schema = TableSchema.infer(frame, target="dead")
    expected = schema.features(frame)
    for name in ("t.csv", "t.tsv", "t.csv.gz"):
        read = read_table(tmp_path / name)
        np.testing.assert_array_equal(schema.features(read), expected)
        np.testing.assert_array_equal(schema.labels(read), [0, 1, 0, 1])


@pytest.mark.parametrize("token", ["", "?", "NA", "NaN", "null", "N/A"])
def test_ways_to_write_missing(save, token):
    frame = read_table(save("t.csv", f"a, b\n1,{token}\n2,3\n"))
    assert frame["b"].isna().tolist() == [True, False]


def test_npz_with_mask_and_sparse_npz(tmp_path):
    x = np.array([[1.0, 0.0], [5.0, 2.0]])
    mask = np.array([[1, 0], [1, 1]])
    np.savez(tmp_path / "m.npz", x=x, mask=mask, y=[0.5, 1.5], feature_names=["p", "q"])
    frame = read_table(tmp_path / "m.npz")
    assert list(frame.columns) == ["p", "q", "y"]
    np.testing.assert_array_equal(frame[["p", "q"]], [[1, np.nan], [5, 2]])
    # A stored zero is observed, an absent entry is not.
    matrix = sparse.csr_array((np.array([0.0, 2.0]), np.array([0, 1]), np.array([0, 1, 2])), shape=(2, 2))
    sparse.save_npz(tmp_path / "s.npz", matrix)
    np.testing.assert_array_equal(read_table(tmp_path / "s.npz"), [[0, np.nan], [np.nan, 2]])


def test_categories_are_one_feature_each_and_unseen_values_are_missing():
    schema = TableSchema.infer(FRAME, target="dead")
    assert schema.feature_names == ("age", "ward=a", "ward=b", "dose")
    assert schema.groups.tolist() == [0, 1, 1, 2]
    later = FRAME.assign(ward=["b", "zzz", "a", None])
    np.testing.assert_array_equal(schema.features(later)[:, 1:3], [[0, 1], [np.nan, np.nan], [1, 0], [np.nan, np.nan]])


@pytest.mark.parametrize(
    ("target", "task", "classes"),
    [
        ([0, 1, 0, 1], "auto", ("0", "1")),
        ([0.0, 1.0, np.nan, 1.0], "auto", ("0", "1")),
        ([10, 9, 2, 1], "auto", ("1", "2", "9", "10")),
        (["yes", "no", None, "no"], "auto", ("no", "yes")),
        ([True, False, True, True], "auto", ("False", "True")),
        ([0.5, 1.0, 2.0, 3.0], "auto", None),
        ([0, 1, 0, 1], "regression", None),
        ([0.5, 1.5, 0.5, 1.5], "classification", ("0.5", "1.5")),
    ],
)
def test_task_is_guessed_and_can_be_given(target, task, classes):
    frame = FRAME.assign(dead=target)
    schema = TableSchema.infer(frame, target="dead", task=task)
    assert schema.classes == classes
    labels = schema.labels(frame)
    assert labels.dtype == np.float64
    np.testing.assert_array_equal(np.isnan(labels), pd.isna(pd.Series(target)))


@pytest.mark.parametrize(("scale", "peer"), [("minmax", MinMaxScaler()), ("standard", StandardScaler())])
def test_scaling_is_scikit_learns(scale, peer):
    x = np.random.default_rng(0).normal(3, 5, (30, 4))
    x[np.random.default_rng(1).random(x.shape) < 0.3] = np.nan
    x[:, 3] = 7.0
    frame = pd.DataFrame(x, columns=list("abcd")).assign(y=1.5)
    schema = TableSchema.infer(frame, target="y", task="regression").fit_scale(x[:20], scale)
    np.testing.assert_allclose(schema.features(frame), peer.fit(x[:20]).transform(x), rtol=1e-12)


def test_json_round_trip():
    import json

    schema = TableSchema.infer(FRAME, target="dead")
    schema = schema.fit_scale(schema.features(FRAME), "minmax")
    back = TableSchema.from_json(json.loads(json.dumps(schema.to_json())))
    assert back == schema
    np.testing.assert_array_equal(back.features(FRAME), schema.features(FRAME))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "not a readable csv table"),
        ("t.csv", "a,b\n", r"empty \(0 rows"),
        ("t.csv", "a,b\n1,2\n1,2,3\n", "line 3"),
        ("t.csv", b"\xff\xfe\x00a,b\n", "not UTF-8"),
        ("t.csv.gz", b"not gzip", "t.csv.gz"),
        ("t.csv.gz", gzip.compress(b"a,b\n1,2\n" * 100, mtime=0)[:-20], "t.csv.gz"),
        pytest.param("t.parquet", b"PAR1", "not a readable parquet", marks=needs_parquet),
        ("t.npz", b"", "not a whole NPZ file|is not an NPZ file"),
        ("t.npz", b"PK\x03\x04broken", "not a whole NPZ file|is not an NPZ file"),
        ("t.xlsx", b"", "cannot tell what '.xlsx' is"),
    ],
)
def test_unreadable_files(save, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read_table(save(name, content))
    assert name in str(caught.value)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv: No such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(InputError, match="directory"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.zeros(3)}, "needs a two-dimensional array 'x'"),
        ({"x": np.zeros(3)}, "needs a two-dimensional array 'x'"),
        ({"x": np.zeros((2, 2)), "mask": np.ones((2, 3))}, "mask must hold"),
        ({"x": np.zeros((2, 2)), "mask": np.full((2, 2), 2)}, "mask must hold"),
        (
            {"x": np.array([[1.0, np.nan]]), "mask": np.ones((1, 2))},
            "NaN at row 0, column 1 although mask says observed",
        ),
        ({"x": np.zeros((2, 2)), "y": np.zeros(3)}, r"y must have shape \(2,\)"),
        ({"x": np.zeros((2, 2)), "feature_names": ["a"]}, "1 feature_names for 2 columns"),
        ({"x": np.array([[{}]], dtype=object)}, "holds Python objects"),
    ],
)
def test_wrong_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"target": "dad"}, "no column 'dad'; there are: age, ward"),
        ({}, {"target": "dead", "exclude": ["x"]}, "no column 'x'"),
        ({}, {"target": "dead", "exclude": ["age", "ward", "dose", "empty"]}, "no feature column is left"),
        ({"dead": [1, 1, 1, 1]}, {"target": "dead"}, "a single class, '1'"),
        ({"dead": [np.nan] * 4}, {"target": "dead"}, "no value at all"),
        ({"dead": list("abab")}, {"target": "dead", "task": "regression"}, "not numeric"),
        ({"age": [1.0, np.inf, 2.0, 3.0]}, {"target": "dead"}, "row 2, column 'age' is infinite"),
    ],
)
def test_tables_that_cannot_be_learned_from(change, options, message):
    with pytest.raises(InputError, match=message):
        TableSchema.infer(FRAME.assign(**change), **options)


def test_a_stray_text_among_numbers_is_named_and_an_identifier_is_refused():
    frame = pd.DataFrame({"a": [*map(str, range(20)), "2o"], "y": range(21)})
    with pytest.raises(InputError, match="row 21, column 'a': '2o' is not a number"):
        TableSchema.infer(frame, target="y")
    frame = pd.DataFrame({"name": [f"person {i}" for i in range(100)], "y": range(100)})
    with pytest.raises(InputError, match=r"100 different texts.*--exclude name"):
        TableSchema.infer(frame, target="y")


def test_later_files_must_fit():
    schema = TableSchema.infer(FRAME, target="dead")
    with pytest.raises(InputError, match="no column 'dose', which the model was trained on"):
        schema.features(FRAME.drop(columns="dose"))
    with pytest.raises(InputError, match="no target column 'dead'"):
        schema.labels(FRAME.drop(columns="dead"))
    with pytest.raises(InputError, match="row 1: the target 'dead' is '7', which training never saw"):
        schema.labels(FRAME.assign(dead=7))


@settings(max_examples=80, deadline=None)
@given(content=st.binary(max_size=300), ending=st.sampled_from(ENDINGS))
def test_any_bytes_give_a_table_or_one_clear_error(tmp_path_factory, content, ending):
    path = tmp_path_factory.mktemp("fuzz") / f"t{ending}"
    path.write_bytes(content)
    try:
        frame = read_table(path)
    except InputError as caught:
        message = str(caught)
    else:
        message = f"{frame.size} cells"
    assert "\n" not in message
    assert message != "0 cells"

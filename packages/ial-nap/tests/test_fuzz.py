"""Every reader of this package meets damaged files: it reads them, or refuses them in one line."""

from __future__ import annotations

import functools
import pickle

import numpy as np

from ial_nap.annotations import Annotation, read_jsonl, to_jsonl
from ial_nap.data import load_data
from shared_core.testing import Readers

RANDOM = np.random.default_rng(0)

readers = Readers()


@readers
def tables(folder):
    lines = [f"{name},{2000 + k},{name in 'bd':d},{k}.5,{1 / (1 + k)}" for name in "abcd" for k in range(3)]
    path = folder / "a.csv"
    path.write_text("\n".join(["id,time,label,LDL,HDL", *lines]))
    return [path], functools.partial(load_data, path)


@readers
def arrays(folder):
    path = folder / "a.npz"
    np.savez(path, X=RANDOM.random((6, 3, 2)), y=np.arange(6) % 2, feature_names=["LDL", "HDL"], lengths=[3] * 6)
    return [path], functools.partial(load_data, path)


@readers
def released(folder):
    parts = ("train", "validation", "evaluation")
    content = {f"{part}_inputs": RANDOM.random((4, 3, 2)) for part in parts}
    content |= {f"{part}_labels": np.arange(4)[:, None] % 2 for part in parts} | {"feature_names": ["LDL", "HDL"]}
    path = folder / "a.pkl"
    path.write_bytes(pickle.dumps(content, 4))
    return [path], functools.partial(load_data, path)


@readers
def verdicts(folder):
    path = folder / "v.jsonl"
    log = [Annotation("p", 0, "LDL", 1, annotator="a"), Annotation("p", 1, "HDL", 0, annotator="b")]
    path.write_text(to_jsonl(log), encoding="utf-8")
    return [path], lambda: (read_jsonl(path, skip_bad=True), read_jsonl(path))


test_valid_files_are_read, test_fuzz = readers.tests(15)

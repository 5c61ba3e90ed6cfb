"""Every reader of the core meets damaged files: it reads them, or refuses them in one line."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.io import savemat

from shared_core.classes import load_classes
from shared_core.cli import _read_config
from shared_core.data import load, read_ratings
from shared_core.errors import InputError
from shared_core.runs import Result, Run, load_tree, read_summary, save_tree
from shared_core.tables import TableSchema, read_sparse, read_table
from shared_core.testing import Readers

RANDOM = np.random.default_rng(0)
readers = Readers()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def of_set(name, folder, files, **options):
    made = [write(folder / where, content) for where, content in files.items()]
    return made, functools.partial(load, name, root=folder, **options)


def idx(array):
    shape = b"".join(side.to_bytes(4, "big") for side in array.shape)
    return bytes((0, 0, 8, array.ndim)) + shape + array.astype(np.uint8).tobytes()


def packed(folder, **arrays):
    np.savez(folder / "packed.npz", **arrays)
    content = (folder / "packed.npz").read_bytes()
    (folder / "packed.npz").unlink()
    return content


@readers
def mnist(folder):
    images, labels = idx(RANDOM.integers(0, 256, (4, 28, 28))), idx(np.arange(4))
    zipped = gzip.compress(images, mtime=0)
    files = {"mnist/train-images-idx3-ubyte.gz": zipped, "mnist/train-labels-idx1-ubyte": labels}
    return of_set("mnist", folder, files)


@readers
def cifar(folder):
    batch = {b"data": RANDOM.integers(0, 256, (3, 3072)).astype(np.uint8), b"labels": [0, 1, 2]}
    files = {
        "cifar10/data_batch_1": pickle.dumps(batch, 2),
        "cifar10/data_batch_2.bin": bytes(3073),
        "cifar10/batches.meta": pickle.dumps({"label_names": list("abcdefghij")}),
    }
    return of_set("cifar10", folder, files)


@readers
def svhn(folder):
    path = folder / "svhn/train_32x32.mat"
    path.parent.mkdir()
    savemat(path, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [10]], np.uint8)})
    return [path], functools.partial(load, "svhn", root=folder)


@readers
def mini_imagenet(folder):
    path = folder / "mini-imagenet/train.npy"
    path.parent.mkdir()
    np.save(path, RANDOM.random((2, 3, 9, 9, 3)))
    return [path], functools.partial(load, "mini-imagenet", root=folder, size=5)


@readers
def movielens(folder):
    lines = "".join(f"{user}\t{item}\t{1 + item % 5}\t88{item}\n" for user in range(3) for item in range(4))
    return of_set("movielens-100k", folder, {"ml-100k/u.data": lines})


@readers
def ratings(folder):
    path = write(folder / "r.csv", 'userId,movieId,rating\n7,"a, b",4.5\n3,10,2\n"x",11,3.5\n')
    return [path], functools.partial(read_ratings, path)


@readers
def ihdp(folder):
    rows = RANDOM.random((5, 30))
    rows[:, 0] = [0, 1, 0, 1, 0]
    return of_set("ihdp", folder, {"ihdp/ihdp_npci_1.csv": "\n".join(",".join(map(str, row)) for row in rows)})


@readers
def jobs(folder):
    arrays = {"x": RANDOM.random((4, 17, 2)), "t": np.array([[0, 1]] * 4), "yf": np.zeros((4, 2)), "e": np.ones((4, 2))}
    return of_set("jobs", folder, {"jobs/jobs_DW_bin.new.10.train.npz": packed(folder, **arrays)}, split="train")


@readers
def twins(folder):
    header = ",".join(f"x{k}" for k in range(30)) + ",'mort_0','mort_1'"
    rows = [",".join(map(str, [*range(30), 9999, 20])), ",".join(map(str, [*range(1, 31), 5, 9999]))]
    return of_set("twins", folder, {"twins/Twin_data.csv": "\n".join([header, *rows])})


@readers
def physionet(folder):
    stay = "Time,Parameter,Value\n00:00,RecordID,7\n00:00,Age,54\n00:07,HR,70\n01:30,pH,7.4\n"
    files = {
        "physionet2012/set-a/7.txt": stay,
        "physionet2012/Outcomes-a.txt": "RecordID,SOFA,In-hospital_death\n9,3,1\n7,-1,0\n",
    }
    return of_set("physionet2012", folder, files)


@readers
def tables(folder):
    files = [
        write(folder / "a.csv", "age,sex,y\n3,f,0.5\n4,m,\n5.5,?,1\n"),
        write(folder / "b.tsv.gz", gzip.compress(b"age\tsex\ty\n3\tf\t0.5\n4\tm\t2\n", mtime=0)),
        write(folder / "c.data", "1 2 3\n4 5 6\n"),
        write(folder / "d.npz", packed(folder, x=RANDOM.random((3, 2)), y=np.arange(3), feature_names=["a", "b"])),
    ]
    sparse.save_npz(folder / "e.npz", sparse.random(4, 5, 0.4, "csr", random_state=0))
    return [*files, folder / "e.npz"], lambda: [read_table(file) for file in [*files, folder / "e.npz"]]


@readers
def sparse_matrices(folder):
    files = [folder / f"{form}.npz" for form in ("csr", "csc", "coo", "dia", "bsr")]
    for file in files:
        sparse.save_npz(file, sparse.random(4, 6, 0.4, file.stem, random_state=0))
    return files, lambda: [read_sparse(file) for file in files]


@readers
def schema(folder):
    frame = read_table(write(folder / "t.csv", "age,sex,y\n3,f,a\n4,m,b\n5.5,f,a\n"))
    made = TableSchema.infer(frame, target="y")
    path = write(folder / "schema.json", json.dumps(made.to_json()))

    def read():
        with contextlib.suppress(ValueError, RecursionError):  # of no JSON: the callers' affair
            document = json.loads(path.read_bytes())
            return lambda: TableSchema.from_json(document).features(frame)
        return lambda: None

    return [path], lambda: read()()


@readers
def class_arrays(folder):
    path = folder / "a.npz"
    np.savez(path, x=RANDOM.integers(0, 256, (6, 9, 9)).astype(np.uint8), y=np.arange(6) % 3, class_names=list("abc"))
    return [path], functools.partial(load_classes, path, split="all")


@readers
def pictures(folder):
    image = pytest.importorskip("PIL.Image")
    files = []
    for name, ending in (("cat", "png"), ("cat", "bmp"), ("dog", "png"), ("dog", "jpg"), ("dog", "gif")):
        path = folder / "pictures" / name / f"{len(files)}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(RANDOM.integers(0, 256, (9, 9, 3)).astype(np.uint8)).save(path)
        files.append(path)
    return files, functools.partial(load_classes, folder / "pictures", split="all", size=8)


def run_in(folder):
    return Run(folder, package="p", version="0", command="demo", config={"epochs": 2}, resume=(folder / "x").exists())


@readers
def summaries(folder):
    run = run_in(folder)
    run.finish(
        [
            Result(
                dataset="d",
                method="m",
                metric="error",
                unit="",
                better="lower",
                mean=1.0,
                low=0.9,
                high=1.1,
                n=3,
                seconds=2.0,
            )
        ]
    )
    return [folder / "summary.json"], functools.partial(read_summary, folder)


@readers
def interrupted_runs(folder):
    run = run_in(folder)
    run.once("a", lambda: [1, {"b": 2.5}])
    run.log(epoch=1, loss=0.5)
    run.save_checkpoint({"weights": torch.ones(3), "steps": [1, (2, "x")], 5: None})
    (folder / "x").touch()
    return [
        folder / f for f in ("config.json", "cells.jsonl", "metrics.jsonl", "checkpoint.safetensors")
    ], functools.partial(resumed, folder)


def resumed(folder):
    kept = {file: file.read_bytes() for file in folder.iterdir()}
    try:
        run = run_in(folder)
        return run.load_checkpoint(), run.once("a", lambda: 1)
    finally:
        for file, content in kept.items():
            file.write_bytes(content)


@readers
def trees(folder):
    path = folder / "tree.safetensors"
    save_tree(path, {"a": torch.ones(2, 3), "b": [np.arange(3), (1, None)], "c": {"d": 0.5, 3: "text"}})
    return [path], functools.partial(load_tree, path)


@readers
def configuration(folder):
    path = write(
        folder / "c.toml", '# a comment\n[fit]\nepochs = 3\nname = "x"\nrates = [0.1, 1e-3]\n[fit.more]\na = true\n'
    )
    return [path], functools.partial(_read_config, path, {"fit": None}, "fit")


test_valid_files_are_read, test_fuzz = readers.tests(12)


def test_a_configuration_nested_too_deeply_is_refused(tmp_path):
    path = tmp_path / "deep.toml"
    path.write_text("x = " + "[" * 5000)
    with pytest.raises(InputError, match="not valid TOML"):
        _read_config(path, {}, "fit")

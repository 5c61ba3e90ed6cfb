"""What is saved is what is loaded, to the bit; and no file, however made, does more than be refused."""

from __future__ import annotations

import json
import pickle
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nap_fitted import IDS, NAMES, STEPS, UNITS, R, T, arrays, fitted
from safetensors import safe_open
from safetensors.torch import save_file

from ial_nap import saving
from ial_nap.annotations import Annotation
from ial_nap.estimator import NAPClassifier, NAPRegressor
from ial_nap.saving import load
from shared_core.errors import InputError

X, LENGTHS, _ = arrays()


@cache
def told(kind="binary", **options):
    model = fitted(kind, options=options)
    model.update([Annotation("pid-3", t, "LDL", 0, annotator="a") for t in range(T)])
    model.update([Annotation("pid-5", 0, "age", 1, annotator="b")])
    return model


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    told().save(path)
    return path


def parts(path):
    with safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return json.loads(opened.metadata()["ial_nap"]), tensors


def written(path, head, tensors, *, signed=True):
    """A file whose header is what somebody made of it; signed as one who knows the package would."""
    if signed and isinstance(head, dict):
        head = {**head, "digest": saving.digest(head, tensors)}
    save_file(tensors, path, metadata={"ial_nap": json.dumps(head)})
    return path


def attempt(path):
    """What is loaded, or what it was refused with."""
    try:
        return load(path, device="cpu")
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("binary", {}),
        ("multiclass", {"rnn": "lstm"}),
        ("multilabel", {"latent": 0}),
        ("regression", {}),
        ("binary", {"protocol": "paper"}),
        ("binary", {"context": "full"}),
        ("multiclass", {"context": "attentive", "hidden": 8}),
    ],
)
def test_what_is_loaded_predicts_the_same_to_the_bit(tmp_path, kind, options):
    model, path = told(kind, **options), tmp_path / "deep" / "model.safetensors"
    model.save(path)
    again = type(model).load(path, device="cpu")
    assert type(again) is type(model)
    assert again.get_params() == model.get_params()
    for one, two in zip(model.predict_dist(X, LENGTHS), again.predict_dist(X, LENGTHS), strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(model.logits(X, LENGTHS), again.logits(X, LENGTHS))
    assert again.context_hash == model.context_hash
    assert again.context_.keys == model.context_.keys
    assert again.context_.depth == 0
    assert (again.series_.features, again.series_.steps, again.units_) == (NAMES, STEPS, UNITS)
    assert again.history_ == model.history_
    assert again.model_.config == model.model_.config
    if kind != "regression":
        assert again.classes_.tolist() == model.classes_.tolist()
        assert again.predict(X, LENGTHS).tolist() == model.predict(X, LENGTHS).tolist()
    # It goes on being told, and saved.
    verdict = [Annotation("pid-3", 0, "ward", 0, annotator="b")]
    model.update(verdict)
    again.update(verdict)
    np.testing.assert_array_equal(model.logits(X, LENGTHS), again.logits(X, LENGTHS))
    model.undo()
    again.save(path)
    assert load(path, device="cpu").context_hash == again.context_hash
    assert [name.name for name in path.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("labels", [[1, 5], ["a", "b"], [True, False], [0.5 * 2, 3.0]])
def test_classes_keep_their_type(tmp_path, labels):
    y = np.array(labels)[np.arange(len(X)) % 2]
    model = NAPClassifier(hidden=3, latent=0, epochs=1, samples=2, device="cpu").fit(X, y)
    model.save(tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors", device="cpu")
    assert again.classes_.dtype.kind == model.classes_.dtype.kind
    assert again.predict(X).tolist() == model.predict(X).tolist()
    assert again.score(X, y) == model.score(X, y)
    assert len(again.context_) == 0


def test_no_training_instance_is_in_the_file(file):
    head, tensors = parts(file)
    assert not any(value.shape[:1] == (len(X),) for value in tensors.values())
    assert not {"pid-0", "pid-9"} & set(json.dumps(head).replace('"', " ").split())
    again = load(file, device="cpu")
    assert again.train_ is None
    assert again.validation_ is None
    for call in (again.rank, again.finetune):
        with pytest.raises(InputError, match="a loaded estimator holds no training series: give"):
            call()
    assert again.rank(X, lengths=LENGTHS, ids=IDS)
    again.replace([Annotation("pid-3", 0, "LDL", 1)])
    with pytest.raises(InputError, match="no instance 'somebody'"):
        again.replace([Annotation("somebody", 0, "LDL", 1)])
    # Before any instance is known, any id will do.
    load(file, device="cpu").replace([Annotation("somebody", 0, "LDL", 1)])


def test_lengths_of_annotated_instances_are_kept(tmp_path):
    model, path = told(), tmp_path / "m.safetensors"
    short = IDS[int(np.flatnonzero(LENGTHS == 1)[0])]
    model.update([Annotation(short, 0, name, 0) for name in NAMES[:-1]])
    model.save(path)
    model.undo()
    with pytest.raises(InputError, match="every cell is marked 0"):
        load(path, device="cpu").update([Annotation(short, 0, NAMES[-1], 0)])


def test_files_of_the_other_kind_are_told_apart(file):
    with pytest.raises(InputError, match=r"holds a NAPClassifier: load it with NAPClassifier\.load"):
        NAPRegressor.load(file)
    assert load(file, device="cpu").device == "cpu"
    with pytest.raises(InputError, match="unknown device"):
        load(file, device="abacus")


def test_saving_where_one_cannot_leaves_what_was_there(tmp_path, file):
    (tmp_path / "folder").write_text("no folder")
    with pytest.raises(InputError, match="cannot write"):
        told().save(tmp_path / "folder" / "model.safetensors")
    target = tmp_path / "model.safetensors"
    target.write_bytes(file.read_bytes())
    model = fitted(options={"epochs": 1})
    model.context_.lengths["pid-1"] = object()
    model.update([Annotation("pid-1", 0, "LDL", 1)])
    with pytest.raises(TypeError):
        model.save(target)
    assert target.read_bytes() == file.read_bytes()


# ---- files that are something else


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "no safetensors file"),
        (b"not a model", "no safetensors file"),
        (pickle.dumps(Bomb()), "no safetensors file"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "no safetensors file"),
        ((2).to_bytes(8, "little") + b"{}", "of no estimator of ial-nap"),
        ((200_000).to_bytes(8, "little") + b"[" * 200_000, "no safetensors file"),
    ],
)
def test_other_files_are_refused(tmp_path, content, match):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=match):
        load(path)


def test_missing_files_folders_and_other_packages(tmp_path):
    with pytest.raises(InputError, match=r"gone\.safetensors: cannot be read"):
        load(tmp_path / "gone.safetensors")
    with pytest.raises(InputError, match=r"cannot be read|no safetensors"):
        load(tmp_path)
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata={"tree": "{}"})
    with pytest.raises(InputError, match="of no estimator of ial-nap; give the file of save"):
        load(path)
    torch.save({"a": Bomb()}, path)
    with pytest.raises(InputError):
        load(path)


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path, file):
    whole, path = file.read_bytes(), tmp_path / "m.safetensors"
    for end in [*range(1, 20), *np.linspace(20, len(whole) - 1, 25).astype(int).tolist()]:
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"m\.safetensors"):
            load(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(InputError, match=r"m\.safetensors"):
        load(path)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_never_gets_through(tmp_path, file, data):
    whole, path = bytearray(file.read_bytes()), tmp_path / "m.safetensors"
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 5000).filter(lambda k: k < len(whole)))
        whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(whole))
    found = attempt(path)
    if isinstance(found, str):
        assert "\n" not in found
        assert "m.safetensors" in found
    else:
        # Bytes that changed back, or that mean nothing (blanks of the header): the same model then.
        assert found.context_hash == told().context_hash
        np.testing.assert_array_equal(found.logits(X, LENGTHS), told().logits(X, LENGTHS))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), header=st.booleans())
def test_bytes_at_random_are_refused(tmp_path, content, header):
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content if header else content)
    with pytest.raises(InputError):
        load(path)


# ---- headers that say what is not so, signed by one who knows how


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_altered_header_is_refused_or_harmless(tmp_path, file, data):
    head, tensors = parts(file)
    place = head
    name = data.draw(st.sampled_from(sorted(head)))
    if isinstance(head[name], dict) and head[name] and data.draw(st.booleans()):
        place = head[name]
        name = data.draw(st.sampled_from(sorted(place)))
    place[name] = data.draw(values)
    path = written(tmp_path / "m.safetensors", head, tensors)
    found = attempt(path)
    assert "m.safetensors" in found if isinstance(found, str) else found.model_.hidden == 5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h, t: h["network"].update(hidden=1_000_000), "has shape .* the network needs"),
        (lambda h, t: h["network"].update(hidden=10**9), "hidden = 1000000000"),
        (lambda h, t: h["network"].update(latent=3), "the network needs"),
        (lambda h, t: h["network"].update(steps=4), "steps of the network: 4, 3 elsewhere"),
        (lambda h, t: h["network"].update(kind="regression"), "kind of the network"),
        (lambda h, t: h["network"].update(keep="often"), "altered"),
        (lambda h, t: h["network"].update(extra=1), "altered"),
        (lambda h, t: h["network"].pop("seed"), "altered"),
        (lambda h, t: h["network"].update(schema="0" * 16), "names of features and the hash of them differ"),
        (lambda h, t: h.update(features=["HDL", "LDL", "age", "ward"]), "names of features and the hash"),
        (lambda h, t: h.update(units=["mmol/L"] * 4), "names of features and the hash"),
        (lambda h, t: h.update(features=["LDL", "LDL", "age", "ward"]), "is there twice"),
        (lambda h, t: h.update(features=["LDL"]), "features of the network"),
        (lambda h, t: h.update(classes=["ill"]), "1 classes, 1 outputs"),
        (lambda h, t: h.update(classes=["ill", "ill"]), "2 classes, 1 outputs"),
        (lambda h, t: h.update(estimator="NAPRegressor"), "a NAPRegressor of a binary task"),
        (lambda h, t: h.update(estimator="os.system"), "its header is damaged"),
        (lambda h, t: h.update(target_deviation=0.0), "its header is damaged"),
        (lambda h, t: h.update(format=2), "is of format 2, this reads format 1; update this package"),
        (lambda h, t: h["parameters"].update(evil=1), "does not have, or lacks: evil"),
        (lambda h, t: h["parameters"].update(samples=10**9), "samples = 1000000000"),
        (lambda h, t: h["parameters"].update(protocol="none"), "protocol 'none' is unknown"),
        (lambda h, t: h.update(context=[["pid-3", "a"], ["pid-3", "a"]]), "two masks"),
        (lambda h, t: h.update(context=[["pid-3", "a"]]), "masks of verdicts have another shape"),
        (lambda h, t: h.pop("history"), "its header is damaged"),
        (lambda h, t: t["context.masks"].fill_(7), "verdict is 1"),
        (lambda h, t: t.update({"context.masks": t["context.masks"].float()}), "masks of verdicts have another shape"),
        (lambda h, t: t.pop("context.masks"), "altered"),
        (lambda h, t: t["network.output.weight"].fill_(torch.nan), "holds values that are not finite"),
        (lambda h, t: t.pop("network.output.weight"), "'output.weight' has shape None"),
        (lambda h, t: t.update({"network.more": torch.zeros(3)}), "'more' has shape"),
        (lambda h, t: t["scaling.deviation"].zero_(), "deviation is not above 0"),
        (lambda h, t: t.update({"scaling.mean": torch.zeros(2)}), "one number for each feature"),
        (lambda h, t: t.pop("scaling.mean"), "altered"),
    ],
)
def test_a_header_is_held_against_the_tensors(tmp_path, file, change, match):
    head, tensors = parts(file)
    change(head, tensors)
    with pytest.raises(InputError, match=match):
        load(written(tmp_path / "m.safetensors", head, tensors), device="cpu")


@pytest.mark.parametrize("head", [[], 5, None, "text", {}, {"format": 1}, {"format": [1]}])
def test_a_header_of_another_form_is_refused(tmp_path, head):
    with pytest.raises(InputError, match=r"m\.safetensors"):
        load(written(tmp_path / "m.safetensors", head, {"a": torch.zeros(1)}))


def test_what_was_altered_without_the_digest_is_noticed(tmp_path, file):
    head, tensors = parts(file)
    tensors["network.output.weight"][0, 0] += 1e-3
    with pytest.raises(InputError, match="was altered after it was saved, or is damaged"):
        load(written(tmp_path / "m.safetensors", head, tensors, signed=False))
    head, tensors = parts(file)
    head["target_mean"] = 1.0
    with pytest.raises(InputError, match="was altered"):
        load(written(tmp_path / "m.safetensors", head, tensors, signed=False))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h, t: t["annotated.lengths"].fill_(9), "not within the steps"),
        (lambda h, t: t.update({"annotated.x": torch.zeros(2, T, R + 1)}), "annotated series: another shape"),
        (lambda h, t: h.update(annotated=["pid-3", "pid-3"]), "there twice"),
        (lambda h, t: h.update(annotated=["pid-3", "pid-6"]), "instance 'pid-5' is annotated"),
        (lambda h, t: t.update({"annotated.y": torch.zeros(3)}), "annotated labels: another shape"),
        (lambda h, t: t.pop("annotated.x"), "altered"),
    ],
)
def test_annotated_instances_are_held_against_the_rest(tmp_path, change, match):
    path = tmp_path / "m.safetensors"
    told(context="full").save(path)
    head, tensors = parts(path)
    change(head, tensors)
    with pytest.raises(InputError, match=match):
        load(written(path, head, tensors), device="cpu")

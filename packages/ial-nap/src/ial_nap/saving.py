"""An estimator in one safetensors file: weights, names, scaling and verdicts; no pickle, and nothing taken on trust.

What the header says is checked against itself (types, sizes, names), against the tensors (every shape is worked out
before anything of that size is made), and against a digest of both, so that a damaged or altered file is refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictBool, StrictFloat, StrictInt, StrictStr
from torch import Tensor

from ial_nap.annotations import feature_set_hash
from ial_nap.context import Context
from ial_nap.nap import FeatureNAP
from ial_nap.series import Kind, Scaling, Series
from ial_nap.training import Epoch
from shared_core.device import resolve_device
from shared_core.errors import InputError
from shared_core.runs import atomic_path

if TYPE_CHECKING:
    from ial_nap.estimator import NAPClassifier, NAPRegressor

__all__ = ["digest", "load", "save"]

_KEY, _FORMAT = "ial_nap", 1
_MOST = 1 << 20
_TYPES = {"b": np.bool_, "i": np.int64, "u": np.uint64, "f": np.float64, "U": np.str_}

_Size = Annotated[StrictInt, Field(ge=1, le=_MOST)]
_Name = Annotated[StrictStr, Field(max_length=10_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Epoch(_Strict):
    epoch: _Size
    loss: StrictFloat | None
    validation: StrictFloat | None
    is_best: StrictBool


class _Saved(_Strict):
    """The header of a file."""

    format: StrictInt
    estimator: Literal["NAPClassifier", "NAPRegressor"]
    parameters: dict[_Name, JsonValue]
    network: dict[_Name, StrictBool | StrictInt | StrictFloat | StrictStr]
    features: Annotated[list[_Name], Field(min_length=1)]
    steps: Annotated[list[_Name], Field(min_length=1)]
    units: list[_Name]
    kind: Kind
    outputs: _Size
    target_mean: StrictFloat
    target_deviation: Annotated[StrictFloat, Field(gt=0)]
    classes: list[StrictBool | StrictInt | StrictFloat | StrictStr]
    classes_type: Literal["b", "i", "u", "f", "U"]
    context: list[tuple[_Name, _Name]]
    lengths: dict[_Name, _Size]
    annotated: list[_Name]
    history: list[_Epoch]
    digest: _Name


def save(estimator: NAPClassifier | NAPRegressor, path: str | Path) -> None:
    """Write a fitted estimator to one file, which appears under its name only when it is complete.

    Parameters
    ----------
    estimator : fitted
    path : file to write, e.g. ``model.safetensors``

    Raises
    ------
    InputError
        When the file cannot be written.
    """
    from safetensors.torch import save_file

    model, series, context = estimator.model_, estimator.series_, estimator.context_
    tensors = {f"network.{name}": value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    tensors["scaling.mean"], tensors["scaling.deviation"] = series.scaling.mean, series.scaling.deviation
    tensors["context.masks"] = context.masks[: len(context)]
    people = estimator.annotated()
    if people is not None:
        tensors["annotated.x"], tensors["annotated.lengths"] = people.x, people.lengths
        tensors["annotated.observed"] = people.observed
        if people.y is not None:
            tensors["annotated.y"] = people.y
    classes = getattr(estimator, "classes_", np.zeros(0))
    annotated = {instance for instance, _ in context.keys}
    head: dict[str, Any] = {
        "format": _FORMAT,
        "estimator": type(estimator).__name__,
        "parameters": json.loads(json.dumps(estimator.get_params(deep=False), default=_plain)),
        "network": dict(model.config),
        "features": list(series.features),
        "steps": list(series.steps),
        "units": list(series.units),
        "kind": series.kind,
        "outputs": series.outputs,
        "target_mean": float(series.scaling.target_mean),
        "target_deviation": float(series.scaling.target_deviation),
        "classes": classes.tolist(),
        "classes_type": classes.dtype.kind,
        "context": [list(key) for key in context.keys],
        "lengths": {name: length for name, length in context.lengths.items() if name in annotated},
        "annotated": list(people.ids) if people is not None else [],
        "history": [
            {
                "epoch": one.epoch,
                "loss": _finite(one.loss),
                "validation": _finite(one.validation),
                "is_best": one.is_best,
            }
            for one in estimator.history_
        ],
    }
    head["digest"] = digest(head, tensors)
    with atomic_path(path) as temporary:
        save_file(
            {name: tensor.clone() for name, tensor in tensors.items()},
            temporary,
            metadata={_KEY: json.dumps(head, allow_nan=False)},
        )


def load(path: str | Path, *, device: str = "auto") -> NAPClassifier | NAPRegressor:
    """Read what :func:`save` wrote.

    Parameters
    ----------
    path : the file
    device : where to, "auto", "cpu", "cuda" or "mps"

    Returns
    -------
    An estimator that predicts what the saved one did under the same verdicts, with its context but without its past
    (there is nothing to undo) and without training series.

    Raises
    ------
    InputError
        For a file that is missing, truncated, not one of this package, of a newer format, or that says of itself what
        is not so.
    """
    place = resolve_device(device)
    head, tensors = _contents(Path(path))
    try:
        return _made(head, tensors, place, device)
    except InputError as error:
        raise InputError(f"{path}: is damaged or was altered: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise InputError(f"{path}: is damaged or was altered ({_line(error)}); give another file") from None


def _contents(path: Path) -> tuple[_Saved, dict[str, Tensor]]:
    """Read header and tensors, and see that they belong together."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said = cast("dict[str, str]", file.metadata() or {})
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or _line(error)}); give a saved estimator") from None
    except (SafetensorError, ValueError, TypeError, RuntimeError, KeyError, OverflowError) as error:
        raise InputError(f"{path}: is no safetensors file, or is damaged ({_line(error)}); give another file") from None
    if _KEY not in said:
        raise InputError(f"{path}: is a safetensors file, but of no estimator of ial-nap; give the file of save()")
    try:
        found: Any = json.loads(said[_KEY])
        if isinstance(found, dict) and cast("dict[str, Any]", found).get("format", 0) != _FORMAT:
            raise InputError(
                f"{path}: is of format {found.get('format')}, this reads format {_FORMAT}; update this package"  # pyright: ignore[reportUnknownMemberType]
            )
        head = _Saved.model_validate(found)
    except InputError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: its header is damaged ({_line(error)}); give another file") from None
    if head.digest != digest({**cast("dict[str, Any]", found), "digest": None}, tensors):
        raise InputError(f"{path}: was altered after it was saved, or is damaged; give the file as it was saved")
    return head, tensors


def _made(head: _Saved, tensors: dict[str, Tensor], place: torch.device, device: str) -> NAPClassifier | NAPRegressor:
    from ial_nap.estimator import NAPClassifier, NAPRegressor

    r, t = len(head.features), len(head.steps)
    kinds = {
        "multiclass": "NAPClassifier",
        "binary": "NAPClassifier",
        "multilabel": "NAPClassifier",
        "regression": "NAPRegressor",
    }
    _need(kinds[head.kind] == head.estimator, f"a {head.estimator} of a {head.kind} task")
    for name, here in (("features", r), ("steps", t), ("outputs", head.outputs), ("kind", head.kind)):
        _need(head.network.get(name) == here, f"{name} of the network: {head.network.get(name)!r}, {here!r} elsewhere")
    if head.kind in {"binary", "multiclass"}:
        _need(len(set(head.classes)) == max(2, head.outputs), f"{len(head.classes)} classes, {head.outputs} outputs")
    schema = feature_set_hash(head.features, t, head.units)
    _need(head.network.get("schema") == schema, "names of features and the hash of them differ")
    state = {name[8:]: value for name, value in tensors.items() if name.startswith("network.")}
    for name, value in head.network.items():
        _need(not isinstance(value, int) or value <= _MOST or name == "seed", f"{name} = {value} of the network")
    _check_shapes(head.network, state, r, t)
    model = FeatureNAP(**cast("Any", head.network))
    for name, value in tensors.items():
        _need(
            not value.is_floating_point() or bool(value.isfinite().all()), f"'{name}' holds values that are not finite"
        )
    model.load_state_dict(state)
    _need(model.config == head.network, "the network is described in another way than this version does")

    mean, deviation = tensors["scaling.mean"], tensors["scaling.deviation"]
    _need(mean.shape == deviation.shape == (r,), "scaling is not one number for each feature")
    _need(mean.dtype == deviation.dtype == torch.float32, "scaling is of another type")
    scale = Scaling(mean, deviation, head.target_mean, head.target_deviation)
    _need(bool((scale.deviation > 0).all()), "a deviation is not above 0")
    context = Context(t, r, kappa=model.kappa, schema=schema, lengths=head.lengths)
    _need(all(length <= t for length in head.lengths.values()), f"an instance is longer than {t} steps")
    masks = tensors["context.masks"]
    _need(
        masks.dtype == torch.int8 and masks.shape == (len(head.context), t, r), "masks of verdicts have another shape"
    )
    _need(len(set(head.context)) == len(head.context), "an instance and annotator have two masks")
    ids, people = [key[0] for key in head.context], [key[1] for key in head.context]
    context.add(masks, ids=ids, annotators=people, allow_empty=True)
    context.forget_past()

    made = (NAPClassifier if head.estimator == "NAPClassifier" else NAPRegressor)()
    unknown = set(head.parameters) ^ set(made.get_params(deep=False))
    _need(not unknown, f"parameters that this version does not have, or lacks: {', '.join(sorted(unknown)[:5])}")
    made.set_params(**head.parameters)
    made.set_params(device=device)
    made.check_parameters()
    for name, value in head.parameters.items():
        _need(not isinstance(value, int) or value <= _MOST or name == "seed", f"{name} = {value}")
    series = Series(
        x=torch.zeros(0, t, r),
        lengths=torch.zeros(0, dtype=torch.int64),
        observed=torch.zeros(0, t, r, dtype=torch.bool),
        y=None,
        kind=head.kind,
        outputs=head.outputs,
        features=tuple(head.features),
        steps=tuple(head.steps),
        ids=(),
        scaling=scale,
        units=tuple(head.units),
    )
    made.restore(
        model.to(place),
        series,
        context,
        [Epoch(one.epoch, _or_nan(one.loss), _or_nan(one.validation), one.is_best) for one in head.history],
        _people(head, tensors, series) if head.annotated else None,
    )
    if isinstance(made, NAPClassifier):
        made.classes_ = np.array(head.classes, dtype=_TYPES[head.classes_type])
        _need(made.classes_.tolist() == head.classes, f"classes are not all of the type '{head.classes_type}'")
    return made


def _people(head: _Saved, tensors: dict[str, Tensor], like: Series) -> Series:
    """Return the annotated instances, which a model that reads more of a context than masks needs."""
    n = len(head.annotated)
    x, observed, lengths = (tensors[f"annotated.{name}"] for name in ("x", "observed", "lengths"))
    _need(x.shape == observed.shape == (n, len(like.steps), len(like.features)), "annotated series: another shape")
    _need(x.dtype == torch.float32 and observed.dtype == torch.bool, "annotated series: another type")
    _need(lengths.shape == (n,) and lengths.dtype == torch.int64, "annotated lengths: another shape or type")
    _need(bool(((lengths >= 1) & (lengths <= len(like.steps))).all()), "annotated lengths: not within the steps")
    _need(len(set(head.annotated)) == n, "an annotated instance is there twice")
    y = tensors.get("annotated.y")
    if y is not None:
        _need(y.shape == ((n, head.outputs) if head.kind == "multilabel" else (n,)), "annotated labels: another shape")
        _need(
            y.dtype == (torch.int64 if head.kind == "multiclass" else torch.float32), "annotated labels: another type"
        )
        _need(head.kind != "multiclass" or bool(((y >= 0) & (y < head.outputs)).all()), "annotated labels: no classes")
    return replace(like, x=x, observed=observed, lengths=lengths, y=y, ids=tuple(head.annotated))


def _check_shapes(network: dict[str, Any], state: dict[str, Tensor], r: int, t: int) -> None:
    """Compare shapes of a network that is not made with those there are."""
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in FeatureNAP(**network).state_dict().items()}
    there = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(expected.keys() | there.keys()):
        here, saved = expected.get(name), there.get(name)
        _need(here == saved, f"'{name}' has shape {saved}, the network needs {here}")
    _need(expected["preference"] == (t, r), f"the network is of {expected['preference']}, names are of {(t, r)}")


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise InputError(what)


def digest(head: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Hash a header without its digest, and all tensors.

    Parameters
    ----------
    head : what goes into the header; a digest in it is passed over
    tensors : on the CPU

    Returns
    -------
    32 hexadecimal digits. It tells that a file is damaged; it is no signature, for anybody can make one.
    """
    told = {name: value for name, value in head.items() if name != "digest"}
    found = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"cannot save a {type(value).__name__}")


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]

"""The file of a plan and that of the small weights, read with suspicion."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from shared_core.errors import DAMAGE, InputError
from shared_core.objects import one_line
from shared_core.runs import atomic_path
from stamp.structure import Attribute, Group, Slot

VERSION = 1
LARGEST_FILE = 1 << 28
MOST_CHANNELS = 1 << 26


class PlanError(InputError):
    """A plan that is damaged, contradicts itself or does not go with the network."""


_Count = Annotated[int, Field(ge=1, le=MOST_CHANNELS, strict=True)]
_Position = Annotated[int, Field(ge=0, le=1 << 40, strict=True)]
_Number = float | Literal["nan", "inf", "-inf"]
_Place = tuple[str, str, _Position, _Count, _Position, _Count]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StoredGroup(_Strict):
    name: str
    width: _Count
    keep: list[_Position] | None = None
    frozen: str | None = None
    producers: list[_Place] = []
    consumers: list[_Place] = []
    followers: list[_Place] = []
    attributes: list[tuple[str, str, _Count]] = []
    scores: list[_Number] | None = None
    gates: list[_Number] | None = None

    def group(self) -> Group:
        places = [tuple(Slot(*place) for place in part) for part in (self.producers, self.consumers, self.followers)]
        attributes = tuple(Attribute(*found) for found in self.attributes)
        return Group(self.name, self.width, places[0], places[1], places[2], self.frozen, attributes)


class StoredPlan(_Strict):
    format: Literal["stamp-plan"]
    version: int
    backbone: str
    method: str
    budget: dict[str, Any]
    ratios: dict[str, float]
    head: str | None
    seconds: float
    notes: list[str]
    groups: list[StoredGroup]


def read_plan(path: Path) -> StoredPlan:
    try:
        with path.open("rb") as stream:
            data = stream.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise PlanError(f"{path}: larger than {LARGEST_FILE:,} bytes; it is no plan")
        content = json.loads(data)
    except OSError as error:
        raise PlanError(
            f"{path}: cannot be read ({error.strerror or error}); give what PrunePlan.save wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: is not JSON, or it is damaged ({one_line(error)})") from error
    if not isinstance(content, dict) or cast("dict[str, Any]", content).get("format") != "stamp-plan":
        raise PlanError(f"{path}: is no plan of stamp; give what PrunePlan.save wrote")
    version = cast("dict[str, Any]", content).get("version")
    if isinstance(version, int) and version > VERSION:
        raise PlanError(f"{path}: is of version {version}, and this stamp reads up to {VERSION}; upgrade it")
    try:
        return StoredPlan.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        raise PlanError(f"{path}: {place}: {first['msg']}") from error


def kept_channels(indices: Sequence[int], width: int, place: str) -> Tensor:
    if indices and max(indices) >= width:
        raise PlanError(f"{place}: keeps channel {max(indices)}, and it has {width}, numbered from 0")
    if len(set(indices)) != len(indices):
        raise PlanError(f"{place}: keeps channel {Counter(indices).most_common(1)[0][0]} twice")
    mask = torch.zeros(width, dtype=torch.bool)
    mask[list(indices)] = True
    return mask


def save_weights(small: nn.Module, path: str | Path) -> None:
    """Write parameters and buffers of a network as safetensors, atomically.

    Parameters
    ----------
    small : the network
    path : to write

    Raises
    ------
    InputError
        When it cannot be written.
    """
    from safetensors.torch import save_file

    # Tied tensors are written twice: the format has no aliases.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in small.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise PlanError(f"{path}: cannot be read ({error.strerror or error}); give what save_weights wrote") from error
    except (SafetensorError, *DAMAGE) as error:
        raise PlanError(f"{path}: is no safetensors file, or it is damaged ({one_line(error)})") from error

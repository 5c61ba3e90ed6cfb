"""HersheyShot: the stroke glyphs of A. V. Hershey's fonts as few-shot classes; drawn here, nothing is downloaded.

A class is a glyph of one face, an instance is its polylines under a small random affine map, with trembling vertices
and a pen of random width. Recipe of this project, not of a paper. Needs ``shared-core[hershey]``: the package
Hershey-Fonts for the strokes, Pillow to draw them.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

from shared_core.data._images import optional
from shared_core.errors import InputError

PROVENANCE = (
    "stroke glyphs of the fonts of A. V. Hershey (1967), from the package Hershey-Fonts;"
    " MIT, the glyphs free to use; https://github.com/apshu/HersheyFonts"
)

# In the order of Hershey-Fonts 2.1: a glyph that several faces have is of the first of them. The faces in no split
# have no glyph of their own.
_FACES = (
    *("futural", "astrology", "cursive", "cyrilc_1", "cyrillic", "futuram", "gothgbt", "gothgrt", "gothiceng"),
    *("gothicger", "gothicita", "gothitt", "greek", "greekc", "greeks", "japanese", "markers", "mathlow", "mathupp"),
    *("meteorology", "music", "rowmand", "rowmans", "rowmant", "scriptc", "scripts", "symbolic", "timesg", "timesi"),
    *("timesib", "timesr", "timesrb"),
)
_SPLITS = {
    "train": (
        *("futural", "futuram", "gothgbt", "gothgrt", "gothicita", "scriptc", "cursive", "timesib", "timesr"),
        *("rowmant", "rowmand", "timesi", "mathlow", "markers"),
    ),
    "validation": ("cyrilc_1", "cyrillic", "meteorology"),
    "test": ("greek", "greekc", "greeks", "symbolic"),
    "far": ("japanese", "astrology", "music"),
}
_CHARACTERS = [chr(code) for code in range(33, 127)]
_LEAST_POINTS = 4
# All lengths of the recipe are for images of 28 pixels a side.
_SIDE, _EXTENT = 28, 20
_FINER = 3
_Strokes = tuple[NDArray[np.float64], ...]


def _library() -> Any:
    try:
        return importlib.import_module("HersheyFonts")
    except ImportError:
        raise InputError(
            "hershey: its strokes are in a package not installed here; pip install Hershey-Fonts"
        ) from None


@lru_cache(maxsize=1)
def _glyphs() -> MappingProxyType[str, _Strokes]:
    """Return the strokes of all different glyphs by ``face/character``, centred, 20 pixels on their longer side."""
    font = _library().HersheyFonts()
    if absent := sorted({*_FACES} - {*font.default_font_names}):
        raise InputError(
            f"hershey: the installed Hershey-Fonts has no face '{absent[0]}'; pip install 'Hershey-Fonts>=2.1'"
        )
    seen: set[tuple[Any, ...]] = set()
    found: dict[str, _Strokes] = {}
    for face in _FACES:
        font.load_default_font(face)
        known = font.all_glyphs
        for character in filter(known.__contains__, _CHARACTERS):
            strokes = [np.array(stroke, dtype=np.float64) for stroke in known[character].strokes if len(stroke)]
            if sum(map(len, strokes)) < _LEAST_POINTS:
                continue
            points = np.concatenate(strokes)
            low, high = points.min(0), points.max(0)
            shape = tuple(tuple(map(tuple, (stroke - low).tolist())) for stroke in strokes)
            if shape not in seen:
                seen.add(shape)
                scale = _EXTENT / max(float((high - low).max()), 1.0)
                found[f"{face}/{character}"] = tuple((stroke - (low + high) / 2) * scale for stroke in strokes)
    return MappingProxyType(found)


def face_of(name: str) -> str:
    """Return the face in a class's name; the character after it may be a slash too."""
    return name.partition("/")[0]


def names_of(split: str) -> list[str]:
    """Return the classes, ``face/character``, of ``train``, ``validation``, ``test``, ``far`` or ``all``."""
    faces = {face for part, faces in _SPLITS.items() if split in (part, "all") for face in faces}
    return [name for name in _glyphs() if face_of(name) in faces]


def versions() -> str:
    """Return what the images depend on, in words."""
    return f"Hershey-Fonts {getattr(_library(), '__version__', '')}, Pillow {optional('PIL').__version__}"


def draw(name: str, size: int, instances: int, seed: int) -> UInt8[np.ndarray, "instances size size"]:
    """Draw one class, white on black, three samples to a pixel's side, averaged.

    Normal deviates, lengths in pixels at a size of 28: rotation .12 rad, shear .12, log-scale .1, shift 1.2, each
    vertex .35; the pen is .7 to 1.5 wide. A class draws from its own generator, so its instances do not depend on which
    other classes are asked for, nor on how many instances are.

    Parameters
    ----------
    name : ``face/character``
    size : side in pixels
    instances : how many to draw
    seed : of the generator, with the face and the character
    """
    if not 8 <= size <= 128:
        raise InputError(f"size: hershey is drawn at 8 to 128 pixels a side, got {size}")
    image, pen = optional("PIL.Image"), optional("PIL.ImageDraw")
    strokes = _glyphs()[name]
    points, cuts = np.concatenate(strokes), np.cumsum([len(stroke) for stroke in strokes])[:-1]
    random = np.random.default_rng([seed, _FACES.index(face_of(name)), ord(name[-1])])
    side, unit = _FINER * size, _FINER * size / _SIDE
    out = np.empty((instances, size, size), dtype=np.uint8)
    for place in range(instances):
        angle, slant, zoom = random.normal(0, (0.12, 0.12, 0.1))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        linear = np.exp(zoom) * turn @ np.array([[1, slant], [0, 1]])
        moved = points @ linear.T + random.normal(0, 1.2, 2) + random.normal(0, 0.35, points.shape)
        width = max(1, round(random.uniform(0.7, 1.5) * unit))
        canvas = image.new("L", (side, side))
        drawing = pen.Draw(canvas)
        for stroke in np.split(moved * unit + side / 2, cuts):
            drawing.line(stroke.ravel().tolist(), fill=255, width=width, joint="curve")
        fine = np.asarray(canvas, dtype=np.float64).reshape(size, _FINER, size, _FINER)
        out[place] = np.rint(fine.mean((1, 3))).astype(np.uint8)
    return out

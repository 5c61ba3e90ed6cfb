"""GlyphShot: characters of the fonts that matplotlib ships, as few-shot classes; made here, nothing is downloaded.

A class is a character, an instance is one of up to 16 faces under a small random affine map. Recipe of this project,
not of a paper. Needs ``shared-core[glyphs]`` (matplotlib for the fonts, Pillow to draw them).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_core.data._datasets import ImageData
from shared_core.data._files import Source, cache_root, reading
from shared_core.data._images import optional
from shared_core.errors import InputError

RECIPE = 1
FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
_CATEGORIES = frozenset(("Lu", "Ll", "Lo", "Lt", "Nd", "No", "Nl", "Sm", "So", "Sc", "Po", "Pd"))
_SCRIPTS = ("LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "GEORGIAN")
_POINTS, _CANVAS, _MIN_FACES = 32, 40, 12


@dataclass(frozen=True)
class _Alphabet:
    """The classes: a character each, with the positions in ``FACES`` that can draw it."""

    characters: tuple[str, ...]
    faces: dict[str, tuple[int, ...]]
    representative: dict[str, str]

    def split_of(self, character: str) -> str:
        """Return train, validation or test (64/16/20) by a hash of the base letter.

        The variants of a letter (accents, cases, its twins in other scripts) are therefore in one split, and a
        letter stays in its split whatever characters a later version of the fonts adds.
        """
        base = unicodedata.normalize("NFKD", character)[0]
        base = self.representative.get(base, base).casefold()
        percent = int.from_bytes(hashlib.sha256(base.encode()).digest()[:4], "big") % 100
        return "train" if percent < 64 else "validation" if percent < 80 else "test"

    def in_split(self, split: str) -> list[str]:
        """Return the characters of a split; the "script" ones divide by script instead of by letter."""
        if split in ("script-train", "script-test"):
            other = {c for c in self.characters if _script(c) in ("GREEK", "ARMENIAN", "GEORGIAN")}
            return [c for c in self.characters if (c in other) == (split == "script-test")]
        return [c for c in self.characters if split in ("all", self.split_of(c))]


def _script(character: str) -> str:
    word = unicodedata.name(character, "SYMBOL").split()[0]
    return word if word in _SCRIPTS else "SYMBOL"


class _Renderer:
    """Draws characters of one face, white on black, the ink centred on a square canvas."""

    def __init__(self, face: str) -> None:
        path = Path(optional("matplotlib").get_data_path(), "fonts", "ttf", f"{face}.ttf")
        module = optional("PIL.ImageFont")
        self.covers = frozenset(map(chr, optional("matplotlib.ft2font").FT2Font(str(path)).get_charmap()))
        self._font: Any = module.truetype(str(path), _POINTS, layout_engine=module.Layout.BASIC)

    def ink(self, character: str) -> NDArray[np.uint8]:
        """Return the drawn pixels, cropped to the ink; of size zero where there is none."""
        mask = self._font.getmask(character, mode="L")
        pixels = np.frombuffer(bytes(mask), dtype=np.uint8).reshape(mask.size[1], mask.size[0])
        rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
        return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else pixels[:0]

    def draw(self, character: str, canvas: NDArray[np.uint8]) -> None:
        """Draw onto an empty square canvas; what is larger is cut off evenly."""
        ink, size = self.ink(character), len(canvas)
        cut = [max(0, extent - size) // 2 for extent in ink.shape]
        ink = ink[cut[0] : cut[0] + size, cut[1] : cut[1] + size]
        top, left = (size - ink.shape[0]) // 2, (size - ink.shape[1]) // 2
        canvas[top : top + ink.shape[0], left : left + ink.shape[1]] = ink


def _alphabet(renderers: Sequence[_Renderer]) -> _Alphabet:
    """Find the characters that at least 12 faces have, and merge those that look the same (A, Alpha, Cyrillic A)."""
    faces: dict[str, tuple[int, ...]] = {}
    for character in sorted(frozenset[str]().union(*(renderer.covers for renderer in renderers))):
        if unicodedata.category(character) in _CATEGORIES:
            drawn_by = tuple(i for i, renderer in enumerate(renderers) if character in renderer.covers)
            if len(drawn_by) >= _MIN_FACES:
                faces[character] = drawn_by
    first: dict[tuple[tuple[int, ...], bytes], str] = {}
    representative: dict[str, str] = {}
    for character, drawn_by in faces.items():
        ink = renderers[drawn_by[0]].ink(character)
        if ink.size:
            representative[character] = first.setdefault((ink.shape, ink.tobytes()), character)
    return _Alphabet(tuple(first.values()), faces, representative)


def _instances(
    canvases: NDArray[np.uint8], pick: NDArray[np.int64], maps: NDArray[np.float32], size: int
) -> NDArray[np.uint8]:
    """Sample canvases under affine maps, two samples to a pixel's side, averaged."""
    import torch
    from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

    out = np.empty((len(pick), size, size), dtype=np.uint8)
    for start in range(0, len(pick), 1024):
        chosen = torch.from_numpy(canvases[pick[start : start + 1024]]).float()[:, None]
        shape = [len(chosen), 1, 2 * size, 2 * size]
        grid = affine_grid(torch.from_numpy(maps[start : start + 1024]), shape, align_corners=False)
        sampled = avg_pool2d(grid_sample(chosen, grid, align_corners=False), 2)
        out[start : start + 1024] = sampled[:, 0].round().to(torch.uint8).numpy()
    return out


def _random_maps(characters: Sequence[str], instances: int, seed: int) -> NDArray[np.float32]:
    """Return maps from output to canvas: rotation +-0.25 rad, scale 0.8-1.15, shear +-0.25, shift +-2 of 40 px.

    A class draws from its own generator, so its instances do not depend on which other classes are asked for.
    """
    draws = np.stack([np.random.default_rng([seed, ord(c)]).uniform(-1, 1, (instances, 5)) for c in characters])
    turn, zoom, shear, *shift = np.moveaxis(draws.reshape(-1, 5), 1, 0)
    angle, scale, slant = 0.25 * turn, 0.975 + 0.175 * zoom, 0.25 * shear
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shearing = np.array([[np.ones_like(slant), slant], [np.zeros_like(slant), np.ones_like(slant)]])
    linear = np.einsum("ijn,jkn->nik", rotation, shearing) / scale[:, None, None]
    offset = np.stack(shift, axis=1)[:, :, None] * (4 / _CANVAS)
    return np.concatenate([linear, offset], axis=2).astype(np.float32)


def glyphs(
    source: Source,
    *,
    size: int = 28,
    classes: int | None = None,
    instances: int = 20,
    faces: Sequence[str] | None = None,
    seed: int = 0,
    cache: bool = True,
) -> ImageData:
    """GlyphShot: images (classes * instances, size, size), white on black, ordered by class; groups = font faces.

    Parameters
    ----------
    size : pixels; 28, 20 and 14 are usual.
    classes : only so many classes of the split, drawn by ``seed``; default: all (about 1,930 in "all").
    instances : images per class; the faces that have the character take turns.
    faces : use only these of ``FACES``; two calls with disjoint faces give support and query without common faces.
    seed : of the affine maps and of the choice of classes; the splits do not depend on it.
    cache : keep the result in the user's cache folder and take it from there the next time.
    """
    unknown = [face for face in faces or () if face not in FACES]
    if unknown or (faces is not None and not len(faces)):
        raise InputError(f"faces: {unknown[0] if unknown else 'nothing'!r} is not one of {', '.join(FACES)}")
    if not 8 <= size <= 128 or instances < 1 or (classes is not None and classes < 1):
        raise InputError(f"glyphs: size {size} (8..128), instances {instances} and classes {classes} must be positive")
    chosen_faces = tuple(faces or FACES)
    versions = [optional(module).__version__ for module in ("matplotlib", "PIL")]
    key = json.dumps([RECIPE, versions, source.split, size, classes, instances, chosen_faces, seed])
    path = cache_root() / "glyphs" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    from shared_core.runs import atomic_path

    made = _cached(path) if cache else None
    if made is None:
        made = _make(source.split, size, classes, instances, chosen_faces, seed)
        if cache:
            # A cache folder that cannot be written costs only time.
            with contextlib.suppress(InputError), atomic_path(path) as temporary:
                arrays: dict[str, Any] = dict(made)
                np.savez(temporary, **arrays)
    names = tuple(map(chr, made["characters"].tolist()))
    labels = np.repeat(np.arange(len(names)), instances)
    notes = f"matplotlib {versions[0]}, Pillow {versions[1]}, seed {seed}"
    images, groups = made["images"], made["faces"]
    return ImageData(*source.origin(images, labels, notes=notes), images, labels, names, groups, FACES, "face")


def _make(
    split: str, size: int, classes: int | None, instances: int, faces: tuple[str, ...], seed: int
) -> dict[str, NDArray[Any]]:
    renderers = [_Renderer(face) for face in FACES]
    alphabet = _alphabet(renderers)
    allowed = frozenset(FACES.index(face) for face in faces)
    characters = alphabet.in_split(split)
    # Chosen before the faces count, so that calls with different faces mostly choose the same classes.
    order = np.random.default_rng(seed).permutation(len(characters)).tolist() if classes else range(len(characters))
    drawable = {c: [f for f in alphabet.faces[c] if f in allowed] for c in map(characters.__getitem__, order)}
    characters = sorted([c for c, usable in drawable.items() if usable][:classes])
    if len(characters) < (classes or 1):
        raise InputError(
            f"classes: {classes or 1} asked for, the split {split!r} has {len(characters)} with these faces"
        )
    first, pick, used = 0, [], []
    canvases = np.zeros((sum(len(drawable[c]) for c in characters), _CANVAS, _CANVAS), dtype=np.uint8)
    for character in characters:
        usable = drawable[character]
        for position, face in enumerate(usable):
            renderers[face].draw(character, canvases[first + position])
        turns = np.arange(instances) % len(usable)
        pick.append(first + turns)
        used.append(np.array(usable)[turns])
        first += len(usable)
    images = _instances(canvases, np.concatenate(pick), _random_maps(characters, instances, seed), size)
    points = np.array([ord(character) for character in characters], dtype=np.int64)
    return {"images": images, "faces": np.concatenate(used).astype(np.int64), "characters": points}


def _cached(path: Path) -> dict[str, NDArray[Any]] | None:
    """Return what an earlier call made, or None where that is absent or unreadable."""
    try:
        with reading(path), np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("images", "faces", "characters")}
    except InputError:
        return None

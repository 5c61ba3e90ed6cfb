"""Picture files: what is below a folder, and pixels of one size out of files of any kind, mode and orientation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from shared_core.data._images import optional
from shared_core.errors import InputError

PICTURES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"))
SMALLEST_SIDE = 8
_MOST_PIXELS = 1 << 26


@dataclass(frozen=True)
class Scan:
    """What is below a folder: pictures by the folder they are in (``""``: in none), and what was passed over."""

    pictures: dict[str, list[Path]]
    empty: list[str]
    hidden: int
    others: list[str]

    @classmethod
    def of(cls, folder: Path) -> Scan:
        pictures: dict[str, list[Path]] = {}
        folders: list[str] = []
        others: list[str] = []
        hidden = 0
        for path in sorted(folder.rglob("*")):
            parts = path.relative_to(folder).parts
            is_folder = path.is_dir()
            if any(part.startswith((".", "__MACOSX")) for part in parts):
                hidden += not is_folder
            elif is_folder:
                folders.append("/".join(parts))
            elif path.suffix.lower() in PICTURES:
                pictures.setdefault("/".join(parts[:-1]), []).append(path)
            else:
                others.append("/".join(parts))
        empty = [name for name in folders if not any(f"{held}/".startswith(f"{name}/") for held in pictures)]
        return cls(pictures, empty, hidden, others)

    @property
    def notes(self) -> list[str]:
        """What was passed over."""
        found: list[str] = []
        if self.hidden:
            found.append(f"skipped {self.hidden} hidden files")
        if self.others:
            found.append(f"skipped {len(self.others)} files that are no images, such as {self.others[0]}")
        return found


def _open(file: Path, use: Callable[[Any], Any]) -> Any:
    """Return what `use` makes of an opened picture, or say in one line that it cannot be read."""
    library = optional("PIL.Image")
    try:
        with library.open(file) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise InputError(f"{file}: {image.width} x {image.height} pixels is too large; shrink it")
            return use(image)
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{file}: not a readable image ({reason}); remove or replace it") from error


def has_colour(file: Path) -> bool:
    return bool(_open(file, lambda image: image.mode not in ("1", "L", "LA", "La", "F") and image.mode[:1] != "I"))


def _eight_bit(image: Any) -> Any:
    """Return the picture upright, with 8 bits a channel and nothing transparent."""
    library = optional("PIL.Image")
    image = optional("PIL.ImageOps").exif_transpose(image)
    if image.mode[:1] == "I" or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds NaN or infinity")
        top = 65535 if image.mode != "F" and (image.mode != "I" or values.max() > 255) else 255
        top = 1 if image.mode == "F" and values.max() <= 1 else top
        if values.min() < 0 or values.max() > top:
            raise ValueError(f"its values are {values.min():g}..{values.max():g}, expected 0..{top}")
        return library.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"), dtype=np.float64)
        light = np.asarray(image.convert("L"), dtype=np.float64)
        # Dark ink on nothing is meant for white paper, and light ink for a dark ground.
        ground = 0 if alpha.any() and (alpha * light).sum() > 127.5 * alpha.sum() and (alpha < 255).any() else 255
        paper = library.new("RGBA", image.size, (ground, ground, ground, 255))
        return library.alpha_composite(paper, image)
    return image


def _border(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the median colour of the outermost pixels of ``(height, width, channels)``."""
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(edges, axis=0).astype(np.uint8)


def _decode(file: Path, size: int | None, channels: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Return a picture as ``(side, side, channels)``, padded to a square, and its own width and height."""
    library = optional("PIL.Image")

    def use(image: Any) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        picture = _eight_bit(image)
        # Pillow has no way from some colour spaces to grey but through RGB.
        if channels == 1 and picture.mode not in ("1", "L", "RGB", "RGBA"):
            picture = picture.convert("RGB")
        picture = picture.convert("L" if channels == 1 else "RGB")
        pixels = np.array(picture, dtype=np.uint8).reshape(picture.height, picture.width, channels)
        height, width = pixels.shape[:2]
        side = max(height, width)
        if height != width:
            square = np.broadcast_to(_border(pixels), (side, side, channels)).copy()
            top, left = (side - height) // 2, (side - width) // 2
            square[top : top + height, left : left + width] = pixels
            pixels = square
        if size is not None and side != size:
            kind = library.Resampling.BOX if side > size else library.Resampling.BILINEAR
            resized = library.fromarray(pixels[:, :, 0] if channels == 1 else pixels).resize((size, size), kind)
            pixels = np.array(resized, dtype=np.uint8).reshape(size, size, channels)
        return pixels, (width, height)

    return cast("tuple[NDArray[np.uint8], tuple[int, int]]", _open(file, use))


def decoded(
    files: Sequence[Path], size: int | None, channels: int, *, strict: bool
) -> tuple[NDArray[np.uint8], list[str]]:
    """Decode files to ``(n, channels, side, side)``; `strict` refuses small pictures instead of enlarging them."""
    images: NDArray[np.uint8] = np.zeros((0, channels, 0, 0), dtype=np.uint8)
    padded: list[Path] = []
    enlarged: list[Path] = []
    for place, file in enumerate(files):
        pixels, (width, height) = _decode(file, size, channels)
        if strict and max(width, height) < SMALLEST_SIDE:
            raise InputError(
                f"{file}: {width} x {height} pixels, at least {SMALLEST_SIDE} are needed; use larger images"
            )
        if not place:
            images = np.empty((len(files), channels, len(pixels), len(pixels)), dtype=np.uint8)
        if pixels.shape[:2] != images.shape[2:]:
            first = images.shape[2]
            raise InputError(
                f"{file}: {width} x {height} pixels, and {files[0]} is {first} on its longer side; give a size to"
                " resize all to, such as 84"
            )
        images[place] = pixels.transpose(2, 0, 1)
        if width != height:
            padded.append(file)
        if size is not None and max(width, height) < size:
            enlarged.append(file)
    if images.shape[2] < SMALLEST_SIDE and strict:
        raise InputError(f"size: images of {images.shape[2]} pixels a side, at least {SMALLEST_SIDE} are needed")
    notes: list[str] = []
    if padded:
        notes.append(f"padded {len(padded)} images to squares, such as {padded[0].name}")
    if enlarged:
        notes.append(f"enlarged {len(enlarged)} images to {size} pixels, such as {enlarged[0].name}")
    return images, notes


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures from anywhere, as a network takes them.

    Parameters
    ----------
    images : ``(n, channels, size, size)`` in [0, 1]
    files : n file names, relative to the folder
    inverted : whether light and dark were exchanged
    notes : what was done to them and what was passed over, a line each
    """

    images: Float32[Tensor, "n channels size size"]
    files: tuple[str, ...]
    inverted: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LabelledPictures(Pictures):
    """Pictures with their classes.

    Parameters
    ----------
    labels : ``(n,)`` positions in `class_names`, ascending
    class_names : names of the folders, in order
    """

    labels: Int64[Tensor, " n"]
    class_names: tuple[str, ...]


def read_labelled(
    path: str | Path,
    size: int,
    channels: Literal[1, 3],
    *,
    invert: Literal["auto"] | bool = "auto",
    training_mean: float | None = None,
) -> LabelledPictures:
    """Read the examples of a new task: a folder for each class.

    Pictures are turned upright, put on white where they are transparent (on black if what shows is light), padded to
    squares in the colour of their border, and resized by averaging areas.

    Parameters
    ----------
    path : folder of ``<class>/*.png`` (or jpg, bmp, gif, webp, tif)
    size : side of the network's images, in pixels
    channels : of the network's images
    invert : exchange light and dark. ``auto``: only in grey, where the training images are light on dark
        (`training_mean` below 0.5) and most of the pictures' borders are bright
    training_mean : mean pixel of the training images in [0, 1]; ``auto`` does nothing without it

    Raises
    ------
    InputError
        For no folder, fewer than two classes, a class without images or a damaged one, naming it.

    Examples
    --------
    >>> import tempfile; from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("left", "right"):
    ...     (folder / name).mkdir()
    ...     Image.new("L", (30, 30), 255).save(folder / name / "1.png")
    >>> found = read_labelled(folder, 28, 1, training_mean=0.1)
    >>> found.class_names, found.labels.tolist(), found.images.shape, found.inverted, float(found.images.max())
    (('left', 'right'), [0, 1], torch.Size([2, 1, 28, 28]), True, 0.0)
    """
    folder = _existing_folder(path, "<class>/*.png")
    scan = Scan.of(folder)
    notes = scan.notes
    if scan.empty:
        raise InputError(f"{folder}: class '{scan.empty[0]}' has no images; add some or remove the folder")
    classes = {name: files for name, files in scan.pictures.items() if name}
    if len(classes) < 2:
        loose = f" and {len(scan.pictures[''])} images in no class" if "" in scan.pictures else ""
        raise InputError(f"{folder}: has {len(classes)} classes of images{loose}; expected at least 2, <class>/*.png")
    if "" in scan.pictures:
        notes.append(f"left out {len(scan.pictures[''])} images that are in no class folder")
    names = sorted(classes)
    labels = [number for number, name in enumerate(names) for _ in classes[name]]
    found = _read(
        folder, [file for name in names for file in classes[name]], size, channels, invert, training_mean, notes
    )
    return LabelledPictures(
        found.images, found.files, found.inverted, found.notes, torch.tensor(labels, dtype=torch.int64), tuple(names)
    )


def read_unlabelled(
    path: str | Path,
    size: int,
    channels: Literal[1, 3],
    *,
    invert: Literal["auto"] | bool = "auto",
    training_mean: float | None = None,
) -> Pictures:
    """Read pictures to classify, in the order of their names, prepared as :func:`read_labelled` does.

    Parameters
    ----------
    path : a folder of pictures, whose own folders are passed over; or one picture
    size, channels, invert, training_mean : as for :func:`read_labelled`; give ``invert=labelled.inverted`` so that both
        are read alike

    Raises
    ------
    InputError
        For no folder, none that holds images or a damaged one, naming it.
    """
    single = Path(path)
    if single.is_file():
        return _read(single.parent, [single], size, channels, invert, training_mean, [])
    folder = _existing_folder(path, "*.png")
    entries = sorted(folder.iterdir())
    files = [entry for entry in entries if entry.is_file()]
    shown = [file for file in files if not file.name.startswith(".")]
    pictures = [file for file in shown if file.suffix.lower() in PICTURES]
    others = [file.name for file in shown if file.suffix.lower() not in PICTURES]
    inner = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))]
    notes = Scan({}, [], len(files) - len(shown), others).notes
    if inner:
        notes.append(f"passed over {len(inner)} folders, such as {inner[0]}")
    if not pictures:
        hint = f"; its folders, such as {inner[0]}, are not read" if inner else ""
        raise InputError(f"{folder}: no images in it; expected {', '.join(sorted(PICTURES))}{hint}")
    return _read(folder, pictures, size, channels, invert, training_mean, notes)


def _existing_folder(path: str | Path, layout: str) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: {'is a file' if folder.exists() else 'no such folder'}; give a folder of {layout}")
    return folder


def _read(
    folder: Path,
    files: Sequence[Path],
    size: int,
    channels: Literal[1, 3],
    invert: Literal["auto"] | bool,
    training_mean: float | None,
    notes: Sequence[str],
) -> Pictures:
    if size < 1 or channels not in (1, 3):
        raise InputError(f"need size >= 1 and 1 or 3 channels, got {size} and {channels}")
    pixels, more = decoded(files, size, channels, strict=False)
    inverted, why = _polarity(pixels, invert, training_mean)
    if inverted:
        pixels = 255 - pixels
    return Pictures(
        torch.from_numpy(pixels).float().div_(255),
        tuple(file.relative_to(folder).as_posix() for file in files),
        inverted,
        (*notes, *more, *why),
    )


def _polarity(
    pixels: NDArray[np.uint8], invert: Literal["auto"] | bool, training_mean: float | None
) -> tuple[bool, list[str]]:
    """Say whether to exchange light and dark, and why."""
    if invert != "auto":
        return invert, ["light and dark were exchanged, as asked"] if invert else []
    if pixels.shape[1] != 1 or training_mean is None or training_mean >= 0.5:
        return False, []
    bright = np.array([_border(image.transpose(1, 2, 0))[0] > 127 for image in pixels])
    inverted = bool(bright.mean() > 0.5)
    notes = ["light and dark were exchanged: the borders are bright, and the training images are light on dark"]
    odd = int((bright != inverted).sum())
    mixed = [f"{odd} of {len(bright)} images have {'a dark' if inverted else 'a bright'} border, unlike the rest"]
    return inverted, [*(notes if inverted else []), *(mixed if odd else [])]

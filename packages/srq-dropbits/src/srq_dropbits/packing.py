"""Sub-byte weights on disk: a dense bit stream per tensor in one safetensors file (format ``srq-packed``, version 1).

A code is the number of a grid point, ``(n - n_lo) / stride``, ``bits`` wide. Codes follow each other without padding,
least significant bit first, so a tensor of N weights takes exactly ``ceil(N bits / 8)`` bytes, at 3, 5, 6 and 7 bits
too. ``<layer>.weight.codes`` is that stream, ``<layer>.weight.scale`` what the integers are multiplied with; every
other tensor is stored in full precision under its own name, and the header says what grid each layer uses.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from shared_core.runs import atomic_path
from srq_dropbits.errors import InvalidBitsError, PackedFormatError
from srq_dropbits.grid import Grid

if TYPE_CHECKING:
    from srq_dropbits.deploy import IntegerLayer

__all__ = [
    "FORMAT",
    "VERSION",
    "SizeReport",
    "SizeRow",
    "inspect_packed",
    "load_packed",
    "pack_bits",
    "save_packed",
    "unpack_bits",
]

FORMAT = "srq-packed"
VERSION = 1

_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
# safetensors' own limit: a longer header is no header.
_LONGEST_HEADER = 100_000_000


def pack_bits(codes: Int[Tensor, "..."] | UInt8[Tensor, "..."], bits: int) -> UInt8[Tensor, "bytes"]:
    """Pack unsigned codes into a dense bit stream, least significant bit first (spec, section 6).

    Parameters
    ----------
    codes : integers 0 .. 2^bits - 1, of any shape (...), taken in row-major order
    bits : width of a code, 1..8

    Returns
    -------
    A tensor of exactly ``ceil(numel * bits / 8)`` bytes; the bits after the last code are 0.

    Raises
    ------
    InvalidBitsError
        For a width outside 1..8, or a code that does not fit.

    Examples
    --------
    >>> pack_bits(torch.tensor([1, 2, 3]), 2), pack_bits(torch.tensor([5, 7, 1]), 3)
    (tensor([57], dtype=torch.uint8), tensor([125,   0], dtype=torch.uint8))
    """
    _check_width(bits)
    flat = codes.detach().reshape(-1).to(torch.int64)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < 2**bits:
        raise InvalidBitsError(
            f"codes run from {int(flat.min())} to {int(flat.max())}; codes of {bits} bits lie in 0..{2**bits - 1}"
        )
    # Eight codes fill `bits` whole bytes, and fit one 64-bit word.
    groups = nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    words = (groups << (torch.arange(8, device=flat.device) * bits)).sum(1, keepdim=True)
    octets = (words >> (torch.arange(bits, device=flat.device) * 8)) & 0xFF
    return octets.reshape(-1)[: packed_bytes(flat.numel(), bits)].to(torch.uint8)


def unpack_bits(packed: UInt8[Tensor, "bytes"], bits: int, count: int) -> UInt8[Tensor, " count"]:
    """Read `count` codes from a dense bit stream.

    Parameters
    ----------
    packed : what :func:`pack_bits` gave, (ceil(count * bits / 8),)
    bits : width of a code, 1..8
    count : number of codes

    Returns
    -------
    The codes (count,).

    Raises
    ------
    InvalidBitsError
        For a width outside 1..8.
    PackedFormatError
        If the stream has another length.

    Examples
    --------
    >>> unpack_bits(torch.tensor([125, 0], dtype=torch.uint8), 3, 3)
    tensor([5, 7, 1], dtype=torch.uint8)
    """
    _check_width(bits)
    if packed.numel() != packed_bytes(count, bits):
        raise PackedFormatError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, the stream has {packed.numel()}"
        )
    if bits == 8:
        return packed.clone()
    octets = nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits).to(torch.int64)
    words = (octets << (torch.arange(bits, device=packed.device) * 8)).sum(1, keepdim=True)
    codes = (words >> (torch.arange(8, device=packed.device) * bits)) & (2**bits - 1)
    return codes.to(torch.uint8).reshape(-1)[:count]


def unpack_at(packed: UInt8[Tensor, "bytes"], bits: int, places: Int[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """Read single codes from a dense bit stream.

    Parameters
    ----------
    packed : what :func:`pack_bits` gave (bytes,)
    bits : width of a code, 1..8
    places : numbers of the codes wanted, of any shape (...)

    Returns
    -------
    The codes (...).

    Examples
    --------
    >>> unpack_at(torch.tensor([125, 0], dtype=torch.uint8), 3, torch.tensor([2, 0]))
    tensor([1, 5], dtype=torch.uint8)
    """
    _check_width(bits)
    first = places * bits
    low = packed[first >> 3].to(torch.int32)
    # A code may reach into the next byte, of which the last code has none.
    high = packed[((first >> 3) + 1).clamp(max=packed.numel() - 1)].to(torch.int32)
    return (((low | (high << 8)) >> (first & 7)) & (2**bits - 1)).to(torch.uint8)


def packed_bytes(count: int, bits: int) -> int:
    """Give the length of a bit stream.

    Parameters
    ----------
    count : number of codes
    bits : width of a code

    Examples
    --------
    >>> packed_bytes(10, 3)
    4
    """
    return -(-count * bits // 8)


def _check_width(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidBitsError(f"bits is {bits!r}; give a whole number from 1 to 8")


@dataclass(frozen=True)
class SizeRow:
    """One tensor of a packed file.

    Parameters
    ----------
    name : of the tensor
    dtype : in safetensors' spelling, e.g. "F32" or "U8"
    shape : of the tensor; of the weight, where it holds codes
    bits : width of a code, or of a number where it holds no codes
    bytes : taken in the file
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bits: int
    bytes: int


@dataclass(frozen=True)
class SizeReport:
    """Where the bytes of a packed file are, to the byte.

    Parameters
    ----------
    path : the file
    rows : its tensors, in the file's order
    header_bytes : of the header, the eight bytes that give its length included
    total : bytes of the file: the header's and the rows'
    float_bytes : what the same tensors take as float32
    """

    path: str
    rows: tuple[SizeRow, ...]
    header_bytes: int
    total: int
    float_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return a table with one line a tensor."""
        width = max([len(row.name) for row in self.rows] + [len("header")])
        lines = [f"{'tensor':<{width}}  {'bits':>4}  {'bytes':>10}  shape"]
        lines += [f"{row.name:<{width}}  {row.bits:>4}  {row.bytes:>10}  {_times(row.shape)}" for row in self.rows]
        lines.append(f"{'header':<{width}}  {'':>4}  {self.header_bytes:>10}")
        share = self.total / self.float_bytes if self.float_bytes else 1.0
        lines.append(f"{'total':<{width}}  {'':>4}  {self.total:>10}  {share:.3f} of the float32 tensors")
        return "\n".join(lines)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def save_packed(imodel: nn.Module, path: str | Path) -> SizeReport:
    """Write a converted model as packed weights.

    Parameters
    ----------
    imodel : what :func:`srq_dropbits.convert` returned; a prepared model is converted first
    path : file to write; it is replaced only when the new one is complete

    Returns
    -------
    Its sizes, as :func:`inspect_packed` gives them.

    Raises
    ------
    InputError
        If the file cannot be written, or the model has nothing quantized.
    """
    from safetensors.torch import save_file

    # `deploy` builds on the bit streams above, so it cannot be imported before them.
    from srq_dropbits.deploy import convert, integer_layers

    if not any(True for _ in integer_layers(imodel)):
        imodel = convert(imodel)
    tensors, metadata = _describe(imodel)
    path = Path(path)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return inspect_packed(path)


def _describe(imodel: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    from srq_dropbits.deploy import IntegerLayer
    from srq_dropbits.layers import SplitAttention

    tensors: dict[str, Tensor] = {}
    grids: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    integer: list[str] = []
    for name, module in imodel.named_modules(remove_duplicate=False):
        if not isinstance(module, IntegerLayer):
            continue
        integer.append(_dotted(name))
        if id(module) in first:
            layers[name] = {"kind": "alias", "of": first[id(module)]}
            continue
        first[id(module)] = name
        layers[name] = _layer_entry(module)
        if module.weight_grid is None:
            continue
        weight = _dotted(name) + "weight"
        grids[weight] = {**asdict(module.weight_grid), "shape": list(module.weight_shape)}
        if module.weight_grid.bits:
            tensors[f"{weight}.codes"] = module.codes
            tensors[f"{weight}.scale"] = module.scale
        if module.bias is not None:
            tensors[_dotted(name) + "bias"] = module.bias
    seen: dict[tuple[int, ...], str] = {}
    for name, tensor in imodel.state_dict().items():
        if any(name.startswith(prefix) and "." not in name[len(prefix) :] for prefix in integer):
            continue
        place = (tensor.data_ptr(), *tensor.shape, *tensor.stride())
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
            tensors[name] = tensor
    stored = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    about = {"format": FORMAT, "version": VERSION, "tensors": grids, "layers": layers}
    attentions = [name for name, module in imodel.named_modules() if isinstance(module, SplitAttention)]
    about |= {key: value for key, value in (("aliases", aliases), ("attentions", attentions)) if value}
    # One entry: safetensors writes several in an order that changes from run to run.
    return stored, {FORMAT: json.dumps(about, separators=(",", ":"))}


def _layer_entry(layer: IntegerLayer) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": layer.kind}
    if layer.input_grid is not None:
        entry["input"] = {**asdict(layer.input_grid), "scale": float(layer.input_scale)}
    if layer.folded is not None:
        entry["batch_norm"] = asdict(layer.folded)
    return entry


def _dotted(name: str) -> str:
    return f"{name}." if name else ""


@dataclass(frozen=True)
class _Contents:
    report: SizeReport
    grids: dict[str, tuple[Grid, tuple[int, ...]]]
    layers: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    attentions: tuple[str, ...]


def inspect_packed(path: str | Path) -> SizeReport:
    """List what a packed file holds, to the byte, without loading it.

    Parameters
    ----------
    path : file that :func:`save_packed` wrote

    Returns
    -------
    A row per tensor; ``header_bytes`` and the rows' bytes add up to the file's size.

    Raises
    ------
    PackedFormatError
        If the file is missing, truncated, of another format or version, or its parts do not fit together.
    """
    return _read_contents(Path(path)).report


def _read_contents(path: Path) -> _Contents:
    header, header_bytes, size = _read_header(path)
    about = _read_about(path, header.pop("__metadata__", None))
    grids = {name: _grid_of(path, name, entry) for name, entry in _part(path, about, "tensors").items()}
    layers = _part(path, about, "layers")
    aliases = _part(path, about, "aliases") if "aliases" in about else {}
    attentions = tuple(map(str, about.get("attentions", ())))
    rows = _rows(path, header, header_bytes, size, grids)
    _check_codes(path, rows, grids)
    float_bytes = sum(4 * math.prod(row.shape) for row in rows if not row.name.endswith(".weight.scale"))
    pruned = sum(4 * math.prod(shape) for grid, shape in grids.values() if not grid.bits)
    report = SizeReport(str(path), tuple(rows), header_bytes, size, float_bytes + pruned)
    return _Contents(
        report, grids, cast("dict[str, dict[str, Any]]", layers), cast("dict[str, str]", aliases), attentions
    )


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > _LONGEST_HEADER:
                raise PackedFormatError(f"{path}: not a safetensors file: its first 8 bytes give no header length")
            text = file.read(length)
    except OSError as error:
        raise PackedFormatError(f"cannot read {path}: {error.strerror or error}") from error
    if len(text) < length:
        raise PackedFormatError(
            f"{path}: truncated or not a safetensors file: expected a header of {length} bytes, found {len(text)}"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PackedFormatError(f"{path}: not a safetensors file: its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise PackedFormatError(f"{path}: not a safetensors file: its header is no JSON object")
    return cast("dict[str, Any]", header), 8 + length, size


def _read_about(path: Path, metadata: Any) -> dict[str, Any]:
    text = metadata.get(FORMAT) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        found = sorted(metadata) if isinstance(metadata, dict) else "none"
        raise PackedFormatError(
            f"{path}: expected '{FORMAT}' in the header's metadata, found {found}; write it with save_packed"
        )
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PackedFormatError(f"{path}: the metadata's '{FORMAT}' is no JSON ({error}); write it again") from error
    for key, expected in (("format", FORMAT), ("version", VERSION)):
        found = about.get(key) if isinstance(about, dict) else None
        if found != expected:
            raise PackedFormatError(
                f"{path}: expected {key} {expected!r}, found {found!r}; this release reads no other"
            )
    return cast("dict[str, Any]", about)


def _part(path: Path, about: Mapping[str, Any], key: str) -> dict[str, Any]:
    part = about.get(key)
    if not isinstance(part, dict):
        raise PackedFormatError(f"{path}: the metadata has no '{key}' by name; write the file again")
    return cast("dict[str, Any]", part)


def _grid_of(path: Path, name: str, entry: Any) -> tuple[Grid, tuple[int, ...]]:
    keys = ("bits", "n_lo", "n_hi", "stride")
    try:
        bits, n_lo, n_hi, stride = numbers = [entry[key] for key in keys]
        shape = tuple(entry.get("shape", ()))
    except (AttributeError, KeyError, TypeError):
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise PackedFormatError(
            f"{path}: tensor '{name}': expected the keys {', '.join(keys)}, found {found}"
        ) from None
    whole = all(type(value) is int for value in (*numbers, *shape))
    if not whole or stride < 1 or n_hi < n_lo or not 0 <= bits <= 8 or (n_hi - n_lo) // stride >= 2**bits:
        raise PackedFormatError(f"{path}: tensor '{name}': no such grid: {dict(zip(keys, numbers, strict=True))}")
    return Grid(bits, n_lo, n_hi, stride), shape


def _rows(
    path: Path, header: dict[str, Any], start: int, size: int, grids: dict[str, tuple[Grid, tuple[int, ...]]]
) -> list[SizeRow]:
    rows: list[tuple[int, int, SizeRow]] = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            width = _DTYPE_BYTES[dtype]
            expected = width * math.prod(shape)
            if any(type(value) is not int or value < 0 for value in (*shape, begin, end)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise PackedFormatError(f"{path}: tensor '{name}': no dtype, shape and data_offsets: {entry}") from None
        if end - begin != expected:
            raise PackedFormatError(f"{path}: tensor '{name}': expected {expected} bytes, found {end - begin}")
        row = SizeRow(name, dtype, shape, 8 * width, expected)
        weight = name.removesuffix(".codes")
        if weight != name and weight in grids:
            row = SizeRow(name, dtype, grids[weight][1], grids[weight][0].bits, expected)
        rows.append((begin, end, row))
    rows.sort(key=lambda item: item[:2])
    position = 0
    for begin, end, row in rows:
        if begin != position:
            raise PackedFormatError(f"{path}: tensor '{row.name}': expected at byte {position}, found at {begin}")
        position = end
    if start + position != size:
        what = "truncated" if size < start + position else "longer than its header says"
        raise PackedFormatError(f"{path}: {what}: expected {start + position} bytes, found {size}")
    return [row for _, _, row in rows]


def _check_codes(path: Path, rows: list[SizeRow], grids: dict[str, tuple[Grid, tuple[int, ...]]]) -> None:
    present = {row.name: row for row in rows}
    for name, (grid, shape) in grids.items():
        if not grid.bits:
            continue
        for part in ("codes", "scale"):
            if f"{name}.{part}" not in present:
                raise PackedFormatError(f"{path}: tensor '{name}.{part}' is missing; write the file again")
        expected, found = packed_bytes(math.prod(shape), grid.bits), present[f"{name}.codes"].bytes
        if expected != found:
            raise PackedFormatError(
                f"{path}: tensor '{name}.codes': expected {expected} bytes for {_times(shape)} codes of {grid.bits}"
                f" bits, found {found}"
            )


@overload
def load_packed(path: str | Path) -> dict[str, Tensor]: ...
@overload
def load_packed(path: str | Path, model: nn.Module) -> nn.Module: ...
def load_packed(path: str | Path, model: nn.Module | None = None) -> nn.Module | dict[str, Tensor]:
    """Load packed weights, as an integer model or as float tensors.

    Parameters
    ----------
    path : file that :func:`save_packed` wrote
    model : a model of the float architecture that was prepared, with any weights; it is copied, not changed

    Returns
    -------
    With `model`: the integer model that was saved, with the same outputs bit for bit. Without: the tensors of the
    float architecture by name, weights as scale times integer, fit for the plain model's ``load_state_dict``; a batch
    norm that was folded into the layer before it is there as one that does nothing but add the folded bias, where that
    layer has none of its own.

    Raises
    ------
    PackedFormatError
        If the file is not one of these or damaged, or does not fit `model`.
    """
    from safetensors.torch import load_file

    path = Path(path)
    contents = _read_contents(path)
    tensors = load_file(path)
    for name, (grid, _) in contents.grids.items():
        if grid.bits:
            _check_range(path, name, tensors[f"{name}.codes"], contents)
    if model is None:
        return _float_tensors(contents, tensors)
    return _integer_model(path, contents, tensors, model)


def _check_range(path: Path, name: str, stream: Tensor, contents: _Contents) -> None:
    grid, shape = contents.grids[name]
    count = math.prod(shape)
    highest = int(unpack_bits(stream, grid.bits, count).max()) if count else 0
    if highest >= grid.size:
        raise PackedFormatError(f"{path}: tensor '{name}.codes': code {highest}, but the grid has {grid.size} points")


def _float_tensors(contents: _Contents, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from srq_dropbits.deploy import FoldedNorm, dequantize

    found = {name: tensor for name, tensor in tensors.items() if not name.endswith((".weight.codes", ".weight.scale"))}
    for name, (grid, shape) in contents.grids.items():
        layer = contents.layers[name.removesuffix("weight").removesuffix(".")]
        if grid.bits:
            found[name] = dequantize(tensors[f"{name}.codes"], tensors[f"{name}.scale"], grid, shape, layer["kind"])
        else:
            found[name] = torch.zeros(shape)
        if "batch_norm" in layer:
            norm = FoldedNorm(**layer["batch_norm"])
            bias = name.removesuffix("weight") + "bias"
            offset = None if norm.layer_has_bias else found.pop(bias)
            found |= norm.identity_tensors(offset)
    for name in contents.attentions:
        found = _joined_projections(found, _dotted(name))
    for name, entry in contents.layers.items():
        if entry["kind"] == "alias":
            prefix = _dotted(entry["of"])
            copies = {_dotted(name) + key[len(prefix) :]: key for key in found if key.startswith(prefix)}
            found |= {new: found[key] for new, key in copies.items()}
    return found | {name: found[of] for name, of in contents.aliases.items()}


def _joined_projections(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Name the projections of an attention as ``nn.MultiheadAttention`` does."""
    found = dict(tensors)
    weights = [found.pop(f"{prefix}{part}_proj.weight") for part in "qkv"]
    if len({weight.shape for weight in weights}) == 1:
        found[f"{prefix}in_proj_weight"] = torch.cat(weights)
    else:
        found |= {f"{prefix}{part}_proj_weight": weight for part, weight in zip("qkv", weights, strict=True)}
    if f"{prefix}q_proj.bias" in found:
        found[f"{prefix}in_proj_bias"] = torch.cat([found.pop(f"{prefix}{part}_proj.bias") for part in "qkv"])
    return found


def _integer_model(path: Path, contents: _Contents, tensors: dict[str, Tensor], model: nn.Module) -> nn.Module:
    from srq_dropbits.deploy import FoldedNorm, IntegerLayer, as_prepared, build_layer, swap_modules

    kinds = {name: str(entry["kind"]) for name, entry in contents.layers.items()}
    model = as_prepared(copy.deepcopy(model), kinds, contents.attentions).eval()
    modules = dict(model.named_modules(remove_duplicate=False))
    swaps: dict[str, nn.Module] = {}
    for name, entry in contents.layers.items():
        if name not in modules:
            raise PackedFormatError(f"{path}: layer '{name}' is not in the model; give the architecture that was saved")
        if entry["kind"] == "alias":
            swaps[name] = swaps[entry["of"]]
            continue
        grid, shape = contents.grids.get(_dotted(name) + "weight", (None, ()))
        input_grid = _grid_of(path, name, entry["input"])[0] if "input" in entry else None
        try:
            layer = build_layer(
                modules[name],
                entry["kind"],
                weight_grid=grid,
                weight_shape=shape,
                codes=tensors.pop(f"{_dotted(name)}weight.codes", None),
                scale=tensors.pop(f"{_dotted(name)}weight.scale", None),
                bias=tensors.pop(f"{_dotted(name)}bias", None),
                input_grid=input_grid,
                input_scale=torch.tensor(float(entry["input"]["scale"])) if input_grid is not None else None,
                name=name,
            )
        except PackedFormatError as error:
            raise PackedFormatError(f"{path}: {error}") from None
        swaps[name] = layer
        layer.to(next((tensor.device for tensor in modules[name].parameters()), torch.device("cpu")))
        if "batch_norm" in entry:
            layer.folded = FoldedNorm(**entry["batch_norm"])
            norm = modules.get(layer.folded.name)
            swaps |= {other: nn.Identity() for other, module in modules.items() if module is norm}
    model = swap_modules(model, swaps).requires_grad_(False)
    tensors |= {name: tensors[of] for name, of in contents.aliases.items()}
    own = [_dotted(name) for name, layer in swaps.items() if isinstance(layer, IntegerLayer)]
    _fill(path, model, tensors, own)
    return model


def _fill(path: Path, model: nn.Module, tensors: dict[str, Tensor], own: list[str]) -> None:
    for name, tensor in model.state_dict().items():
        if any(name.startswith(prefix) and "." not in name[len(prefix) :] for prefix in own):
            continue
        if name not in tensors:
            raise PackedFormatError(f"{path}: tensor '{name}' of the model is not in the file")
        found = tensors.pop(name)
        if found.shape != tensor.shape:
            raise PackedFormatError(
                f"{path}: tensor '{name}': the model has {_times(tuple(tensor.shape))}, the file"
                f" {_times(tuple(found.shape))}; give the architecture that was saved"
            )
        with torch.no_grad():
            tensor.copy_(found)
    if tensors:
        raise PackedFormatError(f"{path}: tensor '{next(iter(tensors))}' is not in the model; give what was saved")

"""The kernel in C, compiled with the machine's own compiler when it is first needed and kept in the user's cache.

Without a compiler, or with ``BLOCKDIAG_OPT_NATIVE=0`` in the environment, everything runs on torch alone.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

__all__ = ["LARGEST", "Kernel", "Task", "load", "reason", "scan", "step"]

LARGEST = 256
"""Largest block the kernel is used for: beyond, LAPACK's blocked algorithms are faster."""

_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-std=c11", "-fPIC")

_int, _float, _pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class Task(ctypes.Structure):
    """One tensor's step, as kernel.c declares it."""

    _fields_ = (
        *((name, _pointer) for name in ("grad", "mean", "moments", "param", "basis", "spectrum", "index", "failed")),
        *((name, _int) for name in ("width", "n", "chunks", "length", "line_stride", "stride", "first", "last")),
        *((name, _int) for name in ("mode", "double_storage", "subtract", "interval", "phase")),
        *((name, _float) for name in ("sign", "coupled_decay", "shrink", "mean_keep", "mean_add", "moment_keep")),
        *((name, _float) for name in ("moment_add", "jitter", "floor", "rate", "root_scale", "damping")),
        *((name, _float) for name in ("lower", "upper")),
    )


SOLVE, DIAGONAL, REFRESH, TRACKED, ACCUMULATE, FLAT = range(6)


class Kernel:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.size = library.bd_task_size
        self.size.restype = _int
        self.step = library.bd_step
        self.step.restype = _int
        self.step.argtypes = (_pointer, _int, _pointer)
        self.scan = library.bd_scan
        self.scan.restype = _int
        self.scan.argtypes = (_pointer, _pointer, _pointer, _pointer, _int)
        if self.size() != ctypes.sizeof(Task):
            raise OSError("the kernel was built for another version")


_reason = ""


def reason() -> str:
    """Say why there is no kernel; an empty string if there is one, or nobody has asked for it yet."""
    return _reason


@functools.cache
def load() -> Kernel | None:
    """Return the kernel, compiled now if it is not in the cache; None where that is impossible, see :func:`reason`."""
    global _reason
    if os.environ.get("BLOCKDIAG_OPT_NATIVE", "1") == "0":
        _reason = "BLOCKDIAG_OPT_NATIVE=0"
        return None
    compiler = _compiler()
    if compiler is None:
        _reason = "no C compiler found (cc, gcc or clang; or name it in CC)"
        return None
    try:
        library, made = _build(compiler)
        try:
            return Kernel(library)
        except (OSError, AttributeError):
            # Whatever lies in the cache, it is not what was put there.
            if made:
                raise
            library.unlink()
            return Kernel(_build(compiler)[0])
    except (OSError, AttributeError, RuntimeError, subprocess.SubprocessError) as error:
        detail = str(error).strip().splitlines()
        _reason = f"{compiler[0]} did not build the kernel: {detail[-1] if detail else type(error).__name__}"
        return None


def _compiler() -> list[str] | None:
    if sys.platform == "win32":
        return None
    named = os.environ.get("CC")
    for candidate in [named] if named else ["cc", "gcc", "clang"]:
        try:
            words = shlex.split(candidate)
        except ValueError:
            continue
        if words and shutil.which(words[0]):
            return words
    return None


def _cache() -> Path | None:
    named = os.environ.get("BLOCKDIAG_OPT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(named) if named else (Path(base) if base else Path.home() / ".cache") / "blockdiag-opt"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None


def _processor() -> str:
    # The code is for this processor: a home folder that several machines share keeps one library for each kind.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
        return "\n".join(sorted(set(told)))
    except OSError:
        return platform.processor() + platform.version()


def _build(compiler: list[str]) -> tuple[Path, bool]:
    """Return the library, and whether it was compiled now."""
    source = Path(__file__).with_name("kernel.c")
    wide = ("-mprefer-vector-width=512",) if platform.machine().lower() in {"x86_64", "amd64"} else ()
    flags = (*_FLAGS, *wide)
    known = [source.read_text(), " ".join(compiler), " ".join(flags), platform.platform(), _processor()]
    key = hashlib.sha256("\0".join(known).encode()).hexdigest()[:24]
    folder = _cache()
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="blockdiag-opt-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library, seal = folder / f"kernel-{key}.so", folder / f"kernel-{key}.sha256"
    if _sealed(library, seal):
        return library, False
    with tempfile.TemporaryDirectory(dir=folder) as place:
        built = Path(place) / library.name
        for chosen in (flags, _FLAGS, tuple(flag for flag in _FLAGS if flag != "-march=native")):
            command = [*compiler, *chosen, "-shared", "-o", str(built), str(source), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603
            if done.returncode == 0 and built.exists():
                break
        else:
            raise OSError(done.stderr.strip() or f"exit status {done.returncode}, and no message")
        sum_file = Path(place) / seal.name
        sum_file.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
        built.replace(library)
        sum_file.replace(seal)
    return library, True


def _sealed(library: Path, seal: Path) -> bool:
    # A torn library is not refused by the loader: it takes the process down.
    try:
        return seal.read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except OSError:
        return False


_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def _pool(threads: int) -> ThreadPoolExecutor:
    # Threads do not survive a fork: a child process makes its own pool.
    with _lock:
        pid = os.getpid()
        if pid not in _pools:
            _pools.clear()
            _pools[pid] = ThreadPoolExecutor(max_workers=max(threads - 1, 1), thread_name_prefix="blockdiag")
        return _pools[pid]


def step(kernel: Kernel, tasks: ctypes.Array[Task], cost: float) -> None:
    """Work through tasks, on as many threads as torch uses.

    Parameters
    ----------
    kernel : the library
    tasks : one for each tensor
    cost : microseconds it should take; small work is not shared
    """
    counter = _int(0)
    args = (ctypes.addressof(tasks), len(tasks), ctypes.addressof(counter))
    threads = min(torch.get_num_threads(), 1 + int(cost / 100))
    if threads <= 1:
        status = kernel.step(*args)
    else:
        pool = _pool(torch.get_num_threads())
        others = [pool.submit(kernel.step, *args) for _ in range(threads - 1)]
        status = kernel.step(*args)
        status |= max(other.result() for other in others)
    if status:
        raise MemoryError("blockdiag-opt: no memory for the kernel's work space")


def scan(kernel: Kernel, tensors: list[torch.Tensor], limits: list[float]) -> int:
    """Return the place of the first tensor with an element that is not finite or above its limit; -1 if there is none.

    Parameters
    ----------
    kernel : the library
    tensors : contiguous float32 or float64 tensors on CPU
    limits : largest magnitude allowed in each
    """
    count = len(tensors)
    pointers = (_pointer * count)(*(tensor.data_ptr() for tensor in tensors))
    sizes = (_int * count)(*(tensor.numel() for tensor in tensors))
    doubles = (_int * count)(*(tensor.element_size() == 8 for tensor in tensors))
    bounds = (_float * count)(*limits)
    return int(
        kernel.scan(ctypes.addressof(pointers), ctypes.addressof(sizes), ctypes.addressof(doubles),
                    ctypes.addressof(bounds), count)
    )  # fmt: skip

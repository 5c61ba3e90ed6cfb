"""The C kernel against the torch engine, against numpy, and against itself: neighbours and threads change no bit."""

from __future__ import annotations

import copy
import gc
import math
import multiprocessing
import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blockdiag_opt import BlockAdam, BlockAdamW, BlockRMSprop, native

DOUBLE = torch.float64
needs_kernel = pytest.mark.skipif(native.load() is None, reason=f"no native engine: {native.reason()}")
ENGINES = [pytest.param("native", marks=needs_kernel), "torch"]


def draw(seed, *shape, dtype=DOUBLE):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def run(grads, start=None, make=BlockAdam, **options):
    """Parameters after all steps, and the optimizer."""
    first = grads[0]
    param = nn.Parameter(torch.zeros_like(first) if start is None else start.clone())
    optimizer = make([param], **options)
    for t, grad in enumerate(grads):
        param.grad = grad.clone()
        optimizer.step()
        if t == 2 and options.get("update_interval", 1) > 1:
            # Far enough for the interval to be in force.
            optimizer.state[param]["step"] += 200
    return param.detach(), optimizer


def survives(work, *args):
    """Call ``work`` in a fork: a memory error would take the tests with it."""
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0


@needs_kernel
@pytest.mark.parametrize("n", [*range(1, 41), 64, 65, 127, 128])
def test_engines_agree_for_every_size(n):
    grads = [draw(t, 19, n) for t in range(6)]
    a, optimizer = run(grads, lr=0.1, eps=1e-3, grouping="row", engine="native")
    b, _ = run(grads, lr=0.1, eps=1e-3, grouping="row", engine="torch")
    assert (a - b).abs().max() < 1e-8
    assert optimizer.health() == {"engine": "native", "fallen_blocks": 0, "skipped_steps": 0, "note": ""}


@needs_kernel
@pytest.mark.parametrize("n", [2, 3, 10, 32, 40])
def test_engines_agree_in_single_precision(n):
    grads = [draw(t, 19, n, dtype=torch.float32) for t in range(2 * n)]
    a, _ = run(grads, lr=0.1, eps=1e-2, grouping="row", engine="native")
    b, _ = run(grads, lr=0.1, eps=1e-2, grouping="row", engine="torch")
    assert (a - b).abs().max() < 2e-3 * b.abs().max()


@needs_kernel
def test_sizes_above_the_largest_go_to_torch():
    grads = [draw(t, 2, native.LARGEST + 1) for t in range(2)]
    a, optimizer = run(grads, lr=0.1, grouping="row", engine="native")
    assert optimizer.health()["engine"] == "torch"
    assert torch.equal(a, run(grads, lr=0.1, grouping="row", engine="torch")[0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("interval", [1, 5])
@pytest.mark.parametrize("n", [2, 3, 10, 33])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_blocks_bits_do_not_depend_on_its_neighbours(engine, interval, n, dtype):
    grads = [draw(t, 101, n, dtype=dtype) * torch.logspace(-6, 6, 101, dtype=dtype)[:, None] for t in range(7)]
    options = {"lr": 0.1, "block_size": n, "engine": engine, "update_interval": interval}
    whole, _ = run(grads, **options)
    for row in (0, 15, 16, 63, 100):
        if interval == 1:
            alone, _ = run([g[row : row + 1] for g in grads], **options)
            if engine == "native":
                assert torch.equal(alone[0], whole[row])
            else:
                # LAPACK's last bits depend on where a batch lies.
                assert torch.allclose(alone[0], whole[row], rtol=1e-4 if dtype == torch.float32 else 1e-9)
        elif row < 16 and engine == "native":
            # The first tile is refreshed when a lone block is.
            alone, _ = run([g[row : row + 1] for g in grads], **options)
            assert torch.equal(alone[0], whole[row])


@needs_kernel
@pytest.mark.parametrize("interval", [1, 4])
def test_the_number_of_threads_changes_no_bit(interval):
    grads = [draw(t, 300, 40, dtype=torch.float32) for t in range(5)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(grads, lr=0.1, block_size=20, engine="native", update_interval=interval)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("n", [1, 2, 3, 10])
@pytest.mark.parametrize("exponent", [-30, -25, -20, -10, 0, 5, 10])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_gradients_of_any_size(engine, n, exponent, dtype):
    size = 10.0**exponent
    grads = [draw(t, 5, n).mul(size).to(dtype) for t in range(2 * n + 3)]
    found, optimizer = run(grads, lr=1.0, eps=1e-3 * size, grouping="row", engine=engine)
    assert bool(found.isfinite().all())
    assert optimizer.health()["fallen_blocks"] == 0
    if dtype == DOUBLE or abs(exponent) <= 10:
        unit = [draw(t, 5, n) for t in range(2 * n + 3)]
        expected, _ = run(unit, lr=1.0, eps=1e-3, grouping="row", engine="torch", floor=n * torch.finfo(dtype).eps)
        assert (found - expected).abs().max() < (0.02 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("exponent", [-140, -100, -80, 80, 100, 140])
def test_double_precision_gradients_far_from_one(engine, n, exponent):
    size = 10.0**exponent
    found, _ = run([size * draw(t, 5, n) for t in range(8)], lr=1.0, eps=1e-3 * size, grouping="row", engine=engine)
    expected, _ = run([draw(t, 5, n) for t in range(8)], lr=1.0, eps=1e-3, grouping="row", engine=engine)
    assert (found - expected).abs().max() < 1e-8


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("kind", ["zero", "one coordinate", "rank one", "rank two", "dead half", "equal", "graded"])
@pytest.mark.parametrize("n", [2, 3, 10, 32, 33])
def test_deficient_moments(engine, dtype, kind, n):
    grads = []
    for t in range(12):
        g = torch.zeros(3, n, dtype=DOUBLE)
        if kind == "one coordinate":
            g[:, 1] = draw(t, 3)
        elif kind == "rank one":
            g = draw(t, 3, 1) * draw(99, 3, n)
        elif kind == "rank two":
            g = (draw(t, 3, 2)[..., None] * draw(99, 3, 2, n)).sum(1)
        elif kind == "dead half":
            g[:, : n // 2] = draw(t, 3, n // 2)
        elif kind == "equal":
            g[:, t % n] = 1.0
        elif kind == "graded":
            g = draw(t, 3, n) * torch.logspace(0, -12, n, dtype=DOUBLE)
        grads.append(g.to(dtype))
    found, optimizer = run(grads, lr=0.1, grouping="row", engine=engine)
    assert bool(found.isfinite().all())
    assert optimizer.health()["fallen_blocks"] == 0
    # A preconditioned step is bounded: at most about lr / sqrt(1 - beta2) a coordinate and step.
    assert found.abs().max() < 12 * 0.1 * 40
    if kind == "zero":
        assert not found.any()
    if kind == "dead half":
        size = found[:, : n // 2].abs().max()
        assert found[:, n // 2 :].abs().max() <= (0 if n // 2 < 1 else 1e-3) * size
    if kind == "rank one":
        direction = draw(99, 3, n).to(dtype)
        along = (found * direction).sum(1, keepdim=True) / direction.square().sum(1, keepdim=True) * direction
        assert (found - along).abs().max() <= (2e-3 if dtype == torch.float32 else 1e-6) * found.abs().max()


@needs_kernel
@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 40),
    st.integers(0, 10**6),
    st.floats(0, 14),
    st.sampled_from(["random", "clustered", "wilkinson", "arrow"]),
)
def test_any_moments_that_a_checkpoint_may_hold(n, seed, condition, kind):
    # Loads V and m, steps with a zero gradient, and compares with numpy.
    rng = np.random.default_rng(seed)
    if kind == "random":
        Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
        V = (Q * np.logspace(0, -condition, n)) @ Q.T
    elif kind == "clustered":
        Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
        V = (Q * np.where(np.arange(n) % 2, 1.0, 1.0 + 1e-13 * rng.normal(size=n))) @ Q.T
    elif kind == "wilkinson":
        V = np.diag(np.abs(np.arange(n) - (n - 1) / 2) + n) + np.diag(np.ones(n - 1), 1) + np.diag(np.ones(n - 1), -1)
    else:
        V = np.diag(np.arange(1.0, n + 1) * 10)
        V[-1, :-1] = V[:-1, -1] = rng.normal(size=n - 1)
        V[-1, -1] = 100 * n
    V = (V + V.T) / 2
    param = nn.Parameter(torch.zeros(1, n, dtype=DOUBLE))
    optimizer = BlockAdam([param], lr=1.0, eps=1e-2, betas=(0.5, 0.5), grouping="row", floor=0.0, engine="native")
    param.grad = torch.zeros(1, n, dtype=DOUBLE)
    optimizer.step()
    saved = optimizer.state_dict()
    m = rng.normal(size=n)
    saved["state"][0]["exp_avg_sq"] = torch.tensor(V[np.tril_indices(n)][None])
    saved["state"][0]["exp_avg"] = torch.tensor(m[None])
    optimizer.load_state_dict(saved)
    optimizer.step()
    values, Q = np.linalg.eigh(V)
    s = 1 / 0.75 / (np.sqrt(np.maximum(values, 0) * 0.5 / 0.75) + 1e-2)
    expected = -Q @ (s * (Q.T @ (m / 2)))
    assert optimizer.health()["fallen_blocks"] == 0
    # sqrt is steep near zero: an error of 1e-16 in an eigenvalue is one of 1e-8 in its root, relative to the damping.
    assert np.abs(param.detach().numpy()[0] - expected).max() < 2e-4 * np.abs(s).max()


# Tracked eigenvectors


def due(t, interval, rows):
    """Blocks that are refreshed at step t: tiles of 16 take turns; the interval grows by one every 20 steps."""
    now = max(1, min(interval, t // 20))
    return [j for j in range(rows) if (j // 16 + t) % now == 0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("interval", "n", "rows"), [(2, 3, 20), (3, 4, 50), (7, 2, 100), (5, 10, 40), (4, 34, 20)])
def test_tracking_equals_a_loop(engine, interval, n, rows):
    # Full rank from the start: eigenvectors of a null space are anybody's.
    before = 20 * interval - 4
    grads = [draw(t, rows, n).numpy() for t in range(2 * interval + 8)]
    start = [draw(1000 + t, rows, n).numpy() for t in range(2 * n)]
    param = nn.Parameter(torch.zeros(rows, n, dtype=DOUBLE))
    optimizer = BlockAdam([param], lr=0.1, eps=1e-3, grouping="row", update_interval=interval, floor=0.0, engine=engine)
    param.grad = torch.zeros(rows, n, dtype=DOUBLE)
    optimizer.step()
    saved = optimizer.state_dict()
    V = sum(np.einsum("bi,bk->bik", g, g) for g in start) / len(start)
    low, col = np.tril_indices(n)
    saved["state"][0]["exp_avg_sq"] = torch.tensor(V[:, low, col])
    saved["state"][0]["step"] = torch.tensor(float(before))
    optimizer.load_state_dict(saved)
    x, m = np.zeros((rows, n)), np.zeros((rows, n))
    basis, values = None, None
    for t, g in enumerate(grads, before + 1):
        param.grad = torch.tensor(g)
        optimizer.step()
        if basis is None:
            values, basis = np.zeros((rows, n)), saved["state"][0]["eigvecs"].numpy().copy()
        m = 0.9 * m + 0.1 * g
        for j in range(rows):
            V[j] = 0.999 * V[j] + 0.001 * np.outer(g[j], g[j])
            if j in due(t, interval, rows):
                values[j], basis[j] = np.linalg.eigh(V[j])
            else:
                values[j] = 0.999 * values[j] + 0.001 * (basis[j].T @ g[j]) ** 2
            s = 0.1 / (1 - 0.9**t) / (np.sqrt(values[j] / (1 - 0.999**t)) + 1e-3)
            x[j] -= basis[j] @ (s * (basis[j].T @ m[j]))
        state = optimizer.state_dict()["state"][0]
        assert np.abs(np.sort(state["eigvals"].numpy(), 1) - np.sort(values, 1)).max() < 1e-9, t
        assert np.abs(param.detach().numpy() - x).max() < 1e-7, t


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("interval", [2, 5, 8])
def test_refreshes_take_turns(engine, interval):
    rows, n = 100, 3
    param = nn.Parameter(torch.zeros(rows, n, dtype=DOUBLE))
    optimizer = BlockAdam([param], lr=0.1, block_size=n, update_interval=interval, engine=engine)
    before = None
    for t in range(1, 20 * interval + 2 * interval):
        param.grad = draw(t, rows, n)
        optimizer.step()
        basis = optimizer.state_dict()["state"][0]["eigvecs"].clone()
        if before is not None:
            changed = (basis != before).flatten(1).any(1).nonzero().flatten().tolist()
            assert changed == due(t, interval, rows), t
        before = basis


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_stored_eigenvectors_are_those_of_the_moments(engine, dtype):
    param = nn.Parameter(torch.zeros(20, 6, dtype=dtype))
    optimizer = BlockAdam([param], block_size=6, update_interval=16, engine=engine)
    for t in range(8):
        param.grad = draw(t, 20, 6).to(dtype)
        optimizer.step()
    state = optimizer.state_dict()["state"][0]
    Q, w = state["eigvecs"].double(), state["eigvals"].double()
    V = torch.zeros(20, 6, 6, dtype=DOUBLE)
    low, col = torch.tril_indices(6, 6)
    V[:, low, col] = V[:, col, low] = state["exp_avg_sq"].double()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert (Q.mT @ Q - torch.eye(6, dtype=DOUBLE)).abs().max() < 10 * tolerance
    assert ((Q * w[:, None]) @ Q.mT - V).abs().max() < tolerance


@pytest.mark.parametrize("engine", ENGINES)
def test_tracking_with_blocks_that_wake_up_late(engine):
    param = nn.Parameter(torch.zeros(40, 4, dtype=torch.float32))
    optimizer = BlockAdam([param], lr=0.1, block_size=4, update_interval=20, engine=engine)
    for t in range(120):
        g = draw(t, 40, 4, dtype=torch.float32)
        g[20:] *= t >= 90
        param.grad = g
        before = param.detach().clone()
        optimizer.step()
        assert bool(param.isfinite().all())
        moved = (param.detach() - before).abs().amax(1)
        assert moved[20:].min() > 0 if t >= 90 else moved[20:].max() == 0
        assert moved.max() < 4.0


# Memory: the kernel trusts what it is given, so nothing stale or of another type may reach it


def ones(*shape, **options):
    param = nn.Parameter(torch.zeros(shape))
    param.grad = torch.ones(shape)
    optimizer = BlockAdam([param], engine="native", **options)
    optimizer.step()
    return param, optimizer


def interval_begins():
    param, optimizer = ones(40, 10)
    optimizer.param_groups[0]["update_interval"] = 5
    optimizer.state[param]["step"] += 200
    try:
        for _ in range(7):
            optimizer.step()
    except (ValueError, RuntimeError) as error:
        assert "update_interval" in str(error)  # noqa: PT017
    assert bool(param.isfinite().all())


@needs_kernel
def test_an_update_interval_that_begins_in_mid_training():
    survives(interval_begins)


def test_an_update_interval_that_begins_in_mid_training_by_torch():
    param = nn.Parameter(torch.zeros(4, 3))
    param.grad = draw(0, 4, 3).float()
    optimizer = BlockAdam([param], engine="torch")
    optimizer.step()
    optimizer.param_groups[0]["update_interval"] = 5
    optimizer.state[param]["step"] += 200
    try:
        for _ in range(7):
            optimizer.step()
    except (ValueError, RuntimeError) as error:
        assert "update_interval" in str(error)  # noqa: PT017
    assert bool(param.isfinite().all())


def stale_eigenvectors():
    _, tracked = ones(4000, 10, update_interval=7)
    _, plain = ones(4000, 10)
    tracked.step()
    tracked.load_state_dict(copy.deepcopy(plain.state_dict()))
    gc.collect()
    fresh = [torch.zeros(250, 100, 16) for _ in range(4)]
    tracked.step()
    assert not any(bool(each.any()) for each in fresh)


@needs_kernel
def test_nothing_is_written_to_eigenvectors_that_a_loaded_state_no_longer_has():
    survives(stale_eigenvectors)


def becomes_double(shape):
    param, optimizer = ones(*shape)
    param.data, param.grad = param.data.double(), torch.ones(shape, dtype=DOUBLE)
    try:
        for _ in range(10):
            optimizer.step()
    except (ValueError, RuntimeError, TypeError) as error:
        assert "float64" in str(error)  # noqa: PT017
        return
    assert bool(param.isfinite().all())
    assert float((param - param[0, 0]).detach().abs().max()) < 1e-4
    assert float(param.detach().max()) < 0


@needs_kernel
@pytest.mark.parametrize("shape", [(40, 10), (4000, 100)])
def test_a_model_cast_to_double_in_mid_training(shape):
    survives(becomes_double, shape)


def other_state_type():
    param, optimizer = ones(400, 100)
    optimizer.param_groups[0]["state_dtype"] = "float64"
    try:
        for _ in range(10):
            optimizer.step()
    except (ValueError, RuntimeError, TypeError) as error:
        assert "state_dtype" in str(error)  # noqa: PT017
        return
    assert float(param.detach().max()) < 0
    assert bool(param.isfinite().all())


@needs_kernel
def test_state_dtype_changed_in_mid_training():
    survives(other_state_type)


def no_numbers(sizes):
    params = [nn.Parameter(torch.full((n, n), math.nan)) for n in sizes]
    for param in params:
        param.grad = draw(0, *param.shape).float()
    optimizer = BlockAdam(params, engine="native", grouping="row", weight_decay=0.1)
    try:
        for _ in range(3):
            optimizer.step()
    except FloatingPointError:
        pass


@needs_kernel
@pytest.mark.parametrize("sizes", [(32, 33), (32, 40), (2, 128)])
def test_parameters_that_are_not_numbers_stay_inside_the_work_space(sizes):
    survives(no_numbers, sizes)


@needs_kernel
def test_negated_views_of_gradients():
    g = draw(0, 4, 4)
    found, _ = run([-g], engine="native")
    param = nn.Parameter(torch.zeros(4, 4, dtype=DOUBLE))
    param.grad = torch._neg_view(g)
    BlockAdam([param], engine="native").step()
    assert torch.equal(param.detach(), found)


@needs_kernel
def test_the_step_counts_threads_that_were_added_later():
    before = torch.get_num_threads()
    grads = [draw(t, 600, 30, dtype=torch.float32) for t in range(2)]
    expected, _ = run(grads, block_size=30, engine="native")
    try:
        for threads in (2, 4, 2):
            torch.set_num_threads(threads)
            assert torch.equal(run(grads, block_size=30, engine="native")[0], expected)
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_a_forked_process_steps_too():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        _, optimizer = ones(600, 30, block_size=30)
        survives(optimizer.step)
    finally:
        torch.set_num_threads(before)


# Where there is no kernel


@pytest.fixture
def forgetful(monkeypatch, tmp_path):
    """The kernel is looked for anew, in an empty cache."""
    native.load.cache_clear()
    monkeypatch.setattr(native, "_reason", "")
    monkeypatch.setenv("BLOCKDIAG_OPT_CACHE", str(tmp_path / "a" / "b"))
    yield
    native.load.cache_clear()


@pytest.mark.parametrize(
    ("name", "value", "note"),
    [
        ("BLOCKDIAG_OPT_NATIVE", "0", "BLOCKDIAG_OPT_NATIVE=0"),
        ("CC", "no-such-compiler", "no C compiler found"),
        ("CC", "false", "did not build the kernel: exit status 1"),
        ("CC", '"gcc', "no C compiler found"),
    ],
)
def test_without_a_compiler_torch_does_the_work_and_says_why(forgetful, monkeypatch, name, value, note):
    monkeypatch.setenv(name, value)
    _, optimizer = run([draw(0, 3, 3)])
    assert optimizer.health()["engine"] == "torch"
    assert note in optimizer.health()["note"]
    with pytest.raises(RuntimeError, match="engine='native' is not to be had here: .*" + note):
        run([draw(0, 3, 3)], engine="native")


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for the compiler: copies the library that is there, and counts."""
    if native.load() is None:
        pytest.skip(f"no native engine: {native.reason()}")
    library = native._build(native._compiler())[0]
    calls = []

    def copies(command, **options):
        calls.append(command)
        shutil.copyfile(library, command[command.index("-o") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(native.subprocess, "run", copies)
    return calls


def test_the_kernel_is_built_once(compiler, forgetful, tmp_path):
    assert run([draw(0, 3, 3)])[1].health()["engine"] == "native"
    native.load.cache_clear()
    assert run([draw(0, 3, 3)])[1].health()["engine"] == "native"
    assert len(compiler) == 1
    assert sorted(path.suffix for path in (tmp_path / "a" / "b").iterdir()) == [".sha256", ".so"]


def test_a_cache_that_cannot_be_made_does_not_matter(compiler, forgetful, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLOCKDIAG_OPT_CACHE", str(tmp_path / "file"))
    assert run([draw(0, 3, 3)])[1].health()["engine"] == "native"


def test_a_damaged_library_in_the_cache_is_no_catastrophe(compiler, forgetful, tmp_path):
    assert run([draw(0, 3, 3)])[1].health()["engine"] == "native"
    (built,) = (tmp_path / "a" / "b").glob("*.so")
    built.unlink()
    built.write_bytes(b"not a library")
    native.load.cache_clear()
    _, optimizer = run([draw(0, 3, 3)])
    assert optimizer.health()["engine"] == "native" or optimizer.health()["note"]


@needs_kernel
@pytest.mark.parametrize("make", [BlockAdamW, BlockRMSprop])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, DOUBLE])
def test_engines_agree_for_every_type_and_memory_format(make, dtype):
    results = {}
    for engine in ("native", "torch"):
        params = [
            nn.Parameter(draw(0, 6, 8).to(dtype).T),
            nn.Parameter(draw(1, 4, 3, 3, 3).to(dtype).to(memory_format=torch.channels_last)),
            nn.Parameter(draw(2, 5).to(dtype)),
        ]
        optimizer = make(params, lr=0.05, eps=1e-2, weight_decay=0.1, maximize=True, engine=engine)
        for t in range(6):
            for k, param in enumerate(params):
                param.grad = torch.empty_like(param).copy_(draw(50 + 7 * t + k, *param.shape))
            optimizer.step()
        results[engine] = torch.cat([param.detach().reshape(-1).double() for param in params])
    size = results["torch"].abs().max()
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-4, DOUBLE: 1e-9}[dtype]
    assert (results["native"] - results["torch"]).abs().max() < tolerance * size


@needs_kernel
def test_the_scan_finds_the_first_bad_tensor():
    kernel = native.load()
    good = [torch.ones(5), torch.zeros(0), torch.full((3,), -7.0, dtype=DOUBLE)]
    assert native.scan(kernel, good, [8.0, 8.0, 8.0]) == -1
    assert native.scan(kernel, good, [8.0, 8.0, 6.0]) == 2
    for bad in (math.nan, math.inf, -math.inf):
        for dtype in (torch.float32, DOUBLE):
            x = torch.zeros(37, dtype=dtype)
            x[36] = bad
            assert native.scan(kernel, [good[0], x, x], [8.0, 8.0, 8.0]) == 1


def test_a_torn_library_in_the_cache_is_built_again(compiler, forgetful, tmp_path):
    assert native.load() is not None
    (library,) = (tmp_path / "a" / "b").glob("*.so")
    whole = library.read_bytes()
    library.unlink()
    library.write_bytes(whole[: len(whole) // 2])
    native.load.cache_clear()
    assert native.load() is not None
    assert library.read_bytes() == whole
    assert len(compiler) == 2


def test_a_sealed_file_that_is_no_kernel_is_built_again(compiler, forgetful, tmp_path, monkeypatch):
    build = native._build

    def first_wrong(words):
        library, _ = build(words)
        monkeypatch.setattr(native, "_build", build)
        wrong = library.with_name("wrong.so")
        wrong.write_bytes(b"nothing")
        return wrong, False

    monkeypatch.setattr(native, "_build", first_wrong)
    assert native.load() is not None
    assert not list((tmp_path / "a" / "b").glob("wrong.so"))

"""Two processes on CPU (gloo): DDP, shared decompositions, FSDP2. Each equals one process on the joint batch."""

from __future__ import annotations

import copy
import multiprocessing
import traceback

import pytest
import torch
import torch.distributed as dist
from torch import nn

import blockdiag_opt.optimizer as optimizer_module
from blockdiag_opt import BlockAdam, BlockRMSprop, RandomizedBlockAdam, native

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)
DOUBLE = torch.float64
ENGINES = ["torch"] if native.load() is None else ["native", "torch"]


@pytest.fixture(autouse=True)
def _intervals_in_force_at_once(monkeypatch):
    # Trainings here take a few steps; children are forks and inherit it.
    monkeypatch.setattr(optimizer_module, "_STEPS_PER_INTERVAL", 1)


def draw(seed, *shape):
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A dense, a convolutional and two vector parameters; sizes that two processes do not share evenly."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, dtype=DOUBLE)
        self.first = nn.Linear(54, 9, dtype=DOUBLE)
        self.last = nn.Linear(9, 4, dtype=DOUBLE)
        with torch.no_grad():
            for k, param in enumerate(self.parameters()):
                param.copy_(0.3 * draw(k, *param.shape))

    def forward(self, x):
        return self.last(torch.tanh(self.first(torch.tanh(self.conv(x)).flatten(1))))


def train(model, optimizer, rank=0, world=1, steps=5, first=0):
    for t in range(first, first + steps):
        x, y = draw(100 + t, 8, 2, 5, 5), draw(200 + t, 8, 4)
        part = slice(8 * rank // world, 8 * (rank + 1) // world)
        optimizer.zero_grad()
        (model(x[part]) - y[part]).square().mean().backward()
        optimizer.step()


def flat(model):
    found = []
    for param in model.parameters():
        value = param.full_tensor() if hasattr(param, "full_tensor") else param
        found.append(value.detach().reshape(-1))
    return torch.cat(found)


def child(work, rank, world, folder, args, queue):
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
        queue.put((rank, True, work(rank, world, *args)))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        queue.put((rank, False, traceback.format_exc()))


def spawn(work, folder, *args, world=2):
    """What each process returns: plain numbers and lists."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=child, args=(work, rank, world, folder, args, queue)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        found = {}
        for _ in range(world):
            rank, good, value = queue.get(timeout=120)
            assert good, value
            found[rank] = value
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(world)]


MAKERS = {
    "adam": lambda p, **o: BlockAdam(p, lr=0.02, eps=1e-3, **o),
    "columns": lambda p, **o: BlockAdam(p, lr=0.02, eps=1e-3, grouping="input", **o),
    "momentum": lambda p, **o: BlockRMSprop(p, lr=0.02, eps=1e-3, momentum=0.9, **o),
    "drawn": lambda p, **o: RandomizedBlockAdam(p, lr=0.02, eps=1e-3, layers_per_step=1, **o),
    "clipped": lambda p, **o: BlockAdam(p, lr=0.02, clip=(0.05, 0.1), weight_decay=0.1, **o),
    "tracked": lambda p, **o: BlockAdam(p, lr=0.02, eps=1e-3, update_interval=3, **o),
}


def replicas(rank, world, cases):
    from torch.nn.parallel import DistributedDataParallel

    found = {}
    for name, options in cases:
        model = DistributedDataParallel(Net())
        train(model, MAKERS[name](model.parameters(), **options), rank, world)
        found[name, str(options)] = flat(model).tolist()
    return found


def test_replicas_are_identical_and_equal_one_process(tmp_path):
    cases = [
        (name, {"engine": engine, "shard_eigh": shard})
        for name in MAKERS
        for engine in ENGINES
        for shard in (False, True)
        if not (shard and name == "tracked")
    ]
    a, b = spawn(replicas, tmp_path, cases)
    wrong = []
    for name, options in cases:
        key = name, str(options)
        model = Net()
        train(model, MAKERS[name](model.parameters(), engine=options["engine"]))
        difference = (torch.tensor(a[key], dtype=DOUBLE) - flat(model)).abs().max()
        # Tracked eigenvectors of a null space are anybody's: the last bits of the gradient choose them.
        if a[key] != b[key] or (difference > 1e-12 and name != "tracked"):
            wrong.append((*key, a[key] == b[key], float(difference)))
    assert not wrong


def shared_in_other_types(rank, world, engine):
    found = []
    for dtype in (torch.bfloat16, torch.float32, DOUBLE):
        for shard in (False, True):
            params = [
                nn.Parameter(draw(k, *shape).to(dtype)) for k, shape in enumerate([(40, 10), (7,), (6, 5), (3, 33)])
            ]
            params.append(nn.Parameter(draw(9, 6, 8).to(dtype).T))
            optimizer = BlockAdam(params, lr=0.1, eps=1e-3, block_size=33, shard_eigh=shard, engine=engine)
            for t in range(4):
                for k, param in enumerate(params):
                    param.grad = draw(10 * t + k, *param.shape).to(dtype)
                optimizer.step()
            found.append([param.detach().double().reshape(-1).tolist() for param in params])
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_sharing_decompositions_changes_nothing_for_any_type(tmp_path, engine):
    a, b = spawn(shared_in_other_types, tmp_path, engine)
    assert a == b
    for k in (0, 2, 4):
        for alone, shared in zip(a[k], a[k + 1], strict=True):
            size = (1e-2, 1e-5, 1e-12)[k // 2]
            assert torch.tensor(alone, dtype=DOUBLE).sub(torch.tensor(shared, dtype=DOUBLE)).abs().max() < size


def sharded(rank, world, cases):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for grouping, options in cases:
        model = Net()
        for layer in (model.conv, model.first, model.last):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        try:
            optimizer = BlockAdam(model.named_parameters(), lr=0.02, eps=1e-3, grouping=grouping, **options)
            train(model, optimizer, rank, world)
            shapes = {k: tuple(v.shape) for k, v in optimizer.state_dict()["state"][2].items() if k != "step"}
            found[grouping, str(options)] = flat(model).tolist(), shapes
        except ValueError as error:
            found[grouping, str(options)] = str(error), None
    return found


@pytest.fixture(scope="module")
def sharding(tmp_path_factory):
    def one(rank, world):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = Net()
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), rank, world, steps=1)

    try:
        spawn(one, tmp_path_factory.mktemp("fsdp"))
    except Exception as error:
        pytest.skip(f"FSDP2 does not run on CPU here: {str(error).strip().splitlines()[-1]}")


def test_fsdp2_equals_one_process(tmp_path, sharding):
    cases = [
        (grouping, {"engine": engine, "update_interval": interval})
        for grouping in ("auto", "output", "row", "filter", "diag")
        for engine in ENGINES
        for interval in (1, 3)
        if grouping in {"auto", "row"} or (interval, engine) == (1, ENGINES[0])
    ]
    a, b = spawn(sharded, tmp_path, cases)
    for grouping, options in cases:
        key = grouping, str(options)
        model = Net()
        train(model, BlockAdam(model.parameters(), lr=0.02, eps=1e-3, grouping=grouping, **options))
        assert a[key] == b[key]
        difference = (torch.tensor(a[key][0], dtype=DOUBLE) - flat(model)).abs().max()
        # Tiles take turns in each shard by themselves: near, not equal.
        assert difference < (1e-12 if options["update_interval"] == 1 else 0.1), key


def test_fsdp2_state_has_the_whole_tensors_shape(tmp_path, sharding):
    cases = [("auto", {"update_interval": 3}), ("row", {})]
    found, _ = spawn(sharded, tmp_path, cases)
    assert found["auto", str(cases[0][1])][1]["exp_avg"] == (9, 54)
    # A row of the state for each row of the weight: 6 blocks of 9.
    assert found["auto", str(cases[0][1])][1]["exp_avg_sq"] == (9, 6 * 45)
    assert found["row", "{}"][1]["exp_avg_sq"] == (9, 54 * 55 // 2)


def test_blocks_across_shards_are_refused_or_exact(tmp_path, sharding):
    a, b = spawn(sharded, tmp_path, [("input", {}), ("full", {})])
    for grouping in ("input", "full"):
        found, _ = a[grouping, "{}"]
        if isinstance(found, str):
            assert "would cross shards" in found
            assert "parameter '" in found
            assert isinstance(b[grouping, "{}"][0], str)
        else:
            model = Net()
            train(model, BlockAdam(model.parameters(), lr=0.02, eps=1e-3, grouping=grouping))
            assert (torch.tensor(found, dtype=DOUBLE) - flat(model)).abs().max() < 1e-12


def saved_and_loaded(rank, world, full, grouping, interval, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))

    def make():
        model = Net()
        for layer in (model.conv, model.first, model.last):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, BlockAdam(
            model.named_parameters(), lr=0.02, eps=1e-3, grouping=grouping, update_interval=interval
        )

    options = StateDictOptions(full_state_dict=full)
    model, optimizer = make()
    train(model, optimizer, rank, world, 5)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    other, fresh = make()
    for a, b in zip(other.parameters(), model.parameters(), strict=True):
        a.data.copy_(b.data)
    if folder:
        dcp.save(state, checkpoint_id=folder)
        state = get_optimizer_state_dict(other, fresh, options=options)
        dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(other, fresh, copy.deepcopy(state), options=options)
    train(model, optimizer, rank, world, 4, first=5)
    train(other, fresh, rank, world, 4, first=5)
    shape = tuple(state["state"]["first.weight"]["exp_avg_sq"].shape)
    return float((flat(model) - flat(other)).abs().max()), shape


@pytest.mark.parametrize(
    ("full", "grouping", "interval", "on_disk"),
    [(False, "auto", 1, False), (False, "row", 4, True), (True, "auto", 4, False), (True, "row", 1, False)],
)
def test_distributed_state_dicts_come_back(tmp_path, sharding, full, grouping, interval, on_disk):
    folder = str(tmp_path / "checkpoint") if on_disk else ""
    for difference, shape in spawn(saved_and_loaded, tmp_path, full, grouping, interval, folder):
        assert difference == 0
        assert shape[0] in {9, 54}


def reads_single(rank, world, path):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    model = Net()
    weights, state = torch.load(path, weights_only=True)
    model.load_state_dict(weights)
    for layer in (model.conv, model.first, model.last):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = BlockAdam(model.named_parameters(), lr=0.02, eps=1e-3)
    try:
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, optimizer, state, options=options)
    except ValueError as error:
        return str(error)
    train(model, optimizer, rank, world, 4, first=5)
    return flat(model).tolist()


def test_the_state_of_one_process_is_read_by_two_or_refused(tmp_path, sharding):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = Net()
    optimizer = BlockAdam(model.named_parameters(), lr=0.02, eps=1e-3)
    train(model, optimizer, steps=5)
    path = tmp_path / "single.pt"
    torch.save((model.state_dict(), get_optimizer_state_dict(model, optimizer)), path)
    train(model, optimizer, steps=4, first=5)
    for found in spawn(reads_single, tmp_path, str(path)):
        if isinstance(found, str):
            assert "parameter '" in found
        else:
            assert (torch.tensor(found, dtype=DOUBLE) - flat(model)).abs().max() < 1e-12


def skips(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = BlockAdam(model.parameters(), lr=0.02, on_nonfinite="skip")
    train(model, optimizer, rank, world, 1)
    if rank == 0:
        model.first.weight.grad.to_local()[0, 0] = torch.nan
    before = flat(model)
    optimizer.step()
    return float((flat(model) - before).abs().max())


def test_a_step_that_one_shard_skips_all_skip(tmp_path, sharding):
    assert spawn(skips, tmp_path) == [0.0, 0.0]

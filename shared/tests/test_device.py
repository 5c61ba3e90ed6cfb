from __future__ import annotations

import itertools
import random
import runpy
import sys
import textwrap

import numpy as np
import pytest
import torch

from shared_core.device import (
    World,
    autocast,
    deterministic,
    generator,
    one_thread,
    process_group,
    resolve_device,
    seed_everything,
    seeded,
)
from shared_core.errors import InputError
from shared_core.testing import in_two_processes


def test_auto_is_a_device_that_works():
    assert torch.ones(2, device=resolve_device("auto")).sum().item() == 2


@pytest.mark.parametrize("name", ["", "gpu", "cuda:-1", "cpu:x", "CPU"])
def test_unknown_device(name):
    with pytest.raises(InputError, match="unknown device"):
        resolve_device(name)


def test_absent_device():
    with pytest.raises(InputError, match="not on this machine"):
        resolve_device("cuda:99")


def test_generator_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    first, second = (torch.randn(3, generator=generator(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_seeded_draws_as_manual_seed_does_and_gives_the_state_back():
    before = torch.get_rng_state()
    with seeded(7) as own:
        found, other = torch.nn.Linear(3, 2), torch.rand(3, generator=own)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        assert torch.equal(torch.nn.Linear(3, 2).weight, found.weight)
    assert torch.equal(torch.rand(3, generator=generator(7)), other)
    with seeded(np.int64(7)):
        assert torch.equal(torch.nn.Linear(3, 2).weight, found.weight)
    with pytest.raises(RuntimeError), seeded(7):
        torch.rand(-1)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_of_several_numbers_differ_by_each_and_by_their_order():
    def drawn(*numbers: int) -> float:
        with seeded(numbers, torch.device("cpu")):
            return torch.rand(()).item()

    assert drawn(3, 4) == drawn(3, 4)
    assert len({drawn(3, 4), drawn(4, 3), drawn(3, 5), drawn(3), drawn(3, 4, 1)}) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_seeded_touches_only_the_cards_it_is_told():
    card = torch.device("cuda:0")
    before = torch.cuda.get_rng_state(card)
    with seeded(7):
        assert torch.equal(torch.cuda.get_rng_state(card), before)
    with seeded(7, card):
        one = torch.rand(3, device=card)
    with seeded(7, card):
        assert torch.equal(torch.rand(3, device=card), one)
    assert torch.equal(torch.cuda.get_rng_state(card), before)


def test_seed_everything_repeats():
    def draw():
        seed_everything(11)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    assert draw() == draw()


def test_deterministic_restores():
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_one_thread_restores():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with one_thread(False):
            assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), one_thread():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_autocast_policy():
    cpu = torch.device("cpu")
    x = torch.randn(4, 4)
    with autocast(cpu, "bfloat16"):
        assert (x @ x).dtype == torch.bfloat16
    with autocast(cpu, "auto"):
        assert (x @ x).dtype == torch.float32
    with pytest.raises(InputError, match="unknown precision"):
        autocast(cpu, "float16")


def test_world_of_one_changes_nothing():
    with process_group(torch.device("cpu")) as world:
        assert world == World()
        x = torch.ones(2)
        world.all_reduce([x])
        world.broadcast([x])
        world.barrier()
        assert x.tolist() == [1, 1]


@pytest.mark.parametrize(("length", "size"), [(10, 3), (2, 4), (0, 2), (7, 7)])
def test_shards_cover_everything_once(length, size):
    parts = [list(range(length))[World(rank, size).shard(length)] for rank in range(size)]
    assert list(itertools.chain(*parts)) == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


TRAIN = textwrap.dedent("""
    import sys, torch
    from safetensors.torch import save_file
    from shared_core.device import process_group, resolve_device, generator
    device = resolve_device("cpu")
    with process_group(device) as world:
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        unused = torch.nn.Parameter(torch.ones(1, dtype=torch.float64) * world.rank)
        for i, p in enumerate(model.parameters()):
            torch.nn.init.normal_(p, generator=generator(i + 100 * world.rank))
        world.broadcast([*model.parameters(), unused])
        parameters = [*model.parameters(), unused]
        x = torch.randn(64, 5, dtype=torch.float64, generator=generator(1)); y = x.sin().sum(1, keepdim=True)
        for step in range(20):
            rows = torch.randperm(64, generator=generator(step))[:21]
            mine = rows[world.shard(len(rows))]
            model.zero_grad()
            ((model(x[mine]) - y[mine]) ** 2).sum().div(len(rows)).backward()
            world.sum_gradients(parameters)
            with torch.no_grad():
                for p in parameters:
                    p -= 0.05 * (torch.zeros_like(p) if p.grad is None else p.grad)
        total = torch.tensor(float(len(rows[world.shard(len(rows))])))
        world.all_reduce([total])
        assert total.item() == len(rows)
        world.barrier()
        if world.is_main:
            save_file({**model.state_dict(), "unused": unused.data}, sys.argv[1])
""")


def test_two_gloo_processes_train_to_the_same_weights_as_one(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "one.safetensors")])
    runpy.run_path(str(script))
    in_two_processes(tmp_path, TRAIN, tmp_path / "two.safetensors")
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-9, atol=1e-12)

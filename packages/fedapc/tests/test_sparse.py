"""Sums of sparse parts, dense or sparse inside, against whole tensors; and that nobody holds what he need not."""

from __future__ import annotations

import gc

import pytest
import torch
from networks import federation, same

from fedapc import sparse, wire
from fedapc.engine import simulate
from fedapc.errors import ModelMismatchError, WireError
from fedapc.sparse import SparseStack, SparseTensor

DENSITIES = (0.0, 0.01, 0.09, 0.11, 0.5, 1.0)


def parts(count, density, shape=(7, 5, 3), dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        values = torch.randn(shape, generator=random, dtype=dtype)
        found.append(SparseTensor.of(values * (torch.rand(shape, generator=random) < density)))
    return found


def by_entries(held, weights):
    """The sum as it was first written: one entry after the other of 64-bit places."""
    index = torch.cat([part.index for part in held])
    slot = torch.repeat_interleave(torch.arange(len(held)), torch.tensor([len(part.index) for part in held]))
    terms = weights.index_select(0, slot) * torch.cat([part.values for part in held])
    whole = terms.new_zeros(torch.Size(held[0].shape).numel())
    return whole.index_add(0, index, terms).view(held[0].shape)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("count", [1, 6])
def test_sums_folds_and_slopes_are_those_of_the_entries(count, density):
    held = parts(count, density)
    stack = SparseStack(held, (7, 5, 3), torch.zeros(1))
    weights = torch.randn(count, generator=torch.Generator().manual_seed(1), requires_grad=True)
    expected = by_entries(held, weights)
    found = stack.weighted_sum(weights)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(stack.total(weights.detach()), expected.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(stack.fold(weights).dense(), expected.detach(), atol=1e-6, rtol=1e-6)
    upstream = torch.randn(7, 5, 3)
    grads = [torch.autograd.grad((of * upstream).sum(), weights)[0] for of in (found, expected)]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stack.slopes(upstream), grads[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("density", DENSITIES[1:])
def test_gradients_are_exact(density):
    held = parts(3, density, dtype=torch.float64)
    stack = SparseStack(held, (7, 5, 3), torch.zeros(1, dtype=torch.float64))
    weights = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stack.weighted_sum, weights)


def test_dense_parts_are_held_as_a_matrix_and_sparse_ones_as_entries():
    for density, kind in ((0.5, sparse._Dense), (0.02, sparse._Entries)):
        stack = SparseStack(parts(4, density, (100, 30)), (100, 30), torch.zeros(1))
        assert abs(stack.density - density) < 0.01
        assert stack._held is None
        stack.weighted_sum(torch.ones(4))
        assert isinstance(stack._held, kind)
        stack.release()
        assert stack._held is None


def test_no_parts_sum_to_nothing():
    stack = SparseStack([], (2, 3), torch.zeros(1))
    assert torch.equal(stack.weighted_sum(torch.zeros(0)), torch.zeros(2, 3))
    assert torch.equal(stack.fold(torch.zeros(0)).dense(), torch.zeros(2, 3))
    assert stack.slopes(torch.ones(2, 3)).shape == (0,)


def test_another_type_is_taken_on():
    stack = SparseStack(parts(2, 0.5, (4, 4)), (4, 4), torch.zeros(1, dtype=torch.float64))
    assert stack.weighted_sum(torch.ones(2, dtype=torch.float64)).dtype == torch.float64
    assert stack.total(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


def test_parts_of_another_shape_are_refused():
    with pytest.raises(ModelMismatchError, match=r"shape \(4, 4\) for a layer of \(4, 5\)"):
        SparseStack(parts(1, 0.5, (4, 4)), (4, 5), torch.zeros(1))


def test_packed_tensors_share_their_places():
    full, few = torch.randn(10, 10), torch.zeros(10, 10)
    few[3, 4] = 2.0
    one, two, sparse_one = (SparseTensor.packed(value) for value in (full, 2 * full, few))
    assert one.index is two.index
    assert torch.equal(one.dense(), full)
    assert sparse_one.index.tolist() == [34]
    # With some zeros too, as long as the values of all places take fewer bytes.
    full[:4] = 0
    assert torch.equal(SparseTensor.packed(full).dense(), full)


def test_the_same_bytes_are_one_tensor_as_long_as_somebody_has_it():
    blob = wire.encode_sparse(parts(1, 0.3)[0])
    part = wire.decode_shared(blob, (7, 5, 3))
    assert wire.decode_shared(bytes(bytearray(blob)), (7, 5, 3)) is part
    with pytest.raises(WireError, match="expected"):
        wire.decode_shared(blob, (7, 15))
    assert wire.decode_shared(blob, (7, 5, 3)) is part
    held = len(wire._SHARED)
    del part
    gc.collect()
    assert len(wire._SHARED) == held - 1


def test_clients_of_one_process_hold_a_part_once_and_between_rounds_nothing_else():
    clients, server = federation(clients=3, tasks=2, rounds=2)
    simulate(clients, server, rounds=3)
    first, second, third = (client.model.running[1] for client in clients)
    for name in clients[0].layout.layers:
        # Of a, b, c: a has parts of b and c, b of a and c, c of a and b.
        assert first.received[name].parts[1] is second.received[name].parts[1]
        assert first.received[name].parts[0] is third.received[name].parts[1]
    for client in clients:
        client.evaluate()
        assert all(stack._held is None for stack in client.model.running[1].received.values())


def test_clients_share_parts_again_after_a_restart():
    clients, server = federation(clients=3, tasks=2, rounds=2)
    simulate(clients, server, rounds=3)
    fresh, _ = federation(clients=3, tasks=2, rounds=2)
    for old, new in zip(clients, fresh, strict=True):
        new.load_state(old.state())
        assert same(old.state(), new.state())
    first, second = (client.model.running[1] for client in fresh[:2])
    assert all(first.received[name].parts[1] is second.received[name].parts[1] for name in first.received)

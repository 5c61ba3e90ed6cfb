"""Saving and loading: what goes on after a resume is what would have gone on without it, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from blockdiag_opt import (
    AdaBlock,
    BlockAdaFom,
    BlockAdagrad,
    BlockAdam,
    BlockAdamW,
    BlockAMSGrad,
    BlockRMSprop,
    RandomizedBlockAdam,
    SpectrumClip,
    native,
)

SHAPES = [(20, 12), (3, 2, 3, 3), (7,), (), (40, 3)]


@pytest.fixture(params=["native", "torch"])
def engine(request):
    if request.param == "native" and native.load() is None:
        pytest.skip(f"no native engine: {native.reason()}")
    return request.param


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype=torch.float32, seed=0):
    return [nn.Parameter(draw(seed + k, *shape, dtype=dtype)) for k, shape in enumerate(SHAPES)]


def go(optimizer, first, last):
    for t in range(first, last):
        for k, param in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            param.grad = draw(100 + 13 * t + k, *param.shape, dtype=param.dtype)
        optimizer.step()
        if t == 3:
            # Far enough for an update interval to be in force: the 10th step lies amid it.
            for entry in optimizer.state.values():
                entry["step"] += 200


def values(optimizer):
    return [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


CASES = [
    (BlockAdam, {}),
    (BlockAdam, {"update_interval": 7}),
    (BlockAdam, {"update_interval": 7, "block_size": 3, "grouping": "input", "clip": SpectrumClip(0.05, 0.1)}),
    (BlockAdam, {"lr": torch.tensor(0.01), "state_dtype": torch.float64}),
    (BlockAdamW, {"grouping": "row", "maximize": True}),
    (BlockAMSGrad, {}),
    (BlockRMSprop, {"momentum": 0.9}),
    (BlockAdagrad, {"initial_accumulator_value": 0.1, "lr_decay": 0.01}),
    (BlockAdaFom, {}),
    (AdaBlock, {}),
    (RandomizedBlockAdam, {"layers_per_step": 2, "seed": 4}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("make", "options"), CASES)
def test_resumed_equals_uninterrupted_bit_for_bit(engine, make, options, dtype):
    options = {"lr": 0.05} | options
    straight = make(parameters(dtype), engine=engine, **options)
    go(straight, 0, 24)
    first = make(parameters(dtype), engine=engine, **options)
    go(first, 0, 10)
    # Made with other settings, which the checkpoint's replace.
    fresh = [nn.Parameter(value) for value in values(first)]
    second = make(fresh, engine=engine, **{**options, "lr": 0.7})
    second.load_state_dict(through_file(first.state_dict()))
    go(second, 10, 24)
    assert equal(values(second), values(straight))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "together"])
@pytest.mark.parametrize("interval", [1, 7])
def test_copies_go_on_alike_and_apart(engine, how, interval):
    blocks = [None] * 4 + [torch.arange(120).view(60, 2)]
    optimizer = BlockAdam(parameters(), lr=0.05, update_interval=interval, blocks=blocks, engine=engine)
    go(optimizer, 0, 10)
    before = values(optimizer)
    if how == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        _, other = copy.deepcopy((optimizer.param_groups[0]["params"], optimizer))
    go(other, 10, 20)
    assert equal(values(optimizer), before)
    go(optimizer, 10, 20)
    assert equal(values(optimizer), values(other))


@pytest.mark.parametrize("shapes", [[(20, 12)], [(10, 5)], [(1, 6)], [(16, 4)], [(6,)]])
def test_two_optimizers_that_share_a_state_dict_do_not_share_memory(engine, shapes):
    def make():
        return BlockAdam([nn.Parameter(draw(0, *shape)) for shape in shapes], lr=0.05, engine=engine)

    source = make()
    go(source, 0, 3)
    target = make()
    target.load_state_dict(source.state_dict())
    kept = copy.deepcopy(target.state_dict()["state"])
    go(source, 3, 6)
    now = target.state_dict()["state"]
    for key, entry in kept.items():
        for name, value in entry.items():
            assert torch.equal(now[key][name], value), name


def test_the_format_does_not_depend_on_the_engine_or_on_memory():
    found = []
    for engine in ("torch", "native") if native.load() is not None else ("torch", "torch"):
        optimizer = BlockAdam(parameters(torch.float64), update_interval=4, engine=engine)
        go(optimizer, 0, 5)
        found.append(optimizer.state_dict()["state"])
    for a, b in zip(*(state.values() for state in found), strict=True):
        assert {name: value.shape for name, value in a.items()} == {name: value.shape for name, value in b.items()}
    first = found[0][0]
    assert first["exp_avg"].shape == (20, 12)
    assert first["exp_avg_sq"].shape == (40, 21)
    assert first["eigvecs"].shape == (40, 6, 6)
    assert first["eigvals"].shape == (40, 6)
    assert found[0][2]["exp_avg_sq"].shape == (7,)


def test_a_state_goes_from_one_engine_to_the_other():
    if native.load() is None:
        pytest.skip(f"no native engine: {native.reason()}")
    results = []
    for engines in (("native", "torch"), ("torch", "native")):
        params = parameters(torch.float64)
        saved = None
        for k, engine in enumerate(engines):
            optimizer = BlockAdam(params, lr=0.05, eps=1e-3, engine=engine)
            if k:
                saved = copy.deepcopy(saved)
                saved["param_groups"][0]["engine"] = engine
                optimizer.load_state_dict(saved)
                assert optimizer.param_groups[0]["engine"] == engine
            go(optimizer, 20 * k, 20 * (k + 1))
            saved = optimizer.state_dict()
        results.append(values(optimizer))
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(*results, strict=True))


def test_saving_changes_nothing_and_an_untouched_optimizer_can_be_saved(engine):
    optimizer = BlockAdam(parameters(), lr=0.05, engine=engine)
    other = BlockAdam(parameters(), lr=0.05, engine=engine)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert not optimizer.state_dict()["state"]
    go(optimizer, 0, 4)
    optimizer.state_dict()
    go(optimizer, 4, 8)
    go(other, 0, 8)
    assert equal(values(optimizer), values(other))


def test_parameters_that_never_had_a_gradient(engine):
    params = parameters()
    optimizer = BlockAdam(params, engine=engine)
    params[0].grad = draw(0, 20, 12)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert [key for key, entry in state.items() if entry] == [0]
    other = BlockAdam(parameters(), engine=engine)
    other.load_state_dict(state_dict=optimizer.state_dict())
    go(other, 1, 2)
    steps = [float(other.state[param]["step"]) for param in other.param_groups[0]["params"]]
    assert steps == [2.0, 1.0, 1.0, 1.0, 1.0]


def test_explicit_partitions_are_saved_and_compared(engine):
    def make(blocks):
        return BlockAdam([nn.Parameter(draw(0, 4, 6))], lr=0.05, blocks=blocks, engine=engine)

    blocks = torch.randperm(24, generator=torch.Generator().manual_seed(0)).view(6, 4)
    source = make(blocks)
    go(source, 0, 5)
    saved = through_file(source.state_dict())
    target = make(blocks.clone())
    target.param_groups[0]["params"][0].data.copy_(source.param_groups[0]["params"][0].data)
    target.load_state_dict(saved)
    go(source, 5, 9)
    go(target, 5, 9)
    assert equal(values(source), values(target))
    for other in (torch.arange(24).view(6, 4), None):
        with pytest.raises(ValueError, match="blocks"):
            make(other).load_state_dict(saved)


@pytest.mark.parametrize("change", [{"block_size": 4}, {"grouping": "input"}, {"grouping": "diag"}])
def test_a_checkpoint_of_other_blocks_is_refused_and_nothing_changes(engine, change):
    source = BlockAdam([("fc.weight", nn.Parameter(draw(0, 20, 12)))], lr=0.05, engine=engine)
    go(source, 0, 3)
    target = BlockAdam([("fc.weight", nn.Parameter(draw(0, 20, 12)))], lr=0.3, engine=engine, **change)
    go(target, 0, 2)
    kept = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=r"fc\.weight") as caught:
        target.load_state_dict(source.state_dict())
    assert "\n" not in str(caught.value)
    now = target.state_dict()
    assert now["param_groups"][0]["lr"] == kept["param_groups"][0]["lr"]
    assert all(torch.equal(now["state"][0][name], value) for name, value in kept["state"][0].items())


def test_checkpoints_of_others_are_refused(engine):
    params = parameters()
    adam = torch.optim.Adam(params)
    with pytest.raises(ValueError, match="another optimizer"):
        BlockAdam(params, engine=engine).load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="has 5 parameters"):
        BlockAdam(params[:2], engine=engine).load_state_dict(BlockAdam(parameters()).state_dict())
    with pytest.raises(ValueError, match="1 parameter groups, the optimizer 2"):
        BlockAdam([{"params": params[:1]}, {"params": params[1:]}]).load_state_dict(BlockAdam(params).state_dict())


def test_double_state_of_a_bfloat16_model_keeps_its_precision(engine):
    optimizer = BlockAdam(parameters(torch.bfloat16), state_dtype="float64", engine=engine)
    go(optimizer, 0, 3)
    other = BlockAdam(parameters(torch.bfloat16), engine=engine)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert b["exp_avg"].dtype == torch.float64
        assert torch.equal(a["exp_avg"], b["exp_avg"])
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])


def test_hooks_of_state_dicts_see_what_a_user_sees(engine):
    optimizer = BlockAdam([nn.Parameter(draw(0, 20, 12))], engine=engine)
    go(optimizer, 0, 2)
    seen = {}

    def saved(_, state_dict):
        seen["saved"] = state_dict["state"][0]["exp_avg_sq"].shape
        state_dict["note"] = "kept"

    optimizer.register_state_dict_pre_hook(lambda _: seen.setdefault("before", True) and None)
    optimizer.register_state_dict_post_hook(saved)
    state = optimizer.state_dict()
    assert seen["before"]
    assert state["note"] == "kept"
    assert state["state"][0]["exp_avg_sq"].shape == (40, 21)
    assert seen["saved"] == (40, 21)
    other = BlockAdam([nn.Parameter(draw(0, 20, 12))], engine=engine)

    def before(_, state_dict):
        seen["loading"] = len(state_dict["state"])

    def after(loaded):
        seen["loaded"] = len(loaded.state)

    other.register_load_state_dict_pre_hook(before)
    other.register_load_state_dict_post_hook(after)
    other.load_state_dict(state)
    assert (seen["loading"], seen["loaded"]) == (1, 1)


def test_a_pre_hook_may_replace_what_is_loaded(engine):
    source = BlockAdam([nn.Parameter(draw(0, 20, 12))], engine=engine)
    go(source, 0, 2)
    other = BlockAdam([nn.Parameter(draw(0, 20, 12))], engine=engine)

    def halve(_, state_dict):
        changed = copy.deepcopy(state_dict)
        changed["state"][0]["exp_avg"] = changed["state"][0]["exp_avg"] / 2
        return changed

    other.register_load_state_dict_pre_hook(halve)
    other.load_state_dict(source.state_dict())
    a, b = (next(iter(optimizer.state.values()))["exp_avg"] for optimizer in (source, other))
    assert torch.equal(a / 2, b)


def test_the_state_follows_a_parameter_to_another_device(engine):
    if torch.cuda.is_available():
        where = torch.device("cuda")
    elif torch.backends.mps.is_available():
        where = torch.device("mps")
    else:
        pytest.skip("one device only")
    optimizer = BlockAdam(parameters(), lr=0.05, update_interval=3)
    go(optimizer, 0, 4)
    for param in optimizer.param_groups[0]["params"]:
        param.data = param.data.to(where)
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(entry["exp_avg_sq"].device.type == where.type for entry in optimizer.state.values())


def test_state_of_a_step_loaded_onto_the_meta_device_has_its_shape():
    source = BlockAdam(parameters())
    go(source, 0, 2)
    meta = BlockAdam([nn.Parameter(param.detach().to("meta")) for param in parameters()])
    meta.load_state_dict(source.state_dict())
    assert all(entry["exp_avg"].device.type == "meta" for entry in meta.state.values())
    shapes = [entry["exp_avg_sq"].shape for entry in meta.state_dict()["state"].values()]
    assert shapes == [entry["exp_avg_sq"].shape for entry in source.state_dict()["state"].values()]


def test_fields_that_a_checkpoint_of_an_older_version_lacks_take_their_defaults(engine):
    source = BlockAdam(parameters(), lr=0.05, engine=engine)
    go(source, 0, 3)
    saved = copy.deepcopy(source.state_dict())
    for name in ("stochastic_rounding", "seed", "draws", "layers_per_step", "shard_eigh"):
        del saved["param_groups"][0][name]
    other = BlockAdam([nn.Parameter(value) for value in values(source)], lr=0.05, engine=engine)
    other.load_state_dict(saved)
    go(source, 3, 5)
    go(other, 3, 5)
    assert equal(values(source), values(other))

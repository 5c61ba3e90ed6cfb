"""What other people's code does with an optimizer: schedulers, scalers, hooks, trainers, and bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from blockdiag_opt import (
    AdaBlock,
    BlockAdagrad,
    BlockAdam,
    BlockAdamW,
    BlockAMSGrad,
    BlockRMSprop,
    RandomizedBlockAdam,
    SpectrumClip,
    native,
)

EVERY = [BlockAdam, BlockAdamW, BlockAMSGrad, BlockRMSprop, BlockAdagrad, AdaBlock, RandomizedBlockAdam]


@pytest.fixture(params=["native", "torch"])
def engine(request):
    if request.param == "native" and native.load() is None:
        pytest.skip(f"no native engine: {native.reason()}")
    return request.param


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def network(seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def loss_of(model, seed=0):
    dtype = next(model.parameters()).dtype
    return (model(draw(seed, 32, 12, dtype=dtype)) - draw(seed + 1, 32, 3, dtype=dtype)).square().mean()


def weights(model):
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])


def train(model, optimizer, steps, scheduler=None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return float(loss_of(model).detach())


@pytest.mark.parametrize("make", EVERY)
def test_every_member_trains(engine, make):
    model = network()
    before = float(loss_of(model).detach())
    assert train(model, make(model.parameters(), lr=0.02, engine=engine), 40) < 0.9 * before


# steps


def test_a_closure_is_called_once_with_gradients_enabled(engine):
    model, calls = network(), []
    optimizer = BlockAdam(model.parameters(), engine=engine)

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == pytest.approx(float(loss_of(network()).detach()))
    assert optimizer.step() is None


def test_parameters_without_a_gradient_neither_move_nor_count_and_may_start_later(engine):
    model = network()
    optimizer = BlockAdam(model.parameters(), lr=0.1, engine=engine)
    frozen = model[0].weight
    frozen.requires_grad_(False)
    start = frozen.detach().clone()
    train(model, optimizer, 5)
    assert torch.equal(frozen, start)
    assert not optimizer.state.get(frozen)
    frozen.requires_grad_(True)
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    assert float(optimizer.state[frozen]["step"]) == 1
    assert float(optimizer.state[model[2].weight]["step"]) == 6
    # Bias correction counts from its own first step: each block of 6 moves by lr.
    norms = (frozen.detach() - start).view(8, 2, 6).norm(dim=-1)
    assert torch.allclose(norms, torch.full_like(norms, 0.1), rtol=1e-3)


def test_nothing_to_do(engine):
    optimizer = BlockAdam(network().parameters(), engine=engine)
    optimizer.step()
    assert not any(optimizer.state.values())


def test_groups_have_settings_of_their_own_and_may_come_later(engine):
    model = network(dtype=torch.float64)
    optimizer = BlockAdam([{"params": [model[0].weight], "block_size": 3, "lr": 0.1}], engine=engine)
    optimizer.add_param_group(
        {"params": [model[2].weight], "grouping": "input", "update_interval": 3, "clip": SpectrumClip(0.1, 0.1)}
    )
    optimizer.add_param_group({"params": [model[0].bias, model[2].bias], "betas": (0.5, 0.9), "eps": 1e-3})
    start = [param.detach().clone() for param in (model[0].weight, model[0].bias)]
    loss_of(model).backward()
    optimizer.step()
    layouts = optimizer.layouts()
    assert (layouts["0.0"].n, layouts["1.0"].kind, layouts["2.1"].kind) == (3, "input", "diag")
    moved = (model[0].weight.detach() - start[0]).view(8, 4, 3).norm(dim=-1)
    assert torch.allclose(moved, torch.full_like(moved, 0.1), rtol=1e-5)
    g = model[0].bias.grad
    assert torch.allclose(model[0].bias.detach() - start[1], -1e-3 * g / (g.abs() + 1e-3))
    train(model, optimizer, 5)
    assert optimizer.defaults["block_size"] == 10


def test_defaults_are_those_of_torch():
    for ours, theirs in [(BlockAdam, torch.optim.Adam), (BlockAdamW, torch.optim.AdamW)]:
        a, b = ours(network().parameters()).defaults, theirs(network().parameters()).defaults
        for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"):
            assert a[name] == b[name]
    a, b = BlockRMSprop(network().parameters()).defaults, torch.optim.RMSprop(network().parameters()).defaults
    assert (a["lr"], a["betas"][1], a["eps"]) == (b["lr"], b["alpha"], b["eps"])


@pytest.mark.parametrize("name", ["fused", "differentiable", "foreach", "capturable"])
@pytest.mark.parametrize("value", [None, False])
def test_keywords_of_adam_that_ask_for_nothing_are_taken(name, value):
    if name in {"differentiable", "capturable"} and value is None:
        value = False
    BlockAdam(network().parameters(), **{name: value})


@pytest.mark.parametrize("name", ["fused", "differentiable", "capturable"])
def test_keywords_of_adam_that_cannot_be_had_are_refused_by_name(name):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=name):
        BlockAdam(network().parameters(), **{name: True})


def test_groups_of_a_torch_optimizer_are_taken():
    model = network()
    adam = torch.optim.Adam(model.parameters(), lr=0.05)
    assert BlockAdam(adam.param_groups).param_groups[0]["lr"] == 0.05
    BlockAdam([{"params": model.parameters(), "fused": None}])


@pytest.mark.parametrize("key", ["name", "group_name", "no_decay", "lr_mult", "layer_id", "decay"])
def test_a_group_may_carry_what_belongs_to_others(key):
    assert BlockAdam([{"params": network().parameters(), key: "mine"}]).param_groups[0][key] == "mine"


def test_a_misspelt_setting_of_a_group_is_met_with_a_suggestion():
    with pytest.raises(ValueError, match="unknown setting 'blocksize'; did you mean 'block_size'"):
        BlockAdam([{"params": network().parameters(), "blocksize": 3}])


# schedulers


def test_one_cycle_turns_rates_and_betas(engine):
    model = network()
    optimizer = BlockAdam(model.parameters(), lr=0.01, engine=engine)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=40)
    before = float(loss_of(model).detach())
    betas = set()
    for _ in range(39):
        train(model, optimizer, 1, scheduler)
        betas.add(optimizer.param_groups[0]["betas"][0])
    assert len(betas) > 10
    assert float(loss_of(model).detach()) < before
    a = BlockAdam(network().parameters(), block_size=1, engine=engine)
    b = torch.optim.Adam(network().parameters())
    for optimizer in (a, b):
        params = optimizer.param_groups[0]["params"]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=20)
        for t in range(19):
            for k, param in enumerate(params):
                param.grad = draw(t + 31 * k, *param.shape)
            optimizer.step()
            scheduler.step()
    for x, y in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        assert torch.allclose(x, y, atol=1e-5)


def test_warm_up_from_zero_with_a_clip(engine):
    model = network()
    optimizer = BlockAdam(model.parameters(), lr=0.05, clip=SpectrumClip(0.1, 0.01), engine=engine)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, t / 5))
    start = weights(model)
    train(model, optimizer, 1, scheduler)
    assert torch.equal(weights(model), start)
    before = float(loss_of(model).detach())
    assert train(model, optimizer, 20, scheduler) < before
    assert bool(weights(model).isfinite().all())


def test_plateau_and_tensor_rates(engine):
    model = network()
    optimizer = BlockAdam(model.parameters(), lr=torch.tensor(0.02), engine=engine)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for _ in range(3):
        train(model, optimizer, 1)
        scheduler.step(1.0)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.005)


def test_a_rate_of_zero(engine):
    model = network()
    start = weights(model)
    train(model, BlockAdam(model.parameters(), lr=0.0, engine=engine), 2)
    assert torch.equal(weights(model), start)
    with pytest.raises(ValueError, match=r"clip with lr = 0.*base_lr"):
        BlockAdam(model.parameters(), lr=0.0, clip=SpectrumClip(0.1))
    BlockAdam(model.parameters(), lr=0.0, base_lr=0.1, clip=SpectrumClip(0.1))


def test_a_first_moment_that_begins_later(engine):
    # OneCycleLR and users change betas: beta1 = 0 at first must not switch the first moment off for ever.
    param = nn.Parameter(torch.zeros(2, 3))
    optimizer = BlockAdam([param], lr=0.1, betas=(0.0, 0.9), engine=engine)
    for size in (1.0, 1.0, 0.0):
        before = param.detach().clone()
        param.grad = size * draw(0, 2, 3)
        optimizer.step()
        optimizer.param_groups[0]["betas"] = (0.9, 0.9)
    assert not torch.equal(before, param.detach())


# precision


def test_the_grad_scaler(engine):
    model = network()
    optimizer = BlockAdam(model.parameters(), lr=0.02, engine=engine)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    twin = network()
    plain = BlockAdam(twin.parameters(), lr=0.02, engine=engine)
    for _ in range(5):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()
    train(twin, plain, 5)
    assert torch.allclose(weights(model), weights(twin), atol=1e-5)
    before = weights(model)
    scaler.scale(loss_of(model) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weights(model), before)
    assert scaler.get_scale() < 2.0**10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_keep_single_precision_state(engine, dtype):
    model = network(dtype=dtype)
    before = float(loss_of(model).detach())
    optimizer = BlockAdam(model.parameters(), lr=0.02, engine=engine)
    assert train(model, optimizer, 30) < before
    assert {entry["exp_avg_sq"].dtype for entry in optimizer.state.values()} == {torch.float32}
    assert {param.dtype for param in model.parameters()} == {dtype}


def test_stochastic_rounding_is_right_on_average(engine):
    # Steps of 1e-3 from 1.0, where bfloat16 is 2^-8 apart: rounding to nearest never moves.
    moved = {}
    for random in (False, True):
        param = nn.Parameter(torch.ones(400, 10, dtype=torch.bfloat16))
        optimizer = BlockAdam([param], lr=1e-3, block_size=1, stochastic_rounding=random, engine=engine)
        for _ in range(20):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[random] = 1 - param.detach().float()
    assert moved[False].abs().max() == 0
    assert float(moved[True].mean()) == pytest.approx(0.02, abs=0.001)
    state = torch.random.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_ill_conditioned_least_squares_in_single_precision(engine):
    A = torch.linalg.qr(draw(0, 60, 20, dtype=torch.float64))[0] * torch.logspace(0, -8, 20, dtype=torch.float64)
    A = (A @ torch.linalg.qr(draw(1, 20, 20, dtype=torch.float64))[0]).float()
    b = A @ draw(2, 20, 4)
    weight = nn.Parameter(torch.zeros(4, 20))
    optimizer = BlockAdam([weight], lr=0.05, block_size=20, engine=engine)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (A @ weight.T - b).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.05 * losses[0]


# shapes and memory


def test_empty_tensors_and_scalars(engine):
    empty, scalar = nn.Parameter(torch.zeros(0, 5)), nn.Parameter(torch.tensor(2.0))
    optimizer = BlockAdam([empty, scalar], lr=0.1, engine=engine)
    empty.grad, scalar.grad = torch.zeros(0, 5), torch.tensor(3.0)
    optimizer.step()
    assert scalar.item() == pytest.approx(1.9)
    BlockAdam([nn.Parameter(torch.zeros(3))], engine=engine).load_state_dict(
        BlockAdam([nn.Parameter(torch.zeros(3))]).state_dict()
    )
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("interval", [1, 3])
def test_memory_formats_change_nothing(engine, interval):
    options = {"lr": 0.1, "engine": engine, "update_interval": interval, "weight_decay": 0.1}
    plain = nn.Parameter(draw(0, 4, 5, 3, 3, dtype=torch.float64))
    dense = nn.Parameter(draw(1, 6, 8, dtype=torch.float64))
    last = nn.Parameter(plain.detach().clone().to(memory_format=torch.channels_last))
    turned = nn.Parameter(dense.detach().T.contiguous().T)
    holder = torch.zeros(6, 17, dtype=torch.float64)
    holder[:, ::2][:, :8] = dense.detach()
    strided = nn.Parameter(holder[:, ::2][:, :8])
    assert not turned.is_contiguous()
    assert not strided.is_contiguous()
    for t in range(5):
        g, h = draw(10 + t, 4, 5, 3, 3, dtype=torch.float64), draw(50 + t, 6, 8, dtype=torch.float64)
        plain.grad, dense.grad, turned.grad, strided.grad = g, h, h.T.contiguous().T, h
        last.grad = g.clone().to(memory_format=torch.channels_last)
        if t == 0:
            optimizer = BlockAdam([plain, dense, last, turned, strided], **options)
        optimizer.step()
    assert torch.allclose(plain, last, atol=1e-12)
    assert torch.allclose(dense, turned, atol=1e-12)
    assert torch.allclose(dense, strided, atol=1e-12)
    assert not holder[:, 1::2].any()


def test_expanded_gradients(engine):
    param = nn.Parameter(torch.zeros(3, 4))
    param.sum().backward()
    optimizer = BlockAdam([param], lr=0.1, engine=engine)
    optimizer.step()
    assert torch.allclose(param, torch.full((3, 4), -0.05))


def test_tied_parameters_are_stepped_once(engine):
    shared = nn.Linear(6, 6, bias=False)
    model = nn.Sequential(shared, shared)
    optimizer = BlockAdam(model.parameters(), lr=0.1, engine=engine)
    model(draw(0, 5, 6)).square().mean().backward()
    optimizer.step()
    assert float(optimizer.state[shared.weight]["step"]) == 1


def test_data_swapped_for_another_shape(engine):
    model = network()
    optimizer = BlockAdam(model.named_parameters(), engine=engine)
    train(model, optimizer, 1)
    model[0].weight.data = torch.zeros(5, 12)
    model[0].weight.grad = torch.zeros(5, 12)
    with pytest.raises(ValueError, match=r"'0\.weight' had .*make a new optimizer"):
        optimizer.step()


# gradients that are not numbers


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])
@pytest.mark.parametrize("interval", [1, 3])
def test_a_bad_gradient_raises_before_anything_changes(engine, bad, interval):
    model = network()
    optimizer = BlockAdam(model.named_parameters(), update_interval=interval, engine=engine)
    train(model, optimizer, 2)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    model[2].weight.grad[1, 2] = bad
    with pytest.raises(FloatingPointError, match=r"'2\.weight' at step 3") as caught:
        optimizer.step()
    assert "\n" not in str(caught.value)
    assert torch.equal(weights(model), before)
    for key, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[key][name]) for name, value in entry.items())


def test_bad_gradients_may_be_skipped_and_are_counted(engine):
    model = network()
    optimizer = BlockAdam(model.parameters(), on_nonfinite="skip", engine=engine)
    train(model, optimizer, 1)
    before = weights(model)
    model[0].bias.grad[0] = math.nan
    optimizer.step()
    assert torch.equal(weights(model), before)
    assert optimizer.health()["skipped_steps"] == 1


def test_many_huge_gradients_of_adagrad_do_not_overflow(engine):
    param = nn.Parameter(torch.zeros(4, 4))
    optimizer = BlockAdagrad([param], engine=engine)
    try:
        for _ in range(450):
            param.grad = torch.full((4, 4), 9.9e17)
            optimizer.step()
    except FloatingPointError:
        return
    assert bool(param.isfinite().all())


def test_sparse_gradients_are_refused(engine):
    layer = nn.Embedding(5, 3, sparse=True)
    optimizer = BlockAdam(layer.named_parameters(), engine=engine)
    layer(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"'weight' has a sparse gradient.*SparseAdam"):
        optimizer.step()


def test_types_that_are_refused():
    with pytest.raises(TypeError, match="'w' is complex"):
        BlockAdam([("w", nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64)))])
    with pytest.raises(TypeError, match=r"torch\.int64"):
        BlockAdam([nn.Parameter(torch.zeros(3, 3, dtype=torch.int64), requires_grad=False)])
    with pytest.raises(TypeError):
        BlockAdam([torch.quantize_per_tensor(torch.zeros(3, 3), 0.1, 0, torch.qint8)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "invalid lr"),
        ({"lr": math.nan}, "invalid lr"),
        ({"lr": torch.tensor([0.1, 0.2])}, "(?i)lr|elements|scalar"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]"),
        ({"eps": -1e-8}, "eps"),
        ({"eps": 0.0, "floor": 0.0}, "eps = 0 needs"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"block_size": 0}, "block_size"),
        ({"update_interval": 0}, "update_interval"),
        ({"grouping": "rows"}, "unknown grouping 'rows'"),
        ({"engine": "cuda"}, "unknown engine"),
        ({"lr_scale": "sqrt"}, "unknown lr_scale"),
        ({"damping_form": "none"}, "unknown damping_form"),
        ({"on_nonfinite": "ignore"}, "unknown on_nonfinite"),
        ({"method": "sgd"}, "unknown method"),
        ({"state_dtype": torch.bfloat16}, "state_dtype must be"),
        ({"clip": (0.1, -1.0)}, "gamma"),
        ({"base_lr": 0.0, "clip": (0.1, 0.1)}, "base_lr"),
        ({"amsgrad": True, "update_interval": 2}, "amsgrad"),
        ({"shard_eigh": True, "update_interval": 2}, "shard_eigh"),
        ({"blocks": torch.arange(9).view(3, 3)}, "1 partitions for 4 parameters"),
        ({"floor": 1.0}, "floor"),
    ],
)
def test_settings_that_are_refused_with_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        BlockAdam(network().parameters(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"block_size": 2.0}, {"block_size": True}, {"betas": 0.9}, {"clip": 0.1}, {"clip": (0.1,)}]
)
def test_settings_of_another_type(options, unchecked):
    with pytest.raises(ValueError, match=next(iter(options))):
        BlockAdam(network().parameters(), **options)


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was():
    model = network()
    optimizer = BlockAdam([model[0].weight])
    with pytest.raises(ValueError, match="block_size"):
        optimizer.add_param_group({"params": [model[2].weight], "block_size": 0})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [model[2].weight]})


def test_blocks_given_for_one_parameter_of_many(engine):
    model = network()
    blocks = [torch.arange(96).view(24, 4), None, None, None]
    optimizer = BlockAdam(model.named_parameters(), blocks=blocks, engine=engine)
    train(model, optimizer, 2)
    assert [layout.kind for layout in optimizer.layouts().values()] == ["blocks", "diag", "output", "diag"]


# hooks, compilers and other people's loops


def test_step_hooks_run_once(engine):
    model, seen = network(), []
    optimizer = BlockAdam(model.parameters(), engine=engine)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, optimizer, 2)
    assert seen == ["before", "after"] * 2


def test_steps_in_the_backward_pass(engine):
    model, twin = network(), network()
    optimizers = {param: BlockAdam([param], lr=0.02, engine=engine) for param in model.parameters()}

    def hook(param):
        optimizers[param].step()
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(hook)
    for _ in range(3):
        loss_of(model).backward()
    train(twin, BlockAdam(twin.parameters(), lr=0.02, engine=engine), 3)
    assert torch.allclose(weights(model), weights(twin), atol=1e-6)


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_models_and_steps(engine, inside):
    model, twin = network(), network()
    optimizer = BlockAdam(model.parameters(), lr=0.02, engine=engine)
    compiled = torch.compile(model, backend="eager")

    def step():
        optimizer.zero_grad()
        loss_of(compiled if not inside else model).backward()
        optimizer.step()

    run = torch.compile(step, backend="eager") if inside else step
    for _ in range(3):
        run()
    train(twin, BlockAdam(twin.parameters(), lr=0.02, engine=engine), 3)
    assert torch.allclose(weights(model), weights(twin), atol=1e-6)


def test_averaged_models(engine):
    model = network()
    optimizer = BlockAdam(model.parameters(), lr=0.02, engine=engine)
    average = torch.optim.swa_utils.AveragedModel(model)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01)
    for _ in range(4):
        train(model, optimizer, 1, scheduler)
        average.update_parameters(model)
    assert float(loss_of(average).detach()) < float(loss_of(network()).detach())
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_loop_like_hugging_faces(engine):
    class Wrapper(torch.optim.Optimizer):
        """Accelerate's: an optimizer that holds another, and moves its state through load_state_dict."""

        def __init__(self, optimizer):
            self.optimizer = optimizer
            optimizer.load_state_dict(optimizer.state_dict())

        param_groups = property(lambda self: self.optimizer.param_groups)
        state = property(lambda self: self.optimizer.state)
        defaults = property(lambda self: self.optimizer.defaults)

        def step(self, closure=None):
            return self.optimizer.step(closure)

        def zero_grad(self, set_to_none=True):
            self.optimizer.zero_grad(set_to_none=set_to_none)

    model = network()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    wrapped = Wrapper(BlockAdamW(groups, lr=0.02, update_interval=4, engine=engine))
    scheduler = torch.optim.lr_scheduler.LambdaLR(wrapped.optimizer, lambda t: max(0.0, 1 - t / 40))
    for t in range(30):
        loss_of(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        wrapped.step()
        scheduler.step()
        wrapped.zero_grad()
        if t == 10:
            wrapped.optimizer.load_state_dict(copy.deepcopy(wrapped.optimizer.state_dict()))
    assert wrapped.param_groups[0]["lr"] == pytest.approx(0.02 * 0.25)
    assert float(loss_of(model).detach()) < float(loss_of(network()).detach())


def test_a_loop_like_lightnings(engine):
    model, twin = network(), network()
    optimizer = BlockAdam(model.parameters(), lr=0.02, update_interval=3, engine=engine)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure=closure)
        for param, entry in optimizer.state.items():
            optimizer.state[param] = {
                name: value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
                for name, value in entry.items()
            }
    train(twin, BlockAdam(twin.parameters(), lr=0.02, update_interval=3, engine=engine), 6)
    assert torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(engine, set_to_none):
    model = network()
    optimizer = BlockAdam(model.parameters(), engine=engine)
    train(model, optimizer, 1)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) == set_to_none for p in model.parameters())
    optimizer.step()
    assert float(optimizer.state[model[0].weight]["step"]) == (1 if set_to_none else 2)


def test_maximize_is_minimising_the_negative(engine):
    model, twin = network(), network()
    up = BlockAdam(model.parameters(), lr=0.02, maximize=True, weight_decay=0.1, engine=engine)
    down = BlockAdam(twin.parameters(), lr=0.02, weight_decay=0.1, engine=engine)
    for _ in range(5):
        up.zero_grad()
        (-loss_of(model)).backward()
        up.step()
    train(twin, down, 5)
    assert torch.allclose(weights(model), weights(twin), atol=1e-6)


def test_repr_and_health(engine):
    optimizer = BlockAdam(network().parameters(), engine=engine)
    assert "block_size: 10" in repr(optimizer)
    assert optimizer.health()["engine"] == "not used yet"

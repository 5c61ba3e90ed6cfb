"""The command line on a user's own arrays and networks: from pretraining to a file for other programs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from shared_core.errors import InputError
from shared_core.runs import Run, Summary
from shared_core.testing import Caller, Program, in_two_processes
from stamp.cli import CompareConfig, MetaFitConfig, line
from stamp.meta import MetaConfig
from stamp.plan import PrunePlan

NETS = '''
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self, num_classes=4, in_channels=1, wide=8):
        super().__init__()
        self.first = nn.Conv2d(in_channels, wide, 3, padding=1)
        self.norm = nn.BatchNorm2d(wide)
        self.second = nn.Conv2d(wide, 8, 3, padding=1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def small(num_classes=4):
    return Small(num_classes)


def wider():
    return Small(wide=12)


def coloured():
    return Small(in_channels=3)


def plain(num_classes=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))


class Branching(Small):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Sorted(Small):
    """An operation that nobody knows sits between the channels of the first layer and those that consume them."""

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x))).sort(1).values
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def broken():
    raise RuntimeError("no such luck")


def nothing():
    return 3


headless = nn.Conv2d
'''

FIT = ("--iters", 4, "--tasks", 2, "--ways", "2,3", "--shots", 2, "--queries", 2, "--set-size", 16)
QUICK = ("--size", 8, "--width", 0.25, "--pretrain-steps", 3, "--iters", 1, "--ways", "2,3", "--sets", 1, "--draws", 2,
         "--tuned-draws", 1)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Leave drawing to tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).write_bytes(b"a picture"))
        yield


def spots(file: Path, *, ways: int = 4, each: int = 20, seed: int = 0, **change: object) -> Path:
    """Images with a bright spot whose place is the class."""
    random = np.random.default_rng(seed)
    y = np.tile(np.arange(ways), each)
    x = random.integers(0, 60, (len(y), 8, 8))
    for k, label in enumerate(y):
        row, column = 4 * (label // 2) + random.integers(0, 3), 4 * (label % 2) + random.integers(0, 3)
        x[k, row : row + 2, column : column + 2] = 230
    arrays: dict[str, object] = {"x": x.astype(np.uint8), "y": y}
    np.savez(file, **{**arrays, **change})
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The folder that everything happens in; tests write under names of their own."""
    made = tmp_path_factory.mktemp("cli")
    (made / "own_nets.py").write_text(NETS)
    spots(made / "reference.npz", seed=1)
    spots(made / "new.npz", ways=3, seed=2)
    spots(made / "more.npz", ways=4, seed=3)
    return made


@pytest.fixture(scope="module")
def call(home) -> Caller:
    return Caller(line, home)


@pytest.fixture(scope="module")
def done(call):
    return call.done


@pytest.fixture(scope="module")
def trained(done) -> Summary:
    return done("pretrain", "own_nets:small", "reference.npz", "--epochs", 2, "--out", "net")


@pytest.fixture(scope="module")
def fitted(trained, done) -> Summary:
    return done("meta-fit", "net", "reference.npz", *FIT, "--out", "gen")


@pytest.fixture(scope="module")
def pruned(fitted, done) -> Summary:
    return done(
        "prune", "net", "new.npz", "--generator", "gen", "--budget", 0.4, "--plan-out", "a.json", "--out", "cut"
    )


@pytest.fixture(scope="module")
def tuned(pruned, done) -> Summary:
    return done("finetune", "cut", "new.npz", "--epochs", 2, "--lr", 0.05, "--out", "tuned")


def value(summary: Summary, metric: str, method: str | None = None) -> float:
    (row,) = [r for r in summary.results if r.metric == metric and method in (None, r.method)]
    return row.mean


def test_pretraining_leaves_a_network_and_what_it_expects(trained, home):
    assert set(trained.artifacts) == {"model.safetensors", "model.json"}
    facts = json.loads((home / "net/model.json").read_text())
    assert (facts["model"], facts["num_classes"], facts["input_shape"]) == ("own_nets:small", 4, [1, 8, 8])
    assert facts["class_names"] == ["0", "1", "2", "3"]
    logged = [json.loads(text) for text in (home / "net/metrics.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in logged] == [1, 2]
    assert 0 <= value(trained, "accuracy") <= 100


def test_a_generator_is_fitted_for_it(fitted, home):
    assert set(fitted.artifacts) == {"generator.safetensors", "history.png"}
    assert len((home / "gen/metrics.jsonl").read_text().splitlines()) == 4
    assert 0 <= value(fitted, "overlap of different tasks' masks") <= 1


def test_pruning_writes_a_plan_and_the_small_weights(pruned, home):
    assert set(pruned.artifacts) == {"plan.json", "small.safetensors", "model.json", "widths.png"}
    assert value(pruned, "macs of the dense network") <= 40
    assert (home / "a.json").read_bytes() == (home / "cut/plan.json").read_bytes()
    plan = json.loads((home / "cut/plan.json").read_text())
    assert (plan["method"], plan["budget"]) == ("stamp", {"macs": 0.4})


def test_a_process_of_its_own_reads_the_generator_and_says_the_same(pruned, home):
    code = "from stamp.cli import main; main()"
    command = ("prune", "net", "new.npz", "--generator", "gen", "--budget", "0.4", "--json", "--out", "cut-apart")
    there = Program(code, *command, folder=home).finish(120)
    assert there.returncode == 0, there.stderr
    found = Summary.model_validate_json(there.stdout)
    ratio = "macs of the dense network"
    assert value(found, ratio) == value(pruned, ratio)
    own, other = (PrunePlan.load(home / name / "plan.json") for name in ("cut", "cut-apart"))
    assert own.gates.keys() == other.gates.keys()
    assert all(torch.equal(own.gates[name], gate) for name, gate in other.gates.items())
    weights, others = (load_file(home / name / "small.safetensors") for name in ("cut", "cut-apart"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in others.items())


def test_plan_and_weights_give_the_network_back(tuned, done):
    here = done("evaluate", "tuned", "new.npz", "--out", "e1")
    assert value(here, "accuracy") == value(tuned, "accuracy", "after")
    apart = ("tuned/plan.json", "new.npz", "--weights", "tuned/small.safetensors")
    assert done("evaluate", *apart, "--model", "own_nets:small", "--out", "e3").results == here.results


def test_a_network_for_other_classes_gets_a_head_when_it_is_tuned(pruned, call):
    result = call("finetune", "cut", "more.npz", "--epochs", 1, "--out", "four")
    assert result.returncode == 0, result.stderr
    assert "the head had 3 outputs and now has 4, of class means" in result.stdout
    wrong = call("evaluate", "cut", "more.npz", "--out", "e4")
    assert (wrong.returncode, "has 4 classes, and the network 3 outputs" in wrong.stderr) == (2, True)


@pytest.mark.parametrize("method", ["l1", "snip", "dense"])
def test_methods_that_need_no_generator(trained, done, method):
    found = done(
        "prune", "net", "new.npz", "--method", method, "--cost", "params", "--budget", 0.6, "--out", f"by-{method}"
    )
    ratio = value(found, "params of the dense network")
    assert ratio == 100 if method == "dense" else ratio <= 60


def interrupting(patch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """Press Ctrl-C once something has been kept so many times."""
    original, times = getattr(Run, name), [0]

    def stopped(self, *args, **options):
        kept = original(self, *args, **options)
        times[0] += 1
        if times[0] == after:
            raise KeyboardInterrupt
        return kept

    patch.setattr(Run, name, stopped)


@pytest.mark.parametrize(
    ("command", "files"),
    [
        (("pretrain", "own_nets:small", "reference.npz", "--epochs", 3, "--jitter"), ["model.safetensors"]),
        (("meta-fit", "net", "reference.npz", *FIT, "--iters", 12), ["generator.safetensors"]),
        (("finetune", "cut", "new.npz", "--epochs", 3), ["small.safetensors", "plan.json"]),
    ],
)
def test_an_interrupted_training_resumes_to_the_same_network(pruned, call, home, command, files):
    name = command[0]
    assert call(*command, "--out", f"{name}-whole").returncode == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupting(patch, "save_checkpoint", 1)
        stopped = call(*command, "--out", f"{name}-part")
    assert stopped.returncode == 130
    assert f"stamp {name} --resume --out {name}-part" in stopped.stderr
    assert not (home / f"{name}-part" / files[0]).exists()
    assert call(name, "--resume", "--out", f"{name}-part").returncode == 0
    for file in [*files, "metrics.jsonl"]:
        part, whole = home / f"{name}-part" / file, home / f"{name}-whole" / file
        if file.endswith(".safetensors"):
            # The order of a file's metadata is nobody's choice.
            tensors = load_file(part), load_file(whole)
            assert tensors[0].keys() == tensors[1].keys()
            assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
        else:
            assert part.read_bytes() == whole.read_bytes()


# All in one group of processes, which take seconds to find each other.
ALL = """
from shared_core.device import process_group, resolve_device
from stamp.cli import main

with process_group(resolve_device("cpu")):
    for arguments in {}:
        try:
            main(arguments)
        except SystemExit as stop:
            assert not stop.code
"""


def test_two_processes_train_what_one_does(fitted, done, home):
    """``torchrun --nproc-per-node=2``: each takes its part of every batch, or of the tasks."""
    pretrain = ("pretrain", "own_nets:plain", "reference.npz", "--epochs", 2, "--batch-size", 16)
    commands = {
        "plain": pretrain,
        "whole": ("pretrain", "own_nets:small", "reference.npz", "--epochs", 1, "--batch-size", 64),
        # Where logits are moved onto a budget, what moves all alike has no gradient but rounding, which Adam enlarges.
        "tasks": ("meta-fit", "net", "reference.npz", *FIT, "--penalty", "dual"),
    }
    for name, command in commands.items():
        done(*command, "--device", "cpu", "--out", f"{name}-1")
    every = [[*map(str, command), "--device", "cpu", "--out", f"{name}-2"] for name, command in commands.items()]
    in_two_processes(home, ALL.format(every))

    def trained(name: str, file: str) -> tuple[dict[str, torch.Tensor], ...]:
        return tuple(load_file(home / f"{name}-{count}" / file) for count in (1, 2))

    for name, file in (("plain", "model.safetensors"), ("tasks", "generator.safetensors")):
        one, two = trained(name, file)
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5)
        lines = [(home / f"{name}-{count}/metrics.jsonl").read_text().splitlines() for count in (1, 2)]
        losses = [[json.loads(text)["loss"] for text in own] for own in lines]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    # Batch norms see a share each; after one step the mean of their running means is that of all.
    one, two = trained("whole", "model.safetensors")
    torch.testing.assert_close(two["norm.running_mean"], one["norm.running_mean"])


COMPARE = ("compare", "more.npz", "--reference", "reference.npz", *QUICK, "--methods", "dense,stamp,l1,random",
           "--budgets", "0.5,0.25", "--seeds", 2, "--steps", 2)  # fmt: skip


@pytest.fixture(scope="module")
def compared(done, call) -> Summary:
    """A comparison that was interrupted and went on."""
    with pytest.MonkeyPatch.context() as patch:
        interrupting(patch, "once", 6)
        stopped = call(*COMPARE, "--out", "part")
    assert stopped.returncode == 130
    assert "--resume" in stopped.stderr
    return done("compare", "--resume", "--out", "part")


def test_comparing(compared, done, home):
    found = compared
    assert set(found.artifacts) == {"cells.json", "tradeoff.png", "tradeoff-ms.png", "widths.png"}
    datasets = [f"more, {share} % of multiply-adds" for share in (50, 25)]
    rows = [row for row in found.results if row.metric == "accuracy after 2 steps"]
    assert [(row.dataset, row.method) for row in rows] == [
        (dataset, method) for dataset in datasets for method in ("dense", "stamp", "l1", "random")
    ]  # fmt: skip
    assert all(row.n == 2 and row.low is not None and row.low <= row.mean <= (row.high or 0) for row in rows)
    assert {claim.text.split(" after")[0] for claim in found.claims} == {
        "stamp is more accurate than l1", "stamp is more accurate than random"
    }  # fmt: skip
    for kind, files in {
        "auto": ["tradeoff.png", "tradeoff-ms.png"], "widths": ["widths.png"], "comparison": ["comparison.png"]
    }.items():  # fmt: skip
        assert done("plot", "part", "--kind", kind, "--out", f"plot-{kind}").artifacts == files
    done("plot", "part", "--output", "mine.svg", "--out", "plot-mine")
    assert (home / "mine.svg").exists()
    assert (home / "mine-ms.svg").exists()


def test_workers_find_what_one_process_finds(compared, done):
    spread = done(*COMPARE, "--workers", 2, "--out", "spread")
    for one, two in zip(compared.results, spread.results, strict=True):
        assert (one.dataset, one.method, one.metric) == (two.dataset, two.method, two.metric)
        if one.unit not in ("s", "ms"):
            assert (one.mean, one.low, one.high, one.n) == (two.mean, two.low, two.high, two.n)
    assert compared.claims == spread.claims


def test_a_users_network_and_generator_are_compared(fitted, call):
    own = ("--network", "own_nets:small", "--weights", "net/model.safetensors", "--generator", "gen")
    command = ("compare", "new.npz", "--reference", "reference.npz", *QUICK, *own, "--seeds", 1, "--steps", 1)
    result = call(*command, "--methods", "stamp,l1", "--budgets", 0.5, "--tune", "--rates", "0.01,0.1", "--out", "own")
    assert result.returncode == 0, result.stderr
    assert "rates chosen on validation examples, first budget: stamp 0." in result.stdout
    assert "pretraining" not in result.stdout


def test_the_experiments_of_the_specification(done, home):
    known = ("--reference", "reference.npz", *QUICK)
    found = done("rapid", "more.npz", *known, "--examples", 8, "--tuning-steps", "0,2", "--seeds", 1, "--epochs", 1,
                 "--methods", "dense,stamp,l1", "--out", "rapid")  # fmt: skip
    assert set(found.artifacts) == {"cells.json", "total-time.json", "comparison.png", "rapid.png"}
    assert value(found, "total time", "stamp") > 0
    found = done("ablate", "more.npz", *known, "--vary", "", "--seeds", 1, "--limit", 16, "--out", "ablate")
    assert {row.method for row in found.results} == {"as it is"}
    command = ("adaptivity", "reference.npz,more.npz", *QUICK, "--seeds", 1, "--limit", 32, "--no-control")
    found = done(*command, "--out", "adaptivity")
    assert set(found.artifacts) == {"cells.json", "adaptivity.png", "widths.png"}
    assert {row.dataset for row in found.results if row.metric == "accuracy"} == {
        "reference, planted network", "more, planted network"
    }  # fmt: skip
    assert done("plot", "adaptivity", "--out", "plot-adaptivity").artifacts == ["adaptivity.png"]
    assert (home / "rapid/comparison.png").exists()


def test_classes_are_drawn_of_every_set_that_has_them_to_draw(call, monkeypatch):
    def refused(source, protocol, **sizes):
        raise InputError(f"{source}: {', '.join(sizes)}")

    monkeypatch.setattr("stamp.experiments.load_target", refused)
    for source, sizes in (("cifar-fs", "seed, classes, instances"), ("Mini_ImageNet", "seed, classes, instances"),
                          ("mnist", "seed, limit")):  # fmt: skip
        result = call("adaptivity", f"{source},digits", "--out", "drawn", "--overwrite")
        assert (result.returncode, f"{source}: {sizes}" in result.stderr) == (2, True), result.stderr


def test_tracing_says_what_can_be_removed_and_what_not(call, done, home):
    result = call("trace", "own_nets:Sorted", "--input-shape", "1,8,8", "--out", "t1")
    assert result.returncode == 0, result.stderr
    assert "first is frozen: " in result.stdout
    assert "sort" in result.stdout
    assert "8 of 20 channels can be removed, in 1 groups" in result.stdout
    found = done("trace", "resnet20", "--width", 0.25, "--input-shape", "3,16,16", "--out", "t2")
    groups = json.loads((home / "t2/groups.json").read_text())
    assert {row.method for row in found.results} == {"network", *(group["name"] for group in groups)}
    assert value(found, "channels", "layer1.0.conv1") == 4
    assert groups[0]["producers"]


def test_plots_of_single_runs(pruned, done, trained):
    done("prune", "net", "more.npz", "--method", "bn", "--budget", 0.4, "--out", "cut-bn")
    assert done("plot", "cut,cut-bn", "--out", "p1").artifacts == ["widths.png"]
    assert done("plot", "cut,cut-bn/plan.json", "--kind", "overlap", "--out", "p2").artifacts == ["overlap.png"]
    assert done("plot", "gen", "--out", "p3").artifacts == ["history.png"]


def test_benching_a_small_network(tuned, call, home):
    result = call("bench", "tuned", "--batch-size", 2, "--repeats", 1, "--fold-bn", "--suggest-round-to", "--out", "b")
    assert result.returncode == 0, result.stderr
    assert "multiply-adds (conv + linear)" in result.stdout
    assert "suits this machine" in result.stdout
    report = json.loads((home / "b/report.json").read_text())
    assert report["ratios"]["macs"] < 0.45


@pytest.mark.parametrize(("kind", "file"), [("torchscript", "small.pt"), ("safetensors", "small.safetensors")])
def test_exporting(tuned, done, home, kind, file):
    assert done("export", "tuned", "--format", kind, "--fold-bn", "--out", f"x-{kind}").artifacts == [file]
    if kind == "torchscript":
        assert torch.jit.load(home / f"x-{kind}" / file)(torch.rand(5, 1, 8, 8)).shape == (5, 3)


def test_exporting_to_onnx_names_the_classes(tuned, done, home, monkeypatch):
    import stamp.export as module

    given: list[object] = []
    monkeypatch.setattr(module, "to_onnx", lambda small, example, path, **names: given.extend([path, names]) or 0.0)
    assert done("export", "tuned", "--output", "small.onnx", "--out", "x").artifacts == []
    assert given == [Path("small.onnx"), {"class_names": ("0", "1", "2")}]


def test_data_says_how_a_source_is_divided(call):
    result = call("data", "reference.npz", "--out", "d")
    lines = [text.split() for text in result.stdout.splitlines()]
    assert ["train", "52", "4", "13-13", "1", "x", "8", "x", "8", "uint8"] in lines


def test_floats_that_nobody_scaled_are_noted(trained, home, call):
    spots(home / "unscaled.npz", ways=3, x=np.random.default_rng(0).random((60, 8, 8)).astype(np.float32) * 255)
    result = call("prune", "net", "unscaled.npz", "--method", "l1", "--out", "unscaled")
    assert result.returncode == 0, result.stderr
    assert "warning: unscaled: x is float32 up to 25" in result.stdout
    assert result.stderr == ""


def test_defaults_of_meta_fit_are_those_of_the_library():
    for name, field in MetaFitConfig.model_fields.items():
        if name in MetaConfig.model_fields and name != "seed":
            assert field.default == MetaConfig.model_fields[name].default, name


def test_every_method_that_compare_takes_by_default_exists():
    from stamp.experiments import METHODS

    assert set(CompareConfig.model_fields["methods"].default) <= set(METHODS)


L1 = ("--method", "l1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune", "net", "empty.npz", *L1), "expected (n, features)"),
        (("prune", "net", "one.npz", *L1), "one"),
        (("prune", "net", "halves.npz", *L1), "expected integers or text"),
        (("prune", "net", "nan.npz", *L1), "holds NaN or infinity"),
        (("prune", "net", "gap.npz", *L1), "which is none of the 2 class_names"),
        (("prune", "net", "nothing.npz", *L1), "is no file and no folder: no data set 'nothing.npz'; there are "),
        (("prune", "net", "colour.npz", *L1), "takes 1 channels"),
        (("prune", "own_nets:coloured", "new.npz", *L1), "takes 3 channels"),
        (("prune", "net", "new.npz"), "--generator: method stamp needs one"),
        (
            ("prune", "net", "new.npz", "--method", "noise"),
            "no method 'noise'; did you mean 'dense'? there are stamp,",
        ),
        (("prune", "own_nets:wider", "new.npz", "--generator", "gen"), "was made for a network of other groups"),
        (("prune", "net", "new.npz", "--generator", "net/model.safetensors"), "no generator"),
        (("prune", "net", "new.npz", "--generator", "none.safetensors"), "there is no such file"),
        (("prune", "net", "new.npz", *L1, "--budget", 1.5), "macs=1.5 is no fraction"),
        (("prune", "net", "new.npz", *L1, "--budget", 0), "--budget: Input should be greater than 0"),
        (("prune", "net", "new.npz", *L1, "--budget", 0.001), "budget=0.001 cannot be reached"),
        (("prune", "net", "new.npz", *L1, "--weights", "gen/generator.safetensors"), "gen/generator.safetensors: "),
        (("prune", "own_nets:Branching", "new.npz", *L1), "torch.fx cannot trace"),
        (("prune", "own_nets:broken", "new.npz", *L1), "own_nets:broken fails: RuntimeError: no such luck"),
        (("prune", "own_nets:nothing", "new.npz", *L1), "returned a int"),
        (("prune", "own_nets:smal", "new.npz", *L1), "did you mean 'small'"),
        (("prune", "no_such_module:net", "new.npz", *L1), "cannot import 'no_such_module'"),
        (("prune", "smallcon", "new.npz", *L1), "did you mean 'smallconv'"),
        (("prune", "gen", "new.npz", *L1), "gen: has no model.json"),
        (("trace", "own_nets:small", "--input-shape", "2,8,8"), "failed on the example"),
        (("trace", "own_nets:small", "--input-shape", "1,0,8"), "--input-shape: must be whole numbers"),
        (("trace", "own_nets:small", "--input-shape", "1,8,8", "--opaque", "nose"), "names no module"),
        (("pretrain", "own_nets:coloured", "reference.npz"), "takes 3 channels"),
        (("pretrain", "own_nets:small", "reference.npz", "--lr", 1e30), "lower the learning rate"),
        (("meta-fit", "net", "reference.npz", "--ways", "5,2"), "ways: must be two numbers"),
        (("meta-fit", "net", "reference.npz", "--ways", "5"), "--ways"),
        (("meta-fit", "net", "reference.npz", "--budgets", "0.5,2"), "budgets: must be two shares"),
        (("meta-fit", "net", "reference.npz", "--head", "nose"), "--head"),
        (("meta-fit", "net", "colour.npz"), "takes 1 channels"),
        (("finetune", "cut", "colour.npz"), "takes 1 channels"),
        (("finetune", "nothing", "new.npz"), "nothing"),
        (("finetune", "gen", "new.npz"), "gen: has no plan.json; give the run folder of 'stamp prune'"),
        (
            ("evaluate", "cut/plan.json", "new.npz", "--model", "own_nets:wider"),
            "plan applied to a model of other widths",
        ),
        (("evaluate", "a.json", "new.npz", "--weights", "cut/small.safetensors"), "--model: a.json does not say"),
        (
            ("evaluate", "cut", "new.npz", "--weights", "net/model.safetensors"),
            "weights and plan must be of one network",
        ),
        (("evaluate", "cut", "named.npz"), "its classes are"),
        (("bench", "cut", "--input-shape", "3,8,8"), "--input-shape: the dense network does not take (3, 8, 8)"),
        (("export", "cut", "--format", "onyx"), "--format"),
        (("plot", "nothing"), "nothing: there is no such run folder"),
        (("plot", "net", "--kind", "tradeoff"), "give the run folder of 'stamp compare'"),
        (("plot", "net", "--kind", "adaptivity"), "give the run folder of 'stamp adaptivity'"),
        (("plot", "net", "--kind", "history"), "is not of a 'stamp meta-fit'"),
        (("plot", "gen", "--kind", "overlap"), "gen: has no plan.json; give the run folder of 'stamp prune'"),
        (("plot", "cut", "--output", "picture.gif"), "use .png, .svg or .pdf"),
        (("compare", "new.npz", "--methods", "noise"), "no method 'noise'"),
        (("compare", "new.npz", "--reference", "reference.npz", *QUICK, "--channels", 2), "--channels: must be 1 or 3"),
        (("compare", "new.npz", "--reference", "reference.npz", "--budgets", "2"), "macs=2.0 is no fraction"),
        (("compare", "new.npz", "--reference", "reference.npz", *QUICK, "--generator", "gen"), "--weights, too"),
        (("rapid", "more.npz", "--examples", "1"), "--examples: need numbers of 2 or more"),
        (("ablate", "more.npz", "--vary", "colour"), "no choice 'colour'"),
        (("adaptivity", "more.npz", *QUICK), "need two or more, got more"),
        (("adaptivity", "more.npz,more.npz", *QUICK), "two of them are called 'more'"),
        (("demo", "--budget", "3"), "--budget"),
    ],
)
def test_wrong_input_is_one_line(pruned, home, call, arguments, message):
    made = {
        "empty.npz": {"x": np.zeros((0, 8, 8), np.uint8), "y": np.zeros(0, np.int64)},
        "one.npz": {"x": np.zeros((1, 8, 8), np.uint8), "y": np.zeros(1, np.int64)},
        "halves.npz": {"y": np.tile([0.5, 1.5], 30)},
        "nan.npz": {"x": np.full((60, 8, 8), np.nan, np.float32)},
        "gap.npz": {"y": np.tile([0, 1, 4], 20), "class_names": np.array(["a", "b"])},
        "colour.npz": {"x": np.zeros((60, 3, 8, 8), np.uint8)},
        "named.npz": {"y": np.tile(["cat", "dog", "eel"], 20)},
    }
    for name in {str(argument) for argument in arguments} & made.keys():
        spots(home / name, ways=3, **made[name])
    assert message in call.wrong(*arguments, "--out", "wrong", "--overwrite")

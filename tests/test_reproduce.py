"""The full-size experiments: every one is a command that there is, and those that can be spread are."""

from __future__ import annotations

import shlex
import sys
import tomllib

import pytest

from contract import ROOT, Package


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    import reproduce

    yield reproduce
    sys.path.remove(str(ROOT / "scripts"))


def test_every_experiment_can_be_asked_for(package: Package, call, script):
    listed = tomllib.loads((package.folder / "reproduce.toml").read_text(encoding="utf-8"))
    kept = {file.stem for file in (ROOT / "docs/results" / package.name).glob("*.json")}
    assert set(listed["experiments"]) == kept
    for arguments in listed["experiments"].values():
        words = shlex.split(arguments.replace("{runs}", "runs"))
        spread = script.spread(package.name, words, "2", None)
        assert (spread[-2:] == ["--workers", "2"]) == ("workers" in package.line().configs[words[0]].model_fields)
        shown = call(package, *spread, "--print-config")
        assert shown.returncode == 0, shown.stderr


def test_what_is_listed_is_run_with_workers_and_kept(script, tmp_path, monkeypatch):
    package, results = tmp_path / "packages/sparsity-norm", tmp_path / "docs/results/sparsity-norm"
    package.mkdir(parents=True)
    (package / "reproduce.toml").write_text(
        '[experiments]\nwine = "compare wine --methods zero,sn --epochs 1 --seeds 2"\n'
        'small = "demo --seeds 1 --methods zero"\n'
    )
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/sparsity-norm"
    program.write_text(f"#!{sys.executable}\nfrom sparsity_norm.cli import main\n\nmain()\n")
    program.chmod(0o755)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    # The demo has no workers: it would refuse them.
    script.main(["sparsity-norm", str(tmp_path / "bin"), str(tmp_path / "runs"), "--workers", "2"])
    assert sorted(file.name for file in results.iterdir()) == ["small.json", "wine.json"]

"""Every command line speaks the same grammar, and answers wrong input the same way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import tomllib
from typing import Literal, get_args, get_origin

import pytest

from contract import ROOT, Package
from shared_core.cli import CommandConfig
from shared_core.runs import Run, Summary, read_summary

COMMON = ["--config", "--device", "--json", "--out", "--overwrite", "--print-config", "--quiet", "--resume", "--seed"]


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in lines[0]
    return lines[0]


def test_house_commands_are_there(package: Package):
    assert {"demo", "compare"} <= set(package.line().configs)


def test_help_of_everything(package: Package, call):
    assert call(package, "--help").returncode == 0
    assert call(package).returncode == 0
    for command, config in package.line().configs.items():
        shown = call(package, command, "--help")
        assert shown.returncode == 0
        for option in COMMON:
            assert option in shown.stdout, (command, option)
        for name, info in config.model_fields.items():
            assert info.description, f"{command}: {name} has no description"


def chosen_among(annotation: object) -> set[str]:
    """Return the words of every ``Literal`` in an annotation."""
    if get_origin(annotation) is Literal:
        return {value for value in get_args(annotation) if isinstance(value, str)}
    return set().union(*map(chosen_among, get_args(annotation)))


def test_words_on_command_lines_and_in_results_are_hyphenated(package: Package):
    """Settings of a method keep the names of Python's arguments: ``block-adam:update_interval=5``."""
    for command, config in package.line().configs.items():
        for name, info in config.model_fields.items():
            given = info.default if isinstance(info.default, tuple) else (info.default,)
            words = chosen_among(info.annotation) | {word for word in given if isinstance(word, str)}
            for word in words:
                assert "_" not in word.partition(":")[0], f"{command}: {name} {word}"
    for file in sorted((ROOT / "docs/results" / package.name).glob("*.json")):
        assert "_" not in file.stem
        for row in read_summary(file).results:
            for text in (row.dataset, row.method.partition(":")[0], row.metric):
                assert "_" not in text, f"{file.name}: {text}"


def test_version_everywhere(package: Package, call):
    expected = f"{package.name} {package.project['version']}\n"
    assert call(package, "--version").stdout == expected
    for command in package.line().configs:
        assert call(package, command, "--version").stdout == expected


def test_print_config_is_toml_and_goes_back_in(package: Package, call, tmp_path):
    everything = call(package, "--print-config").stdout
    assert set(tomllib.loads(everything)) == set(package.line().configs)
    (tmp_path / "all.toml").write_text(everything)
    for command in package.line().configs:
        shown = call(package, command, "--print-config")
        assert shown.returncode == 0, shown.stderr
        (tmp_path / "one.toml").write_text(shown.stdout)
        assert call(package, command, "--config", "one.toml", "--print-config").stdout == shown.stdout
        assert call(package, command, "--config", "all.toml", "--print-config").stdout == shown.stdout
        as_json = call(package, command, "--print-config", "--json")
        assert set(tomllib.loads(shown.stdout)) <= set(json.loads(as_json.stdout))


def test_configs_are_frozen_and_refuse_unknown_keys(package: Package, call, tmp_path):
    (tmp_path / "wrong.toml").write_text("sead = 3\n")
    for command, config in package.line().configs.items():
        assert issubclass(config, CommandConfig)
        assert config.model_config.get("frozen")
        assert config.model_config.get("extra") == "forbid"
        message = one_line(call(package, command, "--config", "wrong.toml"))
        assert "wrong.toml" in message
        assert "'sead'" in message
        assert "seed" in message


def test_unknown_device_and_options(package: Package, call):
    assert "abacus" in one_line(call(package, "demo", "--device", "abacus", "--out", "r"))
    assert "--nonsense" in one_line(call(package, "demo", "--nonsense"))
    assert "nonsense" in one_line(call(package, "nonsense"))
    assert "seed" in one_line(call(package, "demo", "--seed", "x"))


def test_unwritable_output_folder(package: Package, call, tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below", "/dev/null/x"):
        assert "--out" in (message := one_line(call(package, "demo", "--out", out))) or "cannot write" in message
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "locked" in one_line(call(package, "demo", "--out", "locked/x"))


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "binary", "unreadable"])
def test_wrong_files(package: Package, bad_input: str, kind: str, call, tmp_path):
    name = bad_input.partition("{file")[2].partition("}")[0] or ".csv"
    file = tmp_path / f"wrong{name}"
    match kind:
        case "directory":
            file.mkdir()
        case "empty":
            file.touch()
        case "binary":
            file.write_bytes(bytes(range(256)) * 8)
        case "unreadable":
            file.write_text("a,b\n1,2\n")
            file.chmod(0)
            if os.access(file, os.R_OK):
                pytest.skip("this user can read everything")
        case _:
            pass
    arguments = [part if "{file" not in part else file for part in bad_input.split()]
    message = one_line(call(package, *arguments, "--out", tmp_path / "r"))
    assert f"wrong{name}" in message


def quick(package: Package) -> list[str]:
    return str(package.contract["quick"]).split()


def comparable(summary: Summary) -> list[dict[str, object]]:
    # Times differ from run to run; that they were measured must not.
    times = {"seconds", "mean", "low", "high"}
    return [row.model_dump(exclude=times if row.unit in {"s", "ms"} else {"seconds"}) for row in summary.results]


def test_demo_is_whole_repeatable_and_survives_an_interruption(package: Package, tmp_path):
    args = ["demo", *quick(package), "--json", "--seed", "3"]
    done = package.script(*args, "--out", "whole", folder=tmp_path).finish()
    assert done.returncode == 0, done.stderr
    whole = Summary.model_validate_json(done.stdout)
    assert whole == Summary.model_validate_json((tmp_path / "whole/summary.json").read_text())
    assert (whole.package, whole.command, whole.seed) == (package.name, "demo", 3)
    assert len({row.method for row in whole.results}) >= 2
    assert any(name.endswith(".png") for name in whole.artifacts)
    for name in whole.artifacts:
        assert (tmp_path / "whole" / name).stat().st_size > 0

    part = tmp_path / "part"
    program = package.script(*args, "--out", "part", folder=tmp_path)
    while program.status is None and not Run.interrupted(part):
        time.sleep(0.02)
    assert program.status is None, "the run ended before it kept anything: it cannot be interrupted"
    program.send(signal.SIGINT)
    done = program.finish(120)
    assert done.returncode == 130, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert f"{package.name} demo --resume --out part" in done.stderr
    done = package.script("demo", "--resume", "--out", "part", "--quiet", folder=tmp_path).finish()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert comparable(Summary.model_validate_json((part / "summary.json").read_text())) == comparable(whole)
    assert not Run.interrupted(part)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "whole"]
    assert not [path for folder in tmp_path.iterdir() for path in folder.iterdir() if path.name.startswith(".")]

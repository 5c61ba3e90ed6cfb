"""What users name on a command line: found, or told why not in one line."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from shared_core.errors import InputError
from shared_core.objects import load_function, one_line

MODULE = """
import dataclasses, torch

class Outer:
    class Net(torch.nn.Linear):
        pass

@dataclasses.dataclass
class Made:
    width: int

def net(width=3):
    return torch.nn.Linear(width, 2)

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    (tmp_path / "objects_here.py").write_text(MODULE)
    return tmp_path


@pytest.mark.parametrize("place", ["objects_here", "objects_here.py"])
def test_functions_and_classes_of_modules_and_files(folder, place):
    assert load_function(f"{place}:net")(width=5).in_features == 5
    assert load_function(f"{place}:Outer.Net")(1, 4).out_features == 4
    assert load_function(f"{place}:Made")(2).width == 2


def test_files_of_one_name_are_two_modules(folder):
    for name, value in (("a", 1), ("b", 2)):
        (folder / name).mkdir()
        (folder / name / "net.py").write_text(f"def net(): return {value}")
    assert [load_function(f"{name}/net.py:net")() for name in ("a", "b")] == [1, 2]
    assert load_function(f"{folder / 'a' / 'net.py'}:net")() == 1


def test_installed_modules():
    assert load_function("torch.nn:Linear") is torch.nn.Linear


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("net", "'net' names nothing; write package.module:function or path/to/file.py:function, a function that"),
        (":net", "names nothing"),
        ("objects_here:", "names nothing"),
        ("objects_here:nett", "objects_here:nett: 'objects_here' has no 'nett'; did you mean 'net'?"),
        ("objects_here:Outer.Nets", "did you mean 'Net'?"),
        ("objects_here:number", "'number' is a int, not a function that returns a torch.nn.Module"),
        ("objects_here:torch", "'torch' is a module, not a function"),
        ("no_such_thing_at_all:net", "cannot import 'no_such_thing_at_all' (ModuleNotFoundError: "),
        ("no/such.py:net", "there is no file no/such.py; check the path"),
        ("objects_broken:net", "importing 'objects_broken' fails: ZeroDivisionError: division by zero"),
        ("objects_broken.py:net", "running objects_broken.py fails: ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_found_is_told_in_one_line(folder, name, says):
    (folder / "objects_broken.py").write_text("1 / 0")
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        load_function(name)
    assert "\n" not in str(caught.value)
    assert not [key for key in sys.modules if key.startswith("_user_objects_broken")]


def test_exceptions_in_one_line():
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("a\n  b")) == "ValueError: a b"

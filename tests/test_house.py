"""The shape of the code: imports run downwards, files and functions are short, ruff is content."""
import ast
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("compile", "data", "TeacherTrain", "mms_threshold", "entropy", "transfer", "distill",
          "report")
FILES = sorted(path for pattern in ("*.py", "kd/*.py", "criteria/*.py")
               for path in ROOT.glob(pattern))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
NAMES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
pytestmark = pytest.mark.quick


def imports():
    """{module: the modules of this project that it imports, anywhere in it}."""
    found = {}
    for module, path in NAMES.items():
        names = set()
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[module] = (names & set(NAMES)) - {module}
    return found


def test_no_import_goes_in_a_circle():
    TopologicalSorter(imports()).prepare()      # a CycleError names the modules


def test_the_package_imports_no_script_and_a_stage_none_but_data():
    pairs = [(module, other) for module, others in imports().items() for other in others
             if other in STAGES]
    assert not [pair for pair in pairs if pair[0].startswith("kd.")]
    assert not [pair for pair in pairs if pair[0] in STAGES[1:7] and pair[1] != "data"]


def test_what_lies_on_top_is_a_stage():
    assert {path.stem for path in ROOT.glob("*.py")} == {*STAGES, "hubconf"}    # torch.hub's place


def test_files_and_functions_are_short():
    assert not [path.name for path in FILES if len(path.read_text().splitlines()) > 380]
    functions = [node for tree in TREES.values() for node in ast.walk(tree)
                 if isinstance(node, ast.FunctionDef)]
    assert not [each.name for each in functions if each.end_lineno - each.lineno + 1 > 60
                or len(each.args.args) + len(each.args.kwonlyargs) > 9]


def test_ruff_has_nothing_to_say():
    ruff = shutil.which("ruff") or str(Path(sys.executable).with_name("ruff"))
    done = subprocess.run([ruff, "check", "--no-cache", "."], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stdout

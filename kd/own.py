"""Python files of the user's: a network, a criterion."""
import ast
import contextlib
import importlib.util
import sys
from pathlib import Path

from kd.files import UserError, digest, file_digest

ROOT = Path(__file__).resolve().parent.parent
OURS = {path.stem for path in ROOT.glob("*.py")} | {"kd", "criteria"}
_theirs = {}        # {folder: the modules with names of ours that its files have imported}


@contextlib.contextmanager
def running_own(path):
    """While code of the user's file `path` runs: its imports are looked for beside it first, and no
    module of this project answers to a name that is there, or on a path that the file adds."""
    folder = Path(path).resolve().parent
    if folder == ROOT:
        yield
        return
    ours, at_top = _taken_out(), [place for place in sys.path if Path(place).resolve() == ROOT]
    sys.modules.update(_theirs.get(folder, {}))
    sys.path[:] = [str(folder), *_without(str(folder), *at_top), *at_top]
    try:
        yield
    finally:
        sys.path[:] = [*at_top, *_without(str(folder), *at_top), str(folder)]
        _theirs[folder] = _taken_out()
        sys.modules.update(ours)


def _taken_out():
    names = [name for name in sys.modules if name.partition(".")[0] in OURS]
    return {name: sys.modules.pop(name) for name in names}


def _without(*places):
    return [place for place in sys.path if place not in places]


def code_digest(path):
    """As of kd.files.file_digest, of a file of the user's and of what it imports from beside it."""
    path, found = Path(path).resolve(), {}
    if path.parent != ROOT:
        _imported(path, path.parent, found)
    digests = [file_digest(path), *(found[each] for each in sorted(found.keys() - {path}))]
    return digests[0] if len(digests) == 1 else digest("".join(digests).encode())


def _imported(path, folder, found):
    """Adds {path: digest} of a file and of the files below `folder` that it imports."""
    found[path] = file_digest(path)
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):       # which importing it will show
        return
    for node in nodes:
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        base = folder
        if isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1] if node.level else folder
            names = [f"{node.module}.{each.name}" if node.module else each.name
                     for each in node.names]
        for name in names:
            parts = name.split(".")
            for count in range(1, len(parts) + 1):
                place = base.joinpath(*parts[:count])
                for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
                    if file.is_file() and file not in found:
                        _imported(file, folder, found)


def import_file(path):
    """The module in a Python file of the user's, which may import what lies beside it. What the
    file raises is not caught. Raises UserError where there is no such file."""
    path = Path(path).resolve()
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    version = digest(f"{path} {file_digest(path)}".encode())
    name = f"{path.stem}_{version}"     # one of the same name may lie elsewhere, or be changed
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            with running_own(path):
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]

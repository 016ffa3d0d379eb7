"""Python files of the user's: a network, a criterion."""
import contextlib
import importlib.util
import modulefinder
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
    path, found = Path(path).resolve(), []
    if path.parent != ROOT:
        finder = modulefinder.ModuleFinder([str(path.parent)])
        with contextlib.suppress(SyntaxError, OSError):     # which importing it will show
            finder.run_script(str(path))
        found = [each.__file__ for name, each in sorted(finder.modules.items())
                 if each.__file__ and name != "__main__"]
    digests = [file_digest(each) for each in (path, *found)]
    return digest("".join(digests).encode()) if found else digests[0]


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

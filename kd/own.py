"""Python files of the user's: a network, a criterion."""
import ast
import importlib.util
import sys
from pathlib import Path

from kd.files import UserError, digest, file_digest

ROOT = Path(__file__).resolve().parent.parent
OURS = {path.stem for path in ROOT.glob("*.py")} | {"kd", "criteria"}
seen = set()        # folders from which something was imported


def import_file(path):
    """The module in a Python file of the user's, which may import what lies beside it; at its
    top also under names of this project, or of files beside another one of theirs. What the file
    raises is not caught. Raises UserError where there is no such file."""
    path = Path(path).resolve()
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    folder, version = path.parent, digest(f"{path} {file_digest(path)}".encode())
    name = f"{path.stem}_{version}"     # one of the same name may lie elsewhere, or be changed
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        taken = _names_from(seen - {folder}) | (OURS if folder != ROOT else set())
        theirs = {each.stem for each in folder.iterdir()} & taken
        ours = _taken_out(theirs)
        sys.path.insert(0, str(folder))
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            sys.path.remove(str(folder))
            sys.path.append(str(folder))        # for what its functions import
            seen.add(folder)
            _taken_out(theirs)
            sys.modules.update(ours)
    return sys.modules[name]


def _names_from(folders):
    """The first names of the modules that were imported from these folders."""
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    return {name.partition(".")[0] for name, file in files.items()
            if file and folders & {*Path(file).parents[:2]}}


def _taken_out(names):
    """{name: module} of the modules of these names, which are imported anew from now on."""
    return {name: sys.modules.pop(name) for name in list(sys.modules)
            if name.partition(".")[0] in names}


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
    for node in ast.walk(ast.parse(path.read_bytes(), path)):
        base, names = folder, []
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1] if node.level else folder
            names = [f"{node.module or ''}.{each.name}".strip(".") for each in node.names]
        for name in names:
            parts = name.split(".")
            for count in range(1, len(parts) + 1):
                place = base.joinpath(*parts[:count])
                for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
                    if file.is_file() and file not in found:
                        _imported(file, folder, found)

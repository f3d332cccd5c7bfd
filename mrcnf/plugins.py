"""A user's own field, flow, data source or objective, named in a configuration as `module:object`.

The module is MODULE.py in a folder that `beside` names (that of the configuration, or of a run's
level, which has a copy), or in the current folder; otherwise one that Python can import. A run's
is imported only where the caller says `trust`, as that runs its code.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from mrcnf.errors import UserError

T = TypeVar("T")

OWN = "or MODULE:OBJECT of your own"
"""Ends a list of choices where a user's own object is one."""
PLACES = ("folder", "npz", "npy")
"""What precedes the colon in the name of data on disk, and so cannot be a module."""
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_folders: ContextVar[tuple[Path, ...]] = ContextVar("folders", default=())
_from_files: dict[Path, tuple[str, ModuleType]] = {}
"""Modules that were made of files, with the hash of what those held."""


class CodeChanged(UserWarning):
    """A run's code is not what it was when the run was trained."""


def is_own(name: str) -> bool:
    """Whether a name has the form `module:object`."""
    return bool(_NAME.fullmatch(name)) and name.partition(":")[0] not in PLACES


@contextlib.contextmanager
def beside(*folders: Path) -> Iterator[None]:
    """Within: modules are first looked for as files in these folders."""
    token = _folders.set((*map(Path, folders), *_folders.get()))
    try:
        yield
    finally:
        _folders.reset(token)


def require_trust(names: Iterable[str], where: Path | str, trust: bool) -> None:
    """Refuse to run the code that a run names, if there is any and it is not trusted.

    Raises:
        UserError: it is not; nothing has been imported.
    """
    own = sorted({name for name in names if is_own(name)})
    if own and not trust:
        raise UserError(
            f"{where} names code of its own ({', '.join(own)}), which this would run; if you "
            "trust it, add --trust (in Python trust=True)"
        )


def find(name: str, setting: str) -> Any:
    """The object of a name, its module imported.

    Args:
        setting: that holds the name, for messages.

    Raises:
        UserError: there is no such module, it cannot be imported, or it has no such object.
    """
    module_name, _, attribute = name.partition(":")
    module = _module(module_name, f"{setting} {name!r}")
    try:
        return getattr(module, attribute)
    except AttributeError:
        public = sorted(
            key for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        )  # fmt: skip
        here = f"; it has {', '.join(public)}" if public else ""
        raise UserError(
            f"{setting} {name!r}: {getattr(module, '__file__', module_name)} has no {attribute}"
            f"{here}"
        ) from None


def call(name: str, setting: str, *arguments: Any, **options: Any) -> Any:
    """What the callable of a name answers.

    Raises:
        UserError: as `find`; it cannot be called like that, or fails.
    """
    function, where = find(name, setting), f"{setting} {name!r}"
    check_call(function, where, *arguments, **options)
    try:
        return function(*arguments, **options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:
        raise UserError(f"{where} failed: {place_of(error)}") from error


def make(
    name: str, setting: str, kind: type[T], *arguments: Any, options: Mapping[str, Any]
) -> T:
    """An object of a kind, from the class or the function of a name.

    Raises:
        UserError: as `call`; what it makes is of another kind.
    """
    missing = sorted(getattr(find(name, setting), "__abstractmethods__", ()))
    if missing:
        raise UserError(f"{setting} {name!r} must define {', '.join(missing)}")
    made = call(name, setting, *arguments, **options)
    if not isinstance(made, kind):
        raise UserError(
            f"{setting} {name!r} makes a {type(made).__name__}; a subclass of "
            f"mrcnf.{kind.__name__} is needed"
        )
    return made


def check_call(function: Any, where: str, *arguments: Any, **options: Any) -> None:
    """A UserError unless a function takes these arguments; nothing is called."""
    if not callable(function):
        raise UserError(f"{where} is a {type(function).__name__}, which cannot be called")
    try:
        signature = inspect.signature(function)
    except ValueError:  # of C, some have none
        return
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        given = ", ".join([*map(_kind, arguments), *(f"{key}=…" for key in options)])
        raise UserError(
            f"{where} takes {signature}, and is called with ({given}): {error}"
        ) from None


def place_of(error: BaseException) -> str:
    """What went wrong, and in which line of which file, in one line."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).resolve() in _from_files]
    last = (own or frames)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"


def sources(names: Iterable[str]) -> dict[str, Path]:
    """The file of each name's module, of those that are of the user's own and have one."""
    found = {}
    for name in names:
        if is_own(name):
            path = getattr(_module(name.partition(":")[0], repr(name)), "__file__", None)
            if path is not None:
                found[name] = Path(path)
    return found


def copies(names: Iterable[str]) -> dict[str, bytes]:
    """The files, by the name that each is to have in a run, that were no importable modules."""
    paths = {path.resolve() for path in sources(names).values()}
    return {path.name: path.read_bytes() for path in paths if path in _from_files}


def hashes(names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the file of each name's module."""
    return {name: _hash(path.read_bytes()) for name, path in sources(names).items()}


def warn_if_changed(recorded: Mapping[str, str], names: Iterable[str], where: Path) -> None:
    """Warn (`CodeChanged`) where code is not what a run recorded by `hashes`."""
    now = hashes(names)
    for name, digest in recorded.items():
        if now.get(name, digest) != digest:
            path = sources([name])[name]
            warnings.warn(
                f"{path} is not what {where} was trained with", CodeChanged, stacklevel=2
            )


def made_of_files(classes: Iterable[type]) -> bool:
    """Whether one of the classes is of a module that another process could not import."""
    names = {module.__name__ for _, module in _from_files.values()}
    return any(cls.__module__ in names for cls in classes)


def _module(name: str, where: str) -> ModuleType:
    folders = [*_folders.get(), Path()]
    if "." not in name:
        for folder in folders:
            path = folder / f"{name}.py"
            if path.is_file():
                return _from_file(path.resolve(), name, where)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.partition(".")[0]):
            raise UserError(f"{where} cannot be imported: {place_of(error)}") from error
        places = ", ".join(str(folder) for folder in folders[:-1])
        raise UserError(
            f"{where}: there is no {name.replace('.', '/')}.py in "
            f"{places + ' or ' if places else ''}the current folder, and no module {name} that "
            "Python can import"
        ) from None
    except Exception as error:
        raise UserError(f"{where} cannot be imported: {place_of(error)}") from error


def _from_file(path: Path, name: str, where: str) -> ModuleType:
    """A module made of a file; again if it has changed since."""
    code = path.read_bytes()
    digest = _hash(code)
    if path in _from_files and _from_files[path][0] == digest:
        return _from_files[path][1]
    # Each level of a run has a file of this name, so the name alone would not tell them apart.
    unique = f"{name}@{_hash(str(path).encode())[:12]}"
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.modules[unique] = sys.modules.get(unique), module  # dataclasses look there
    try:
        # Not by the loader, which would believe a __pycache__ beside the file, whoever wrote that.
        exec(compile(code, str(path), "exec", dont_inherit=True), module.__dict__)
    except Exception as error:
        del sys.modules[unique]
        if before is not None:
            sys.modules[unique] = before
        raise UserError(f"{where} cannot be imported: {place_of(error)}") from error
    _from_files[path] = digest, module
    return module


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _kind(value: Any) -> str:
    return repr(value) if isinstance(value, (int, float, str)) else type(value).__name__

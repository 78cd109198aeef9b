"""Code of the user's: gathered once, shipped to every host, kept in the run folder, loaded in any process.

``use = "my_paper.py"`` names files and modules. A ``Code`` holds their text, the text of what they import from beside
them, and objects that a script or a notebook gave (pickled by value with cloudpickle). Whoever opens the experiment
loads it, which puts its rows into the tables (``fedmaestro.extend``), and works with what the text says, not with what
lies on that machine's disk.

Loading a run folder runs the code that it holds, as importing it would. That happens where this user has written it, or
says that it is to be trusted (``runs.trust``). Objects are pickled for hosts only: no file of a run folder is a pickle.
"""

import ast
import base64
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import linecache
import pickle
import shlex
import site
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from fedmaestro.data import cache
from fedmaestro.errors import UserError
from fedmaestro.extend import Registered, forget_loaded, register_loaded, session
from fedmaestro.places import read_file
from fedmaestro.runs import trust
from fedmaestro.runs.folder import write_atomically

_FOLDER, _MANIFEST, _SIGNATURE = "code", "code.json", "signature"
LARGE = "code-sha256"
"""What a message names code by that it does not carry: its fingerprint, and the hash of the bytes in the cache, since
those are a pickle, and others may be able to write there."""
SHIPPED_BYTES = 1 << 20
"""Code of at most this size travels with every message; more is read from the cache: hosts share it, or are sent it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The text of one module."""

    module: str
    path: str
    """Where it came from: what tracebacks name and ``__file__`` says."""
    text: str
    package: bool = False

    @property
    def file(self) -> str:
        """Its path in the run folder's copy."""
        parts = self.module.replace(".", "/")
        return f"{parts}/__init__.py" if self.package else f"{parts}.py"


@dataclass(frozen=True, kw_only=True, eq=False)
class Code:
    """All that an experiment needs besides this package; equal to what has the same fingerprint."""

    entries: tuple[str, ...] = ()
    """Modules to import, in this order."""
    sources: tuple[Source, ...] = ()
    objects: bytes = b""
    """Pickled ``Registered`` rows; empty in what a run folder keeps."""
    object_digests: Mapping[str, str] = field(default_factory=dict)
    """What tells whether an object is the same: by ``KIND NAME``."""

    def __bool__(self) -> bool:
        return bool(self.sources or self.object_digests)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Code) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 by file, or by kind and name of an object."""
        files = {source.file: hashlib.sha256(source.text.encode()).hexdigest() for source in self.sources}
        return {**files, **self.object_digests}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all of it; empty without any."""
        if not self:
            return ""
        return hashlib.sha256(json.dumps([self.entries, sorted(self.digests.items())]).encode()).hexdigest()

    def to_bytes(self, *, objects: bool = True) -> bytes:
        """Return what ``from_bytes`` reads; without ``objects``, those have to be there already when it is loaded."""
        form = {**asdict(self), "objects": base64.b64encode(self.objects).decode("ascii") if objects else ""}
        return json.dumps(form).encode()

    @staticmethod
    def from_bytes(content: bytes) -> "Code":
        """Read what ``to_bytes`` wrote."""
        form = json.loads(content)
        sources = tuple(Source(**source) for source in form["sources"])
        for source in sources:
            # They become files of a run folder.
            if not all(part.isidentifier() for part in str(source.module).split(".")):
                raise ValueError(f"{source.module!r} is no name of a module")
        return Code(
            entries=tuple(form["entries"]),
            sources=sources,
            objects=base64.b64decode(form["objects"]),
            object_digests=form["object_digests"],
        )

    def difference(self, other: "Code") -> str:
        """Return what of ``other`` is not as here, in words; empty: nothing."""
        mine, its = self.digests, other.digests
        if changed := [name for name in mine if name in its and mine[name] != its[name]]:
            return f"{_named(changed)} has changed" if len(changed) == 1 else f"{_named(changed)} have changed"
        if lost := [name for name in mine if name not in its]:
            return f"{_named(lost)} is missing"
        if new := [name for name in its if name not in mine]:
            return f"{_named(new)} is new"
        return "" if self.entries == other.entries else "the modules of use are others"


NO_CODE = Code()


def _named(names: Sequence[str]) -> str:
    return ", ".join(names)


# --- gathering ---------------------------------------------------------------------------------------------------


def gather(use: str, rows: Iterable[Registered] = ()) -> Code:
    """Return the code that ``use`` names, with what it imports from beside it, and rows given as objects.

    Args:
        use: files (absolute) and modules, separated by spaces; quoted where a path holds one.
        rows: of a script or a notebook.

    Raises:
        UserError: a file or module that is not there, or an object that cannot be shipped.
    """
    sources: dict[str, Source] = {}
    entries = []
    for word in shlex.split(use):
        entry, root, inside = _entry(word)
        entries.append(entry)
        _collect(entry, root, inside, sources)
    rows = list(rows)
    return Code(
        entries=tuple(entries),
        sources=tuple(sorted(sources.values(), key=lambda source: source.module)),
        objects=_pickled(rows) if rows else b"",
        object_digests={f"{row.kind} {row.name}": digest_of(row.value) for row in rows},
    )


def _entry(word: str) -> tuple[str, Path, str]:
    """Return the module that a word of ``use`` means, the folder it is imported from, and the package to stay in."""
    if not word.endswith(".py") and "/" not in word:
        return _module(word)
    path = Path(word)
    if not path.is_file():
        raise UserError(f"use: {path} does not exist: name a Python file (relative to the experiment's) or a module")
    name = path.stem
    if not name.isidentifier():
        raise UserError(f"use: {path.name} cannot be imported under the name {name!r}: rename it, to my_code.py say")
    known = importlib.util.find_spec(name) if name not in _loaded else None
    if known is not None and known.origin and Path(known.origin).resolve() != path.resolve() and _is_installed(known):
        raise UserError(f"use: {path.name} has the name of the installed module {name!r}: rename it")
    return name, path.parent, ""


def _is_installed(spec: importlib.machinery.ModuleSpec) -> bool:
    origin = spec.origin or ""
    return origin in ("built-in", "frozen") or any(origin.startswith(folder) for folder in _installed_folders())


def _installed_folders() -> list[str]:
    paths = sysconfig.get_paths()
    own = str(Path(__file__).parent.parent)
    return [own, *{paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}, *site.getsitepackages()]


def _module(name: str) -> tuple[str, Path, str]:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise UserError(f"use: there is no Python module {name!r}: name a file (my_paper.py), or one on the path")
    root = Path(spec.origin).parent
    for _ in range(name.count(".") + (spec.submodule_search_locations is not None)):
        root = root.parent
    return name, root, name.partition(".")[0] if _is_installed(spec) else ""


def _collect(module: str, root: Path, inside: str, sources: dict[str, Source]) -> None:
    """Add a module of ``root``, the packages around it, and what it imports from ``root``."""
    if module in sources or (inside and module.partition(".")[0] != inside):
        return
    path = _file_of(module, root)
    if path is None:
        return
    try:
        text = read_file(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"use: cannot read {path}: {error}") from None
    source = Source(module=module, path=str(path), text=text, package=path.name == "__init__.py")
    sources[module] = source
    if "." in module:
        _collect(module.rpartition(".")[0], root, inside, sources)
    for name in _imported(source):
        _collect(name, root, inside, sources)


def _file_of(module: str, root: Path) -> Path | None:
    at = root.joinpath(*module.split("."))
    return next((path for path in (at / "__init__.py", at.with_name(f"{at.name}.py")) if path.is_file()), None)


def _imported(source: Source) -> Iterator[str]:
    """Yield the modules that a text imports, whichever of them exist."""
    try:
        parsed = ast.parse(source.text, source.path)
    except SyntaxError as error:
        raise UserError(f"{source.path}, line {error.lineno}: {error.msg}") from None
    package = source.module if source.package else source.module.rpartition(".")[0]
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            around = package.split(".") if package else []
            around = around[: len(around) - node.level + 1] if node.level else []
            base = ".".join([*around, *([node.module] if node.module else [])])
            if base:
                yield base
            for alias in node.names:
                yield f"{base}.{alias.name}" if base else alias.name


# --- objects -----------------------------------------------------------------------------------------------------


def _pickled(rows: Sequence[Registered]) -> bytes:
    import cloudpickle

    local = [module for module in list(sys.modules.values()) if _is_local(module)]
    kept = [module for module in local if module.__name__ not in cloudpickle.list_registry_pickle_by_value()]
    for module in kept:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(rows)  # type: ignore[no-any-return]
    except Exception as error:
        names = _named([f"{row.kind} {row.name!r}" for row in rows])
        raise UserError(f"{names} cannot be shipped to the hosts: {type(error).__name__}: {error}") from None
    finally:
        for module in kept:
            cloudpickle.unregister_pickle_by_value(module)


def _is_local(module: ModuleType | None) -> bool:
    """Return whether a module is the user's: hosts may not be able to import it."""
    file = getattr(module, "__file__", None)
    if not file or module is None or module.__name__ == "__main__" or module.__name__.partition(".")[0] == "fedmaestro":
        return False
    return not any(str(Path(file).absolute()).startswith(folder) for folder in _installed_folders())


def digest_of(value: Any) -> str:
    """Return what tells whether an object is the same in another process: a hash of its source, or of its content."""
    digest = hashlib.sha256()
    for part in _identity(value):
        digest.update(part)
    return digest.hexdigest()


def _identity(value: Any) -> Iterator[bytes]:
    from torch import nn

    if isinstance(value, nn.Module):
        yield from _identity(type(value))
        for name, tensor in value.state_dict().items():
            yield name.encode()
            yield tensor.detach().cpu().contiguous().numpy().tobytes()
        return
    if isinstance(value, type | FunctionType):
        try:
            yield inspect.getsource(value).encode()
        except (OSError, TypeError):
            yield _content(value)
            return
        if isinstance(value, FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            named = [value.__globals__.get(name) for name in value.__code__.co_names]
            plain = [x for x in [*cells, *named] if isinstance(x, bool | int | float | str | tuple | None)]
            yield repr(plain).encode()
        return
    yield _content(value)


def _content(value: Any) -> bytes:
    import cloudpickle

    return cloudpickle.dumps(value)  # type: ignore[no-any-return]


# --- loading -----------------------------------------------------------------------------------------------------

_loaded: dict[str, Source] = {}
_active = ""
_lock = threading.RLock()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Serves the modules of the code that is loaded, from its text."""

    def find_spec(
        self,
        fullname: str,
        path: object = None,  # noqa: ARG002
        target: object = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        source = _loaded.get(fullname)
        if source is None:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=source.path, is_package=source.package)
        spec.has_location = True
        return spec

    def get_source(self, fullname: str) -> str:
        return _loaded[fullname].text

    def get_code(self, fullname: str) -> CodeType:
        source = _loaded[fullname]
        # So that tracebacks, pdb and inspect.getsource see the text that runs, also where there is no such file.
        linecache.cache[source.path] = (len(source.text), None, source.text.splitlines(keepends=True), source.path)
        return compile(source.text, source.path, "exec", dont_inherit=True)


_finder = _Finder()
_NOWHERE = "use: "


def activate(code: Code) -> None:
    """Load ``code`` in this process, in the place of what was loaded before; its rows are in the tables then.

    Raises:
        UserError: it cannot be imported: which file, which line, what Python says.
    """
    global _active
    with _lock:
        if code.fingerprint == _active:
            return
        for module in _loaded:
            sys.modules.pop(module, None)
        _loaded.clear()
        forget_loaded()
        _active = ""
        if not code:
            return
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
        _loaded.update({source.module: source for source in code.sources})
        for module in _loaded:
            sys.modules.pop(module, None)
        try:
            here = {f"{kind} {name}": row for (kind, name), row in session().items()}
            known = {key for key, row in here.items() if code.object_digests.get(key) == digest_of(row.value)}
            if (lacking := sorted(code.object_digests.keys() - known)) and not code.objects:
                raise UserError(
                    f"{_named(lacking)} was an object of a script or a notebook, which run folders do not keep: define "
                    "it here as it was then (fedmaestro.extend), or start from a file that use names"
                )
            rows = pickle.loads(code.objects) if lacking else []
            # The script's own objects, where this is its process: what they write to is then what it sees.
            rows = [row for row in rows if f"{row.kind} {row.name}" not in known]
            register_loaded(rows, lambda: [importlib.import_module(entry) for entry in code.entries])
        except UserError as error:
            raise UserError(f"{_where(error, code)}{error}") from None
        except Exception as error:
            raise UserError(f"{_where(error, code)}{type(error).__name__}: {error}") from None
        _active = code.fingerprint


def _where(error: BaseException, code: Code) -> str:
    """Return the file and line of the user's that an error comes from, as the start of a sentence."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: "
    paths = {source.path for source in code.sources}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in paths]
    return f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else _NOWHERE


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Let errors of the user's code inside be one line: ``what`` it is, which file, which line, what Python says.

    Raises:
        UserError: in the place of any other error that comes from a file of the code that is loaded.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _where(error, Code(sources=tuple(_loaded.values()))) == _NOWHERE:
            raise
        raise UserError(f"{what}: {located(error)}") from error


def located(error: BaseException) -> str:
    """Return an error of user code in one line, with the file and the line that it comes from."""
    where = _where(error, Code(sources=tuple(_loaded.values())))
    message = " ".join(str(error).split())
    return f"{'' if where == _NOWHERE else where}{type(error).__name__}: {message}"


# --- at rest -----------------------------------------------------------------------------------------------------


def write_code(folder: Path, code: Code) -> None:
    """Write the copy that a run folder keeps: files to read, ``code.json``, which has all of it, and its signature."""
    if not code:
        return
    for source in code.sources:
        write_atomically(folder / _FOLDER / source.file, source.text)
    content = code.to_bytes(objects=False)
    write_atomically(folder / _FOLDER / _SIGNATURE, trust.sign(content))
    write_atomically(folder / _FOLDER / _MANIFEST, content)


def check_trust(folder: Path, content: bytes = b"", signature: str = "") -> None:
    """Raise UserError unless this user has written the code of a folder, or says that it is to be trusted."""
    if not trust.is_trusted(content, signature):
        raise UserError(
            f"{folder} holds code that your runs on this machine have not written: read it, and add --trust (in "
            "Python, trust=True) if it may run"
        )


def read_code(folder: Path) -> Code:
    """Return the code that a run folder keeps; none if it keeps none.

    Raises:
        UserError: the copy is damaged, or not this user's and not to be trusted (``runs.trust``).
    """
    path = folder / _FOLDER / _MANIFEST
    if not path.is_file():
        return NO_CODE
    try:
        content = read_file(path)
        signed = read_file(path.with_name(_SIGNATURE)).decode() if path.with_name(_SIGNATURE).is_file() else ""
        check_trust(folder, content, signed)
        code = Code.from_bytes(content)
        for source in code.sources:
            shown = folder / _FOLDER / source.file
            if not shown.is_file() or read_file(shown).decode() != source.text:
                raise UserError(f"{shown} is not what {path} holds, which is what would run: restore both")
        return code
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}): restore it, or start anew") from None


def shipped(code: Code) -> dict[str, Any]:
    """Return what a message says of the code: all of it, or where more of it than fits lies in the cache."""
    if not code:
        return {}
    content = code.to_bytes()
    if len(content) <= SHIPPED_BYTES:
        return {"code": content}
    # By its bytes, not by its fingerprint: others may have put another pickle of the same objects there.
    name = f"{code.fingerprint}-{hashlib.sha256(content).hexdigest()}"
    cache.fetch(
        cached(name), lambda folder: write_atomically(folder / _MANIFEST, content), lambda folder: stored(folder, name)
    )
    return {LARGE: name}


_objects_welcome: ContextVar[bool] = ContextVar("objects_welcome", default=False)


@contextmanager
def objects_welcome() -> Iterator[None]:
    """Let messages hold pickled objects inside: those of this process, and of a Ray that it is part of."""
    token = _objects_welcome.set(True)
    try:
        yield
    finally:
        _objects_welcome.reset(token)


def received(job: dict[str, Any]) -> Code:
    """Return the code of a message, and take it out of ``job``.

    Raises:
        UserError: it is not in this machine's cache, or has pickled objects from somewhere else.
    """
    code = _received(job)
    if code.objects and not _objects_welcome.get():
        raise UserError(
            "objects of scripts and notebooks go to the hosts of this process and its Ray only: put them into a file "
            "that use names"
        )
    return code


def _received(job: dict[str, Any]) -> Code:
    if (content := job.pop("code", None)) is not None:
        return Code.from_bytes(content)
    if (name := job.pop(LARGE, None)) is None:
        return NO_CODE
    return _from_cache(cached(name))


def stored(folder: Path, name: str) -> Code:
    """Return what an entry of the cache holds; ValueError unless it is, byte for byte, what ``name`` says."""
    content = (folder / _MANIFEST).read_bytes()
    if hashlib.sha256(content).hexdigest() != name.rpartition("-")[2]:
        raise ValueError("other code than the message means")
    return Code.from_bytes(content)


@lru_cache(maxsize=2)
def _from_cache(entry: Path) -> Code:
    found = cache.read(entry, lambda folder: stored(folder, entry.name))
    if found is None:
        raise UserError(
            f"this host lacks the experiment's objects, which are larger than a message (no usable {entry}): "
            f"share the cache folder ({cache.CACHE_VARIABLE}), or name a file that loads them in use"
        )
    return found


def cached(name: str) -> Path:
    """Return the cache entry of code that is too large for messages."""
    return cache.cache_root() / "code" / name

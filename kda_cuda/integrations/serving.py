"""What the doors share: whether this package serves a call, and imports of what may be absent."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from .. import calls, variants
from ..schemas import FUNCTIONAL, raw_op

__all__ = ["attempt", "engine_folder", "import_if_present", "open_if_asked", "when_imported"]


def attempt(bind: Callable[..., calls.Call], args: tuple, kwargs: dict) -> calls.Call | str:
    """The checked call, or the reason why it is left to the library that it came from."""
    try:
        call = bind(*args, **kwargs)
        return unserved(call) or call
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        return str(error)


def unserved(call: calls.Call) -> str | None:
    """Why a call, or the backward that will follow it, has no kernel. On the CPU the reference serves as well."""
    raw, x = raw_op(call.op), call.owner
    namespace, reason = variants.choose(raw, x)
    if x.device.type == "cpu":
        return None
    if not variants.is_kernel(namespace, x):
        return f"kda_cuda::{raw}: {reason}"
    if call.op in FUNCTIONAL:
        backward = raw.replace("_fwd", "_bwd")
        namespace, reason = variants.choose_backward(backward, namespace, x, x.shape[3] if call.op == "chunk" else None)
        if not variants.is_kernel(namespace, x):
            return f"kda_cuda::{backward}: {reason}"
    return None


def import_if_present(name: str) -> ModuleType | None:
    """The module, or None if there is none of this name. What it fails to import itself is an error."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise


class _WhenImported:
    """A finder that finds nothing itself: it calls ``then[name]`` once another one's module of that name has run."""

    def __init__(self):
        self.then: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in self.then:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((x for x in found if x is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.then.pop(name, lambda _: None)(module)

            spec.loader.exec_module = exec_module
        return spec


_when_imported = _WhenImported()


def when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Calls ``then(module)``: now if the module has been imported, else as soon as somebody imports it."""
    if name in sys.modules:
        then(sys.modules[name])
        return
    _when_imported.then[name] = then
    if _when_imported not in sys.meta_path:
        sys.meta_path.insert(0, _when_imported)


def engine_folder(package: str, door: str) -> Path:
    """The folder that holds an engine's package, which is not imported. ``door`` is who asks.

    Raises:
        ImportError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{door}: {package} is not installed, expected it")
    return Path(next(iter(spec.submodule_search_locations))).parent


def open_if_asked(engine: str, switch: str | None, register: Callable[[], object]) -> None:
    """What a plugin does when its engine calls it: registers if the environment says 1.

    Logs what ``register`` raises, since an engine would not start.
    """
    if switch != "1":
        return
    try:
        register()
    except (ImportError, RuntimeError) as error:
        logging.getLogger(__name__).warning("%s runs KDA by itself: %s", engine, error)

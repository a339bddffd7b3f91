"""Hooks on functions by name."""

import contextvars
import pkgutil
from enum import Enum

_current_plugin_source = contextvars.ContextVar("source", default=None)


class HookType(Enum):
    AFTER = "after"


class HookRegistry:
    hooks = {}  # noqa: RUF012

    @classmethod
    def register(cls, target, hook, hook_type=HookType.AFTER, *, source=None):
        cls.hooks[target] = hook

    @classmethod
    def apply_hooks(cls):
        for target, hook in cls.hooks.items():
            holder, _, name = target.rpartition(".")
            holder = pkgutil.resolve_name(holder)
            setattr(holder, name, cls._after(getattr(holder, name), hook))
        cls.hooks.clear()

    @staticmethod
    def _after(own, hook):
        def wrapper(*args, **kwargs):
            return hook(own(*args, **kwargs), *args, **kwargs)

        return wrapper

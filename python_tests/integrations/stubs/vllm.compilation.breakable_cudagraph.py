"""The mark of methods that no CUDA graph holds."""

import functools


def eager_break_during_capture(fn):
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        return fn(*args, **kwargs)

    wrapper.breaks = True
    return wrapper

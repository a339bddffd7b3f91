"""A progress bar."""

from __future__ import annotations

import sys
import time

__all__ = ["Progress", "clock"]


class Progress:
    """A bar with the time that is left: one line that redraws itself on a terminal, ten lines elsewhere.

    Args:
        total: steps of the whole run.
        begin: steps that an earlier process has done. They do not count for the pace.
    """

    def __init__(self, total: int, begin: int = 0):
        self.total, self.begin = total, begin
        self.start, self.live = time.monotonic(), sys.stdout.isatty()

    def show(self, done: int, text: str) -> None:
        """Draws the bar after ``done`` steps; elsewhere than on a terminal only once every tenth of the way."""
        last = done == self.total
        if not (self.live or last or done * 10 // self.total != (done - 1) * 10 // self.total):
            return
        seconds = time.monotonic() - self.start
        left = clock(seconds * (self.total - done) / (done - self.begin))
        told = f"took {clock(seconds)}" if last else f"{left} left"
        filled = 30 * done // self.total
        line = f"[{'#' * filled}{'.' * (30 - filled)}] {done}/{self.total}  {told}  {text}"
        print(f"\r{line}\033[K" if self.live else line, end="" if self.live and not last else "\n", flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds, such as ``2:05``."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"

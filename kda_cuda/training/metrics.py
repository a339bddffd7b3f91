"""What a run measured: a line of JSON for each step, and a picture of the curves."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
from pathlib import Path

__all__ = ["Metrics", "draw", "read"]

PANELS = {  # title, keys of the lines and their labels
    "Loss, nats a token": {"loss": "training batch", "validation_loss": "validation"},
    "Learning rate": {"lr": ""},
    "Norm of all gradients": {"gradient_norm": ""},
    "Tokens a second": {"tokens_per_second": ""},
}


def read(path: Path) -> list[dict]:
    """The complete lines of a file; none if it is not there.

    A process that was killed may leave half a line, and a machine that lost its power anything. That is left out.
    """
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


class Metrics:
    """Appends lines to a file, each with its ``step``.

    Args:
        path: the file. Lines of later steps than ``done`` are removed: the run does these steps again.
        done: how many steps the checkpoint has from which the run goes on; 0 begins an empty file.

    Raises:
        OSError: the file cannot be written, or another run has it open.
    """

    def __init__(self, path: Path, done: int):
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, _locked(path.parent))
            self.rows = [row for row in read(path) if row["step"] <= done]
            kept = path.with_suffix(".new")
            kept.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            os.replace(kept, path)
            self.file = stack.enter_context(open(path, "a"))
            self._held = stack.pop_all()

    def write(self, row: dict) -> None:
        """The line is in the file when this returns."""
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Another run may then open the file."""
        self._held.close()


def _locked(folder: Path) -> int:
    """A handle of the folder that no other run has. Its end, or that of the process, lets others in."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise OSError(error.errno, f"kda_cuda.train: another run writes into --out {folder}") from None
    except OSError:  # a file system without locks
        pass
    return handle


def draw(path: Path, rows: list[dict]) -> bool:
    """Writes the curves of the lines; returns False, and writes nothing, where matplotlib is not installed."""
    if not importlib.util.find_spec("matplotlib"):
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(11, 7), sharex=True)
    for axes, (title, curves) in zip(panels.flat, PANELS.items(), strict=True):
        for key, label in curves.items():
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o" if key == "validation_loss" else "", label=label)
        axes.set_title(title)
        axes.grid(alpha=0.3)
    if rows:
        panels.flat[0].legend()
    for axes in panels[1]:
        axes.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True

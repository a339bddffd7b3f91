"""What a run measured: a line of JSON for each step, and a picture of the curves."""

from __future__ import annotations

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
    """The complete lines of a file; none if it is not there. A process that was killed may leave half a line."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Metrics:
    """Appends lines to a file, each with its ``step``.

    Args:
        path: the file. Lines of later steps than ``done`` are removed: the run does these steps again.
        done: how many steps the checkpoint has from which the run goes on; 0 begins an empty file.
    """

    def __init__(self, path: Path, done: int):
        self.rows = [row for row in read(path) if row["step"] <= done]
        kept = path.with_suffix(".new")
        kept.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(kept, path)
        self.file = open(path, "a")  # noqa: SIM115

    def write(self, row: dict) -> None:
        """The line is in the file when this returns."""
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


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

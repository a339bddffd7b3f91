"""The curves of all runs as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

__all__ = ["best_runs", "draw"]

COLOURS = {"kda": "C0", "scalar_gate": "C1", "no_delta_rule": "C3"}
LABELS = {"kda": "KDA", "scalar_gate": "one gate a head (Gated DeltaNet)", "no_delta_rule": "no delta rule (GLA)"}


def best_runs(rows: Sequence[dict], task: str, length: int, variant: str) -> list[dict]:
    """The runs of all seeds at the learning rate with the highest mean accuracy; of equal ones the quickest."""
    of_rate: dict[float, list[dict]] = {}
    for row in rows:
        if (row["task"], row["length"], row["variant"]) == (task, length, variant):
            of_rate.setdefault(row["lr"], []).append(row)
    return max(of_rate.values(), default=[], key=_merit)


def _merit(rows: Sequence[dict]) -> tuple[float, float]:
    return mean(row["accuracy"] for row in rows), -mean(row["curve"][-1][0] for row in rows)


def draw(path: Path, rows: Sequence[dict]) -> None:
    """A panel for each task and length: accuracy against steps, a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((row["task"], row["length"]) for row in rows))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.6 * lines), squeeze=False, sharey=True)
    for panel, ax in zip(panels, axes.flat, strict=False):
        for variant, colour in COLOURS.items():
            for i, row in enumerate(best_runs(rows, *panel, variant)):
                label = f"{LABELS[variant]}, lr {row['lr']:g}" if i == 0 else None
                steps, right, _ = zip((0, 0, 0), *row["curve"], strict=True)
                ax.plot(steps, right, color=colour, linewidth=1.2, alpha=0.8, label=label)
                if row["solved_at"]:
                    ax.plot(steps[-1], right[-1], "o", color=colour, markersize=4)
        ax.set(title=f"{panel[0]}, {panel[1]} tokens", xlabel="step", ylim=(0, 1.03))
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7, loc="lower right")
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("right answers on rows not seen")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

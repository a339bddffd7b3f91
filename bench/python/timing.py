"""How benchmarks measure: medians of eager calls and of CUDA graphs, host time, copy bandwidth, and on what machine.

Functions with a ``device`` argument run on the CPU too, by the host's clock, so that tests run whole benchmarks.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

Run = Callable[[], object]


def copy_bandwidth(device: str = "cuda") -> float:
    """Bytes per second, read plus written, of a large copy: eager, since a captured copy of some sizes is slower."""
    x = torch.empty(1 << (30 if device == "cuda" else 20), dtype=torch.uint8, device=device).random_()
    y = torch.empty_like(x)

    def copy() -> None:
        y.copy_(x)

    elapsed_us(copy, device)
    us = statistics.median(elapsed_us(copy, device) for _ in range(41 if device == "cuda" else 5))
    return 2 * x.numel() / (us * 1e-6)


def note(row: dict, lines: Sequence[str], result: dict, out: Path | None, device: str) -> None:
    """One more of the rows of ``result``: printed, written at once, and nothing of it stays in memory."""
    result["rows"].append(row)
    print("\n".join(lines), flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        whole = out.with_name(out.name + ".part")  # who is killed while it writes leaves the rows before
        whole.write_text(json.dumps(result, indent=1) + "\n")
        whole.replace(out)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def end_if_failed(rows: Sequence[dict]) -> None:
    if faults := [row["failed"] for row in rows if "failed" in row]:
        raise SystemExit(f"{len(faults)} of {len(rows)} rows failed, the first: {faults[0]}")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def side_stream(device: str) -> Iterator[None]:
    """A stream of its own: what autograd recorded on it is differentiated on it, so both can be captured there."""
    if device != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def loop_of(calls: Sequence[Run]) -> Run:
    def loop() -> None:
        for call in calls:
            call()

    return loop


def graph_of(calls: Sequence[Run], device: str) -> Run:
    """All calls as one CUDA graph on the current stream, or on a new one if that is the default; on the CPU a loop."""
    loop = loop_of(calls)
    if device != "cuda":
        return loop
    current = torch.cuda.current_stream()
    stream = None if current == torch.cuda.default_stream() else current
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loop()
    return graph.replay


def elapsed_us(run: Run, device: str) -> float:
    """Time of one run on the device: between two events on a GPU."""
    if device != "cuda":
        begin = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - begin)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end)


def eager_us(calls: Sequence[Run], device: str) -> tuple[float, float]:
    """Per call: until the host is free again, and until the device is done."""
    synchronize(device)
    begin = time.perf_counter()
    for call in calls:
        call()
    issued = time.perf_counter()
    synchronize(device)
    done = time.perf_counter()
    return 1e6 * (issued - begin) / len(calls), 1e6 * (done - begin) / len(calls)


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and spread, the width of the middle half as a share of the median."""
    middle = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (middle,) * 3
    return {"median": round(middle, 1), "spread": round((high - low) / middle, 3)}


def machine(device: str) -> dict:
    """What every result says of where and of what it was measured. KDA_CUDA_COMMIT names the commit without git."""
    on_gpu = device == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str:
    """Of these sources, wherever the program was started; -dirty if a file differs from it."""
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return os.environ.get("KDA_CUDA_COMMIT") or said_by("git", "-C", str(Path(__file__).parent), *describe) or ""


def said_by(*command: str) -> str | None:
    """The first line that a command prints; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else None


def installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None

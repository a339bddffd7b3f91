"""The host benchmark, whole, on the CPU: what it calls, what it leaves behind, and what its recorded run promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kda_cuda
from bench.python import bench_host, empty_ops
from kda_cuda import checks, library, recipes, testing

ROOT = Path(__file__).parents[2]
SIZES = {"heads": 1, "dim": 64, "batch": 2, "tokens": 64}


@pytest.fixture(scope="module")
def folder() -> Path:
    """Where the empty ops are compiled once for all tests."""
    return ROOT / "build" / "empty_ops"


@pytest.mark.devices("emulator")
def test_a_whole_run(device, folder, tmp_path, capsys):
    """Of this checkout twice, in processes of their own."""
    path, sizes = tmp_path / "results" / "host.json", json.dumps(SIZES)
    bench_host.main(
        [
            "--rounds",
            "1",
            "--calls",
            "3",
            "--device",
            "cpu",
            "--folder",
            str(folder),
            "--sizes",
            sizes,
            "--checkout",
            str(ROOT),
            "--json",
            str(path),
        ]
    )
    written, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert set(written["times"]) == {"this", str(ROOT)} and all(name in printed for name in bench_host.RAW)
    for rows in written["times"].values():
        assert all(set(rows[name]) == {"public", "raw", "empty"} for name in bench_host.RAW)
        assert set(rows["chunk_kda, training"]) == {"step", "forward", "backward"}
        assert all(0 < low <= middle for row in rows.values() for low, middle in row.values())


@pytest.mark.devices("emulator")
def test_nothing_is_launched_and_nothing_stays_switched(device, folder):
    inputs, look = bench_host.Inputs("cpu", **SIZES), checks.check_contents
    _, kernels = device.run(lambda: bench_host.measure("cpu", 1, inputs, folder))
    assert kernels == []
    _, kernels = device.run(lambda: kda_cuda.decode(**inputs.decode()))
    assert kernels == ["decode"]
    assert checks.check_contents is recipes.check_contents is look
    with pytest.raises(ValueError, match="slot_of has 9"):
        kda_cuda.decode(**(inputs.decode() | {"slot_of": torch.tensor([0, 9])}))


@pytest.mark.devices("emulator")
def test_empty_ops_have_the_schema_and_do_nothing(device, folder):
    testing.load_emulator()
    given = bench_host.Inputs("cpu", **SIZES).decode()
    before = given["out"].clone()
    arguments = kda_cuda.decode.bind(**given).arguments
    names = tuple(bench_host.RAW.values())
    op = empty_ops.load(folder, *names)
    assert op("decode")(*arguments) is None and torch.equal(given["out"], before)
    assert str(op("chunk_fwd")._schema).endswith("-> (Tensor, Tensor, Tensor)")
    for name in names:
        assert [a.name for a in op(name)._schema.arguments] == [
            a.name for a in getattr(torch.ops.kda_cuda, name).default._schema.arguments
        ]
    assert set(names) <= set(library.SCHEMAS)


def test_recorded_result_is_within_the_promise():
    """On a CPU a public call takes at most three times what an empty op of the same schema takes in the same run."""
    times = json.loads((ROOT / "bench" / "results" / "host_cpu.json").read_text())["times"]["this"]
    for name in bench_host.RAW:
        assert times[name]["public"][0] <= 3 * times[name]["empty"][0], name

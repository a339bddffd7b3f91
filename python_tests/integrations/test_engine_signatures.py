"""What the doors of the engines rely on, compared with sources; and what they do with other sources, or none."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from kda_cuda.integrations.signatures import (
    SGLANG,
    VLLM,
    VLLM_LAYERS,
    Attributes,
    Called,
    Overridden,
    differences,
)

from .engine_truth import install_stubs, stub_engine  # noqa: F401

ENGINES = {"vllm": VLLM | VLLM_LAYERS, "sglang": SGLANG}
ROOT = Path(__file__).parents[2]


def folder_of(engine: str) -> Path | None:
    """Where the sources of an engine are: in a folder that KDA_CUDA_ENGINES names, or installed."""
    for folder in os.environ.get("KDA_CUDA_ENGINES", "").split(os.pathsep):
        if folder and (Path(folder) / engine).is_dir():
            return Path(folder)
    spec = importlib.util.find_spec(engine)
    return Path(next(iter(spec.submodule_search_locations))).parent if spec else None


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_as_recorded(engine):
    folder = folder_of(engine)
    if folder is None:  # gigabytes, which no other test needs: there the stubs, of the same signatures, stand in
        pytest.skip(f"{engine} is not installed, and no folder of KDA_CUDA_ENGINES holds it")
    assert differences(ENGINES[engine], folder) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_the_stubs_are_as_recorded(engine, tmp_path):
    install_stubs(engine, tmp_path)
    assert differences(ENGINES[engine], tmp_path) == []


SOURCE = """
class Layer:
    kept: int = 0

    def __init__(self):
        self.weight: int = 1
        self.norm = 2

    def forward(self, x, scale=1, *, mode="fast", **others): ...
"""


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"Layer.forward": Called(("self", "x", "mode"))}, []),
        ({"Layer.forward": Overridden(("self", "x", "scale", "mode", "others"))}, []),
        ({"Layer": Attributes(("kept", "weight", "norm"))}, []),
        ({"Layer.forward": Called(("self", "scale"))}, ["engine.layers: Layer.forward has also x"]),
        ({"Layer.forward": Called(("self", "x", "y", "z"))}, ["engine.layers: Layer.forward has no parameter y, z"]),
        ({"Layer.forward": Overridden(("self", "x"))}, ["engine.layers: Layer.forward has also scale, mode, others"]),
        ({"Layer": Attributes(("kept", "bias"))}, ["engine.layers: Layer has no bias"]),
        ({"Layer.backward": Called(())}, ["engine.layers: there is no Layer.backward"]),
        ({"Other": Attributes(())}, ["engine.layers: there is no Other"]),
    ],
)
def test_each_difference_is_named(tmp_path, wanted, said):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "layers.py").write_text(SOURCE)
    assert differences({"engine.layers": wanted}, tmp_path) == said
    assert differences({"engine.other": wanted}, tmp_path) == ["engine.other: there is no such module"]


# ---- the doors -------------------------------------------------------------------------------------------------------


def change(tmp_path: Path, module: str, old: str, new: str) -> None:
    path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_a_layer_class_that_differs_is_vllms(stub_engine, tmp_path):  # noqa: F811
    door = stub_engine("vllm")
    change(tmp_path, "vllm.models.kimi_k3.nvidia.kda", "g1, g2, beta", "g1, g2, beta, new")
    served = door.register()
    assert "KimiK3DeltaAttention" not in served and len(served) == 3
    (said,) = door.report()["declined"]
    assert "vllm.models.kimi_k3.nvidia.kda: KimiK3DeltaAttention._forward has also new" in said


SHARED = {
    "vllm": ("vllm.forward_context", "get_forward_context()", "get_forward_context(device)"),
    "sglang": ("sglang.srt.layers.attention.linear.kernels.kda_triton", "beta_is_raw=False", "beta_kind=None"),
}
SAID = {
    "vllm": "vllm.forward_context: get_forward_context has also device; expected that of vllm 0.33.0",
    "sglang": "TritonKDAKernel.extend has no parameter beta_is_raw; ",
}


@pytest.mark.parametrize("engine", SHARED)
def test_an_engine_that_differs_runs_by_itself(stub_engine, tmp_path, engine, caplog):  # noqa: F811
    door = stub_engine(engine)
    change(tmp_path, *SHARED[engine])
    with pytest.raises(RuntimeError, match=f"^kda_cuda.integrations.{engine}: ") as raised:
        door.register()
    assert SAID[engine] in str(raised.value)
    with caplog.at_level(logging.WARNING):
        door.plugin()
    (record,) = caplog.records
    assert "runs KDA by itself" in record.getMessage() and SAID[engine] in record.getMessage()


@pytest.mark.parametrize("engine", ENGINES)
def test_no_engine(stub_engine, monkeypatch, engine, caplog):  # noqa: F811
    door = stub_engine(engine)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = f"kda_cuda.integrations.{engine}: {engine} is not installed, expected it"
    with pytest.raises(ImportError, match=f"^{expected}$"):
        door.register()
    with caplog.at_level(logging.WARNING):
        door.plugin()
    assert [expected in x.getMessage() for x in caplog.records] == [True]


@pytest.mark.parametrize("engine", ENGINES)
def test_registration_imports_nothing_of_the_engine(stub_engine, engine):  # noqa: F811
    door = stub_engine(engine)
    door.plugin()
    assert not [name for name in sys.modules if name.partition(".")[0] == engine]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_switch(stub_engine, monkeypatch, engine):  # noqa: F811
    door, before, switch = stub_engine(engine), list(sys.meta_path), f"KDA_CUDA_{engine.upper()}"
    monkeypatch.delenv(switch)
    door.plugin()
    assert sys.meta_path == before
    monkeypatch.setenv(switch, "1")
    door.plugin()
    assert len(sys.meta_path) == len(before) + 1


@pytest.mark.parametrize(("engine", "group"), [("vllm", "vllm.general_plugins"), ("sglang", "sglang.srt.plugins")])
def test_the_entry_point(engine, group):
    text = (ROOT / "pyproject.toml").read_text()
    _, _, section = text.partition(f'[project.entry-points."{group}"]\n')
    name, _, value = section.splitlines()[0].partition(" = ")
    loaded = EntryPoint(name, value.strip('"'), group).load()
    assert name == "kda_cuda" and loaded.__name__ == "plugin" and loaded.__module__.endswith(f".{engine}")

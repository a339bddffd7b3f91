"""The ``device`` fixture, the markers, and a summary that says what ran where: nothing is left out silently."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from kda_cuda import build_info, testing

from .support import bwd_calls
from .support.devices import NAMES, Device, note_kernels, take_kernels

# Few tests that take long. They go first, so that no worker is left with one of them at the end.
LONG_FILES = ("train/", "nn/test_demo.py", "integrations/", "bench/", "parallel/")
REPORTED = "what ran"  # where in a report: the device of the test, and its kernels by device
outcomes = {name: Counter() for name in (*NAMES, "-")}
kernels_seen = {name: Counter() for name in NAMES}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--no-emulator", action="store_true", help="leave out what needs build/emulator (make emulator)")


def pytest_configure(config):
    config.addinivalue_line("markers", "devices(*names): of cpu, emulator and cuda, where a test with `device` runs")
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    """``@pytest.mark.devices("cpu", "emulator")`` narrows where a test with a ``device`` runs."""
    if "device" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("devices")
        metafunc.parametrize("device", marker.args if marker else NAMES, indirect=True)


def _device_of(item) -> str:
    return item.callspec.params.get("device", "-") if hasattr(item, "callspec") else "-"


def pytest_collection_modifyitems(config, items):
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if _device_of(item) == "cuda":
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if _device_of(item) == "emulator" and config.getoption("--no-emulator"):
            item.add_marker(pytest.mark.skip(reason="--no-emulator"))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))
    items.sort(key=lambda item: not item.nodeid.removeprefix("python_tests/").startswith(LONG_FILES))


@pytest.fixture
def device(request):
    """cpu, emulator or cuda: a string for ``device=``, with ``name``, ``runs_kernels`` and ``run(call)``."""
    if request.param == "emulator":
        with testing.emulated():
            yield Device("emulator")
            note_kernels("emulator", testing.take_record())
    else:
        yield Device(request.param)


@pytest.fixture
def chunk_bwd(device):
    """Skips where kernels run and the backward has none yet: test_training says who serves it there."""
    if device.runs_kernels and not bwd_calls.has_kernel(device):
        pytest.skip(f"no chunk_bwd kernel is compiled in for {device.name}")


@pytest.fixture
def poisoned_memory():
    """Whatever is allocated holds NaN until it is written."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    report.user_properties.append((REPORTED, (_device_of(item), take_kernels())))
    return report


def pytest_runtest_logreport(report):
    """In the process that prints the summary: reports also come from workers (pytest-xdist)."""
    device, kernels = dict(report.user_properties).get(REPORTED, ("-", {}))
    if report.when == "call" or report.outcome != "passed":
        outcomes[device][report.outcome] += 1
    for name, counts in kernels.items():
        kernels_seen[name].update(counts)


def pytest_terminal_summary(terminalreporter):
    write = terminalreporter.write_line
    terminalreporter.section("what ran where")
    write(f"torch {torch.__version__}; kernels: {build_info()['ops'] or 'not built'}")
    for name, of_device in outcomes.items():
        if not of_device:
            continue
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(of_device.items()))
        kernels = ", ".join(f"{kernel} x{n}" for kernel, n in sorted(kernels_seen.get(name, {}).items()))
        write(f"{'no device' if name == '-' else name:>10}: {counts}" + (f"; kernels {kernels}" if kernels else ""))

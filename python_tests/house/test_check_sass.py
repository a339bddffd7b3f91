"""The look into the machine code: what it takes for a loop, what it finds there, and what it says without cuobjdump."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "csrc" / "tools"
SYMBOL, KERNEL = "_ZN3kda21chunk_fwd_scan_kernelINS_12Bf16K128Sm90EEEvv", "chunk_fwd_scan_kernel<Bf16K128Sm90>"
REPORT = f"ptxas info    : Compiling entry function '{SYMBOL}' for 'sm_90a'\n"
HEADER = f'\tcode for sm_90a\n\t\tFunction : {SYMBOL}\n\t.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED"\n'


@pytest.fixture(scope="module")
def check_sass():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import check_sass
    finally:
        sys.path.remove(str(SCRIPTS))
    return check_sass


def listing(*lines: str) -> str:
    """As cuobjdump prints it: 16 bytes an instruction, in two lines. `{n}`: the address of line n."""
    address = [f"0x{16 * i:x}" for i in range(len(lines))]
    code = [
        f"        /*{16 * i:04x}*/      {x.format(*address)} ;     /* 0x0000000000007918 */\n /* 0x000fc0 */\n"
        for i, x in enumerate(lines)
    ]
    return HEADER + "".join(code)


PRODUCT, LOAD, STORE = "HGMMA.64x64x16.F32.BF16 R88, R152, gdesc[UR8], RZ, !UPT", "LDL.64 R2, [R1+0x8]", "STL [R1], R2"
LOOP = ("MOV R2, R3", PRODUCT, "@!P0 BRA {1}", "EXIT", "BRA {4}")
CASES = {
    "clean": (LOOP, None),
    "local memory before and after": (("STL [R1], R2", PRODUCT, "@!P0 BRA {1}", LOAD, "EXIT"), None),
    "in the loop": (("NOP", PRODUCT, LOAD, "@!P0 BRA {1}", "EXIT"), "1 accesses to local memory"),
    "before the product": (("NOP", STORE, LOAD, PRODUCT, "@P1 EXIT", "BRA {1}"), "STL at 0x10"),
    "on a detour": (("NOP", "@P1 BRA {5}", PRODUCT, "@!P0 BRA {1}", "EXIT", LOAD, "BRA {2}"), "LDL at 0x50"),
    "behind a table": (
        ("NOP", "@P1 BRA {5}", "BRX R88 -0x30", LOAD, "BRA {5}", PRODUCT, "@!P0 BRA {1}", "EXIT"),
        "LDL at 0x30",
    ),
    "behind a table after the loop": (("NOP", PRODUCT, "@!P0 BRA {1}", "BRX R88 -0x30", LOAD, "EXIT"), None),
    "in a subroutine": (
        ("NOP", "CALL.REL.NOINC {5}", PRODUCT, "@!P0 BRA {1}", "EXIT", LOAD, "RET.REL.NODEC R2 0x0"),
        "LDL at 0x50",
    ),
    "before a call that goes on": (
        ("NOP", LOAD, "@P0 CALL.REL.NOINC {4}", "EXIT", PRODUCT, "@!P0 BRA {1}", "EXIT"),
        "LDL at 0x10",
    ),
    "behind a call that leaves": (("NOP", PRODUCT, "@P0 CALL.REL.NOINC {4}", "BRA {1}", LOAD, "EXIT"), None),
    "by a product after the loop": (("NOP", "@!P0 BRA {0}", LOAD, PRODUCT, "EXIT"), "no loop that multiplies"),
    "no warpgroups": (("NOP", "HMMA.16816.F32 R2, R4, R6, R8", "@!P0 BRA {1}", "EXIT"), "no HGMMA"),
}


@pytest.mark.parametrize("case", CASES)
def test_faults(check_sass, case):
    lines, fault = CASES[case]
    ((symbol, arch, code),) = check_sass.functions(iter(listing(*lines).splitlines()))
    assert (symbol, arch, len(code)) == (SYMBOL, "90a", len(lines))
    found = check_sass.faults(KERNEL, code)
    assert bool(found) == bool(fault) and (not fault or fault in " ".join(found)), found


def test_what_is_demanded_of_which_kernel(check_sass):
    for kernel in (KERNEL, "chunk_fwd_scan_kernel<Fp16K256>", "chunk_fwd_summarise_kernel<Bf16K64C32>"):
        assert check_sass.is_demanding(kernel)
    for kernel in ("chunk_fwd_chain_kernel<Bf16K64>", "decode_kernel<KeyFirstShape<float, 64, true> >"):
        assert not check_sass.is_demanding(kernel) and check_sass.faults(kernel, []) == []


@pytest.mark.parametrize(
    ("printed", "code", "said"),
    [
        (listing(*LOOP), 0, "1 kernels looked at, 1 of them built on HGMMA: 0 faults"),
        (listing(*CASES["in the loop"][0]), 1, f"{KERNEL} (sm_90a) has 1 accesses to local memory"),
        ("", 1, f"{KERNEL} (sm_90a) is not in"),
        (None, 0, "NOT CHECKED: the machine code of the kernels, as there is no cuobjdump"),
    ],
)
def test_the_script(tmp_path, printed, code, said):
    """With a cuobjdump that prints what it is told, or none."""
    (tmp_path / "kernel.ptxas").write_text(REPORT)
    if printed is not None:
        (tmp_path / "printed").write_text(printed)
        for tool in ("cuobjdump", "nvdisasm"):
            (tmp_path / tool).write_text(f"#!/bin/sh\nexec /bin/cat {tmp_path}/printed\n")
            (tmp_path / tool).chmod(0o755)
    (tmp_path / "c++filt").write_text(f"#!/bin/sh\necho '{KERNEL}'\n")
    (tmp_path / "c++filt").chmod(0o755)
    script = "import sysconfig, sys; sysconfig.get_path = lambda _: '/nowhere'; import check_sass; check_sass.main()"
    command = [sys.executable, "-c", script, tmp_path / "_ops.so", tmp_path / "kernel.ptxas"]
    environment = os.environ | {"PATH": str(tmp_path), "PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == code and said in done.stdout + done.stderr, done.stdout + done.stderr


def test_continuous_integration_looks_and_repeats_what_it_could_not():
    makefile, ci = ((Path(__file__).parents[2] / name).read_text() for name in ("Makefile", ".ci/run"))
    assert "csrc/tools/check_sass.py kda_cuda/_ops.so $(RESOURCE_REPORTS)" in makefile
    assert ci.index("make check-registers | tee") < ci.index('grep "NOT CHECKED"')

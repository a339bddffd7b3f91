"""How long `import kda_cuda` takes beyond `import torch`, each in processes of its own.

python -m bench.python.bench_import [--json FILE] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

MEASURE = """
import time
begin = time.perf_counter()
import torch
between = time.perf_counter()
import kda_cuda
print(between - begin, time.perf_counter() - between, torch.__version__, kda_cuda.build_info()["ops"] is not None)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).parents[1] / "results" / "import_time.json")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    command = [sys.executable, "-c", MEASURE]
    runs = [subprocess.check_output(command, text=True).split() for _ in range(args.rounds + 1)][1:]  # caches are warm
    torch_s, own_s = (statistics.median(float(run[i]) for run in runs) for i in (0, 1))
    result = {
        "torch_ms": round(1e3 * torch_s), "kda_cuda_ms": round(1e3 * own_s), "rounds": args.rounds,
        "torch": runs[0][2], "with_kernels": runs[0][3] == "True", "cpus": os.cpu_count(),
    }  # fmt: skip
    print(f"torch {result['torch_ms']} ms, kda_cuda another {result['kda_cuda_ms']} ms")
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# torch 2.13.0 (CPU). A generator of the CPU takes a seed of 64 bits, reports all of them, and uses the lower 32.
#
# manual_seed says that any value of 64 bits is a seed, and initial_seed returns it. Yet seeds that differ above bit 31
# alone give the same numbers, since the Mersenne Twister of the CPU is seeded with 32 bits. A program that makes the
# seed of a worker or an epoch as `seed + (epoch << 32)` shuffles every epoch alike, and nothing says so.
#
# Output seen on 2026-11-30:
#   2.13.0+cpu
#   seed 1: [5, 6, 1, 2, 0, 8, 9, 3, 7, 4] initial_seed 1
#   seed 1 + 2**32: [5, 6, 1, 2, 0, 8, 9, 3, 7, 4] initial_seed 4294967297
#   seed 1 + 2**62: [5, 6, 1, 2, 0, 8, 9, 3, 7, 4] initial_seed 4611686018427387905
#   seed 2: other numbers
. "$(dirname "$0")/common.bash"
install torch==2.13.0 numpy==2.4.6

output=$(python - <<'PY'
import torch

print(torch.__version__)
orders = []
for name, seed in (("1", 1), ("1 + 2**32", 1 + 2**32), ("1 + 2**62", 1 + 2**62), ("2", 2)):
    generator = torch.Generator().manual_seed(seed)
    orders.append(torch.randperm(10, generator=generator).tolist())
    shown = f"{orders[-1]} initial_seed {generator.initial_seed()}" if name != "2" else (
        "other numbers" if orders[-1] != orders[0] else "the same numbers"
    )
    print(f"seed {name}: {shown}")
print("still so" if orders[0] == orders[1] == orders[2] != orders[3] else "changed")
PY
)
echo "$output"
expect "$output" "^seed 1 \+ 2\*\*62: .* initial_seed 4611686018427387905$"
expect "$output" "^still so$"

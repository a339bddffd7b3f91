"""Planted bugs in the kernels of the product: lines of their headers, and the mistake that stands there instead.

    product_plants.py HEADERS DIRECTORY

copies the headers that have plants from HEADERS, the folder csrc, into DIRECTORY. In a copy such a line is a choice:
the mistake, if ``kda::tests::planted`` names it, or the line as it is. The compiler finds the copies first. So one
program, product_plants.cpp, has every bug, and the product has no trace of them. A line must be in its header exactly
once: where the code moves, this fails, and the plant moves too. sanitize.py runs the program and holds what it reports
against ``found``.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

CHOICE = """#pragma once
namespace kda::tests {{
enum class Plant {{ {names} }};
inline constexpr char const* kPlants[] = {{ {texts} }};
inline Plant planted = Plant::none;
}}
"""


@dataclass(frozen=True)
class Plant:
    name: str
    header: str
    line: str  # whole statements of one block
    mistake: str
    build: str  # plain: wrong results, or what the emulator says; tsan: what ThreadSanitizer says
    found: tuple[str, ...]  # what the report says


def wrong(*gradients: str) -> tuple[str, ...]:
    return tuple(f": {name}: relative RMS error" for name in gradients)


def race(header: str) -> tuple[str, ...]:
    return "data race", header


KERNEL, KEYS, REDUCE, SCAN, SLICES, VALUES = (
    f"kda/chunk_bwd/{name}.h" for name in ("kernel", "keys_thread", "reduce", "scan", "keys", "values")
)
PLANTS = (
    # ---- scans that are a chunk or a round behind --------------------------------------------------------------------
    Plant(
        "reverse_scan_starts_a_chunk_late",
        KERNEL,
        "init_scan<Variant, kPass>(storage->reverse);",
        "init_scan<Variant, kPass>(storage->reverse);\nif (work.chunks > 1) --work.chunks;",
        "plain",
        wrong("dk", "dv", "dinitial_state"),
    ),
    Plant(
        "gradient_of_a_state_a_chunk_late",
        SCAN,
        "after(cell);",
        "after(cell);\nif (kPass == ScanPass::kReverse) before(cell);",
        "plain",
        wrong("dk", "dv"),
    ),
    Plant(
        "state_of_the_chunk_before",
        SCAN,
        "before(cell);",
        "if (kPass == ScanPass::kReverse || i == 0) before(cell);\n"
        "if (kPass == ScanPass::kStates && i + 1 < count)\n"
        "  before(BackwardCell<Variant>(p, first_cell + i + 1, work.value_head));",
        "plain",
        wrong("dq", "dg"),
    ),
    Plant(
        "state_of_the_round_before",
        SCAN,
        "keep_state<E>(consumer.state, cell.state(tile), consumer.row(), consumer.key());",
        "if (p.first_head == 0)\n  keep_state<E>(consumer.state, cell.state(tile), consumer.row(), consumer.key());",
        "plain",
        wrong("dq", "dg"),
    ),
    # ---- sums that leave something out -------------------------------------------------------------------------------
    Plant(
        "sum_of_one_turn",
        REDUCE,
        "sum += channel < kKeyTile ? chunk.ddt_bias[channel] : chunk.dA_log_of_all();",
        "if (cell < kRows) sum += channel < kKeyTile ? chunk.ddt_bias[channel] : chunk.dA_log_of_all();",
        "plain",
        wrong("ddt_bias", "dA_log"),
    ),
    Plant(
        "sum_without_its_last_row",
        REDUCE,
        "for (int i = 1; i < kRows; ++i) sum += storage->sum[i][column];",
        "for (int i = 1; i < kRows - 1; ++i) sum += storage->sum[i][column];",
        "plain",
        wrong("ddt_bias", "dA_log"),
    ),
    Plant(
        "sum_without_its_last_head",
        REDUCE,
        "for (int n = 0; n < group; ++n) sum += from[int64_t(n) * p.key_dim];",
        "for (int n = 0; n < group - 1; ++n) sum += from[int64_t(n) * p.key_dim];",
        "plain",
        wrong("dq", "dk"),
    ),
    Plant(
        "dots_of_one_slice",
        SLICES,
        "if (p.l2norm && kSlices > 1) add_dots_of_other_slices();",
        "",
        "plain",
        wrong("dq", "dk"),
    ),
    Plant(
        "dots_that_are_not_there",
        SLICES,
        "s.dots[kind][0][row] += await_published(&cell.sums().dots[i][kind * Base::kChunk + row]);",
        "s.dots[kind][0][row] += cell.sums().dots[i][kind * Base::kChunk + row];",
        "tsan",
        race(SLICES),
    ),
    Plant("sum_of_rows_that_are_not_there", REDUCE, "sync_block();", "", "tsan", race(REDUCE)),
    # ---- what is read before it is brought or computed ---------------------------------------------------------------
    Plant(
        "values_before_their_cell",
        VALUES,
        "for (int i = 0; i < count; ++i) bringer(i).wait(first / kTiles % 2);",
        "",
        "plain",
        ("chunk_bwd_values: ", "more than 1 arrivals in one phase"),
    ),
    Plant(
        "values_before_their_stream",
        VALUES,
        "cp_async_wait<0>();",
        "",
        "plain",
        ("chunk_bwd_values: ", "cp.async copies that were never waited for"),
    ),
    Plant(
        "keys_before_their_cell",
        KEYS,
        "bringer().wait(tile % 2);",
        "",
        "plain",
        ("chunk_bwd_keys: ", "more than 1 arrivals in one phase"),
    ),
    Plant(
        "reverse_scan_before_its_products",
        SCAN,
        "products.template wait<0>();",
        "",
        "plain",
        ("chunk_bwd_scan: ", "wgmma results that were never waited for"),
    ),
    # ---- shared memory that is filled again while it is read ---------------------------------------------------------
    Plant(
        "values_refilled_while_read",
        VALUES,
        "for (int i = 0; i < kTiles; ++i) bringer(i).release();\n        sync_block();",
        "for (int i = 0; i < kTiles; ++i) bringer(i).release();",
        "tsan",
        race(VALUES),
    ),
    Plant("values_over_the_state", VALUES, "sync_block();  // dX lies where dS_C was", "", "tsan", race(VALUES)),
    Plant(
        "scan_refilled_while_read",
        SCAN,
        "if (i >= kStages) Barrier::wait(Barrier::empty(stage));",
        "",
        "plain",
        ("chunk_bwd_scan: ", "a thread arrives twice at barrier"),
    ),
)


def choice(line: str, plants: list[Plant]) -> str:
    mistakes = (f"if (tests::planted == tests::Plant::{x.name}) {{\n{x.mistake}\n}} else " for x in plants)
    return "".join(mistakes) + f"{{\n{line}\n}}"


def with_choices(header: str, text: str, plants: list[Plant]) -> str:
    at: dict[str, list[Plant]] = defaultdict(list)
    for plant in plants:
        if (count := text.count(plant.line)) != 1:
            raise SystemExit(f"{plant.name}: {header} has this {count} times, expected once: {plant.line}")
        at[plant.line].append(plant)
    lines = re.compile("|".join(map(re.escape, at)))
    text = lines.sub(lambda found: choice(found[0], at[found[0]]), text)
    return text.replace("#pragma once\n", '#pragma once\n#include "planted.h"\n', 1)


def copies(headers: Path, plants: tuple[Plant, ...] = PLANTS) -> dict[str, str]:
    """Texts by their place below DIRECTORY."""
    of: dict[str, list[Plant]] = defaultdict(list)
    for plant in plants:
        of[plant.header].append(plant)
    names = ["none", *(plant.name for plant in plants)]
    declared = CHOICE.format(names=", ".join(names), texts=", ".join(f'"{name}"' for name in names))
    return {header: with_choices(header, (headers / header).read_text(), its) for header, its in of.items()} | {
        "planted.h": declared
    }


def main() -> None:
    headers, directory = (Path(argument) for argument in sys.argv[1:])
    texts = copies(headers)
    shutil.rmtree(directory, ignore_errors=True)
    for place, text in texts.items():
        path = directory / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()

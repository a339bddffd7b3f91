"""The storeys of the package: no module imports, at any place in it, one that leads back to it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import kda_cuda

PACKAGE = Path(kda_cuda.__file__).parent
PATHS = {".".join(("kda_cuda", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
         for path in PACKAGE.rglob("*.py")}  # fmt: skip

COMPILED = {"kda_cuda._C"}  # leads nowhere; not there in a reference-only install


def imported(module: str) -> Iterator[str]:
    """Modules of the package that ``module`` names in an import: inside functions too."""
    path = PATHS[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in PATHS)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join((*base, *(node.module or "").split("."))).strip(".")
            for alias in node.names:
                found = f"{source}.{alias.name}" if f"{source}.{alias.name}" in PATHS else source
                if f"{source}.{alias.name}" not in COMPILED and found in PATHS:
                    yield found


def circles(imports: dict[str, list[str]]) -> list[list[str]]:
    """Every chain of imports that ends where it began, one for each module that it leads back to."""
    found, finished = [], set()

    def walk(module: str, chain: list[str]) -> None:
        if module in chain:
            found.append([*chain[chain.index(module) :], module])
        elif module not in finished:
            for other in imports[module]:
                walk(other, [*chain, module])
            finished.add(module)

    for module in imports:
        walk(module, [])
    return found


def test_no_module_leads_back_to_itself():
    imports = {module: sorted(set(imported(module))) for module in PATHS}
    assert "kda_cuda.schemas" in imports["kda_cuda.library"] and "kda_cuda.native" in imports["kda_cuda.plans"]
    assert circles(imports) == []


def test_a_circle_is_found():
    assert circles({"a": ["b"], "b": ["c", "d"], "c": ["b"], "d": []}) == [["b", "c", "b"]]
    assert circles({"a": ["a"]}) == [["a", "a"]]
    assert circles({"a": ["b", "c"], "b": ["c"], "c": []}) == []

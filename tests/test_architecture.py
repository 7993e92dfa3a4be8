"""Who may import whom, as docs/architecture.md says, and that the page names files that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"tpfuse.ops": ROOT / "ops", "tpfuse.passes": ROOT / "passes", "tpfuse": ROOT / "tpfuse"}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for name, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([name, *(p for p in parts if p != "__init__")])] = path
    return found


MODULES = modules()


def imports(module: str) -> Iterator[str]:
    """Modules that a module imports, at its top or inside a function."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for a in node.names:
                yield f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base


def crossing(inside: str, forbidden: str, allowed: tuple[str, ...] = ()) -> list[str]:
    """``importer -> imported`` for every import from ``inside`` of ``forbidden`` that is not allowed."""

    def within(name: str, package: str) -> bool:
        return name == package or name.startswith(f"{package}.")

    return sorted(
        f"{module} -> {name}"
        for module in MODULES
        if within(module, inside)
        for name in imports(module)
        if within(name, forbidden) and name not in allowed
    )


OP_FACTS = (
    *("reference", "flavour", "layer_norm_reference", "layer_norm_flavour"),
    *("quant_reference", "quantizer"),
)


def test_the_pass_imports_what_the_op_computes_and_no_kernel():
    allowed = ("tpfuse.ops", *(f"tpfuse.ops.{m}" for m in OP_FACTS))
    assert crossing("tpfuse.passes", "tpfuse.ops", allowed) == []
    assert crossing("tpfuse.passes", "triton") == []


def test_the_op_imports_nothing_of_the_pass():
    assert crossing("tpfuse.ops", "tpfuse.passes") == []
    assert crossing("tpfuse.ops", "tpfuse.parallel") == []


def test_only_the_command_bench_imports_what_measures():
    others = [line for line in crossing("tpfuse", "tpfuse.measure") if not line.startswith("tpfuse.measure")]
    assert {line.partition(" ")[0] for line in others} == {"tpfuse.inspect.commands"}


def test_engines_are_loaded_by_their_engine_alone_and_load_it_late():
    others = [line for line in crossing("tpfuse", "tpfuse.engines") if not line.startswith("tpfuse.engines")]
    assert others == []
    for path in (ROOT / "tpfuse" / "engines").glob("*.py"):
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = [a.name for n in top if isinstance(n, ast.Import) for a in n.names]
        names += [n.module or "" for n in top if isinstance(n, ast.ImportFrom) and not n.level]
        assert not [n for n in names if n.partition(".")[0] in ("vllm", "sglang")], path.name


@pytest.mark.parametrize("folder", ("tpfuse/measure", "benchmarks"))
def test_what_measures_takes_no_private_name(folder):
    found = []
    for path in (ROOT / folder).rglob("*.py"):
        tree = ast.parse(path.read_text())
        ours = {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names
                if (n.module or "").startswith("tpfuse") or n.level}  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and ((node.module or "").startswith("tpfuse") or node.level):
                found += [f"{path.name}: {a.name}" for a in node.names if a.name.startswith("_")]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
                found += [f"{path.name}: {node.value.id}.{node.attr}"] if node.attr.startswith("_") else []
    assert found == []


def test_what_the_rules_forbid_is_found():
    assert "tpfuse.inspect.commands -> tpfuse.measure.bench" in crossing("tpfuse", "tpfuse.measure")
    assert any(
        "tpfuse.passes.replay -> tpfuse.ops.reference" in line for line in crossing("tpfuse.passes", "tpfuse.ops")
    )


# What serves several walks at once, and says what it is in its own first line.
UNNAMED = {
    "values.py",
    "storages.py",
    "candidate.py",
    "options.py",
    "streams.py",
    "invariant.py",
    "flavour.py",
    "stamps.py",
}


def test_the_page_names_files_that_exist_and_every_file_of_the_walks():
    page = (ROOT / "docs" / "architecture.md").read_text()
    names = set(re.findall(r"`([\w/]+\.(?:py|md))`", page))
    parts = ("tpfuse", "passes", "ops", "examples", "tests", "docs")
    files = [str(path.relative_to(ROOT)) for part in parts for path in (ROOT / part).rglob("*")]
    assert not [name for name in names if not any(f == name or f.endswith(f"/{name}") for f in files)]
    for part in ("passes", "ops", "ops/kernels"):
        inside = {path.name for path in (ROOT / part).glob("*.py")} - {"__init__.py"} - UNNAMED
        assert not {name for name in inside if not any(n == name or n.endswith(f"/{name}") for n in names)}


def test_a_set_of_dtypes_is_named_once():
    """Two copies of what "16 bits" or "what the op takes" means drift apart when one learns a dtype."""
    named: dict[frozenset[str], list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            value = node.value if isinstance(node, ast.Assign) else None
            if isinstance(value, ast.Tuple) and all(ast.unparse(item).startswith("torch.") for item in value.elts):
                named.setdefault(frozenset(map(ast.unparse, value.elts)), []).append(module)
    assert named, "no dtypes were found: this test looks at nothing"
    assert {modules[0]: modules[1:] for modules in named.values() if len(modules) > 1} == {}

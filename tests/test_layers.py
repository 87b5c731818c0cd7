"""Imports go down only: the protocol is free of files, the formats are free of sockets.

Each package lists what it may import of nbdimg; the leaves are open to all. Everything in a module counts, also what a
function imports or a type checker alone sees.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import nbdimg

ROOT = Path(nbdimg.__file__).parent
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(ROOT.rglob("*.py"))}

ARCHITECTURE = (ROOT.parent / "docs/architecture.md").read_text()

LEAVES = {
    "errors": set[str](),
    "units": {"errors"},
    "limits": {"errors", "units"},
    "uri": {"errors", "units"},
    "histogram": set[str](),
    "version": set[str](),
}
MAY_IMPORT = {
    **LEAVES,
    "wire": {*LEAVES},
    "storage": {*LEAVES},
    "image": {"storage", *LEAVES},
    "formats": {"image", "storage", *LEAVES},
    "export": {"wire", "image", *LEAVES},
    "config": {*LEAVES},
    "configfile": {"config", "export", "formats", "storage", "wire", *LEAVES},
    "server": {"export", "wire", "image", "formats", "storage", "config", *LEAVES},
    "admin": {"server", "export", "wire", "formats", "config", "configfile", *LEAVES},
    "cli": {"", "admin", "server", "export", "wire", "image", "formats", "storage", "config", "configfile", *LEAVES},
    "__main__": {"cli"},
    "": {"server", "formats", "config", *LEAVES},
}
"""`""` is nbdimg/__init__.py, the public API: nothing below the command line imports it."""

ONLY_IN = {
    "socket": {"server", "admin", "cli"},
    "ssl": {"server"},
    "uvloop": {"server"},
    "asyncio": {"storage", "image", "formats", "export", "server", "admin", "cli"},
    "aiohttp": {"admin"},
    "typer": {"cli"},
    "rich": {"cli"},
    "cryptography": {"formats"},
    "backports": {"formats"},
    "compression": {"formats"},
    "crc32c": {"formats"},
    "isal": {"formats"},
}
LAZY_LAYERS = {"admin"}
"""Only functions of other layers import them: HTTP is slow to import, and most servers have none."""
LAZILY = {"rich", "cryptography", "backports", "compression", "isal"}
"""Not needed to serve a plain image, and slow to import or not installed: functions import them."""
DESCRIPTOR_CALLS = {"open", "read", "readv", "write", "writev", "lseek", "fsync", "fdatasync", "sendfile", "splice"}
RANGE_CALLS = {"pread", "preadv", "pwrite", "pwritev", "truncate", "ftruncate", "posix_fallocate", "copy_file_range"}
FILE_CALLS = DESCRIPTOR_CALLS | RANGE_CALLS
"""Of `os`; storage/ alone calls them. cli/ opens standard streams."""


def layer_of(source: str) -> str:
    """`wire/messages.py` is of layer wire, `units.py` of units, `__init__.py` of the root."""
    return source.partition("/")[0].removesuffix(".py").replace("__init__", "")


def imported(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """(line, module, whether a function imports it) of every import; `from a import b` gives `a.b`, a relative one
    begins with a dot."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lazy = {inner for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, node in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}", node in lazy) for alias in node.names)


def import_violation(layer: str, module: str, is_lazy: bool) -> str | None:
    package, _, rest = module.partition(".")
    if package == "nbdimg":
        target = rest.partition(".")[0]
        target = target if target in MAY_IMPORT else ""
        allowed = target == layer or target in MAY_IMPORT[layer]
        if allowed and target in LAZY_LAYERS - {layer} and not is_lazy:
            return f"{target} is imported where it is used, not at the head of a module"
        return None if allowed else f"{layer or 'nbdimg'} may not import {target or 'nbdimg itself'}"
    if package in ONLY_IN:
        if package in LAZILY and not is_lazy:
            return f"{package} is imported where it is used, not at the head of a module"
        return None if layer in ONLY_IN[package] else f"{layer or 'nbdimg'} may not import {package}"
    return None if package in sys.stdlib_module_names else f"{module} is neither nbdimg's nor the standard library's"


def violations(source: str, text: str) -> list[str]:
    """What `text`, as the file `source` beneath nbdimg/, does that its layer may not do."""
    layer, tree = layer_of(source), ast.parse(text)
    found = [(line, import_violation(layer, module, is_lazy)) for line, module, is_lazy in imported(tree)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            if node.attr in FILE_CALLS and layer != "storage" and (layer, node.attr) != ("cli", "open"):
                found.append((node.lineno, f"os.{node.attr} outside storage"))
        elif isinstance(node, ast.ImportFrom) and node.module == "os" and layer != "storage":
            calls = sorted(FILE_CALLS & {alias.name for alias in node.names})
            found += [(node.lineno, f"os.{call} outside storage") for call in calls]
    return [f"{source}:{line}: {what}" for line, what in sorted(found, key=lambda each: each[0]) if what]


@pytest.mark.parametrize("source", SOURCES)
def test_module_stays_within_its_layer(source: str) -> None:
    assert violations(source, SOURCES[source]) == []


def test_every_layer_of_the_table_exists_and_has_modules() -> None:
    assert {layer_of(source) for source in SOURCES} == set(MAY_IMPORT)


@pytest.mark.parametrize("source", [each for each in SOURCES if each.count("/") and each.endswith("__init__.py")])
def test_package_is_found_by_its_name(source: str) -> None:
    """What a package imports may hide one within it by its name: then `import nbdimg.formats.qcow2.l1 as l1` fails."""
    parent, _, name = f"nbdimg/{source}".removesuffix("/__init__.py").replace("/", ".").rpartition(".")
    package = import_module(f"{parent}.{name}")
    assert getattr(import_module(parent), name) is package


def test_architectures_table_names_every_module_and_no_other() -> None:
    """Rows are of files, `wire/a.py`, `b.py`, or of a folder, `wire/`: then what is in it is named without `.py`."""
    files, stems = set[str](), set[str]()
    for where, what in re.findall(r"^\| (`.*?) \| (.*)", ARCHITECTURE, re.MULTILINE):
        folder = ""
        for name in re.findall(r"`([^`]+)`", where):
            folder = name.rpartition("/")[0] or folder
            if name.endswith("/"):
                stems |= {f"{folder}/{stem}.py" for stem in " ".join(re.findall(r"`([^`]+)`", what)).split()}
            else:
                files.add(f"{folder}/{name.rpartition('/')[2]}".lstrip("/"))
    assert files <= SOURCES.keys()
    assert {each for each in SOURCES if not each.endswith("/__init__.py")} <= files | stems


def test_table_has_no_cycle() -> None:
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        free = [layer for layer in MAY_IMPORT if layer not in order and MAY_IMPORT[layer] <= set(order)]
        assert free
        order += free


@pytest.mark.parametrize(
    ("source", "text", "what"),
    [
        ("wire/x.py", "import asyncio", "wire may not import asyncio"),
        ("wire/x.py", "from nbdimg.storage.file import BlockFile", "wire may not import storage"),
        ("wire/x.py", "from nbdimg import server", "wire may not import server"),
        ("wire/x.py", "from nbdimg import Service", "wire may not import nbdimg itself"),
        ("storage/x.py", "def f():\n    import socket", "storage may not import socket"),
        ("formats/x.py", "if TYPE_CHECKING:\n    from socket import socket", "formats may not import socket"),
        ("formats/raw.py", "import nbdimg.wire.errors as e", "formats may not import wire"),
        ("image/x.py", "import os\nos.preadv(0, [], 0)", "os.preadv outside storage"),
        ("server/x.py", "from os import fsync as flush, stat", "os.fsync outside storage"),
        ("export/x.py", "from nbdimg.formats import open_image", "export may not import formats"),
        ("cli/x.py", "import ssl", "cli may not import ssl"),
        ("server/x.py", "from ..cli import main", "..cli.main is neither nbdimg's nor the standard library's"),
        ("cli/x.py", "from rich import print", "rich is imported where it is used, not at the head of a module"),
        ("server/x.py", "def f():\n    import rich", "server may not import rich"),
        ("cli/x.py", "from nbdimg.admin import app", "admin is imported where it is used, not at the head of a module"),
        ("cli/x.py", "def f():\n    import aiohttp", "cli may not import aiohttp"),
        ("server/x.py", "def f():\n    from nbdimg.admin import app", "server may not import admin"),
        ("image/x.py", "def f():\n    from backports import zstd", "image may not import backports"),
        ("storage/x.py", "def f():\n    import cryptography", "storage may not import cryptography"),
        ("units.py", "import numpy", "numpy is neither nbdimg's nor the standard library's"),
        ("units.py", "from nbdimg import limits", "units may not import limits"),
    ],
)
def test_control_violation_is_reported(source: str, text: str, what: str) -> None:
    (found,) = violations(source, text)
    assert found.startswith(f"{source}:")
    assert found.endswith(f": {what}")


def test_control_what_is_allowed_is_not_reported() -> None:
    text = "import os, errno\nfrom nbdimg import limits\nfrom nbdimg.units import MiB\nos.stat('x')"
    assert violations("wire/x.py", text) == []
    assert violations("storage/x.py", "import os\nos.pread(0, 1, 0)") == []
    assert violations("cli/x.py", "def f():\n    from rich.progress import Progress") == []
    assert violations("cli/x.py", "def f():\n    from nbdimg.admin import app") == []
    assert violations("admin/x.py", "from aiohttp import web\nfrom nbdimg.admin import app") == []
    assert violations("formats/x.py", "async def f():\n    from backports import zstd") == []

"""Text of installed packages: docstrings as prose, sources as code, licences as boilerplate. Files are only read."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from dyno.data.document import Document
from dyno.errors import UserError

PACKAGES = ("networkx", "numpy", "pandas", "sympy")
# Pure Python packages that the core dependencies bring: a binary wheel's licence lists what its platform bundles.
LICENSED = (
    "alembic", "altair", "attrs", "click", "codecarbon", "colorlog", "filelock", "fsspec", "hydra-core", "idna",
    "jinja2", "jsonschema", "mpmath", "narwhals", "networkx", "omegaconf", "optuna", "packaging",
    "prometheus-client", "python-dateutil", "referencing", "requests", "rich", "six", "sympy", "tqdm",
    "typing-extensions", "urllib3",
)  # fmt: skip
SKIPPED_DIRECTORIES = {"tests", "testing", "_testing", "benchmarks", "__pycache__"}
# Written by the wheel's build, so different on every platform.
SKIPPED_FILES = {"__config__.py", "_version.py", "_version_meson.py", "version.py", "_distributor_init.py"}
LARGEST_FILE_BYTES = 200_000  # larger ones are mostly generated tables, and slow to parse
SMALLEST_BYTES = 200
LARGEST_PROSE_BYTES, LARGEST_CODE_BYTES, LARGEST_LICENCE_BYTES = 6_000, 3_000, 12_000
CODE_BYTES_A_FILE = 18_000  # so that the selection spans many files
_LICENCE = re.compile(r"^[^/,\n]+\.dist-info/((?:[^,\n]*/)?(?:LICEN[CS]E|COPYING|NOTICE)[^,/\n]*),", re.MULTILINE)


def prose_and_code(prose_bytes: int, code_bytes: int) -> dict[str, list[Document]]:
    """Documents of both sources up to the given bytes; a budget of 0 gives an empty list.

    Each package gives an equal share, and later packages get what an earlier one could not fill. Raises UserError for a
    missing package.
    """
    found: dict[str, list[Document]] = {"prose": [], "code": []}
    left = {"prose": prose_bytes, "code": code_bytes}
    for done, package in enumerate(PACKAGES):
        share = {source: left[source] // (len(PACKAGES) - done) for source in left}
        for path, name in _files(package):
            if all(rest < SMALLEST_BYTES for rest in share.values()):
                break
            for document in read_source(path, name):
                size = len(document.text.encode())
                if size <= share[document.source]:
                    share[document.source] -= size
                    left[document.source] -= size
                    found[document.source].append(document)
    return found


def licences() -> Iterator[Document]:
    """The licence files of LICENSED in their order, cut at 12 kB; packages that are not installed are passed over."""
    for package in LICENSED:
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            continue
        for name in sorted(_LICENCE.findall(distribution.read_text("RECORD") or "")):
            text = distribution.read_text(name)
            if text and len(text) >= SMALLEST_BYTES:
                yield Document(f"boilerplate/{package}/{name}", "boilerplate", _cut(text, LARGEST_LICENCE_BYTES))


def read_source(path: Path, name: str) -> list[Document]:
    """The docstrings of one Python file as prose, and the rest as code in pieces that end between statements.

    Docstrings leave the code, so that no text is in both sources. A file that is no UTF-8 or no Python gives nothing.
    """
    try:
        text = path.read_text(encoding="utf-8")  # universal newlines
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    lines: list[str | None] = list(text.split("\n"))
    documents = []
    for body, constant, doc in _docstrings(tree):
        prose = _cut(_dedent(doc), LARGEST_PROSE_BYTES)
        if len(prose.encode()) >= SMALLEST_BYTES:
            documents.append(Document(f"prose/{name}#{constant.lineno}", "prose", prose))
        indent = " " * constant.col_offset
        for number in range(constant.lineno - 1, constant.end_lineno or constant.lineno):
            lines[number] = None
        if len(body) == 1:
            lines[constant.lineno - 1] = f"{indent}..."
    starts = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1 for node in tree.body]
    left = CODE_BYTES_A_FILE
    for number, piece in enumerate(_pieces(lines, starts)):
        left -= len(piece.encode())
        if left < 0:
            break
        if len(piece.encode()) >= SMALLEST_BYTES:
            documents.append(Document(f"code/{name}#{number}", "code", piece))
    return documents


def _files(package: str) -> list[tuple[Path, str]]:
    """(path, name) of the package's source files, in the fixed order of the hash of their names."""
    spec = find_spec(package)  # finds a top-level package without running it
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the embedded corpus reads the package {package}, which is not installed: pip install {package}"
        )
    root = Path(spec.submodule_search_locations[0])
    found = []
    for directory, children, names in os.walk(root):
        children[:] = [child for child in children if child not in SKIPPED_DIRECTORIES]
        for path in (Path(directory, name) for name in names if name.endswith(".py") and name not in SKIPPED_FILES):
            if path.stat().st_size <= LARGEST_FILE_BYTES:
                found.append((path, path.relative_to(root.parent).as_posix()))
    return sorted(found, key=lambda item: hashlib.sha256(item[1].encode()).digest())


def _docstrings(tree: ast.Module) -> Iterator[tuple[list[ast.stmt], ast.Constant, str]]:
    """(body, docstring, its text) of the module, classes and functions, where it has its lines for itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            alone = len(node.body) == 1 or node.body[1].lineno > (first.end_lineno or 0)
            inside = isinstance(node, ast.Module) or first.lineno > node.lineno
            if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and alone and inside):
                continue
            if isinstance(first.value.value, str):
                yield node.body, first.value, first.value.value


def _pieces(lines: list[str | None], starts: list[int]) -> Iterator[str]:
    """Pieces of up to LARGEST_CODE_BYTES that end before a top-level statement where they can."""
    size = 0
    piece: list[str] = []
    borders = [0, *starts, len(lines)]
    for start, end in zip(borders, borders[1:], strict=False):
        block = [line for line in lines[start:end] if line is not None]
        needed = sum(len(line.encode()) + 1 for line in block)
        units = [block] if needed <= LARGEST_CODE_BYTES else [[line] for line in block]
        for unit in units:
            needed = sum(len(line.encode()) + 1 for line in unit)
            if size + needed > LARGEST_CODE_BYTES and piece:
                yield "\n".join(piece).strip("\n")
                size, piece = 0, []
            piece += unit
            size += needed
    yield "\n".join(piece).strip("\n")


def _dedent(doc: str) -> str:
    """A docstring without its common indentation; inspect.cleandoc, but the same in every Python release."""
    first, *rest = doc.expandtabs().split("\n")
    margin = min((len(line) - len(line.lstrip(" ")) for line in rest if line.strip()), default=0)
    return "\n".join([first.lstrip(), *(line[margin:].rstrip() for line in rest)]).strip()


def _cut(text: str, limit: int) -> str:
    """The whole lines of `text` that fit in `limit` bytes, with newlines as \\n and no lone surrogates."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    size = 0
    for count, line in enumerate(lines):
        size += len(line.encode()) + 1
        if size > limit:
            return "\n".join(lines[:count])
    return "\n".join(lines)

"""The embedded corpus: a few MB of text that every installation has or can make, with nothing downloaded or vendored.

Prose and code come from the files of installed packages that the lock file pins, boilerplate from their licences;
stories, noise and planted duplicates are generated. Where the same package versions are installed, the documents and
their fingerprint are the same: files are read, never imported, and nothing depends on the platform, the directory's
order, hash seeds or the standard library of one Python release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from dyno.data.document import Document
from dyno.data.draw import Draw
from dyno.data.generator import Planted, noise, plant
from dyno.data.packages import licences, prose_and_code
from dyno.data.stories import tale
from dyno.errors import UserError

# The share of bytes of each source.
SOURCES = {"prose": 0.3, "code": 0.3, "boilerplate": 0.06, "stories": 0.28, "noise": 0.06}
SMALLEST_CORPUS_BYTES = 20_000
PLANTED_EACH = 8  # copies a kind at 3 MB


@dataclass(frozen=True)
class Embedded:
    """The corpus and the truth about the duplicates planted in it."""

    documents: list[Document]
    planted: list[Planted]


def build(size_bytes: int = 3_000_000, seed: int = 0, sources: Sequence[str] | None = None) -> Embedded:
    """Documents of about `size_bytes` UTF-8 bytes, source by source in a fixed order, planted copies last.

    `seed` moves generated text and copies, not the choice of package files. `sources` picks some of SOURCES, which
    then share the size. Boilerplate ends where the installed licences do. Raises UserError for an unknown source, a
    size under 20 kB, or a missing package.
    """
    wanted = list(SOURCES) if sources is None else list(sources)
    unknown = sorted(set(wanted) - set(SOURCES))
    if unknown or not wanted:
        raise UserError(f"corpus.sources has {unknown or 'no source'}: choose from {list(SOURCES)}")
    if size_bytes < SMALLEST_CORPUS_BYTES:
        raise UserError(f"corpus.size_bytes={size_bytes} is too small: at least {SMALLEST_CORPUS_BYTES}")
    total = sum(SOURCES[source] for source in wanted)
    budget = {source: int(size_bytes * share / total) for source, share in SOURCES.items() if source in wanted}
    collected: dict[str, list[Document]] = {source: [] for source in budget}
    if "prose" in budget or "code" in budget:
        collected |= prose_and_code(budget.get("prose", 0), budget.get("code", 0))
    if "boilerplate" in budget:
        collected["boilerplate"] = _take(licences(), budget["boilerplate"])
    for source, write in (("stories", tale), ("noise", noise)):
        if source in budget:
            collected[source] = _take(_generated(source, write, seed), budget[source])
    documents = [document for source in budget for document in collected[source]]
    copies, planted = plant(documents, seed, max(1, PLANTED_EACH * size_bytes // 3_000_000))
    return Embedded(documents + copies, planted)


def _take(documents: Iterable[Document], budget: int) -> list[Document]:
    """Documents from the front while they fit in `budget` bytes."""
    taken = []
    for document in documents:
        budget -= len(document.text.encode())
        if budget < 0:
            break
        taken.append(document)
    return taken


def _generated(source: str, write: Callable[[Draw], str], seed: int) -> Iterator[Document]:
    draw = Draw(seed, source)
    number = 0
    while True:
        yield Document(f"{source}/{number:05d}", source, write(draw))
        number += 1

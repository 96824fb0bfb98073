"""Generated text: noise of several kinds, and copies of documents with a known similarity."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from dyno.data.document import Document
from dyno.data.draw import Draw

SHINGLE_WORDS = 5
SIMILARITIES = (0.95, 0.9, 0.8, 0.7, 0.5)


@dataclass(frozen=True)
class Planted:
    """The truth about one planted copy.

    `kind` is "exact" (equal bytes), "folded" (equal after normalisation) or "near"; `jaccard` is the exact similarity
    of original and copy over sets of 5 whitespace-separated words.
    """

    original: str
    copy: str
    kind: str
    jaccard: float


def shingles(text: str, words: int = SHINGLE_WORDS) -> set[tuple[str, ...]]:
    """The distinct runs of `words` words; a shorter text is one shingle."""
    tokens = text.split()
    return set(zip(*(tokens[start:] for start in range(words)), strict=False)) or {tuple(tokens)}


def jaccard(a: str, b: str, words: int = SHINGLE_WORDS) -> float:
    """Exact Jaccard similarity of two texts over their word shingles: the reference for approximate methods."""
    left, right = shingles(a, words), shingles(b, words)
    return len(left & right) / len(left | right)


def plant(documents: Sequence[Document], seed: int, each: int) -> tuple[list[Document], list[Planted]]:
    """Copies of some of `documents`: `each` exact, `each` folded, and `each` near ones a similarity of SIMILARITIES.

    No document is copied twice. Returns the copies, which keep their original's source, and the truth about each.
    """
    draw = Draw(seed, "plant")
    # Repeated shingles would blur the arithmetic of `_rewrite`; long enough texts with none are plentiful.
    usable = [d for d in documents if len(words := d.text.split()) >= 100 and len(shingles(d.text)) == len(words) - 4]
    kinds: list[tuple[str, Callable[[str], str]]] = [("exact", lambda text: text), ("folded", _respace)]
    kinds += [("near", partial(_rewrite, target=target, draw=draw)) for target in SIMILARITIES]
    each = min(each, len(usable) // len(kinds))
    chosen = iter(draw.sample(usable, each * len(kinds)))
    copies: list[Document] = []
    truth: list[Planted] = []
    for kind, edit in kinds:
        for original in (next(chosen) for _ in range(each)):
            text = edit(original.text)
            copy = Document(f"{original.id}~{kind}{len(copies):03d}", original.source, text)
            copies.append(copy)
            truth.append(Planted(original.id, copy.id, kind, jaccard(original.text, text)))
    return copies, truth


def _respace(text: str) -> str:
    """The same words, other whitespace."""
    return "  " + "\n".join(line.replace(" ", "  ") for line in text.split("\n")) + "\n\n"


def _rewrite(text: str, target: float, draw: Draw) -> str:
    """Replace evenly spread words by new ones until the similarity is as near `target` as whole words allow.

    With n distinct shingles of w words, k replaced words that are at least w apart and w from the ends change w k of
    them, so J = (n - w k) / (n + w k).
    """
    parts = re.split(r"(\s+)", text.strip())  # words at even places, the whitespace between them at odd ones
    width, words = SHINGLE_WORDS, (len(parts) + 1) // 2
    count = max(1, round((words - width + 1) * (1 - target) / (width * (1 + target))))
    step = max(width, (words - 2 * width) // count)
    for word in range(width, min(width + step * count, words - width), step):
        parts[2 * word] = "".join(draw.pick(string.ascii_lowercase) for _ in range(9))
    return "".join(parts)


def noise(draw: Draw) -> str:
    """One piece of text that nobody wants to train on; seven kinds, for which different quality rules exist."""
    return draw.pick((_keys, _loop, _menu, _numbers, _dump, _salad, _stub))(draw)


def _keys(draw: Draw) -> str:
    return "".join(draw.pick(string.printable[:94] + " ") for _ in range(200 + draw.below(600)))


def _loop(draw: Draw) -> str:
    line = " ".join(_word(draw) for _ in range(4 + draw.below(5)))
    return "\n".join([line] * (10 + draw.below(30)))


def _menu(draw: Draw) -> str:
    return "\n".join(f"- {_word(draw).capitalize()}" for _ in range(15 + draw.below(40)))


def _numbers(draw: Draw) -> str:
    columns = 3 + draw.below(6)
    return "\n".join("\t".join(str(draw.below(100_000)) for _ in range(columns)) for _ in range(10 + draw.below(20)))


def _dump(draw: Draw) -> str:
    return "\n".join(
        f"{row:08x}  " + " ".join(f"{draw.below(256):02x}" for _ in range(16)) for row in range(0, 256, 16)
    )


def _salad(draw: Draw) -> str:
    return " ".join(_word(draw) for _ in range(60 + draw.below(120)))


def _stub(draw: Draw) -> str:
    return draw.pick(("Read more", "Page not found", "Loading", "Sign in", "See also")) + f" {draw.below(1000)}"


def _word(draw: Draw) -> str:
    return "".join(draw.pick("bdfgklmnprstvz") + draw.pick("aeiou") for _ in range(1 + draw.below(4)))

"""Rule-based quality filtering."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dyno.errors import UserError
from dyno.technique import Technique

if TYPE_CHECKING:
    from dyno.technique import Run

LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")
_HEAD = 4096


@dataclass
class QualityRules(Technique):
    """Removes documents that break a cheap rule on length, characters, lines or repetition.

    In the manner of Gopher's rules (Rae et al. 2021, https://arxiv.org/abs/2112.11446, appendix A1.1).
    A document is removed by the first rule it breaks, in this order; lengths are in characters, 0 or null turns a rule
    off. Documents of `exempt_sources` pass: code has short lines, few letters and repeats itself, rightly.

    min_chars, max_chars: bounds of the length.
    min_unique_chars: at least as many different characters.
    min_letter_ratio: letters (str.isalpha) / characters.
    min_line_chars: mean length of non-blank lines, where there are more than `list_lines`: finds lists and menus.
    min_unique_word_ratio: different words / words. It falls with length by nature (Heaps' law), so it is severe
      with very long documents.
    """

    min_chars: int = 100
    max_chars: int | None = 100_000
    min_unique_chars: int = 10
    min_letter_ratio: float = 0.5
    min_line_chars: float = 20.0
    list_lines: int = 10
    min_unique_word_ratio: float = 0.3
    exempt_sources: list[str] = field(default_factory=lambda: ["code"])

    def __post_init__(self) -> None:
        for name in ("min_letter_ratio", "min_unique_word_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data_filters.quality_rules.{name}={getattr(self, name)} is a share: between 0 and 1")
        if self.max_chars and self.max_chars < self.min_chars:
            raise UserError(
                f"data_filters.quality_rules.max_chars={self.max_chars} is under min_chars={self.min_chars}"
            )

    def apply(self, run: Run) -> None:
        exempt = set(self.exempt_sources)
        kept, removed = [], {}
        for document in run.documents:
            rule = None if document.source in exempt else self.broken(document.text)
            if rule is None:
                kept.append(document)
            else:
                removed[document.id] = rule
        run.note(
            "quality_rules",
            {
                "documents": len(run.documents),
                "kept": len(kept),
                "removed": len(removed),
                "by_rule": dict(sorted(Counter(removed.values()).items())),
                "broken_rule": removed,
            },
        )
        run.documents = kept

    def broken(self, text: str) -> str | None:
        """The knob of the first rule that the text breaks, or None."""
        rules: tuple[tuple[str, Callable[[str], bool]], ...] = (
            ("min_chars", lambda text: len(text) < self.min_chars),
            ("max_chars", lambda text: bool(self.max_chars) and len(text) > (self.max_chars or 0)),
            ("min_unique_chars", self._few_characters),
            ("min_letter_ratio", lambda text: letters(text) / max(1, len(text)) < self.min_letter_ratio),
            ("min_line_chars", self._short_lines),
            ("min_unique_word_ratio", self._repeated_words),
        )
        return next((name for name, breaks in rules if breaks(text)), None)

    def _few_characters(self, text: str) -> bool:
        # The head of a text nearly always has enough: reading on can only add.
        return len(set(text[:_HEAD])) < self.min_unique_chars and len(set(text)) < self.min_unique_chars

    def _short_lines(self, text: str) -> bool:
        lengths = [len(line) for line in text.split("\n") if line and not line.isspace()]
        return len(lengths) > max(0, self.list_lines) and sum(lengths) / len(lengths) < self.min_line_chars

    def _repeated_words(self, text: str) -> bool:
        words = text.split()
        return bool(words) and len(set(words)) / len(words) < self.min_unique_word_ratio


def letters(text: str) -> int:
    """How many characters of a text are letters: sum(map(str.isalpha, text)), ASCII at the speed of a byte table."""
    raw = text.encode("ascii", "ignore")
    count = len(raw) - len(raw.translate(None, LETTERS))
    if len(raw) < len(text):
        count += sum(map(str.isalpha, "".join(_BEYOND_ASCII.findall(text))))
    return count

"""What of a corpus can't be used: counted, with the reason, and never left out in silence."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from ..predictors.errors import UserError

Refuse = Callable[[str, str], None]
"""Called with the place of a row or file that can't be used (`row 3 of a.jsonl`) and the reason."""


class CorpusError(UserError):
    """The corpus is missing, unreadable or empty; the message says which and what to do."""


class RefusedError(ValueError):
    """A row or a file can't be used; the message is the reason. The others can be."""


def refuse_all(where: str, reason: str) -> None:
    """Raises `CorpusError`: nothing may be left out."""
    raise CorpusError(advised(f"{where} {reason}"))


def advised(sentence: str) -> str:
    """The sentence with an advice, if it has none."""
    return sentence if ";" in sentence else f"{sentence}; mend it, or give another corpus"


class Refusals:
    """Counts what was refused, by reason."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        """Rows and files by reason."""
        self.first: dict[str, str] = {}
        """The place of the first one with each reason."""

    def add(self, where: str, reason: str) -> None:
        """Counts one."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    def report(self, console: Console) -> None:
        """Prints how many rows and files were left out, a line for each reason; nothing if there are none."""
        if not self.counts:
            return
        console.print(f"rows and files left out of the corpus: {sum(self.counts.values()):,}", highlight=False)
        for reason, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            line = f"  {count:,} like {self.first[reason]}, which {reason}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)

"""A block between two comments in a hand-written page, which a program writes."""

from pathlib import Path
from typing import NamedTuple

from training.files import write_atomically


class MarkedBlock(NamedTuple):
    """Two comments, each once in a page and in this order."""

    begin: str
    end: str

    def current(self, page: Path) -> str:
        """Return the text between the comments.

        Raises:
            FileNotFoundError: if the page does not exist.
            ValueError: if the page does not have each comment once, in this order.
        """
        return self._split(page)[1]

    def rewrite(self, page: Path, text: str) -> bool:
        """Replace the text between the comments; return whether it changed."""
        before, old, after = self._split(page)
        content = (before + text + after).encode()
        if old != text:
            write_atomically(page, lambda file: file.write(content))
        return old != text

    def _split(self, page: Path) -> tuple[str, str, str]:
        content = page.read_bytes().decode()
        before, _, rest = content.partition(self.begin)
        old, _, after = rest.partition(self.end)
        if content.count(self.begin) != 1 or content.count(self.end) != 1 or self.end not in rest:
            raise ValueError(
                f"{page} must have one line {self.begin} and after it one line {self.end}; add them where "
                "the block belongs"
            )
        return before + self.begin, old, self.end + after

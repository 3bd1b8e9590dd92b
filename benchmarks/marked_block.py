"""A block between two comments in a hand-written page, which a program writes."""

from dataclasses import dataclass
from pathlib import Path

from training.files import write_atomically


@dataclass(frozen=True)
class MarkedBlock:
    """Two comments, each once in a page and in this order."""

    begin: str
    end: str

    def is_in(self, page: Path) -> bool:
        """Whether a page has one of the comments, so that it should have both."""
        content = page.read_text(encoding="utf-8")
        return self.begin in content or self.end in content

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
        if old == text:
            return False
        content = (before + text + after).encode()
        write_atomically(page, lambda file: file.write(content))
        return True

    def _split(self, page: Path) -> tuple[str, str, str]:
        content = page.read_bytes().decode()
        begin, end = content.find(self.begin), content.find(self.end)
        if content.count(self.begin) != 1 or content.count(self.end) != 1 or end < begin:
            raise ValueError(
                f"{page} must have one line {self.begin} and after it one line {self.end}; add them where "
                "the block belongs"
            )
        start = begin + len(self.begin)
        return content[:start], content[start:end], content[end:]

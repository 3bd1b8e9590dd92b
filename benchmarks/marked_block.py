"""The part of a hand-written page that a program writes: what stands between two comments."""

from dataclasses import dataclass
from pathlib import Path

from training.files import write_atomically


@dataclass(frozen=True)
class MarkedBlock:
    """Two comments that stand once each in a page, in this order."""

    begin: str
    end: str

    def current(self, page: Path) -> str:
        """What stands between the two comments.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the comments are not there once each, in this order.
        """
        return self._split(page)[1]

    def rewrite(self, page: Path, text: str) -> bool:
        """Put ``text`` between the comments and leave all else as it is; returns whether anything changed."""
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
                f"{page} must have one line {self.begin} and after it one line {self.end}; put them "
                "where the figures belong"
            )
        start = begin + len(self.begin)
        return content[:start], content[start:end], content[end:]

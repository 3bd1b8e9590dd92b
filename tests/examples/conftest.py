"""The demo runs other programs, as benchmarks do, so its test uses their fixture."""

from tests.benchmarks.conftest import programs

__all__ = ["programs"]

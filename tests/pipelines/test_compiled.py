"""Where compiled kernels are kept."""

import shutil
from pathlib import Path

from pipelines import compiled


def test_any_changed_file_of_the_package_changes_the_place(tmp_path: Path) -> None:
    """A constant from a file without kernels is compiled into those of another."""
    copy = tmp_path / "pipelines"
    shutil.copytree(Path(compiled.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = compiled.hash_of_sources(copy)
    assert before == compiled.hash_of_sources(Path(compiled.__file__).parent)
    for name in ("beton.py", "resample.py", "recipe.py"):
        with (copy / name).open("a") as file:
            file.write("\n# changed\n")
        after = compiled.hash_of_sources(copy)
        assert after != before
        before = after


def test_options_of_a_kernel_are_left_as_they_were_for_others() -> None:
    import numba

    before = numba.config.CACHE_DIR
    assert compiled.kernel(lambda x: x + 1)(1) == 2
    assert before == numba.config.CACHE_DIR

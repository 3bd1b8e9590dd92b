"""Compiled kernels are cached on disk by the code they come from."""

import shutil
from pathlib import Path

from pipelines.kernels import compiled

PACKAGE = Path(compiled.__file__).parents[1]


def test_changed_code_in_any_file_of_the_package_changes_the_cache_folder(tmp_path: Path) -> None:
    """A constant from one file may be compiled into the kernels of another."""
    copy = tmp_path / "pipelines"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = compiled.hash_of_sources(copy)
    assert before == compiled.hash_of_sources(PACKAGE)
    for name in ("sets/beton.py", "kernels/resample.py", "recipe.py"):
        with (copy / name).open("a") as file:
            file.write("\nCHANGED = 1\n")
        after = compiled.hash_of_sources(copy)
        assert after != before
        before = after


def test_docstrings_and_comments_do_not_change_the_cache_folder(tmp_path: Path) -> None:
    code = '"""One."""\n\ndef f(x):\n    """Two."""\n    return x in {"a", "b"}\n'
    (tmp_path / "a.py").write_text(code)
    before = compiled.hash_of_sources(tmp_path)
    (tmp_path / "a.py").write_text(code.replace("One", "Other").replace("Two", "Words") + "# a comment\n")
    assert compiled.hash_of_sources(tmp_path) == before
    (tmp_path / "a.py").write_text(code.replace('"b"', '"c"'))
    assert compiled.hash_of_sources(tmp_path) != before


def test_kernel_restores_numbas_options() -> None:
    import numba

    before = numba.config.CACHE_DIR
    assert compiled.kernel(lambda x: x + 1)(1) == 2
    assert before == numba.config.CACHE_DIR

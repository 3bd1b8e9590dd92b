"""Packs: archives respect their limit, only missing packages are added, errors are one sentence."""

import hashlib
import importlib.metadata
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.training.install.bare import closure, make_bare, make_wheels, run_bash
from training.install import activate, downloads, pack
from training.install.activate import FOLDER
from training.install.downloads import MACHINES_OWN, Wheel
from training.install.pack import Pack, Piece

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
# The packages that the programs started here need, and Pillow, which torchvision depends on.
REQUIREMENTS = [
    text
    for text in pack.requirements()[0]
    if text.startswith(("torch", "pillow", "safetensors", "tensorboard", "matplotlib", "rich", "tyro"))
]
CONSTRAINTS = pack.ROOT / "constraints.txt"
UNREACHABLE = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_FIND_LINKS": "",
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_EXTRA_INDEX_URL": "",
}


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every package index unreachable."""
    for name, value in UNREACHABLE.items():
        monkeypatch.setenv(name, value)


def _skip_outside_a_clone() -> None:
    if not (pack.ROOT / ".git").exists():
        pytest.skip("packs are made in a clone, and this is not one")


def _turbojpeg() -> Path:
    found = sorted(Path("/usr/lib").glob("*/libturbojpeg.so.0"))
    if not found:
        pytest.skip("no libturbojpeg.so.0 below /usr/lib; apt-get install libturbojpeg0")
    return found[0]


# ======================================================================================================
# A whole pack of packages that are installed here
# ======================================================================================================


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """A pack made without a network."""
    _skip_outside_a_clone()
    root = tmp_path_factory.mktemp("pack")
    (root / "wheels").mkdir()
    make_wheels(root / "wheels", closure(REQUIREMENTS, without=MACHINES_OWN).values())
    make_wheels(root / "wheels", [importlib.metadata.distribution("numpy")], only_metadata=True)
    config = Pack(root / "out", HERE, turbojpeg=_turbojpeg(), cache=root / "cache", limit_mib=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "requirements", lambda: (REQUIREMENTS, [], []))
        for name, value in {**UNREACHABLE, "PIP_NO_INDEX": "1"}.items():
            patch.setenv(name, value)
        patch.setenv("PIP_FIND_LINKS", str(root / "wheels"))
        pack.main(config)
    return config


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has only torch, torchvision, numpy and numba."""
    return make_bare(tmp_path_factory.mktemp("bare"), closure(MACHINES_OWN).values())


@pytest.fixture(scope="module")
def unpacked(packed: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which all archives were unpacked."""
    folder = tmp_path_factory.mktemp("unpacked")
    for archive in packed.out.glob("*.tar.gz"):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="tar")
    return folder


def test_archives_are_within_the_limit_and_match_their_sums(packed: Pack) -> None:
    archives = sorted(packed.out.glob("*.tar.gz"))
    sums = dict(line.split("  ")[::-1] for line in (packed.out / "SHA256SUMS").read_text().splitlines())
    assert len(archives) > 1 and set(sums) == {path.name for path in archives}
    for path in archives:
        assert path.stat().st_size <= 20 * 2**20
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sums[path.name]


def test_a_machine_with_torch_alone_runs_the_programs(
    packed: Pack, bare: Path, picture_folder: Path, tmp_path: Path
) -> None:
    script = f"""
        set -eu
        mkdir maskmix
        cat {packed.out}/*.tar.gz | tar -xzi -C maskmix
        source maskmix/activate
        source maskmix/activate   # a second time changes nothing
        python3 -c 'import PIL, tyro, numpy; print(PIL.__file__, tyro.__file__, numpy.__file__)'
        python3 -c 'import ctypes, os; ctypes.CDLL(os.environ["LIBTURBOJPEG"]).tjInitDecompress'
        cd maskmix
        python3 train_pretrain.py --help
        python3 -m dataset_tools convert {picture_folder} {tmp_path}/made.beton
    """
    ended = run_bash(script, tmp_path, bare)
    assert ended.returncode == 0, ended.stderr
    first, second, files, *rest = ended.stdout.splitlines()
    assert first == second
    assert first.startswith(f"Python {HERE}.") and first.endswith("python3 train_pretrain.py --help")
    pillow, tyro, numpy = files.split()
    assert Path(tyro).is_relative_to(tmp_path / "maskmix" / FOLDER)
    assert Path(pillow).is_relative_to(bare.parent) and Path(numpy).is_relative_to(bare.parent)
    assert any("--moco-k" in line for line in rest)
    assert (tmp_path / "made.beton").is_file()


def test_a_second_run_needs_no_network(
    packed: Pack, tmp_path: Path, unreachable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It also removes archives of an earlier pack."""
    monkeypatch.setattr(pack, "requirements", lambda: (REQUIREMENTS, [], []))
    stale = tmp_path / f"maskmix-py{HERE}-9.tar.gz"
    stale.touch()
    again = pack.main(Pack(tmp_path, HERE, turbojpeg=packed.turbojpeg, cache=packed.cache, limit_mib=200))
    assert [path.name for path in again] == [f"maskmix-py{HERE}-1.tar.gz"] and not stale.exists()


def test_only_requirements_of_the_programs_are_checked(unpacked: Path) -> None:
    """An old pytest on a machine does not prevent training."""
    programs, tests, dali = pack.requirements()
    assert {"torch>=2.8,<3", "tyro>=0.9"} <= set(programs) and dali == ["nvidia-dali-cuda130==2.4.0"]
    assert [text for text in tests if text.startswith("pytest")] and not set(programs) & set(tests)
    assert json.loads((unpacked / FOLDER / "1-programs.json").read_text())["needs"] == REQUIREMENTS


def test_archives_hold_the_tracked_files(packed: Pack, unpacked: Path) -> None:
    tracked = {piece.name for piece in pack.tracked(2**30)}
    assert {"train_pretrain.py", "training/install/pack.py", "Makefile"} <= tracked
    inside = {str(f.relative_to(unpacked)) for f in unpacked.rglob("*") if f.is_file()}
    assert {name for name in inside if not name.startswith(FOLDER)} == tracked | {"activate"}
    for name in ("train_pretrain.py", "training/card.md"):
        assert (unpacked / name).read_bytes() == (pack.ROOT / name).read_bytes()


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("bash {folder}/activate", "only sets variables; run: source"),
        ("python3() {{ echo 3.9; }}; source {folder}/activate", "the pack is for Python " + HERE),
        ("python3() {{ return 1; }}; source {folder}/activate", "python3 here is absent"),
    ],
)
def test_activation_in_another_shell_or_python_is_refused(
    script: str, says: str, unpacked: Path, bare: Path, tmp_path: Path
) -> None:
    ended = run_bash(script.format(folder=unpacked), tmp_path, bare)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1 and says in ended.stderr


# ======================================================================================================
# Activation
# ======================================================================================================


def _write_pack(root: Path, **texts_of: dict[str, str]) -> dict[str, Any]:
    """Write a pack with one wheel per argument, each in two pieces; returns its list.

    Args:
        root: the folder of the pack.
        texts_of: content of each wheel's files, by the wheel's name.
    """
    (root / FOLDER).mkdir()
    library = root / FOLDER / "libturbojpeg.so.0"
    library.write_bytes(_turbojpeg().read_bytes())
    content: dict[str, Any] = {
        "machine": os.uname().machine,
        "needs": ["torch>=2.8"],
        "libraries": {f"{FOLDER}/{library.name}": _piece(library)},
        "wheels": {},
    }
    for name, texts in texts_of.items():
        whole = root / "whole.whl"
        with zipfile.ZipFile(whole, "w") as wheel:
            for file, text in texts.items():
                wheel.writestr(file, text)
        pieces = {}
        for number, piece in enumerate(
            pack.split(f"{FOLDER}/{name}.whl", whole, whole.stat().st_size // 2 + 1)
        ):
            (root / piece.name).write_bytes(piece.read())
            pieces[piece.name] = _piece(root / piece.name, number)
        content["wheels"][name] = {"version": "1.0", "requires": [], "pieces": pieces}
    (root / FOLDER / "1-programs.json").write_text(json.dumps(content))
    return content


def _piece(file: Path, number: int = 0) -> dict[str, str]:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"archive": f"maskmix-{number + 1}.tar.gz", "sha256": digest}


def _set_installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    monkeypatch.delenv("LIBTURBOJPEG", raising=False)
    monkeypatch.setattr(activate, "installed", lambda path: versions)
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_only_missing_packages_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia = {"nvidia/dali/__init__.py": "", "nvidia/__init__.py": "raise ImportError"}
    _write_pack(
        tmp_path,
        here={"here.py": ""},
        missing={
            "missing.py": "x = 1",
            "missing-1.0.data/purelib/more.py": "",
            "missing-1.0.data/scripts/run": "",
        },
        **{"nvidia-dali-cuda130": nvidia},
    )
    _set_installed(monkeypatch, torch="2.11.0+cu130", here="0.1")
    monkeypatch.setenv("PYTHONPATH", f"/theirs:{tmp_path}:{tmp_path / FOLDER / 'site-of-old'}")
    machine = tmp_path / "machine"
    (machine / "nvidia/cu13/lib").mkdir(parents=True)
    (machine / "nvidia/cu13/lib/libcufft.so.12").touch()
    sys.path.append(str(machine))
    variables, line = activate.prepare_environment(tmp_path)
    root, theirs, site = variables["PYTHONPATH"].split(":")
    assert (root, theirs) == (str(tmp_path), "/theirs")
    names = {str(f.relative_to(site)) for f in Path(site).rglob("*") if f.is_file()}
    assert names == {"missing.py", "more.py", "nvidia/__init__.py", "nvidia/dali/__init__.py"}
    assert "extend_path" in (Path(site) / "nvidia/__init__.py").read_text()
    assert str(machine / "nvidia/cu13/lib") in variables["LD_LIBRARY_PATH"].split(":")
    assert "torch 2.11.0+cu130, 2 packages added" in line
    assert activate.prepare_environment(tmp_path)[0]["PYTHONPATH"] == variables["PYTHONPATH"]
    assert [f.name for f in (tmp_path / FOLDER).glob("*site-*")] == [Path(site).name]


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({}, "torch is not installed"),
        ({"torch": "2.7.1+cu118"}, "torch 2.7.1+cu118 is installed"),
        ({"torch": "2.10.0a0+git1"}, ""),
    ],
)
def test_torch_must_be_installed_and_new_enough(
    versions: dict[str, str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _write_pack(tmp_path)
    _set_installed(monkeypatch, **versions)
    assert activate.main(tmp_path) == (2 if says else 0)
    printed = capsys.readouterr()
    if says:
        assert printed.out == "" and printed.err.startswith(f"error: {says}") and printed.err.count("\n") == 1
    else:
        assert printed.out.startswith("export PYTHONPATH=")


@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_or_missing_piece_names_its_archive(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = _write_pack(tmp_path, missing={"missing.py": "x = 1"})
    _set_installed(monkeypatch, torch="2.11")
    piece = tmp_path / list(content["wheels"]["missing"]["pieces"])[number]
    damaged = bytearray(piece.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    piece.write_bytes(damaged)
    with pytest.raises(activate.PackError, match=rf"not match its hash; copy maskmix-{number + 1}\.tar\.gz"):
        activate.prepare_environment(tmp_path)
    piece.unlink()
    with pytest.raises(activate.PackError, match=rf"not exist; unpack maskmix-{number + 1}\.tar\.gz"):
        activate.prepare_environment(tmp_path)
    assert not list((tmp_path / FOLDER).glob("*site-*"))


def test_an_unmet_requirement_of_a_wheel_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = _write_pack(tmp_path, missing={"missing.py": ""})
    content["wheels"]["missing"]["requires"] = ["numpy>=2"]
    (tmp_path / FOLDER / "1-programs.json").write_text(json.dumps(content))
    _set_installed(monkeypatch, torch="2.11", numpy="1.26.4")
    activate.prepare_environment(tmp_path)
    note = capsys.readouterr().err
    assert note.startswith("note: numpy 1.26.4 is installed") and "missing of the pack may not work" in note


def test_the_users_libturbojpeg_is_kept_if_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_pack(tmp_path)
    _set_installed(monkeypatch, torch="2.11")
    monkeypatch.setenv("LIBTURBOJPEG", str(_turbojpeg()))
    assert activate.prepare_environment(tmp_path)[0]["LIBTURBOJPEG"] == str(_turbojpeg())
    monkeypatch.setenv("LIBTURBOJPEG", "nowhere.so")
    message = r"nowhere\.so is not a libturbojpeg that can be loaded .*; export LIBTURBOJPEG with the path"
    with pytest.raises(activate.PackError, match=message):
        activate.prepare_environment(tmp_path)


def test_the_first_distribution_of_a_name_counts(tmp_path: Path) -> None:
    for folder, version in (("first", "2.0"), ("second", "1.0")):
        info = tmp_path / folder / f"Some_Thing-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: Some_Thing\nVersion: {version}\n")
    (tmp_path / "second" / "broken.dist-info").mkdir()
    assert activate.installed([str(tmp_path / "first"), str(tmp_path / "second")]) == {"some-thing": "2.0"}


# ======================================================================================================
# Downloads and archives
# ======================================================================================================


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@example(sizes=[0, 1, 250_000, 250_001, 1_000_000])
@given(sizes=st.lists(st.integers(0, 1_200_000), min_size=1, max_size=8))
def test_every_byte_is_in_one_archive_and_no_archive_is_too_large(sizes: list[int], tmp_path: Path) -> None:
    limit = 1_000_000
    pieces, contents = [], {}
    for number, size in enumerate(sizes):
        source = tmp_path / str(number)
        source.write_bytes(os.urandom(size))  # incompressible
        contents[str(number)] = source.read_bytes()
        pieces += pack.split(str(number), source, limit // 4)
    found: dict[str, bytes] = {}
    for number, archive in enumerate(pack.fill(pieces, limit)):
        path = tmp_path / f"{number}.tar.gz"
        pack._write_archive(path, archive, "list", b"x" * 1000, lambda size: None)
        assert path.stat().st_size <= limit
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name != "list":
                    assert member.name not in found
                    found[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    joined: dict[str, bytes] = {}
    for name in sorted(found):
        stem = name.split(".")[0]
        joined[stem] = joined.get(stem, b"") + found[name]
    assert joined == contents


def test_symbolic_links_are_kept(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("elsewhere")
    pack._write_archive(
        tmp_path / "a.tar.gz", [Piece("link", tmp_path / "link")], "list", b"", lambda n: None
    )
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        assert tar.getmember("link").linkname == "elsewhere"


def test_requirements_are_those_of_the_other_python() -> None:
    item = {
        "metadata": {
            "name": "Some_Thing",
            "version": "1.0",
            "requires_dist": [
                'new>=2; python_version >= "3.12"',
                'old; python_version < "3.12"',
                'more; extra == "all"',
                "always[x]<3",
            ],
        },
        "download_info": {"url": "https://index/some_thing-1.0%2Blocal-py3-none-any.whl", "archive_info": {}},
    }
    wheel = downloads.from_report(item, "3.12")
    assert wheel.requires == ("new>=2", "always[x]<3")
    assert (wheel.name, wheel.file) == ("some-thing", "some_thing-1.0+local-py3-none-any.whl")
    assert downloads.from_report(item, "3.11").requires == ("old", "always[x]<3")


def test_nvidias_wheels_are_trimmed(tmp_path: Path) -> None:
    kept = ["nvidia/a.py", "nvidia/a.cpython-312-x.so", "nvidia/lib/liba.so.1", "nvidia_a.dist-info/LICENSE"]
    left_out = ["nvidia/a.cpython-311-x.so", "nvidia/a.cpython-312t-x.so", "nvidia/b.a", "nvidia/include/a.h"]
    wheel = tmp_path / "nvidia_a-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*kept, *left_out):
            archive.writestr(name, name)
    with zipfile.ZipFile(downloads.trim(wheel, "3.12", tmp_path / "cache")) as archive:
        assert archive.namelist() == kept and archive.read(kept[1]).decode() == kept[1]
    other = wheel.rename(tmp_path / "other-1-py3-none-any.whl")
    assert downloads.trim(other, "3.12", tmp_path / "cache") == other


@pytest.mark.parametrize("python", ["3.10", "3", "python3.12", "3.12.1", "2.7"])
def test_an_invalid_python_version_is_refused(python: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--python is .*; give a version >=3\.11, such as 3\.12"):
        pack.main(Pack(tmp_path, python))


def test_an_unreachable_index_is_reported(tmp_path: Path, unreachable: None) -> None:
    with pytest.raises(ValueError, match="the package index cannot be reached; make the pack on a machine"):
        downloads.resolve(["rich"], "3.12", CONSTRAINTS, tmp_path)


def test_a_package_without_a_wheel_is_reported(
    tmp_path: Path, unreachable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "rich-15.0.0-cp311-cp311-manylinux1_x86_64.whl", "w"):
        monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    for requirement, name in (("rich>=13", r"rich==\S+"), ("of-no-constraint>1", "of-no-constraint>1")):
        with pytest.raises(ValueError, match=rf"no wheel of {name} for Python 3\.12 on Linux \w+; choose"):
            downloads.resolve([requirement], "3.12", CONSTRAINTS, tmp_path / "cache")


def test_a_download_with_another_hash_is_refused(tmp_path: Path) -> None:
    wheel = Wheel("rich", "15.0", "rich.whl", hashlib.sha256(b"right").hexdigest(), ())
    (tmp_path / "rich.whl").write_bytes(b"right")
    downloads.download([wheel], "3.12", tmp_path)
    (tmp_path / "rich.whl").write_bytes(b"wrong")
    with pytest.raises(
        ValueError, match=r"rich\.whl does not have the hash .*; delete it, and run this again"
    ):
        downloads.download([wheel], "3.12", tmp_path)


def test_without_apt_get_a_local_library_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"apt-get, .* is not installed here; name a local library by --turbo"
    ):
        downloads.debian_turbojpeg(tmp_path / "cache")
    for name in ("apt-get", "dpkg-deb"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(ValueError, match=r"failed \(Unable to locate package\); run apt-get update, or name"):
        downloads.debian_turbojpeg(tmp_path / "cache")
    (tmp_path / "text.so").write_text("no library")
    monkeypatch.setattr(pack, "resolve", lambda *given: [])
    message = r"text\.so is not a libturbojpeg that can be loaded .*; give another --turbojpeg"
    with pytest.raises(ValueError, match=message):
        pack.main(Pack(tmp_path, HERE, turbojpeg=tmp_path / "text.so", cache=tmp_path / "cache"))


def test_a_file_larger_than_an_archive_is_reported() -> None:
    _skip_outside_a_clone()
    with pytest.raises(ValueError, match=r"is 0 MiB, more than an archive holds; raise --limit-mib"):
        pack.tracked(pack._LIST_BYTES + 1)

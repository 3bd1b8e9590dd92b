import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataset_tools.__main__ import COMMANDS, main
from pipelines.sets.beton import open_beton
from tests.processes import started

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]


def test_convert_prints_path_count_and_next_step(tree: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "sets" / "images.beton"
    assert main(["convert", str(tree), str(output)]) == 0
    out, err = capsys.readouterr()
    assert err == "", "no bar without a terminal"
    (line,) = out.splitlines()
    assert line.startswith(f"{output}: 5 images, tier jpeg, 0.0 MB, 5 in ")
    assert line.endswith(f"Next: make pretrain DATA={output}")
    assert len(open_beton(output)) == 5


def test_convert_lists_images_left_out(tree: Path, tmp_path: Path, capsys: Capture) -> None:
    for i in range(21):
        (tree / "cats" / f"x[red]{i:02d}.jpg").write_bytes(b"bad")
    assert main(["convert", str(tree), str(tmp_path / "set.beton"), "--max-bad", "1"]) == 0
    out = capsys.readouterr().out
    assert "21 skipped: not a picture" in out
    assert "  cats/x[red]00.jpg: not a picture" in out
    assert f"… and 1 more; all are in {tmp_path / 'set.skipped.txt'}" in out


def test_options_reach_the_conversion(tree: Path, tmp_path: Path) -> None:
    options = ["--max-side", "30", "--no-labels", "--workers", "1", "--tier", "raw"]
    assert main(["convert", str(tree), str(tmp_path / "set.beton"), *options]) == 0
    beton = open_beton(tmp_path / "set.beton")
    assert beton.metadata["f0"]["width"].tolist() == [30] * 5
    assert beton.metadata["f0"]["mode"].tolist() == [1] * 5
    assert beton.labels.tolist() == [-1] * 5


def test_planes_on_the_command_line(tree: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "set.beton"
    assert main(["convert", str(tree), str(path), "--tier", "yuv420", "--short-side", "21"]) == 0
    out = capsys.readouterr().out
    assert "5 transcoded: reduced to a short side of 21 px" in out
    assert f"{path}: 5 images, tier yuv420, " in out
    assert open_beton(path).metadata["f0"]["height"].tolist() == [21] * 5
    assert main(["verify", str(path)]) == 0
    assert f"{path} is undamaged, tier yuv420, matches its manifest" in capsys.readouterr().out
    assert main(["stats", str(path)]) == 0
    assert "yuv420" in capsys.readouterr().out


def test_recompress_on_the_command_line(tree: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["convert", str(tree), str(tmp_path / "set.beton"), "--recompress", "--quality", "30"]) == 0
    assert "5 transcoded: recompressed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("none", [], "does not exist"),
        ("empty", [], "no images in"),
        ("images", ["--quality", "0"], "quality is 0"),
        ("images", ["--workers", "0"], "workers is 0"),
        ("images", ["--max-side", "9", "--short-side", "8"], "give one of the two"),
        ("images", ["--tier", "raw", "--recompress"], "choose tier jpeg"),
        ("bad", ["--max-bad", "1"], "none of the 1 images"),
        (
            "bad",
            [],
            "1 of 1 images of bad cannot be used (1 not a picture), --max-bad 0.01 allows 0; the last is a",
        ),
        ("images", ["--accept-truncated"], "is for damaged tars"),
    ],
)
def test_user_errors_are_one_sentence(
    tree: Path, tmp_path: Path, capsys: Capture, source: str, options: list[str], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"bad")
    assert main(["convert", str(tmp_path / source), str(tmp_path / "set.beton"), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not list(tmp_path.glob("set.*"))


def test_existing_output_is_refused(tree: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "set.beton").write_bytes(b"mine")
    assert main(["convert", str(tree), str(tmp_path / "set.beton")]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert (tmp_path / "set.beton").read_bytes() == b"mine"
    assert main(["convert", str(tree), str(tmp_path / "set.beton"), "--overwrite"]) == 0


@pytest.mark.parametrize("args", [["convert", "a", "b.beton", "--colour", "red"], ["compile"], []])
def test_unknown_options_are_errors(args: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out) > 300


def test_verify_and_stats_report(tree: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "set.beton"
    main(["convert", str(tree), str(path)])
    capsys.readouterr()
    assert main(["verify", str(path)]) == 0
    assert f"{path} is undamaged, tier jpeg, matches its manifest" in capsys.readouterr().out
    assert main(["stats", str(path)]) == 0
    out = capsys.readouterr().out
    assert "cats" in out
    assert "60 … 64 px" in out

    beton = open_beton(path)
    content = bytearray(path.read_bytes())
    content[int(beton.metadata["f0"]["data_ptr"][3])] ^= 0xFF
    path.write_bytes(content)
    assert main(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert "image 3 (dogs/a.jpg): damaged" in out
    assert "1 of 5 images bad" in out
    path.write_bytes(content[:100])
    assert main(["verify", str(path)]) == 1
    assert main(["stats", str(path)]) == 2
    assert main(["verify", str(tmp_path / "none.beton")]) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_clean_up(tmp_path: Path, number: signal.Signals) -> None:
    command = [
        sys.executable,
        "-m",
        "dataset_tools",
        "photographs",
        str(tmp_path / "set"),
        "--count",
        "100000",
    ]
    with started(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("set.partial/train/*/*.JPEG")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; nothing was left behind" in errors
    assert list(tmp_path.iterdir()) == []

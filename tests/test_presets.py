"""The named runs, and the agreement of docs/command-line.md with the programs."""

import contextlib
import dataclasses
import io
import itertools
import re
import shlex
from pathlib import Path

import pytest

from models.encoders import ARCHS
from presets import PRESETS, PresetName, PretrainConfig, Views, training_set
from train_lincls import ProbeConfig
from train_lincls import parse as parse_probe
from train_pretrain import parse
from training.optim import MILESTONES
from training.published_flags import REFUSED

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "command-line.md").read_text()

# ======================================================================================================
# Presets
# ======================================================================================================


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_a_whole_run_and_flags_override_it(name: PresetName) -> None:
    preset = PRESETS[name](Path("DATA"))
    assert preset.preset == name
    assert preset.arch in ARCHS
    assert preset.recipe().mixing.grid_size <= preset.views.crop_px
    assert preset.batch_size % preset.splits(1) == 0
    assert parse(["DATA", "--preset", name]) == preset
    config = parse(["DATA", "--preset", name, "--lr", "0.5", "--grid-size", "5", "--method", "both"])
    mixing = dataclasses.replace(preset.mixing, grid_size=5, method="both")
    assert config == dataclasses.replace(preset, lr=0.5, mixing=mixing)


def test_presets_have_their_own_folders_and_name_source_and_cost() -> None:
    assert len({PRESETS[name](Path("DATA")).out for name in PRESETS}) == len(PRESETS)
    for name, preset in PRESETS.items():
        text = preset.__doc__ or ""
        assert re.search(r"arXiv \d{4}\.\d{5}", text) or name == "fashion"
        assert "not yet measured here" in " ".join(text.split()) or name == "fashion"


def test_in1k_is_the_published_run() -> None:
    config = PRESETS["in1k"](Path("DATA"))
    assert config == PretrainConfig(Path("DATA"))
    assert (config.arch, config.epochs, config.batch_size, config.lr) == ("resnet50", 200, 256, 0.03)
    assert (config.moco_dim, config.moco_k, config.moco_m, config.moco_t) == (128, 65536, 0.999, 0.2)
    assert (config.weight_decay, config.sgd_momentum) == (1e-4, 0.9)
    assert config.mlp and config.aug_plus and config.cos and not config.mixing.symmetric
    mixing = config.mixing
    assert (mixing.method, mixing.mask_type, mixing.grid_size) == ("mixmask", "block", 8)
    assert (mixing.mask_lam, mixing.mask_per, mixing.partner) == (0.5, "batch", "reverse")
    assert config.splits(1) == 8 and config.splits(8) == 1
    assert (config.recipe().blur_prob, config.recipe().crop_scale) == (0.5, (0.2, 1.0))


def test_in100_is_the_published_run_with_another_encoder_and_more_epochs() -> None:
    config, published = PRESETS["in100"](Path("DATA")), PRESETS["in1k"](Path("DATA"))
    differing = {"preset", "out", "arch", "epochs"}
    assert (config.arch, config.epochs) == ("resnet18", 400)
    for item in dataclasses.fields(config):
        same = getattr(config, item.name) == getattr(published, item.name)
        assert same == (item.name not in differing), item.name


def test_cifar_has_the_recipe_of_unmix() -> None:
    ten, hundred = (PRESETS[name](Path("DATA")) for name in ("cifar10", "cifar100"))
    assert (ten.arch, ten.small_stem, ten.mlp, ten.moco_dim) == ("resnet18", True, False, 128)
    assert (ten.epochs, ten.batch_size, ten.lr, ten.weight_decay) == (1000, 512, 0.06, 5e-4)
    assert ten.cos and ten.aug_plus
    assert (ten.moco_k, ten.moco_m, ten.moco_t, ten.knn_k, ten.splits(1)) == (4096, 0.99, 0.1, 200, 8)
    mixing = ten.mixing
    assert (mixing.method, mixing.unmix_global_prob, mixing.unmix_beta) == ("unmix", 0.5, 1.0)
    recipe = ten.recipe()
    assert (recipe.crop_px, recipe.crop_scale, recipe.blur_prob) == (32, (0.08, 1.0), 0.0)
    assert recipe.center_share == 1.0 and not mixing.symmetric
    # The same run on another set.
    normalised = dataclasses.replace(ten.views, mean=hundred.views.mean, std=hundred.views.std)
    assert hundred == dataclasses.replace(ten, preset="cifar100", out=hundred.out, views=normalised)


def test_tiny_imagenet_is_the_cifar_recipe_at_64_px() -> None:
    tiny, cifar = PRESETS["tiny-imagenet"](Path("DATA")), PRESETS["cifar10"](Path("DATA"))
    assert (tiny.views.crop_px, tiny.views.crop_min, tiny.epochs) == (64, 0.2, 200)
    assert (tiny.mixing.method, tiny.mixing.grid_size) == ("mixmask", 4)
    back = {"preset": cifar.preset, "out": cifar.out, "views": cifar.views}
    assert cifar == dataclasses.replace(tiny, **back, mixing=cifar.mixing, epochs=cifar.epochs)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_mean_and_deviation_are_for_pixels_in_the_unit_range(name: PresetName) -> None:
    views: Views = PRESETS[name](Path("DATA")).views
    assert all(0.25 < mean < 0.52 for mean in views.mean)
    assert all(0.22 < std < 0.36 for std in views.std)


# ======================================================================================================
# Schedule and data
# ======================================================================================================


def test_schedule_gives_the_epochs_of_the_drops() -> None:
    assert parse(["DATA", "--no-cos"]).milestones() == MILESTONES
    published = parse(shlex.split("DATA --no-cos --schedule 120 160"))
    assert published.schedule == (120, 160) and published.milestones() == MILESTONES
    assert parse(shlex.split("--no-cos --epochs 10 --schedule 5 DATA")).milestones() == (0.5,)


@pytest.mark.parametrize(
    ("schedule", "cos", "message"),
    [
        ((120, 160), True, "schedule has no effect on a cosine; add --no-cos"),
        (
            (60, 200),
            False,
            "schedule is 60 200; in a run of 200 epochs, give increasing epochs from 1 to 199",
        ),
    ],
)
def test_schedules_that_do_not_fit_the_run_are_refused(
    schedule: tuple[int, ...], cos: bool, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainConfig(Path("DATA"), schedule=schedule, cos=cos)
    with pytest.raises(SystemExit):
        parse(["DATA", *([] if cos else ["--no-cos"]), "--schedule", *map(str, schedule)])
    assert message.split()[1] in capsys.readouterr().err


def test_train_is_used_of_a_folder_with_train_and_val(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    assert training_set(tmp_path) == tmp_path, "a class may be named train"
    (tmp_path / "val").mkdir()
    assert training_set(tmp_path) == tmp_path / "train"
    assert parse([str(tmp_path)]).data == tmp_path / "train"
    assert training_set(tmp_path / "absent.beton") == tmp_path / "absent.beton"


# ======================================================================================================
# docs/command-line.md
# ======================================================================================================


def _section(title: str) -> str:
    return re.split(r"^## ", PAGE.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def _rows(title: str, head: str) -> list[list[str]]:
    """The cells of a section's table with this first head cell."""
    lines = _section(title).split(f"| {head} |")[1].splitlines()[2:]
    table = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [line.strip("| ").split(" | ") for line in table]


def _flags(cell: str) -> list[list[str]]:
    return [shlex.split(flags) for flags in re.findall(r"`([^`]+)`", cell)]


def _table(title: str) -> list[tuple[list[str], list[str] | None]]:
    """The pairs of a table of flags: a published flag with its value, and ours, None if it is gone."""
    pairs: list[tuple[list[str], list[str] | None]] = []
    for published, here, *_ in _rows(title, "published"):
        for flags in _flags(published):
            ours = {"same": [flags], "gone": [None]}.get(here) or _flags(here)
            pairs.append((flags, ours[0]))
    return [(flags, ours) for flags, ours in pairs if flags != ["DATA"]]


PRETRAINING, PROBE = _table("Pretraining"), _table("Linear probe")
WORKING = [(flags, ours) for flags, ours in PRETRAINING if ours]


def _published_command(title: str) -> list[str]:
    """The published command of a section, without the program's name and the launcher's flags."""
    block = _section(title).split("# published\n")[1].split("\n# ")[0]
    launcher = r"--(dist-url \S+|multiprocessing-distributed|world-size 1|rank 0)"
    return shlex.split(re.sub(launcher, "", block))[2:]


def test_the_published_command_line_is_the_default() -> None:
    config = parse(_published_command("Pretraining"))
    assert (config.data, config.out) == (Path("DATA"), Path("OUT"))
    assert config == parse(["DATA", "--out", "OUT"])
    ours = shlex.split(_section("Pretraining").split("train_pretrain.py ")[1].split("\n# ")[0])
    assert parse(ours) == config


@pytest.mark.parametrize(("flags", "ours"), WORKING, ids=[" ".join(flags) for flags, _ in WORKING])
@pytest.mark.parametrize("swap", ["_-", "-_"])
def test_a_published_flag_has_the_meaning_in_the_table(flags: list[str], ours: list[str], swap: str) -> None:
    flag, *values = flags
    spelled = flag[:2] + flag[2:].replace(*swap)
    config = parse(["DATA", spelled, *values])
    assert config == parse(["DATA", *ours])
    if values and flags != ["--mask_type", "block"]:
        assert config != parse(["DATA"])
        if len(values) == 1 and flag.startswith("--"):
            assert config == parse(["DATA", f"{spelled}={values[0]}"])
    elif not values:
        assert config != parse(["DATA", f"--no-{flag[2:]}"])


@pytest.mark.parametrize("flags", [" ".join(flags) for flags, ours in PRETRAINING if not ours])
def test_a_published_flag_that_is_gone_is_refused(flags: str) -> None:
    flag, *values = flags.split()
    for argv in (["DATA", flag, *values], [flag, *values, "DATA"], ["DATA", "=".join([flag, *values])]):
        with pytest.raises(ValueError, match=flag if flag in REFUSED else "takes no path") as refusal:
            parse(argv)
        assert "{" not in str(refusal.value)


def test_the_table_has_every_flag_that_is_gone() -> None:
    assert {flags[0] for flags, ours in PRETRAINING if not ours} == {*REFUSED, "--resume"}


def test_the_defaults_are_those_on_the_page() -> None:
    default = parse(["DATA"])
    for row in _rows("Pretraining", "left out"):
        (flags,) = _flags(row[3])
        assert parse(["DATA", *flags]) != default, row
    assert (default.mlp, default.aug_plus, default.cos) == (True, True, True)
    assert (default.moco_t, default.mixing.grid_size, default.mixing.unmix_global_prob) == (0.2, 8, 0.5)


@pytest.mark.parametrize("row", _rows("Recipes", "recipe"), ids=lambda row: row[0])
def test_every_recipe_is_parsed(row: list[str]) -> None:
    for flags in _flags(row[1]):
        parse(["DATA", *flags])


def test_recipes_match_their_names() -> None:
    recipes = {row[0]: _flags(row[1]) for row in _rows("Recipes", "recipe")}
    first = parse(["DATA", *recipes["MoCo v1"][0]])
    assert first.recipe().grey_before_jitter and first.moco_t == 0.07
    assert not first.mlp and not first.cos and first.mixing.method == "moco"
    second = parse(["DATA", *recipes["MoCo v2"][0]])
    as_v2 = {name: getattr(PretrainConfig, name) for name in ("mlp", "aug_plus", "cos", "moco_t")}
    assert second == dataclasses.replace(first, **as_v2)
    named = " ".join(row[1] for row in _rows("Recipes", "recipe") if "--preset" in row[1])
    assert all(name in named for name in PRESETS)


def _probe(argv: list[str]) -> ProbeConfig:
    return parse_probe(["DATA", "--pretrained", "FILE", *argv])


@pytest.mark.parametrize(("flags", "ours"), PROBE, ids=[" ".join(flags) for flags, _ in PROBE])
def test_the_probe_takes_the_flags_of_its_table(flags: list[str], ours: list[str] | None) -> None:
    if ours:
        assert _probe(flags) == _probe(ours) != _probe([])
        return
    with pytest.raises((SystemExit, ValueError)), contextlib.redirect_stderr(io.StringIO()):
        _probe(flags)


def test_the_published_probe_is_the_default() -> None:
    config = parse_probe(_published_command("Linear probe"))
    assert config == _probe(["--pretrained", "CKPT", "--out", "OUT", "--arch", "resnet50"])

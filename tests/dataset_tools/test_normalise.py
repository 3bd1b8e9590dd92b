import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dataset_tools import normalise as module
from dataset_tools.normalise import BadImage, Normalising, StoredImage, normalise
from pipelines.decode.jpeg import Jpeg, encode_planes
from pipelines.sets.manifest import Tier
from tests.dataset_tools.conftest import unusual_jpeg

JPEG = Normalising()


def decoded(payload: object) -> Image.Image:
    assert isinstance(payload, bytes)
    with Image.open(io.BytesIO(payload)) as image:
        image.load()
        return image


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"exif": exif(1)}, {"width": 1, "height": 1}]
)
def test_plain_jpeg_stays_unchanged(encode: Callable[..., bytes], options: dict[str, object]) -> None:
    payload = encode(**options)
    normal = normalise(payload, JPEG)
    assert normal.payload is payload
    assert normal.changed == ""
    assert (normal.width, normal.height) == decoded(payload).size


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kind": "PNG"}, "PNG"),
        ({"kind": "PNG", "mode": "RGBA"}, "PNG"),
        ({"kind": "PNG", "mode": "P"}, "PNG"),
        ({"kind": "PNG", "mode": "1"}, "PNG"),
        ({"kind": "BMP"}, "BMP"),
        ({"kind": "WEBP"}, "WEBP"),
        ({"kind": "TIFF"}, "TIFF"),
        ({"mode": "L"}, "greyscale JPEG"),
        ({"mode": "CMYK"}, "CMYK JPEG"),
        ({"exif": exif(6)}, "EXIF rotation"),
        ({"exif": exif(3)}, "EXIF rotation"),
    ],
)
def test_other_images_are_encoded_again(
    encode: Callable[..., bytes], options: dict[str, object], reason: str
) -> None:
    payload = encode(**options)
    normal = normalise(payload, JPEG)
    assert normal.changed == reason
    image = decoded(normal.payload)
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (normal.width, normal.height))
    expected = ImageOps.exif_transpose(decoded(payload)).convert("RGB")
    assert image.size == expected.size
    difference = np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16))
    assert difference.mean() < 6, "the pixels are those of the source, upright"


def test_chroma_is_subsampled_only_for_jpegs(encode: Callable[..., bytes]) -> None:
    from PIL.JpegImagePlugin import get_sampling

    with Image.open(io.BytesIO(bytes(normalise(encode(kind="PNG"), JPEG).payload))) as image:
        assert get_sampling(image) == 0
    with Image.open(io.BytesIO(bytes(normalise(encode(exif=exif(6)), JPEG).payload))) as image:
        assert get_sampling(image) == 2


def test_sixteen_bits_are_scaled() -> None:
    ramp = np.linspace(0, 65_535, 64 * 64).reshape(64, 64).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    pixels = normalise(buffer.getvalue(), Normalising(tier="raw")).payload
    assert isinstance(pixels, np.ndarray)
    assert np.abs(pixels[:, :, 0].astype(float) - ramp / 257).max() <= 0.51


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_max_side_reduces_the_longer_side(encode: Callable[..., bytes], kind: str) -> None:
    normal = normalise(encode(200, 100, kind=kind), Normalising(max_side=50))
    assert (normal.width, normal.height, normal.changed) == (50, 25, "reduced to 50 px")
    small = encode(50, 30)
    assert normalise(small, Normalising(max_side=50)).payload is small


def test_raw_tier_holds_the_pixels(encode: Callable[..., bytes]) -> None:
    normal = normalise(encode(31, 17, kind="PNG"), Normalising(tier="raw"))
    assert isinstance(normal.payload, np.ndarray)
    assert normal.payload.shape == (17, 31, 3)
    assert normal.changed == ""
    assert (normal.payload == np.asarray(decoded(encode(31, 17, kind="PNG")))).all()
    again = normalise(normal.payload, Normalising(tier="raw"))
    assert again.payload is normal.payload


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("size", "reduced"),
    [((200, 100), (100, 50)), ((100, 201), (50, 100)), ((50, 300), None), ((49, 30), None)],
)
def test_short_side_reduces_the_shorter_side(
    encode: Callable[..., bytes], kind: str, size: tuple[int, int], reduced: tuple[int, int] | None
) -> None:
    normal = normalise(encode(*size, kind=kind), Normalising(short_side=50))
    assert (normal.width, normal.height) == (reduced or size)
    assert decoded(normal.payload).size == (reduced or size)
    assert (normal.changed == "reduced to a short side of 50 px") == (reduced is not None)


@given(
    width=st.integers(1, 65_535),
    height=st.integers(1, 65_535),
    px=st.integers(1, 65_535),
    short=st.booleans(),
)
def test_reducing_keeps_the_shape_and_never_enlarges(width: int, height: int, px: int, short: bool) -> None:
    how = Normalising(short_side=px) if short else Normalising(max_side=px)
    pick = min if short else max
    reduced = how.reduced(width, height)
    if pick(width, height) <= px:
        assert reduced is None
        return
    assert reduced is not None
    assert pick(reduced) == px
    share = px / pick(width, height)
    for side, before in zip(reduced, (width, height), strict=True):
        assert 1 <= side <= before
        assert abs(side - max(1, before * share)) <= 0.5001
    assert how.reduced(*reduced) is None, "once is enough"


def test_pixels_are_reduced_too() -> None:
    pixels = np.full((40, 90, 3), 7, np.uint8)
    normal = normalise(pixels, Normalising(tier="raw", short_side=20))
    assert isinstance(normal.payload, np.ndarray)
    assert (normal.payload.shape, normal.width, normal.height) == ((20, 45, 3), 45, 20)
    assert (normal.payload == 7).all()


def test_recompress_encodes_every_jpeg_again(encode: Callable[..., bytes]) -> None:
    payload = encode(120, 90, quality=97)
    sizes = {}
    for quality in (20, 90):
        normal = normalise(payload, Normalising(recompress=True, quality=quality))
        assert normal.changed == "recompressed"
        assert isinstance(normal.payload, bytes)
        expected = io.BytesIO()
        decoded(payload).save(expected, "JPEG", quality=quality, subsampling="4:2:0")
        assert normal.payload == expected.getvalue()
        sizes[quality] = len(normal.payload)
    assert sizes[20] < sizes[90] < len(payload)
    assert normalise(encode(kind="PNG"), Normalising(recompress=True)).changed == "PNG"
    with pytest.raises(BadImage, match="truncated"):
        normalise(cut(payload), Normalising(recompress=True, verify=False))


YUV420 = Normalising(tier="yuv420")


@pytest.mark.parametrize("size", [(64, 48), (63, 48), (64, 47), (1, 1), (2, 1), (1, 2), (17, 33)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": exif(1)}])
def test_planes_of_a_420_jpeg_are_its_own(
    encode: Callable[..., bytes], size: tuple[int, int], options: dict[str, object]
) -> None:
    payload = encode(*size, subsampling=2, **options)
    normal = normalise(payload, YUV420)
    assert (normal.width, normal.height, normal.changed) == (*size, "")
    assert isinstance(normal.payload, np.ndarray)
    assert normal.payload.tobytes() == Jpeg(payload).planes().packed().tobytes()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kind": "PNG"}, "PNG"),
        ({"mode": "L"}, "greyscale JPEG"),
        ({"mode": "CMYK"}, "CMYK JPEG"),
        ({"exif": exif(6), "subsampling": 2}, "EXIF rotation"),
        ({"subsampling": 0}, "JPEG not of 4:2:0"),
        ({"subsampling": 0, "keep_rgb": True}, "JPEG not of 4:2:0"),
        ({"subsampling": 0, "exif": exif(1)}, "JPEG not of 4:2:0"),
    ],
)
def test_planes_of_others_are_made_of_upright_rgb(
    encode: Callable[..., bytes], options: dict[str, object], reason: str
) -> None:
    payload = encode(63, 47, **options)
    normal = normalise(payload, YUV420)
    assert normal.changed == reason
    rgb = ImageOps.exif_transpose(decoded(payload)).convert("RGB")
    assert (normal.width, normal.height) == rgb.size
    assert isinstance(normal.payload, np.ndarray)
    assert normal.payload.tobytes() == encode_planes(np.asarray(rgb)).packed().tobytes()
    pixels = normalise(np.asarray(rgb), YUV420)
    assert isinstance(pixels.payload, np.ndarray)
    assert (pixels.payload.tobytes(), pixels.changed) == (normal.payload.tobytes(), "pixels")


def test_planes_are_made_after_reducing(encode: Callable[..., bytes]) -> None:
    payload = encode(120, 80, subsampling=2)
    normal = normalise(payload, Normalising(tier="yuv420", short_side=41))
    assert (normal.width, normal.height) == (62, 41)
    small = decoded(payload).resize((62, 41), Image.Resampling.LANCZOS, reducing_gap=2.0)
    assert isinstance(normal.payload, np.ndarray)
    assert normal.payload.tobytes() == encode_planes(np.asarray(small)).packed().tobytes()


@pytest.mark.parametrize("verify", [True, False])
def test_damage_is_found_when_planes_are_decoded(encode: Callable[..., bytes], verify: bool) -> None:
    for payload in (cut(encode(subsampling=2)), cut(encode(subsampling=2, exif=exif(1)))):
        with pytest.raises(BadImage) as caught:
            normalise(payload, Normalising(tier="yuv420", verify=verify))
        assert caught.value.reason == "truncated"


@pytest.mark.parametrize("tier", ["jpeg", "yuv420"])
def test_unusual_subsampling_is_encoded_again(tier: Tier) -> None:
    normal = normalise(unusual_jpeg(), Normalising(tier=tier))
    assert (normal.width, normal.height, normal.changed) == (32, 16, "JPEG of unusual subsampling")
    if isinstance(normal.payload, bytes):
        assert (np.asarray(decoded(normal.payload)) == 128).all()
        assert normalise(normal.payload, JPEG).changed == ""
    else:
        assert (normal.payload == 128).all()


@pytest.mark.parametrize("how", [JPEG, YUV420, Normalising(short_side=45), Normalising(verify=False)])
def test_the_short_path_gives_the_same_as_pillow(
    encode: Callable[..., bytes], how: Normalising, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path without Pillow stores the same bytes and accepts no other images."""
    whole = encode(subsampling=2)
    payloads = [
        *(encode(subsampling=2, **extra) for extra in ({}, {"progressive": True}, {"exif": exif(6)})),
        *(encode(subsampling=0, **extra) for extra in ({}, {"keep_rgb": True}, {"comment": b"\xff\xe1 x"})),
        *(encode(mode=mode) for mode in ("L", "CMYK")),
        *(encode(kind=kind) for kind in ("PNG", "WEBP")),
        whole[:-2] + b"stray" * 40 + whole[-2:],
        whole + b"behind the end",
        *(whole[:stop] for stop in (0, 2, 3, 20, 200, len(whole) // 2, -40, -2, -1)),
        whole[:20] + b"\xff\xff" + whole[20:],
        b"hello",
        unusual_jpeg(),
    ]

    def outcome(payload: bytes) -> object:
        try:
            normal = normalise(payload, how)
        except BadImage as bad:
            return bad.reason
        stored = normal.payload if isinstance(normal.payload, bytes) else normal.payload.tobytes()
        return stored, normal.width, normal.height, normal.changed

    quick = [outcome(payload) for payload in payloads]
    assert isinstance(module._store_unchanged(whole, JPEG), StoredImage)
    monkeypatch.setattr(module, "_store_unchanged", lambda payload, how: None)
    assert quick == [outcome(payload) for payload in payloads]


def test_a_small_file_with_a_huge_size_in_its_header_is_not_decoded(encode: Callable[..., bytes]) -> None:
    """A progressive JPEG's decoder allocates two bytes per sample at once, gigabytes in this case."""
    payload = bytearray(encode(64, 48, progressive=True))
    frame = payload.index(b"\xff\xc2")
    payload[frame + 5 : frame + 9] = (65_000).to_bytes(2) * 2
    with pytest.raises(BadImage) as caught:
        normalise(bytes(payload), JPEG)
    assert caught.value.reason == "too large"


def cut(payload: bytes) -> bytes:
    return payload[: len(payload) * 2 // 3]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda encode: cut(encode()), "truncated"),
        (lambda encode: encode()[:-2], "truncated"),
        (lambda encode: cut(encode(progressive=True)), "truncated"),
        (lambda encode: cut(encode(mode="CMYK")), "truncated"),
        (lambda encode: cut(encode(mode="L")), "truncated"),
        (lambda encode: cut(encode()) + b"\xff\xd9", "truncated"),
        (lambda encode: cut(encode(kind="PNG")), "truncated"),
        (lambda encode: b"", "not a picture"),
        (lambda encode: b"hello", "not a picture"),
        (lambda encode: b"\xff\xd8\xff", "not a picture"),
    ],
)
def test_bad_bytes_have_a_reason(
    encode: Callable[..., bytes], spoil: Callable[[Callable[..., bytes]], bytes], reason: str
) -> None:
    with pytest.raises(BadImage) as caught:
        normalise(spoil(encode), JPEG)
    assert caught.value.reason == reason


def test_unverified_jpegs_are_judged_by_their_header(encode: Callable[..., bytes]) -> None:
    payload = cut(encode())
    assert normalise(payload, Normalising(verify=False)).payload is payload


def test_jpegs_with_decoder_warnings_are_encoded_again(encode: Callable[..., bytes]) -> None:
    """Stray bytes before the end change no pixel, but the loader's decoder would warn in every epoch."""
    whole = encode()
    normal = normalise(whole[:-2] + b"stray" * 40 + whole[-2:], JPEG)
    assert normal.changed == "irregular JPEG"
    assert normalise(bytes(normal.payload), JPEG).changed == ""


def test_too_large_sides_are_refused() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (70_000, 2)).save(buffer, "PNG")
    with pytest.raises(BadImage, match="70000 × 2 px; the limit is 65535"):
        normalise(buffer.getvalue(), JPEG)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quality": 0}, "quality is 0"),
        ({"quality": 101}, "quality is 101"),
        ({"max_side": 0}, "max_side is 0"),
        ({"short_side": 65_536}, "short_side is 65536 px"),
        ({"short_side": 9, "max_side": 9}, "max_side is 9 px and short_side 9 px; give one of the two"),
        ({"tier": "gif"}, "tier is 'gif'; known are jpeg, yuv420, raw"),
        ({"tier": "raw", "recompress": True}, "the tier raw has none"),
        ({"tier": "yuv420", "recompress": True}, "the tier yuv420 has none"),
    ],
)
def test_options_are_checked(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Normalising(**options)  # type: ignore[arg-type]

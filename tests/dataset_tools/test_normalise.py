import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from dataset_tools.normalise import BadPicture, Normalising, normalise

pytest.importorskip("ffcv")
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
def test_plain_jpeg_passes_untouched(encode: Callable[..., bytes], options: dict[str, object]) -> None:
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
def test_others_are_encoded_anew(
    encode: Callable[..., bytes], options: dict[str, object], reason: str
) -> None:
    payload = encode(**options)
    normal = normalise(payload, JPEG)
    assert normal.changed == reason
    image = decoded(normal.payload)
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (normal.width, normal.height))
    wanted = ImageOps.exif_transpose(decoded(payload)).convert("RGB")
    assert image.size == wanted.size
    difference = np.abs(np.asarray(image, np.int16) - np.asarray(wanted, np.int16))
    assert difference.mean() < 6, "the pixels are those of the source, upright"


def test_chroma_is_kept_whole_where_it_was(encode: Callable[..., bytes]) -> None:
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
def test_bad_bytes_are_named(
    encode: Callable[..., bytes], spoil: Callable[[Callable[..., bytes]], bytes], reason: str
) -> None:
    with pytest.raises(BadPicture) as caught:
        normalise(spoil(encode), JPEG)
    assert caught.value.reason == reason


def test_unverified_jpegs_pass_by_their_header(encode: Callable[..., bytes]) -> None:
    payload = cut(encode())
    assert normalise(payload, Normalising(verify=False)).payload is payload


def test_decoder_warnings_lead_to_a_clean_jpeg(encode: Callable[..., bytes]) -> None:
    """Stray bytes before the end cost no pixel, but the loader's decoder would report them for ever."""
    whole = encode()
    normal = normalise(whole[:-2] + b"stray" * 40 + whole[-2:], JPEG)
    assert normal.changed == "irregular JPEG"
    assert normalise(bytes(normal.payload), JPEG).changed == ""


def test_sides_beyond_the_format_are_refused() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (70_000, 2)).save(buffer, "PNG")
    with pytest.raises(BadPicture, match="70000 × 2 px; the limit is 65535"):
        normalise(buffer.getvalue(), JPEG)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quality": 0}, "quality is 0"),
        ({"quality": 101}, "quality is 101"),
        ({"max_side": 0}, "max_side is 0"),
        ({"tier": "gif"}, "tier is 'gif'"),
    ],
)
def test_options_are_checked(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Normalising(**options)  # type: ignore[arg-type]

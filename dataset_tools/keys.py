"""Names of samples in shards: the source's path, in letters that every reader of WebDataset takes alike.

WebDataset cuts a name at the first dot after the last slash, DALI's index files are split at white space,
and tar programs print other letters in their own ways. So all but letters, digits and ``_ - ~ / .`` are
percent-encoded as in URLs, and so are the dots in a picture's own name. No two pictures have the same key.
"""

import hashlib
import os
from collections.abc import Iterable
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt

from pipelines.sets.folder import PICTURE_SUFFIXES


def encode_key(path: str) -> str:
    """Percent-encode a relative path; dots stay only within the names of folders."""
    folder, slash, name = path.rpartition("/")
    parts = [_encode_part(part) for part in folder.split("/")] if slash else []
    return "/".join([*parts, quote(os.fsencode(name), safe="").replace(".", "%2E")])


def decode_key(key: str) -> str:
    """Return the path that :func:`encode_key` made ``key`` of."""
    return unquote(key, errors="surrogateescape")


def _encode_part(part: str) -> str:
    quoted = quote(os.fsencode(part), safe="")
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted


def without_suffix(path: str) -> str:
    """Cut the suffix of a picture file off a path; a name that is nothing else stays."""
    folder, slash, name = path.rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    return f"{folder}{slash}{stem}" if stem and f"{dot}{suffix}".lower() in PICTURE_SUFFIXES else path


class Keys:
    """The key of every picture: its path without the suffix, or with it where that would not be unique.

    Knows of every picture only whether it keeps its suffix, in one bit.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        """Look at all paths, which must differ from each other."""
        hashes = np.fromiter(((_hash(without_suffix(path)), _hash(path)) for path in paths), _TWO_HASHES)
        # Where hashes of different paths meet, a suffix is kept without need, and nothing else happens.
        stems, inverse, counts = np.unique(hashes["stem"], return_inverse=True, return_counts=True)
        shared = (counts > 1) | np.isin(stems, hashes["path"])
        self._keeps: npt.NDArray[np.uint8] = np.packbits(shared[inverse])

    def __call__(self, index: int, path: str) -> str:
        """Return the key of picture ``index``, whose path is ``path``."""
        keeps = self._keeps[index >> 3] >> (7 - (index & 7)) & 1
        return encode_key(path if keeps else without_suffix(path))


_TWO_HASHES = np.dtype([("stem", "<u8"), ("path", "<u8")])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "little")

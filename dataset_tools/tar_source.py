"""Images in a tar. Nothing is unpacked: every image is read from its offset."""

import io
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dataset_tools.sources import ListedSource, Sample
from dataset_tools.tars import Member, Window, tar_members
from pipelines.sets.folder import IMAGE_SUFFIXES, NO_LABEL, SPLIT_NAMES, PassedOver

PathParts = tuple[str, ...]
"""A path, split at its slashes."""


class TarSource(ListedSource):
    """Images of one tar, in the order of a FolderSource of the unpacked tar.

    Three layouts are accepted:

    - a tar of one tar per class, such as ILSVRC2012_img_train.tar; the name of the inner tar is the class.
    - a tar of images in folders; the first folder of the path is the class.
    - a tar of images without folders; they have no classes.

    Names that start with a dot are ignored. If several members have the same name, the last one is used, as
    when a tar is unpacked.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        labelled: bool = True,
        labels_file: str | Path | None = None,
        accept_truncated: bool = False,
        progress: Callable[[], None] | None = None,
    ) -> None:
        """Read all headers; only the name, offset, size and label of each image are kept.

        Args:
            path: the tar.
            labelled: False treats all images as unlabelled.
            labels_file: one class name per line, in the order of the sorted images, for tars without
                folders.
            accept_truncated: take the images of a damaged tar before the damage, and count it in
                ``passed_over``.
            progress: called once per image.

        Raises:
            ValueError: if the tar is compressed, cut short or damaged; if it holds no images, images both
                in folders and outside, or links; if the labels do not match.
        """
        scan = _TarScan(Path(path), accept_truncated)
        found = scan.folders(progress)
        classes, labels = _classes_and_labels(Path(path), found, labelled)
        if labels_file is not None:
            if classes:
                raise ValueError(
                    f"{path} has class folders, and {labels_file} would label it again; omit the file"
                )
            classes, labels = read_labels(labels_file, len(labels))
        names = ((f.prefix, f.names()) for f in found)
        super().__init__(Path(path), classes, labels, names, scan.passed_over)
        self._offsets = np.concatenate([f.numbers(f.offsets) for f in found])
        self._sizes = np.concatenate([f.numbers(f.sizes) for f in found])
        self._file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if (file := self.__dict__.get("_file")) is not None:
            os.close(file)

    def read(self, index: int) -> Sample:
        """Read the bytes of image ``index``. Raises OSError if the tar ends before its end."""
        size = int(self._sizes[index])
        content = os.pread(self._file, size, int(self._offsets[index]))
        if len(content) < size:
            raise OSError(f"{self.root} ends within the image")
        return Sample(content, self.label(index), self.path(index))


class _FolderImages:
    """The images of one folder of a tar, in the order of the tar, and by name after ``sort``."""

    def __init__(self, parts: PathParts) -> None:
        self.parts = parts
        self.prefix = "".join(part + "/" for part in parts)
        self._names = bytearray()  # each after a NUL, which no name contains
        self.offsets, self.sizes = array("Q"), array("Q")
        self._order: npt.NDArray[np.int64] = np.zeros(0, np.int64)

    def add(self, name: str, offset: int, num_bytes: int) -> None:
        """Add one image."""
        self._names += b"\0" + os.fsencode(name)
        self.offsets.append(offset)
        self.sizes.append(num_bytes)

    def __len__(self) -> int:
        return len(self._order)

    def sort(self) -> int:
        """Sort by name, keep the last image of each name, and return how many were dropped.

        Names are Python objects only here and in ``names``, for one folder at a time.
        """
        names = self._decoded()
        last = {name: i for i, name in enumerate(names)}
        self._order = np.array([last[name] for name in sorted(last)], np.int64)
        return len(names) - len(last)

    def names(self) -> list[str]:
        """Return the sorted names."""
        names = self._decoded()
        return [names[i] for i in self._order]

    def numbers(self, values: "array[int]") -> npt.NDArray[np.uint64]:
        """Return ``offsets`` or ``sizes`` in the order of the names."""
        sorted_values: npt.NDArray[np.uint64] = np.frombuffer(values, np.uint64)[self._order]
        return sorted_values

    def _decoded(self) -> list[str]:
        return [os.fsdecode(name) for name in bytes(self._names).split(b"\0")[1:]]


class _TarScan:
    """One walk through the headers of a tar, and of the tars in it."""

    def __init__(self, path: Path, accept_truncated: bool) -> None:
        self.passed_over = PassedOver()
        self._path = path
        self._on_damage = self.passed_over.count_damage if accept_truncated else None

    def folders(self, progress: Callable[[], None] | None) -> list[_FolderImages]:
        """Return the folders of all images in the order of a listing, a folder before its subfolders."""
        folders: dict[PathParts, _FolderImages] = {}
        for parts, member in self._images():
            folder = folders.setdefault(parts[:-1], _FolderImages(parts[:-1]))
            folder.add(parts[-1], member.offset, member.num_bytes)
            if progress is not None:
                progress()
        if not folders:
            raise ValueError(
                f"no images in {self._path}: looked for {' '.join(IMAGE_SUFFIXES)}, and for tars with "
                "them; give a tar of images, or of one tar per class"
            )
        ordered = [folders[parts] for parts in sorted(folders)]
        for folder in ordered:
            if earlier := folder.sort():
                self.passed_over["ignored: earlier files of the same name"] += earlier
        return ordered

    def _images(self) -> Iterator[tuple[PathParts, Member]]:
        """Yield (folder and name, member) of every image of the tar, or of the tars in it."""
        first_tar = first_image = ""
        with self._path.open("rb") as file:
            for member in tar_members(file, str(self._path), self._on_damage):
                parts = self._parts(member, (*IMAGE_SUFFIXES, ".tar"))
                if not parts:
                    continue
                if parts[-1].lower().endswith(".tar"):
                    first_tar = first_tar or member.name
                    yield from self._images_of_class(Path(parts[-1]).stem, member, file.fileno())
                else:
                    first_image = first_image or member.name
                    yield parts, member
                if first_tar and first_image:
                    raise ValueError(
                        f"{self._path} holds tars (such as {first_tar}) and images (such as "
                        f"{first_image}); pack only one of the two kinds"
                    )

    def _images_of_class(
        self, name: str, inner: Member, descriptor: int
    ) -> Iterator[tuple[PathParts, Member]]:
        """Yield the images of one class, which are in an inner tar; offsets are those of the outer tar."""
        window = io.BufferedReader(Window(descriptor, inner.offset, inner.num_bytes))
        for member in tar_members(window, f"{self._path}: {inner.name}", self._on_damage):
            if parts := self._parts(member, IMAGE_SUFFIXES):
                yield (name, *parts), member._replace(offset=inner.offset + member.offset)

    def _parts(self, member: Member, suffixes: tuple[str, ...]) -> PathParts:
        """Return the parts of a member's path; () for a hidden file or another suffix, which is counted."""
        parts = tuple(part for part in member.name.split("/") if part not in ("", "."))
        hidden = next((part for part in parts if part.startswith(".") and part != ".."), "")
        if not parts or hidden or not parts[-1].lower().endswith(suffixes):
            self.passed_over.count_file(hidden or (parts[-1] if parts else ""))
            return ()
        if ".." in parts:
            raise ValueError(f"{self._path}: {member.name} lies outside the packed folder; pack it again")
        if member.link:
            raise ValueError(
                f"{self._path}: {member.name} is a link or a sparse file, so its content is not stored here; "
                "pack the tar again with `tar --dereference --hard-dereference`"
            )
        return parts


def _classes_and_labels(
    path: Path, found: list[_FolderImages], labelled: bool
) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Return the class names, and the (N,) labels of the images in order."""
    counts = [len(folder) for folder in found]
    loose = not found[0].parts
    if not labelled or (loose and len(found) == 1):
        return (), np.full(sum(counts), NO_LABEL, np.int64)
    if loose:
        raise ValueError(
            f"{path} holds {counts[0]} loose images (first: {found[0].names()[0]}) and others in folders "
            f"(first: {found[1].prefix}); pack all of them in folders or none, or convert with --no-labels "
            "to take all of them as one unlabelled set"
        )
    classes = tuple(sorted({folder.parts[0] for folder in found}))
    if {name.lower() for name in classes} <= SPLIT_NAMES:
        raise ValueError(
            f"the folders in {path} are splits, not classes ({', '.join(classes)}); pack only one of them, "
            "or convert with --no-labels to take all as one unlabelled set"
        )
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.repeat(np.array([number[folder.parts[0]] for folder in found], np.int64), counts)


def read_labels(file: str | Path, count: int) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Read one class name per line for ``count`` images; return the sorted names and (N,) class numbers.

    Raises:
        ValueError: if the file has another number of lines or an empty line.
    """
    names = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    if len(names) != count:
        raise ValueError(f"{file} has {len(names)} lines for {count} images; give one class name per line")
    if not all(names):
        raise ValueError(f"{file}: line {names.index('') + 1} is empty; give one class name per line")
    classes = tuple(sorted(set(names)))
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[name] for name in names], np.int64)

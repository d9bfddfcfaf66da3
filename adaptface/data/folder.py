"""Training faces in an image folder, one folder an identity, with an optional CSV of identities and domains."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from adaptface.data.base import DOMAIN_COLUMN, UNLABELLED, DomainNumbers, label_fault, natural, shown, warn
from adaptface.data.lists import FileSource, read_csv, relative_name

IMAGE_SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif",
    ".tiff", ".webp",
)  # fmt: skip
NEIGHBOURS = (".csv", ".db", ".ini", ".json", ".lst", ".md", ".txt", ".yaml", ".yml")  # expected beside images
SPLIT_FOLDERS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test"))


class FolderSource(FileSource):
    """An image folder, one folder an identity; see `open_source` for the arguments. `loose` images may lie outside.

    Labels and images follow the natural order of their names ("id_2" before "id_10") on every system. Images
    may lie deeper than one level; the first folder names the identity. Links to folders are followed.
    """

    def __init__(
        self,
        root: Path,
        metadata: str | os.PathLike[str] | None,
        split: str,
        domains: Sequence[str] | None,
        loose: bool = False,
    ) -> None:
        root = _split_folder(root, split)
        files = _training_images(root)
        listed = root / "metadata.csv"
        numbers = DomainNumbers(domains)
        table: dict[str, _Row] = {}
        if metadata is not None or listed.is_file():
            table = _read_metadata(Path(metadata) if metadata is not None else listed, root, set(files), numbers)
        unlisted = _Row(None, UNLABELLED, 0)
        super().__init__(
            shown(root),
            root,
            files,
            _identities(root, files, table, loose),
            [table.get(file, unlisted).domain for file in files],
            numbers.names,
        )


def _split_folder(root: Path, split: str) -> Path:
    """`root/split` where the folder is made of splits, else `root` (which is then all training data)."""
    folders = set(_folders(root))
    if folders and folders <= SPLIT_FOLDERS:
        if split not in folders:
            raise ValueError(f"{shown(root)}: has no split {split!r}, only {', '.join(sorted(folders))}")
        return root / split
    if split != "train":
        raise ValueError(
            f"{shown(root)}: is not divided into splits, so it has no {split!r}; give that part's own folder"
        )
    return root


def _folders(root: Path) -> list[str]:
    return [name for name in os.listdir(root) if not name.startswith(".") and (root / name).is_dir()]


def find_images(root: Path) -> tuple[list[str], list[str]]:
    """Images below a folder, links to folders followed, hidden ones left out.

    Returns:
        Paths of the images relative to `root` with "/", in natural order; and of files that one would not expect there.
    Raises:
        OSError: a folder cannot be read.
        ValueError: a link leads to a folder that is there already, or nowhere.
    """
    images: list[str] = []
    strangers: list[str] = []
    seen: dict[tuple[int, int], str] = {}  # folders, by device and number there

    def entries(folder: str, prefix: str) -> list[tuple[os.DirEntry, str]]:
        """What a folder holds, last one first."""
        status = os.stat(folder)
        other = seen.setdefault((status.st_dev, status.st_ino), folder)
        if other != folder:
            raise ValueError(
                f"{shown(folder)}: a link to {shown(other)}, whose images would count twice, or without end; remove it"
            )
        found = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        return [(e, prefix + e.name) for e in sorted(found, key=lambda entry: natural(entry.name), reverse=True)]

    ahead = entries(os.fspath(root), "")  # a stack: folders may be nested deeper than calls
    while ahead:
        entry, name = ahead.pop()
        try:
            is_folder = entry.is_dir()
        except OSError as error:  # a link to itself
            raise ValueError(f"{shown(entry.path)}: cannot be followed ({error.strerror})") from error
        suffix = os.path.splitext(name)[1].lower()
        if is_folder:
            ahead += entries(entry.path, f"{name}/")
        elif suffix in IMAGE_SUFFIXES:
            images.append(name)
        elif suffix not in NEIGHBOURS:
            strangers.append(name)
    return images, strangers


def person_of(name: str) -> str:
    """Whose photo it is, by its path below a folder: the first folder's name, or the file's own without its suffix."""
    path = PurePosixPath(name)
    return path.parts[0] if len(path.parts) > 1 else path.stem


def _training_images(root: Path) -> list[str]:
    """As `find_images`; warns about what is left out."""
    images, strangers = find_images(root)
    if not images:
        raise ValueError(f"{shown(root)}: holds no image ({' '.join(IMAGE_SUFFIXES)}); expected a folder an identity")
    if strangers:
        warn(root, strangers, "files are no images and are left out")
    filled = {file.partition("/")[0] for file in images}
    empty = sorted((name for name in _folders(root) if name not in filled), key=natural)
    if empty:
        warn(root, empty, "identity folders hold no image and are left out")
    return images


def _identities(root: Path, files: list[str], table: "dict[str, _Row]", loose: bool) -> list[str]:
    """Identity name of each image: from the CSV where it has that column, else the first folder, or a file's name."""
    if any(row.identity is not None for row in table.values()):
        missing = [file for file in files if file not in table]
        if missing:
            raise ValueError(
                f"{shown(root / missing[0])}: not listed in the metadata, nor are {len(missing) - 1} others; with an "
                "`identity` column every image must be listed"
            )
        return [str(table[file].identity) for file in files]
    outside = [file for file in files if "/" not in file]
    if outside and not loose:
        raise ValueError(
            f"{shown(root / outside[0])}: lies outside any identity folder, like {len(outside) - 1} others; move it, "
            "or name its identity in a metadata CSV"
        )
    identities = [person_of(file) for file in files]
    folded: dict[str, str] = {}
    for name in dict.fromkeys(identities):
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise ValueError(
                f"{shown(root)}: the folders '{shown(other)}' and '{shown(name)}' differ by case only and would be "
                "one identity on other systems; rename or merge them"
            )
    return identities


class _Row(NamedTuple):
    identity: str | None
    domain: int
    line: int


def _read_metadata(path: Path, root: Path, files: set[str], domains: "DomainNumbers") -> dict[str, _Row]:
    """Rows of the CSV by image file, checked against the images found."""
    table: dict[str, _Row] = {}
    for line, record in read_csv(path):
        here = f"{shown(path)}, line {line}"
        if not {"identity", DOMAIN_COLUMN} & record.keys():
            raise ValueError(
                f"{shown(path)}, line 1: neither a column 'identity' nor '{DOMAIN_COLUMN}', only "
                f"{shown(', '.join(record))}; name one so, or remove the file"
            )
        file = relative_name(record["file"])
        if file not in files:
            raise ValueError(f"{here}: '{shown(file)}' is no image of {shown(root)}")
        if file in table:
            raise ValueError(f"{here}: '{shown(file)}' was listed before, on line {table[file].line}")
        identity = record.get("identity")
        if identity is not None and not identity.strip():
            raise ValueError(f"{here}: '{shown(file)}' has no identity")
        domain = domains.number(here, record.get(DOMAIN_COLUMN))
        table[file] = _Row(identity and identity.strip(), domain, line)
    if not table:
        raise ValueError(f"{shown(path)}: has no row; list the images, or remove the file")
    labels = [row.identity for row in table.values() if row.identity is not None]  # of all rows or none
    if fault := label_fault(labels):
        raise ValueError(f"{shown(path)}, line {list(table.values())[fault[0]].line}: {fault[1]}")
    return table

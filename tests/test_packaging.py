"""What a user's machine gets: the wheel's names, the application inside it, and a light import."""

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


def run_python(*arguments, cwd, pythonpath):
    environment = os.environ | {"PYTHONPATH": str(pythonpath), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    built = run_python("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=CHECKOUT, pythonpath="")
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "site")
        yield archive


@pytest.fixture(scope="module")
def site(wheel):
    return Path(wheel.filename).parent / "site"


def test_the_wheel_claims_one_top_level_name(wheel):
    top_level = {Path(name).parts[0] for name in wheel.namelist()}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"jax_sae"}


def files_under(folder):
    found = (path for path in (CHECKOUT / folder).rglob("*") if path.is_file())
    return {path.relative_to(CHECKOUT) for path in found if path.parent.name != "__pycache__"}


def test_the_wheel_holds_every_file_of_library_and_application_and_nothing_else(wheel):
    shipped = {Path(name) for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == files_under("jax_sae") | {"jax_sae" / path for path in files_under("train")}


def test_the_wheel_is_typed_and_carries_its_license(wheel):
    assert "jax_sae/py.typed" in wheel.namelist()
    (license_file,) = (name for name in wheel.namelist() if name.endswith("licenses/LICENSE"))
    assert wheel.read(license_file).decode() == (CHECKOUT / "LICENSE").read_text()


def test_the_installed_application_runs_outside_the_checkout(site, tmp_path):
    shown = run_python("-m", "jax_sae.train", "--help", cwd=tmp_path, pythonpath=site)
    assert shown.returncode == 0, shown.stderr
    assert "--preset" in shown.stdout
    assert "--workdir" in shown.stdout


# The path of an editable install would hide an absolute import of the checkout's `train`.
IMPORT_EVERYTHING = f"""
import importlib, pkgutil, sys
sys.path[:] = [path for path in sys.path if path != {str(CHECKOUT)!r}]
import jax_sae
print(jax_sae.__file__)
for module in pkgutil.walk_packages(jax_sae.__path__, "jax_sae."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print("train" in sys.modules)
"""


def test_every_module_of_the_wheel_imports_without_the_checkout(site, tmp_path):
    imported = run_python("-c", IMPORT_EVERYTHING, cwd=tmp_path, pythonpath=site)
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.splitlines() == [str(site / "jax_sae" / "__init__.py"), "False"]


NEW_PACKAGES = """
import sys
import jax, flax.nnx, numpy, optax
def packages():
    return {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
before = packages()
import jax_sae
print(*sorted(packages() - before))
"""


def test_importing_the_library_loads_only_its_core_dependencies(tmp_path):
    loaded = run_python("-c", NEW_PACKAGES, cwd=tmp_path, pythonpath=CHECKOUT)
    assert loaded.stdout.split() == ["jax_sae"], loaded.stderr


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0]


def test_dependencies_point_from_the_application_to_the_library_only():
    for path in (CHECKOUT / "jax_sae").rglob("*.py"):
        assert not {"train", "benchmarks", "tests"} & set(imported_names(path)), path
    for path in (CHECKOUT / "train").rglob("*.py"):
        assert not {"train", "benchmarks", "tests"} & set(imported_names(path)), path


def test_every_import_is_declared_in_pyproject():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *extras["train"], *extras["demo"]]
    declared = {normalized(requirement) for requirement in required} | {"jax_sae"}
    sources = [*(CHECKOUT / "jax_sae").rglob("*.py"), *(CHECKOUT / "train").rglob("*.py")]
    imported = {name for path in sources for name in imported_names(path)} - set(sys.stdlib_module_names)
    provided = {
        "orbax": "orbax_checkpoint",
        "PIL": "pillow",
        "markupsafe": "jinja2",
        "ml_dtypes": "jax",
        "tensorboardX": "tensorboardx",
    }
    assert {provided.get(name, name) for name in imported} - declared == set()


def normalized(requirement):
    name = requirement.split(";")[0]
    for separator in "[<>=! ":
        name = name.partition(separator)[0]
    return name.replace("-", "_").lower()

"""The wheel, installed without the checkout."""

import json
import os
import site
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import capsexp
from capsexp.config.compose import conf_dir

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run(*arguments, cwd, **variables):
    """Run a command that must succeed; return what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    done = subprocess.run(
        [*map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin` of a new environment with the wheel; the dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("fresh") / "env"
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    pip = (folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, wheel, cwd=folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    # The .pth files there are read too: the editable capsexp is importable, but after the installed one.
    (packages / "zz_dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin"


def test_the_wheel_has_all_code_and_all_of_conf_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kinds = ("*.py", "*.cpp", "*.h", "*.html", "*.svg", "py.typed")
    code = {path.relative_to(ROOT).as_posix() for kind in kinds for path in (ROOT / "capsexp").rglob(kind)}
    conf = {f"capsexp/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert len(code) > 40
    assert len(conf) > 25
    assert names == code | conf


def test_the_installed_package_reads_its_own_conf(installed, tmp_path):
    code = "import capsexp, capsexp.config.compose as c; print(capsexp.__file__); print(c.conf_dir())"
    module, conf = map(Path, run(installed / "python", "-c", code, cwd=tmp_path).splitlines())
    assert module.is_relative_to(installed.parent)
    assert conf == module.parent / "conf"


def test_the_installed_command_shows_its_config_anywhere(installed, tmp_path):
    out = run(installed / "capsexp", "train", "--cfg", "job", cwd=tmp_path)
    assert "\nmodel:\n  _target_: capsexp.model.dynamic_routing.CapsNet\n" in out
    assert run(installed / "capsexp", "--version", cwd=tmp_path) == f"capsexp {metadata.version('capsexp')}\n"
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_trains_anywhere(installed, tmp_path):
    run(installed / "capsexp", "train", "trainer=smoke", "run=here", "device=cpu", cwd=tmp_path)
    status = json.loads((tmp_path / "here" / "status.json").read_text())
    assert (status["status"], status["step"]) == ("completed", 2)
    environment = json.loads((tmp_path / "here" / "env.json").read_text())
    assert (environment["commit"], environment["dirty"]) == (None, False)
    assert not (tmp_path / "here" / "dirty.patch").exists()


def test_an_editable_install_reads_the_checkouts_own_conf():
    assert Path(conf_dir()) == ROOT / "conf"
    assert Path(capsexp.__file__).parent == ROOT / "capsexp"
    assert not (ROOT / "capsexp" / "conf").exists()

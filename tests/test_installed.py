"""The program from a checkout, an editable install and a wheel, in a folder that has a ``data/`` too."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, stasc_environment

from stasc.__main__ import SCRIPTS

HOW = ("checkout", "editable", "wheel")

FIND = """
import importlib.util, stasc
print(stasc.__file__, *(importlib.util.find_spec(name).origin for name in ("callbacks", "data")), sep="\\n")
"""

MINE = """
from pathlib import Path

from lightning.pytorch import Callback

import callbacks
import data
import stasc
from data import QuestionSource
from stasc.reward import InAccuracy


class MyReward(InAccuracy):
    pass


class Tells(Callback):
    def on_fit_start(self, trainer, pl_module):
        modules = (stasc, callbacks, data)
        Path(f"rank-{trainer.global_rank}").write_text("\\n".join(module.__file__ for module in modules))
"""

TRAP = "raise SystemExit('this is the module of the user')\n"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this repository, built without a registry."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--quiet", "--wheel-dir", folder, ROOT], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def environments(tmp_path_factory, wheel) -> dict[str, Path]:
    """The ``bin`` of environments that have our libraries, and stasc installed in some way or none."""
    bins = {}
    for how in HOW:
        folder = tmp_path_factory.mktemp(how)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        # Such lines do not read the .pth files of those folders, so an editable install there is off.
        places = [place for place in sys.path if place.endswith("site-packages")]
        (packages / "libraries.pth").write_text("\n".join(places))
        bins[how] = folder / "bin"
        source = {"checkout": [], "editable": ["--editable", ROOT], "wheel": [wheel]}[how]
        options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--ignore-installed")
        if source:
            command = [bins[how] / "python", "-m", "pip", "install", *options, *source]
            subprocess.run(command, check=True)
    return bins


@pytest.fixture
def run(environments, cache):
    """Runs a command of one of the environments."""

    def run(how: str, program: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        environment = stasc_environment(cache) | {"OMP_NUM_THREADS": "1"}
        del environment["PYTHONPATH"]
        return subprocess.run(
            [environments[how] / program, *map(str, arguments)],
            cwd=cwd,
            env=environment | ({"PYTHONPATH": str(ROOT)} if how == "checkout" else {}),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run


def users_folder(folder: Path, names: tuple[str, ...], kind: str) -> Path:
    """A folder with a ``data`` and so on of the user: a folder of files, a package or a module."""
    for name in names:
        if kind == "module":
            (folder / f"{name}.py").write_text(TRAP)
            continue
        (folder / name).mkdir()
        (folder / name / {"folder": "questions.jsonl", "package": "__init__.py"}[kind]).write_text(TRAP)
    (folder / "my").mkdir()
    (folder / "my/data.py").write_text(MINE)
    return folder


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["folder", "package", "module"])
def test_what_is_imported_is_ours(environments, run, tmp_path, how, kind):
    # A folder `stasc` without Python in it is what one sees from beside a clone.
    users_folder(tmp_path, ("callbacks", "data", *(["stasc"] if kind == "folder" else [])), kind)
    found = run(how, "python", "-c", FIND, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    package, *rooms = map(Path, found.stdout.splitlines())
    installed = environments[how].parent.resolve()
    assert package.is_relative_to(installed if how == "wheel" else ROOT)
    house = package.parent if how == "wheel" else ROOT
    assert rooms == [house / "callbacks/__init__.py", house / "data/__init__.py"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "program"),
    [
        ("checkout", ("python", "-m", "stasc")),
        ("editable", ("python", "-m", "stasc")),
        ("editable", ("stasc",)),
        ("wheel", ("python", "-m", "stasc")),
        ("wheel", ("stasc",)),
    ],
)
def test_the_users_classes_and_our_configs_are_found(run, tmp_path, how, program):
    users_folder(tmp_path, ("callbacks", "data", "stasc"), "folder")
    options = ("--config", "quickstart", "--config", "baselines/star", "--data.reward", "my.data.MyReward")
    printed = run(how, *program, "fit", *options, "--print_config", cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    assert "class_path: my.data.MyReward\n" in printed.stdout
    assert "class_path: stasc.algorithm.STaR\n" in printed.stdout
    assert "content: You are a helpful reasoning assistant." in printed.stdout  # of prompts/demo.yaml


@pytest.mark.slow
def test_all_processes_of_a_run_import_ours(environments, run, tmp_path):
    """Two training processes with an engine each, beside packages that end a program that imports them."""
    users_folder(tmp_path, ("callbacks", "data", "stasc"), "package")
    done = run(
        *("wheel", "stasc", "fit", "--config", "quickstart", "--run_dir", "run"),
        *("--data.train.init_args.size", 20, "--data.test.init_args.size", 20, "--algorithm.iterations", 1),
        *("--data.reward", "my.data.MyReward", "--trainer.callbacks", "my.data.Tells"),
        *("--trainer.devices", 2, "--trainer.strategy", "ddp", "--sampler.kv_cache_gib", 0.2),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run/iteration-01/metrics.json").is_file()
    assert len(list((tmp_path / "run").glob("engine-*.log"))) == 2
    for rank in (0, 1):
        for module in (tmp_path / f"rank-{rank}").read_text().split():
            assert Path(module).is_relative_to(environments["wheel"].parent.resolve())


@pytest.mark.slow
def test_the_ablations_run_from_a_wheel(run, tmp_path):
    users_folder(tmp_path, ("callbacks", "data"), "folder")
    done = run(
        "wheel", "stasc", "baselines", "--config", "quickstart", "--data.batches.size", 0, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "0 of 3 runs are finished." in done.stdout
    assert "STaR/seed-42 failed: stasc: data.batches.size is 0: it must be 1 or more." in done.stdout


def test_the_command_and_the_module_are_one_program(run, tmp_path):
    for arguments, status in (((), 2), (("--help",), 0), (("--version",), 0)):
        command = run("wheel", "stasc", *arguments, cwd=tmp_path)
        module = run("wheel", "python", "-m", "stasc", *arguments, cwd=tmp_path)
        assert (command.returncode, command.stdout) == (module.returncode, module.stdout)
        assert command.returncode == status
        assert command.stdout
    assert command.stdout == "stasc 0.2.0\n"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_commands(run, tmp_path, script):
    done = run("wheel", "stasc", script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {script}.py")


def test_what_a_wheel_holds(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    assert {file.partition("/")[0] for file in files} == {"stasc", "stasc-0.2.0.dist-info"}
    expected = {"stasc/py.typed"}
    for room in ("callbacks", "configs", "data", "scripts"):
        expected |= {f"stasc/{path.relative_to(ROOT)}" for path in (ROOT / room).rglob("*.[py]*[yl]")}
    assert len(expected) > 20
    assert not expected - set(files)

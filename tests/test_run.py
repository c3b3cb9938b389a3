"""The run folder: whole files or none, and one configuration for each run."""

import pytest

from stasc.errors import UserError
from stasc.run import Run, write_folder, write_json, write_lines

CONFIG = {"algorithm": {"variant": "EIE", "iterations": 2}, "trainer": {"devices": 1}, "run_dir": "a"}


def test_what_is_interrupted_leaves_the_old_file_and_no_folder(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})

    def lines():
        yield "half"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_lines(path, lines())
    assert path.read_text() == '{\n  "a": 1\n}\n'

    def fill():
        with write_folder(tmp_path / "model") as folder:
            (folder / "weights").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill()
    assert not (tmp_path / "model").exists()
    with write_folder(tmp_path / "model") as folder:
        assert not any(folder.iterdir())
        (folder / "weights").write_text("whole")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["weights"]


def test_the_same_configuration_continues_a_run(tmp_path):
    run = Run(tmp_path / "run")
    run.claim(CONFIG)
    run.claim(CONFIG)
    run.claim({**CONFIG, "trainer": {"devices": 2}, "run_dir": "moved"})


def test_more_iterations_continue_a_run_and_fewer_do_not(tmp_path):
    run = Run(tmp_path)
    run.claim(CONFIG)
    run.claim({**CONFIG, "algorithm": {"variant": "EIE", "iterations": 3}})
    with pytest.raises(UserError, match=r"another algorithm\.iterations \(3, now 2\)"):
        run.claim(CONFIG)


def test_another_configuration_is_refused_and_the_old_one_stays(tmp_path):
    run = Run(tmp_path)
    run.claim(CONFIG)
    before = run.config.read_bytes()
    with pytest.raises(UserError, match=r"another algorithm\.variant \(EIE, now FIF\): choose another"):
        run.claim({**CONFIG, "algorithm": {"variant": "FIF", "iterations": 2}})
    assert run.config.read_bytes() == before


def test_iterations_without_a_configuration_are_nobodys(tmp_path):
    (tmp_path / "iteration-01").mkdir()
    with pytest.raises(UserError, match=r"without its config\.yaml"):
        Run(tmp_path).claim(CONFIG)

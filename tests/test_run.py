"""The run folder: whole files or none, and one configuration for each run."""

from typing import Any

import pytest

from stasc.errors import UserError
from stasc.run import Run, copy_file, write_folder, write_json, write_lines


def config(variant: str = "EIE", iterations: int = 2, **others: Any) -> dict[str, Any]:
    options = {"variant": variant, "iterations": iterations}
    algorithm = {"class_path": "stasc.algorithm.STaSC", "init_args": options}
    return {"algorithm": algorithm, "trainer": {"devices": 1}, "run_dir": "a", **others}


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
    run.claim(config())
    run.claim(config())
    run.claim(config(trainer={"devices": 2}, run_dir="moved", reuse="elsewhere"))


def test_more_iterations_continue_a_run_and_fewer_do_not(tmp_path):
    run = Run(tmp_path)
    run.claim(config())
    run.claim(config(iterations=3))
    with pytest.raises(UserError, match=r"another --algorithm\.iterations \(3, now 2\)"):
        run.claim(config())


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (config(variant="FIF"), r"--algorithm\.variant \(EIE, now FIF\)"),
        (
            config(algorithm={"class_path": "stasc.algorithm.STaR"}),
            r"--algorithm \(stasc\.algorithm\.STaSC, now ",
        ),
        (
            config(algorithm={"class_path": "stasc.algorithm.STaSC"}),
            r"--algorithm\.iterations \(2, now None\)",
        ),
        (config(data={"test": {"init_args": {"size": 3}}}), r"--data\.test\.size \(None, now 3\)"),
    ],
)
def test_another_configuration_is_refused_as_a_user_types_it_and_the_old_one_stays(tmp_path, other, named):
    run = Run(tmp_path)
    run.claim(config())
    before = run.config.read_bytes()
    with pytest.raises(UserError, match=f"holds a run with another {named}.*: choose another"):
        run.claim(other)
    assert run.config.read_bytes() == before


def test_iterations_without_a_configuration_are_nobodys(tmp_path):
    (tmp_path / "iteration-01").mkdir()
    with pytest.raises(UserError, match=r"without its config\.yaml"):
        Run(tmp_path).claim(config())


def test_a_copy_has_the_same_bytes(tmp_path):
    source, copy = tmp_path / "source.jsonl", tmp_path / "deep" / "copy.jsonl"
    source.write_text('"line\u2028separator"\n"carriage\\r return"\n', encoding="utf-8", newline="")
    copy_file(source, copy)
    assert copy.read_bytes() == source.read_bytes()

"""The run folder: whole files or none, and one configuration for each run."""

from typing import Any

import pytest

from stasc.algorithm import STaSC
from stasc.errors import UserError
from stasc.run import (
    NEVER,
    START,
    TRAINING,
    FirstUse,
    Run,
    SystemRecord,
    first_use,
    read_json,
    write_folder,
    write_json,
    write_lines,
)

SYSTEM = SystemRecord("EIE", 2, 1.0, False, 42, {"algorithm.init_args.variant": "EIE"})


def config(variant: str = "EIE", iterations: int = 2, **others: Any) -> dict[str, Any]:
    options = {"variant": variant, "iterations": iterations}
    algorithm = {"class_path": "stasc.algorithm.STaSC", "init_args": options}
    return {"algorithm": algorithm, "trainer": {"devices": 1}, "run_dir": "a", **others}


def use(option: str, before: Any, now: Any) -> FirstUse:
    if option in ("run_dir", "trainer.devices"):
        return NEVER
    return TRAINING if option == "rate" else START


def claim(run: Run, configuration: dict[str, Any]) -> None:
    run.claim(configuration, SYSTEM, use, {"date": "today"})


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


def test_a_run_goes_on_with_whatever_has_no_part_in_its_results(tmp_path):
    run = Run(tmp_path / "run")
    claim(run, config())
    write_lines(run.iteration(1).answers(1), ["{}"])
    claim(run, config())
    claim(run, config(trainer={"devices": 2}, run_dir="moved"))
    assert run.read_system() == SYSTEM
    assert read_json(run.starts) == [{"date": "today"}] * 3


def test_more_iterations_continue_a_run_and_fewer_than_it_has_do_not(tmp_path):
    run = Run(tmp_path)

    def uses(option: str, before: Any, now: Any) -> FirstUse:
        return first_use(STaSC.first_uses, option.removeprefix("algorithm.init_args."), before, now)

    run.claim(config(), SYSTEM, uses, {})
    write_json(run.iteration(1).training, {})
    run.claim(config(iterations=3), SYSTEM, uses, {})
    run.claim(config(iterations=1), SYSTEM, uses, {})
    run.claim(config(iterations=3), SYSTEM, uses, {})
    write_json(run.iteration(2).training, {})
    with pytest.raises(UserError, match=r"another --algorithm\.iterations \(3, now 1\)"):
        run.claim(config(iterations=1), SYSTEM, uses, {})


def test_an_option_may_change_until_the_first_file_that_follows_from_it(tmp_path):
    run = Run(tmp_path)
    claim(run, config(rate=1))
    claim(run, config(variant="FIF", rate=1))  # nothing was sampled yet
    write_lines(run.iteration(1).answers(1), ["{}"])
    claim(run, config(variant="FIF", rate=2))
    write_json(run.iteration(1).training, {})
    with pytest.raises(UserError, match=r"another --rate \(2, now 3\)"):
        claim(run, config(variant="FIF", rate=3))


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
    claim(run, config())
    write_lines(run.iteration(1).answers(1), ["{}"])
    before = run.config.read_bytes()
    with pytest.raises(UserError, match=f"holds a run with another {named}.*: choose another"):
        claim(run, other)
    assert run.config.read_bytes() == before


def test_iterations_without_a_configuration_belong_to_nobody(tmp_path):
    (tmp_path / "iteration-01").mkdir()
    with pytest.raises(UserError, match=r"without its config\.yaml"):
        claim(Run(tmp_path), config())


def test_a_run_of_an_earlier_version_is_not_continued(tmp_path):
    run = Run(tmp_path)
    claim(run, config())
    write_lines(run.iteration(1).answers(1), ["{}"])
    run.system.unlink()
    with pytest.raises(UserError, match="a run of an earlier version"):
        claim(run, config())
    with pytest.raises(UserError, match=r"system\.json cannot be read"):
        run.read_system()

"""TensorBoard: every point is in its files once, whatever was killed, and ablations can be compared in it."""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import curves
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from callbacks import Curves
from callbacks.curves import tag
from callbacks.evaluation import curves as points

HYPERPARAMETERS = {"system": "EIF", "seed": 1, "learning_rate": 1e-3}


def train(run: Path, epochs: range, killed: bool = False, system: str = "EIF") -> None:
    """Log what training logs: two steps in each epoch, and the model before the epoch as its step."""
    logger = Curves(run)
    logger.log_hyperparams(HYPERPARAMETERS | {"system": system})
    for epoch in epochs:
        logger.begin(epoch)
        logger.log_metrics({"test/r1": epoch / 10}, step=epoch)
        logger.experiment.add_text("test/table", f"M_{epoch}", epoch)
        for step in (2 * epoch, 2 * epoch + 1):
            logger.log_metrics({"step/loss": 1 / (1 + step)}, step=step)
            logger.save()
    if not killed:
        logger.finalize("success")


class HParams(NamedTuple):
    """TensorBoard's page HPARAMS: what it ticks, and its rows by the run's name.

    It ticks five columns of each kind at first: hyper-parameters that differ between runs before others.
    """

    differing: list[str]
    metrics: list[str]
    rows: dict[str, dict[str, Any]]


def hparams_page(place: Path) -> HParams:
    """What TensorBoard, started for a folder, has on its page HPARAMS."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(place)).Reload()
    context = TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(place)), logdir=str(place))
    backend = backend_context.Context(context)
    request = RequestContext()
    experiment = get_experiment.Handler(request, backend, "", api_pb2.GetExperimentRequest()).run()
    columns = [
        api_pb2.ColParams(metric=metric.name, include_in_result=True) for metric in experiment.metric_infos
    ] + [api_pb2.ColParams(hparam=info.name, include_in_result=True) for info in experiment.hparam_infos]
    wanted = api_pb2.ListSessionGroupsRequest(
        col_params=columns,
        allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING],
        start_index=0,
        slice_size=100,
    )
    groups = list_session_groups.Handler(request, backend, "", wanted).run().session_groups
    rows = {
        session.name: {
            "status": session.status,
            **{name: value.string_value or value.number_value for name, value in group.hparams.items()},
            **{metric.name.tag: (metric.training_step, metric.value) for metric in session.metric_values},
        }
        for group in groups
        for session in group.sessions
    }
    differing = [info.name for info in experiment.hparam_infos if info.differs]
    return HParams(differing, [info.name.tag for info in experiment.metric_infos][:5], rows)


@pytest.mark.parametrize("epoch", range(3))
def test_an_epoch_that_is_trained_again_is_logged_once(tmp_path, epoch):
    train(tmp_path / "whole", range(3))
    train(tmp_path / "killed", range(epoch + 1), killed=True)
    train(tmp_path / "killed", range(epoch, 3))
    expected = curves(tmp_path / "whole")
    assert [step for step, _ in expected[tag("step/loss")]] == list(range(6))
    assert curves(tmp_path / "killed") == expected


def test_what_every_start_logs_before_its_first_epoch_is_there_once(tmp_path):
    for epoch in (0, 1):
        logger = Curves(tmp_path)
        logger.log_metrics({"users/own": epoch}, step=0)
        logger.begin(epoch)
        logger.log_metrics({"users/own": 2.0 + epoch}, step=1 + epoch)
        logger.finalize("failed")
    assert sorted(curves(tmp_path)["users/own"]) == [(0, 1.0), (1, 2.0), (2, 3.0)]


@pytest.mark.parametrize(
    "end", [b"", b"\xff" * 64, struct.pack("<Q", 20) + b"\xff" * 28], ids=["cut", "length", "event"]
)
def test_what_a_kill_or_the_disk_spoils_at_the_end_of_a_file_is_written_anew(tmp_path, end):
    train(tmp_path / "whole", range(3))
    train(tmp_path / "killed", range(2), killed=True)
    (file,) = (path for path in (tmp_path / "killed").iterdir() if path.suffix != ".start")
    file.write_bytes(file.read_bytes()[:-7] if not end else file.read_bytes() + end)
    train(tmp_path / "killed", range(1, 3))
    assert curves(tmp_path / "killed") == curves(tmp_path / "whole")


def test_hparams_ticks_what_differs_and_the_rewards(tmp_path):
    train(tmp_path / "runs/EIF", range(2))
    train(tmp_path / "runs/FIE", range(1), killed=True, system="FIE")
    page = hparams_page(tmp_path / "runs")
    assert page.differing == ["system"]
    assert page.metrics[0] == "1 test/1 reward of initial answers, r(Y1)"
    assert page.rows == {
        "EIF": {
            **HYPERPARAMETERS,
            "status": api_pb2.STATUS_SUCCESS,
            tag("test/r1"): (1, pytest.approx(0.1)),
            tag("step/loss"): (3, pytest.approx(1 / 4)),
        },
        "FIE": {
            **HYPERPARAMETERS,
            "system": "FIE",
            "status": api_pb2.STATUS_UNKNOWN,
            tag("test/r1"): (0, 0.0),
            tag("step/loss"): (1, pytest.approx(1 / 2)),
        },
    }


def test_the_test_questions_come_first_and_a_users_own_curve_keeps_its_name():
    names = ["step/loss", "train/r1", "validation/r2", "test/edited", "best/r2", "best/r1", "test/delta"]
    tags = [tag(name) for name in [*names, "test/r2", "test/r1"]]
    assert len(set(tags)) == len(tags)
    first = ["test/r1", "test/r2", "test/delta", "best/r1", "best/r2"]
    assert sorted(tags)[:5] == [tag(name) for name in first]
    assert tag("mine/r1") == "mine/r1"
    assert tag("epoch") == "epoch"


def test_the_best_rewards_are_those_up_to_here():
    iterations = [
        {"iteration": n, "test": {"r1": r1, "r2": r2}} for n, (r1, r2) in enumerate([(0.3, 0.1), (0.2, 0.4)])
    ]
    assert points(iterations) == {"test/r1": 0.2, "test/r2": 0.4, "best/r1": 0.3, "best/r2": 0.4}
    assert points(iterations[:1])["best/r2"] == 0.1

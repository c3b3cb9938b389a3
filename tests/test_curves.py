"""TensorBoard: every point is in its files once, whatever was killed, and ablations can be compared in it."""

from pathlib import Path
from typing import Any

import pytest
from conftest import curves
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from callbacks import Curves
from callbacks.evaluation import curves as points

HYPERPARAMETERS = {"system": "EIF", "seed": 1, "learning_rate": 1e-3}


def train(run: Path, epochs: range, killed: bool = False) -> None:
    """Log what training logs: two steps in each epoch, and the model before the epoch as its step."""
    logger = Curves(run / "tensorboard")
    logger.log_hyperparams(HYPERPARAMETERS)
    for epoch in epochs:
        logger.begin(epoch)
        logger.log_metrics({"test/r1": epoch / 10}, step=epoch)
        logger.experiment.add_text("test/table", f"M_{epoch}", epoch)
        for step in (2 * epoch, 2 * epoch + 1):
            logger.log_metrics({"step/loss": 1 / (1 + step)}, step=step)
            logger.save()
    if not killed:
        logger.finalize("success")


def hparams_table(place: Path) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The metrics that TensorBoard's table of hyper-parameters names, and its rows by the run's name."""
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
    return [info.name.tag for info in experiment.metric_infos], rows


@pytest.mark.parametrize("epoch", range(3))
def test_an_epoch_that_is_trained_again_is_logged_once(tmp_path, epoch):
    train(tmp_path / "whole", range(3))
    train(tmp_path / "killed", range(epoch + 1), killed=True)
    train(tmp_path / "killed", range(epoch, 3))
    expected = curves(tmp_path / "whole")
    assert [step for step, _ in expected["step/loss"]] == list(range(6))
    assert curves(tmp_path / "killed") == expected


def test_what_every_start_logs_before_its_first_epoch_is_there_once(tmp_path):
    for epoch in (0, 1):
        logger = Curves(tmp_path / "tensorboard")
        logger.log_metrics({"users/own": epoch}, step=0)
        logger.begin(epoch)
        logger.log_metrics({"users/own": 2.0 + epoch}, step=1 + epoch)
        logger.finalize("failed")
    assert sorted(curves(tmp_path)["users/own"]) == [(0, 1.0), (1, 2.0), (2, 3.0)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3


def test_the_table_of_hyperparameters_has_a_row_for_each_run(tmp_path):
    train(tmp_path / "EIF", range(2))
    train(tmp_path / "FIE", range(1), killed=True)
    metrics, rows = hparams_table(tmp_path)
    assert metrics == ["test/r1", "test/r2", "best/r1", "best/r2"]
    assert rows == {
        "EIF/tensorboard": {
            **HYPERPARAMETERS,
            "status": api_pb2.STATUS_SUCCESS,
            "test/r1": (1, pytest.approx(0.1)),
        },
        "FIE/tensorboard": {**HYPERPARAMETERS, "status": api_pb2.STATUS_UNKNOWN, "test/r1": (0, 0.0)},
    }
    assert set(curves(tmp_path / "EIF")) == {"test/r1", "step/loss"}, "the table adds no curve"


def test_the_best_rewards_are_those_up_to_here():
    iterations = [
        {"iteration": n, "test": {"r1": r1, "r2": r2}} for n, (r1, r2) in enumerate([(0.3, 0.1), (0.2, 0.4)])
    ]
    assert points(iterations) == {"test/r1": 0.2, "test/r2": 0.4, "best/r1": 0.3, "best/r2": 0.4}
    assert points(iterations[:1])["best/r2"] == 0.1

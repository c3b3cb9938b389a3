"""The probe: an engine with the trainer's weights passes, and one with any others does not."""

import json
import shutil

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file

from stasc.errors import UserError
from stasc.sampling import TransformersSampler
from stasc.sampling.probe import Probe
from stasc.training.weights import log_probabilities

SEQUENCES = [[1, 2, 3, 4, 5], [9, 8, 7]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def sampler(model, tmp_path):
    engine = TransformersSampler()
    engine.start(model, device=torch.device("cpu"), context=64, log=tmp_path / "log")
    return engine


def probe_of(model, change: float = 0.0) -> Probe:
    """What a trainer would write whose weights are the model's, each changed a little."""
    weights = {
        name: tensor + change * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    return Probe(SEQUENCES, log_probabilities(weights, model, SEQUENCES))


def test_a_probe_comes_back_from_its_file(model, tmp_path):
    probe = probe_of(model)
    probe.write(tmp_path / "probe.json")
    assert Probe.read(tmp_path / "probe.json") == probe
    assert [len(of_one) for of_one in probe.log_probabilities] == [4, 2]


def test_an_engine_with_the_trainers_weights_passes(model, sampler):
    probe_of(model).check(sampler, model)


@pytest.mark.parametrize("change", [3e-3, 0.1])
def test_an_engine_with_other_weights_is_found(model, sampler, change):
    with pytest.raises(
        UserError, match=r"the sampling engine does not hold .* off the trainer's, and 0\.001"
    ):
        probe_of(model, change).check(sampler, model)


def test_half_precision_is_allowed_its_rounding_and_not_another_model(model, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(model, half)
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, half / "model.safetensors")
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    engine = TransformersSampler()
    engine.start(half, device=torch.device("cpu"), context=64, log=tmp_path / "log")
    probe_of(model).check(engine, half)
    with pytest.raises(UserError, match=r"and 0\.1 is allowed"):
        probe_of(model, 0.1).check(engine, half)


def test_a_trainer_that_diverged_is_named_before_the_engine_is_asked(model):
    probe = Probe(SEQUENCES, [[0.0, float("nan"), 0.0, 0.0], [0.0, 0.0]])
    with pytest.raises(UserError, match=r"training diverged: .* Lower model\.learning_rate"):
        probe.check(None, model)

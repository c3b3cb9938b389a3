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
LONG = torch.randint(1, 200, (4, 100), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def sampler(model, tmp_path):
    engine = TransformersSampler()
    engine.start(model, device=torch.device("cpu"), context=64, log=tmp_path / "log")
    return engine


def changed(model, change: float) -> dict[str, torch.Tensor]:
    return {
        name: tensor + change * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        for name, tensor in load_file(model / "model.safetensors").items()
    }


def probe_of(model, change: float = 0.0, sequences=SEQUENCES) -> Probe:
    """What a trainer would write whose weights are the model's, each changed a little."""
    return Probe(sequences, log_probabilities(changed(model, change), model, sequences))


def in_half_precision(model, folder, change: float = 0.0):
    """A folder with the model's weights, each changed a little, in bfloat16."""
    shutil.copytree(model, folder)
    weights = {name: tensor.bfloat16() for name, tensor in changed(model, change).items()}
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


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
    half = in_half_precision(model, tmp_path / "half")
    engine = TransformersSampler()
    engine.start(half, device=torch.device("cpu"), context=64, log=tmp_path / "log")
    probe_of(model).check(engine, half)
    with pytest.raises(UserError, match=r"and 0\.1 is allowed"):
        probe_of(model, 0.1).check(engine, half)


@pytest.mark.parametrize(("change", "told"), [(1e-3, True), (1e-6, False), (0.0, False)])
def test_the_weights_of_the_iteration_before_are_found_where_rounding_hides_them(
    model, tmp_path, change, told
):
    old = in_half_precision(model, tmp_path / "old")
    new = in_half_precision(model, tmp_path / "new", change)
    before, now = probe_of(old, sequences=LONG), probe_of(new, sequences=LONG)
    engine = TransformersSampler()
    engine.start(old, device=torch.device("cpu"), context=128, log=tmp_path / "log")
    now.check(engine, new)  # no further off than rounding may be
    if told:
        with pytest.raises(UserError, match=r"does not hold .*/new but the model before it"):
            now.check(engine, new, before)
    else:
        now.check(engine, new, before)
    engine.load(new)
    now.check(engine, new, before)


def test_a_probe_of_the_base_model_reads_its_folder(model):
    assert log_probabilities(None, model, SEQUENCES) == probe_of(model).log_probabilities


def test_a_trainer_that_diverged_is_named_before_the_engine_is_asked(model):
    probe = Probe(SEQUENCES, [[0.0, float("nan"), 0.0, 0.0], [0.0, 0.0]])
    with pytest.raises(UserError, match=r"training diverged: .* Lower model\.learning_rate"):
        probe.check(None, model)

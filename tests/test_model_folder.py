"""Model folders: found, read without their weights, and told apart."""

import json
import os
import pickle
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file

from stasc.errors import UserError
from stasc.model_folder import ModelFolder


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", context=77)


@pytest.fixture
def folder(original, tmp_path) -> ModelFolder:
    """A copy that a test may change."""
    shutil.copytree(original, tmp_path / "model")
    return ModelFolder(tmp_path / "model")


def change_config(folder: ModelFolder, **changes: object) -> None:
    path = folder.path / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


# ---------------------------------------------------------------- finding


def test_a_folder_is_located_by_any_of_its_paths(folder, monkeypatch):
    monkeypatch.chdir(folder.path.parent)
    monkeypatch.setenv("HOME", str(folder.path.parent))
    for name in (str(folder.path), "model", "./model", "~/model"):
        assert ModelFolder.locate(name) == ModelFolder(folder.path.resolve())


def test_what_is_no_model_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"has no config\.json: model\.base must be"):
        ModelFolder.locate(str(tmp_path))
    with pytest.raises(UserError, match=r"model\.base .*/missing does not exist"):
        ModelFolder.locate(str(tmp_path / "missing"))

    def offline(model: str, **_: object) -> None:
        raise OSError("the hub is away\nand more lines")

    monkeypatch.setattr("stasc.model_folder.hub_is_away", lambda *_: None)
    monkeypatch.setattr("stasc.model_folder.snapshot_download", offline)
    with pytest.raises(UserError, match=r"'some/model' is not a folder here, .* \(the hub is away\)\.$"):
        ModelFolder.locate("some/model")


# ---------------------------------------------------------------- reading


def test_config_dtype_and_context(folder):
    assert folder.config["hidden_size"] == 64
    assert folder.dtype == "float32"
    assert folder.context == 77
    change_config(folder, dtype="bfloat16")
    assert folder.dtype == "bfloat16"
    change_config(folder, dtype=None, torch_dtype="float16")
    assert folder.dtype == "float16"
    change_config(folder, torch_dtype=None)
    assert folder.dtype == "float32"


def test_an_unknown_context_is_refused(folder):
    (folder.path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    with pytest.raises(UserError, match=r"has no max_position_embeddings: add it"):
        _ = folder.context


@pytest.mark.parametrize("content", [None, "{", "\xff"])
def test_a_damaged_config_is_refused(folder, content):
    path = folder.path / "config.json"
    path.unlink() if content is None else path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"is no model folder: config\.json cannot be read"):
        _ = folder.config


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["[1, 2]", '{"model_type": null, "eos_token_id": "two"}'])
def test_a_model_is_not_loaded_by_damaged_configs(folder, name, content):
    (folder.path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(name)):
        folder.model(torch.float32)


def test_tokenizer_and_generation_config(folder):
    assert folder.tokenizer().eos_token == "<|im_end|>"
    assert folder.generation_config().eos_token_id == folder.tokenizer().eos_token_id
    (folder.path / "generation_config.json").unlink()
    assert folder.generation_config() is None


def test_files_beside_weights(folder):
    (folder.path / "model.safetensors.index.json").write_text("{}")
    (folder.path / "notes.md").write_text("")
    names = {path.name for path in folder.files_beside_weights()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not {"model.safetensors", "model.safetensors.index.json", "notes.md"} & names


# ---------------------------------------------------------------- tensors


def test_shapes_are_those_of_the_tensors_in_one_file_or_several(folder):
    path = folder.path / "model.safetensors"
    tensors = load_file(path)
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert folder.tensor_shapes() == expected

    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for i, name in enumerate(sorted(tensors)):
        parts[f"{'ab'[i % 2]}.safetensors"][name] = tensors[name].to(torch.bfloat16)
    for file, part in parts.items():
        save_file(part, folder.path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    path.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    path.unlink()
    assert folder.tensor_shapes() == expected


def test_tensors_that_follow_from_others_do_not_count(folder):
    path = folder.path / "model.safetensors"
    expected, tensors = folder.tensor_shapes(), load_file(path)
    copies = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3),
    }
    save_file(tensors | copies, path)
    assert folder.tensor_shapes() == expected
    change_config(folder, tie_word_embeddings=False)
    assert folder.tensor_shapes().keys() - expected.keys() == {"lm_head.weight"}


@pytest.mark.parametrize("damage", ["cut", "missing", "index"])
def test_damaged_weights_are_refused(folder, damage):
    path = folder.path / "model.safetensors"
    if damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "missing":
        path.unlink()
    else:
        path.with_name("model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="has no usable safetensors weights"):
        folder.tensor_shapes()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_weights_that_could_run_code_are_refused_and_not_read(folder, name):
    class Strange:
        def __reduce__(self):
            return Path(folder.path / "ran").touch, ()

    (folder.path / "model.safetensors").unlink()
    (folder.path / name).write_bytes(pickle.dumps(Strange()))
    with pytest.raises(UserError, match=rf"has no usable safetensors weights .*; {name} could run code"):
        folder.tensor_shapes()
    assert not (folder.path / "ran").exists()


def test_code_of_a_model_is_refused_at_once_and_not_run(folder):
    (folder.path / "strange.py").write_text(f"open({str(folder.path / 'ran')!r}, 'w')\n")
    tokenizer = {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["strange.Strange", None]}}
    (folder.path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with suppress(UserError):
        folder.tokenizer()  # transformers may know a tokenizer for the architecture
    code = {"AutoConfig": "strange.Strange", "AutoModelForCausalLM": "strange.Strange"}
    change_config(folder, model_type="strange", auto_map=code)
    with pytest.raises(UserError, match=r"is read by Python code of its own \(auto_map\)"):
        folder.model_config()
    assert not (folder.path / "ran").exists()


def test_a_folder_that_leads_to_other_files_is_refused(folder):
    index = folder.path / "model.safetensors.index.json"
    for name in ("../model/model.safetensors", str(folder.path / "model.safetensors")):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        with pytest.raises(UserError, match=r"index\.json names .*, which is no file of this folder"):
            folder.tensor_shapes()
    (folder.path / "adapter_config.json").write_text('{"base_model_name_or_path": "nobody/nothing"}')
    with pytest.raises(UserError, match=r"has an adapter_config\.json, so it is an adapter"):
        folder.model_config()


def test_quantised_weights_are_refused(folder):
    change_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match="quantised weights cannot learn: choose the model that"):
        folder.model_config()


def test_other_tensors_are_named(folder):
    expected = dict(folder.tensor_shapes())
    folder.check_same_tensors(expected)
    with pytest.raises(UserError, match=r"model\.norm\.weight is 64, not 63\.$"):
        folder.check_same_tensors({**expected, "model.norm.weight": (63,)})
    with pytest.raises(UserError, match=r"new is missing, not 2x3\.$"):
        folder.check_same_tensors({**expected, "new": (2, 3)})
    del expected["model.norm.weight"]
    with pytest.raises(UserError, match=r"model\.norm\.weight is 64, not missing\.$"):
        folder.check_same_tensors(expected)


# ---------------------------------------------------------------- identity


def test_the_identity_stays_as_long_as_the_weights_do(folder, tmp_path):
    identity = folder.identity()
    assert len(identity) == 32
    assert int(identity, 16)
    (folder.path / "notes.md").write_text("not part of the model")
    (tmp_path / "link").symlink_to(folder.path)
    for again in (folder, ModelFolder(tmp_path / "link"), ModelFolder.locate(str(folder.path))):
        assert again.identity() == identity


def test_the_identity_tells_folders_and_states_of_a_folder_apart(folder, tmp_path):
    weights, found = folder.path / "model.safetensors", [folder.identity()]
    shutil.copytree(folder.path, tmp_path / "copy")  # with the same times
    found.append(ModelFolder(tmp_path / "copy").identity())
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    found.append(folder.identity())
    os.truncate(weights, status.st_size - 1)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    found.append(folder.identity())
    change_config(folder, rope_theta=1.0)
    found.append(folder.identity())
    weights.rename(folder.path / "other.safetensors")
    found.append(folder.identity())
    assert len(set(found)) == len(found)


def test_without_a_config_there_is_no_identity(tmp_path):
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        ModelFolder(tmp_path).identity()

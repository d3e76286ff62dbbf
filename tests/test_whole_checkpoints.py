"""Checkpoints of whole adapted models, as training loops write them: `load_lora` takes the adapter out of them.

The oracle is the model that was saved. Alone: `pytest tests/test_whole_checkpoints.py`.
"""

import json

import pytest
import torch
from reference import randomize
from safetensors.torch import save_file
from small_model import INDEX, TARGETS, assert_unchanged, small_model, snapshot
from torch import nn

import loralib as lora


def adapted(**more):
    model = small_model()
    lora.inject_lora(model, r=2, lora_alpha=6, target_modules=TARGETS, **more)
    randomize(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora" not in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def sharded(model, folder, endings):
    """As transformers shards what is too large for one file."""
    folder.mkdir()
    state, stem = model.state_dict(), "model" if endings == ".safetensors" else "pytorch_model"
    names, write = list(state), torch.save if endings == ".bin" else save_file
    parts = {f"{stem}-0000{i + 1}-of-00003{endings}": names[i::3] for i in range(3)}
    for file, part in parts.items():
        write({name: state[name].clone() for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / f"{stem}{endings}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def single(model, folder, name):
    folder.mkdir()
    write = save_file if name.endswith(".safetensors") else torch.save
    write({key: tensor.clone() for key, tensor in model.state_dict().items()}, folder / name)
    return folder


FORMS = {
    "bin": lambda model, path: single(model, path, "all.bin") / "all.bin",
    "safetensors": lambda model, path: single(model, path, "all.safetensors") / "all.safetensors",
    "folder": lambda model, path: single(model, path, "model.safetensors"),
    "folder of bin": lambda model, path: single(model, path, "pytorch_model.bin"),
    "shards": lambda model, path: sharded(model, path, ".safetensors"),
    "shards of bin": lambda model, path: sharded(model, path, ".bin"),
}


@pytest.mark.parametrize("write", FORMS.values(), ids=FORMS)
def test_the_adapter_is_taken_out(tmp_path, write):
    model = adapted()
    path = write(model, tmp_path / "saved")
    base = small_model()
    names = lora.load_lora(base, path, lora_alpha=6)
    assert torch.equal(base(INDEX), model(INDEX))
    assert sorted(names) == sorted(TARGETS)
    trained = {name for name, p in base.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    again = adapted()
    lora.load_lora(again, path, lora_alpha=6)
    assert torch.equal(again(INDEX), model(INDEX))


TRAINED = {"head": {"modules_to_save": ["head"]}, "biases": {"bias": "all"}, "its biases": {"bias": "lora_only"}}


@pytest.mark.parametrize("more", TRAINED.values(), ids=TRAINED)
def test_what_else_was_trained_comes_along(tmp_path, more):
    model = adapted(**more)
    base = small_model()
    lora.load_lora(base, single(model, tmp_path / "saved", "model.safetensors"), lora_alpha=6)
    assert torch.equal(base(INDEX), model(INDEX))
    assert not torch.equal(adapted()(INDEX), model(INDEX))


def test_names_of_wrappers(tmp_path):
    model = adapted()
    save_file(
        {f"module.{name}": tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "a.safetensors"
    )
    base = small_model()
    lora.load_lora(base, tmp_path / "a.safetensors", lora_alpha=6)
    assert torch.equal(base(INDEX), model(INDEX))


def test_scalings_that_are_recorded(tmp_path):
    """As `save_pretrained` of an adapted model records them, in the order of the names."""
    model = adapted(alpha_pattern={"embed": 10}, use_rslora=True)
    layers = {
        name: layer.scaling for name, layer in model.named_modules() if getattr(layer, "r", 0) and name != "second"
    }
    scalings = torch.tensor([layers[name] for name in sorted(layers)], dtype=torch.float64)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file({**state, "lora_scalings": scalings}, tmp_path / "a.safetensors")
    base = small_model()
    lora.load_lora(base, tmp_path / "a.safetensors")
    torch.testing.assert_close(base(INDEX), model(INDEX))
    with pytest.raises(ValueError, match="lora_alpha=6: .*a.safetensors carries its own; leave it out"):
        lora.load_lora(small_model(), tmp_path / "a.safetensors", lora_alpha=6)


def without(path, change):
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


REFUSED = {
    "no alpha": (lambda path: None, {}, "carries no lora_alpha"),
    "a shard is missing": (
        lambda path: (path / "model-00002-of-00003.safetensors").unlink(),
        {"lora_alpha": 6},
        "names files that are not beside it",
    ),
    "a file elsewhere": (
        lambda path: without(
            path, lambda index: index["weight_map"].update(a="../saved/model-00001-of-00003.safetensors")
        ),
        {"lora_alpha": 6},
        "names files that are not beside it",
    ),
    "no index": (
        lambda path: (path / "model.safetensors.index.json").write_text("[]"),
        {"lora_alpha": 6},
        "is no index of a checkpoint",
    ),
}


@pytest.mark.parametrize("change, more, message", REFUSED.values(), ids=REFUSED)
def test_refusals(tmp_path, change, more, message):
    path = sharded(adapted(), tmp_path / "saved", ".safetensors")
    change(path)
    model = small_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lora.load_lora(model, path, **more)
    assert_unchanged(model, before)


def test_another_base_is_refused(tmp_path):
    model, other = adapted(), small_model()
    with torch.no_grad():
        other.first.weight.mul_(2)
    with pytest.raises(ValueError, match="with another base than this one: first.weight differ; load the adapter into"):
        lora.load_lora(other, single(model, tmp_path / "saved", "model.safetensors"), lora_alpha=6)
    assert lora.list_adapters(other) == []
    torch.save(model.half().state_dict(), tmp_path / "half.pt")
    with pytest.raises(ValueError, match=r"differ; load .* trained on, in its dtype \(float16 there, float32 here\)"):
        lora.load_lora(small_model(), tmp_path / "half.pt", lora_alpha=6)


def test_a_checkpoint_of_lightning(tmp_path):
    model, base = adapted(), small_model()
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state, "callbacks": {}}, tmp_path / "a.ckpt")
    lora.load_lora(nn.ModuleDict({"net": base}), tmp_path / "a.ckpt", lora_alpha=6)
    assert torch.equal(base(INDEX), model(INDEX))


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(ValueError, match="holds no adapter: no name in it ends with '.lora_A'"):
        lora.load_lora(small_model(), single(small_model(), tmp_path / "saved", "model.safetensors"), lora_alpha=6)

"""Adapter files: round trips, what is refused, and that nothing is half done.

Real tiny models and real files; damage is done to the bytes of files that save_lora wrote.
Run alone: `pytest tests/test_checkpoint.py`.
"""

import copy
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import loralib as lora

X = torch.linspace(-1, 1, 32).reshape(4, 8)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = x + self.embed(torch.arange(x.shape[0]))
        x = self.conv(x.T[None])[0].T
        return self.head(self.body(x))


TARGETS = ["embed", "conv", "body.0"]


def adapted(r=2, targets=TARGETS, **options):
    torch.manual_seed(5)
    model = Model()
    lora.inject_lora(model, r=r, lora_alpha=6, target_modules=targets, **options)
    for module in model.modules():
        if isinstance(module, lora.LoRALayer):
            nn.init.normal_(module.lora_A)
            nn.init.normal_(module.lora_B)
    return model


def base():
    torch.manual_seed(5)
    return Model()


def snapshot(model):
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "grad": [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        "scaling": [m.scaling for m in model.modules() if isinstance(m, lora.LoRALayer)],
    }


def assert_same(now, then):
    assert {k: v for k, v in now.items() if k != "state"} == {k: v for k, v in then.items() if k != "state"}
    assert now["state"].keys() == then["state"].keys()
    assert all(torch.equal(now["state"][name], then["state"][name]) for name in now["state"])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "adapter.safetensors"
    lora.save_lora(adapted(), path)
    return path


@pytest.mark.parametrize("mode", ["train", "eval", "merged while training", "disabled"])
@pytest.mark.parametrize("into", ["base", "base in eval", "adapted", "adapted and merged"])
def test_round_trip(tmp_path, mode, into):
    """The loaded model computes what the saved one computed, whatever the state of either."""
    path, model = tmp_path / "a.safetensors", adapted(lora_dropout=0.25)
    with torch.no_grad():
        wanted = model.eval()(X)
    model.train(mode != "eval")
    if mode == "merged while training":
        lora.merge_lora_weights(model)
    if mode == "disabled":
        with lora.disable_adapters(model):
            lora.save_lora(model, path)
    else:
        lora.save_lora(model, path)
    other = base() if "base" in into else adapted(lora_dropout=0.25)
    other.train(into in ("base", "adapted"))
    if "adapted" in into:
        for module in other.modules():
            if isinstance(module, lora.LoRALayer):
                module.scaling = 99.0
                nn.init.zeros_(module.lora_A)
        with torch.no_grad():
            other(X)
    assert lora.load_lora(other, path) == TARGETS
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(X), wanted)
    layer = other.body[0]
    assert (layer.r, layer.lora_alpha, layer.scaling, layer.lora_dropout.p) == (2, 6, 3.0, 0.25)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("modules_to_save", [None, ["head"], "hea."])
def test_biases_and_heads_travel(tmp_path, bias, modules_to_save):
    """What mark_only_lora_as_trainable trains is in the file, and trains again after loading into a plain base."""
    path, model = tmp_path / "a.safetensors", adapted()
    lora.mark_only_lora_as_trainable(model, bias, modules_to_save)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    lora.save_lora(model, path, bias, modules_to_save)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(load_file(path)) == trained
    other = base()
    lora.load_lora(other, path)
    assert {name for name, parameter in other.named_parameters() if parameter.requires_grad} == trained
    torch.testing.assert_close(other(X), model(X))


def test_scaling_and_groups_travel(tmp_path):
    """A changed scaling and the groups of a MergedLinear made by hand come back, into a plain nn.Linear too."""
    path = tmp_path / "a.safetensors"
    model = nn.Sequential(lora.MergedLinear(8, 12, r=2, enable_lora=[False, True, True]))
    nn.init.normal_(model[0].lora_B)
    model[0].scaling = 0.125
    lora.save_lora(model, path)
    plain = nn.Sequential(nn.Linear(8, 12))
    plain.load_state_dict(model.state_dict(), strict=False)
    lora.load_lora(plain, path)
    assert plain[0].enable_lora == [False, True, True] and plain[0].scaling == 0.125
    torch.testing.assert_close(plain(X), model(X))


def test_file_is_what_the_format_says(file):
    """Plain safetensors under upstream's keys, float32, with the configuration as JSON in the metadata."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    config = json.loads(metadata["loralib"])
    assert list(metadata) == ["loralib"] and config["format_version"] == 1
    assert config["loralib_version"] == lora.__version__
    assert list(config["layers"]) == TARGETS
    assert config["layers"]["body.0"] == {"r": 2, "lora_alpha": 6, "scaling": 3.0, "lora_dropout": 0.0}
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(file).items() if name.startswith("body")}
    assert shapes == {"body.0.lora_A": (2, 8), "body.0.lora_B": (8, 2)}
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_file_has_the_permissions_of_any_new_file(file, tmp_path):
    (tmp_path / "other").touch()
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_equal_adapters_give_equal_files_without_local_paths(tmp_path):
    model = adapted()
    files = []
    for name in (str(tmp_path), "gpt2"):
        model.config = SimpleNamespace(_name_or_path=name)
        for _ in range(4):
            lora.save_lora(model, tmp_path / "a.safetensors")
            files.append((tmp_path / "a.safetensors").read_bytes())
    assert len(set(files)) == 2
    assert str(tmp_path).encode() not in files[0] and tmp_path.name.encode() in files[0] and b"gpt2" in files[-1]


def rewritten(file, change_config=None, change_tensors=None):
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["loralib"])
    tensors = load_file(file)
    if change_config:
        config = change_config(config) or config
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, file, metadata={"loralib": config if isinstance(config, str) else json.dumps(config)})


def with_complex_numbers(file):
    if version("safetensors").startswith("0.") and int(version("safetensors").split(".")[1]) < 7:
        pytest.skip("safetensors before 0.7 writes no complex numbers")
    rewritten(file, None, lambda t: t.update({"conv.lora_B": torch.ones(8, 2, dtype=torch.complex64)}))


def rename_layer(config):
    config["layers"]["body.7"] = config["layers"].pop("body.0")


def spec(**changes):
    return lambda config: config["layers"]["body.0"].update(changes)


DAMAGES = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-10]), "is no whole safetensors file"),
    "empty": (lambda f: f.write_bytes(b""), "is no whole safetensors file"),
    "pickle": (lambda f: torch.save({"a": X}, f), "is no whole safetensors file"),
    "foreign": (lambda f: save_file({"a": X}, f), "has no loralib configuration"),
    "no JSON": (lambda f: rewritten(f, lambda c: "{"), "malformed loralib configuration"),
    "a list": (lambda f: rewritten(f, lambda c: [1]), "malformed loralib configuration"),
    "later format": (lambda f: rewritten(f, lambda c: c.update(format_version=2)), "format_version is 2"),
    "no layers": (lambda f: rewritten(f, lambda c: c.pop("layers") and None), "malformed loralib configuration"),
    "empty layers": (lambda f: rewritten(f, lambda c: c.update(layers={})), "it names no layers"),
    "head as text": (
        lambda f: rewritten(f, lambda c: c.update(modules_to_save="conv")),
        "modules_to_save must be a list",
    ),
    "head as number": (
        lambda f: rewritten(f, lambda c: c.update(modules_to_save=[1])),
        "bias and modules_to_save must be names",
    ),
    "rank as text": (lambda f: rewritten(f, spec(r="2")), "r='2': the rank must be an integer"),
    "NaN scaling": (lambda f: rewritten(f, spec(scaling=float("nan"))), "must be finite"),
    "unknown key": (lambda f: rewritten(f, spec(device="cuda")), "a layer has .*'device'"),
    "wrong bias mode": (lambda f: rewritten(f, lambda c: c.update(bias="some")), "bias='some': must be one of"),
    "huge rank": (lambda f: rewritten(f, spec(r=10**9)), r"body.0.lora_A: \(2, 8\) in the file, \(1000000000, 8\)"),
    "endless rank": (
        lambda f: rewritten(f, spec(r=10**30)),
        "body.0.lora_A: .2, 8. in the file, .10+, 8. in the model",
    ),
    "rank 0": (lambda f: rewritten(f, spec(r=0)), "body.0: body.0 would get no adapter: r=0"),
    "no group": (
        lambda f: rewritten(f, spec(enable_lora=[False, False])),
        r"body.0: body.0 would get no adapter: r=2, enable_lora=\[False, False\]",
    ),
    "unknown layer": (lambda f: rewritten(f, rename_layer), "body.7: the model has no such layer"),
    "tensor missing": (
        lambda f: rewritten(f, None, lambda t: t.pop("conv.lora_A")),
        "conv.lora_A: missing in the file",
    ),
    "base weight inside": (
        lambda f: rewritten(f, None, lambda t: t.update({"head.weight": torch.zeros(3, 8)})),
        "head.weight: unexpected in the file",
    ),
    "integers": (
        lambda f: rewritten(f, None, lambda t: t.update({"conv.lora_B": torch.ones(8, 2, dtype=torch.int64)})),
        "conv.lora_B: torch.int64 in the file, torch.float32 in the model",
    ),
    "complex numbers": (
        with_complex_numbers,
        "conv.lora_B: torch.complex64 in the file, torch.float32 in the model",
    ),
    "misshapen": (
        lambda f: rewritten(f, None, lambda t: t.update({"conv.lora_B": torch.zeros(8, 5)})),
        r"conv.lora_B: \(8, 5\) in the file, \(8, 2\) in the model",
    ),
}


COMPARED = {
    "huge rank": "body.0: r is 1000000000 in the file, 2 in the model",
    "endless rank": "body.0: r is 10+ in the file, 2 in the model",
    "rank 0": "body.0: r is 0 in the file, 2 in the model",
    "no group": r"body.0: enable_lora is \[False, False\] in the file, None in the model",
    "unknown layer": "body.7: the file adapts it, the model does not",
}


@pytest.mark.parametrize("make", [base, adapted])
@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_refused_and_nothing_changed(file, make, damage, message):
    damage(file)
    model = make().eval()
    before = snapshot(model)
    if make is adapted:  # the file is compared with the model, rather than a layer built from it
        message = COMPARED.get(next(name for name, entry in DAMAGES.items() if entry[0] is damage), message)
    with pytest.raises(ValueError, match=message):
        lora.load_lora(model, file)
    assert_same(snapshot(model), before)


def test_all_problems_in_one_error(file):
    """A file for another model names every layer and tensor that does not fit."""
    model = nn.Sequential()
    model.embed, model.conv = nn.Embedding(10, 8), nn.Conv1d(8, 4, 3)
    with pytest.raises(ValueError, match="does not fit Sequential; nothing was loaded") as caught:
        lora.load_lora(model, file)
    for part in ("body.0: ", "body.0.lora_A: unexpected", "conv.lora_B: (8, 2) in the file, (4, 2) in the model"):
        assert part in str(caught.value)


def test_a_model_without_values_is_refused(file):
    """What is copied to the meta device is gone, which torch only warns of."""
    with pytest.raises(ValueError, match="the model is on the meta device, which holds no values"):
        lora.load_lora(base().to("meta"), file)


def test_other_groups_of_the_same_shape_are_refused(tmp_path):
    """enable_lora is compared: the shapes alone would let q be loaded as k."""
    path = tmp_path / "a.safetensors"
    lora.save_lora(nn.Sequential(lora.MergedLinear(8, 12, r=2, enable_lora=[True, False, True])), path)
    other = nn.Sequential(lora.MergedLinear(8, 12, r=2, enable_lora=[True, True, False]))
    with pytest.raises(ValueError, match=r"0: enable_lora is \[True, False, True\] in the file"):
        lora.load_lora(other, path)


def test_missing_file_and_nothing_to_save(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such adapter file"):
        lora.load_lora(base(), tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="Model has no adapters to save; call lora.inject_lora"):
        lora.save_lora(base(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="bias='some'"):
        lora.save_lora(adapted(), tmp_path / "a.safetensors", bias="some")
    with pytest.raises(ValueError, match="format='torch': must be 'loralib', 'peft' or 'diffusers'"):
        lora.save_lora(adapted(), tmp_path / "a.safetensors", format="torch")
    with pytest.raises(ValueError, match="single_rank=True is for format='peft'"):
        lora.save_lora(adapted(), tmp_path / "a.safetensors", single_rank=True)
    with pytest.raises(ValueError, match="is a folder; give the name of a file, or format='peft'"):
        lora.save_lora(adapted(), tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="is a file; give the name of a folder for format='peft'"):
        lora.save_lora(adapted(), tmp_path / "a", format="peft")
    with pytest.raises(ValueError, match="is a file; give the name of a folder for format='diffusers'"):
        lora.save_lora(adapted(), tmp_path / "a", format="diffusers")


def test_weights_of_peft_without_their_configuration(tmp_path):
    """The bare file is not enough: ranks, but no alpha."""
    model = nn.Sequential(nn.Linear(4, 4))
    lora.inject_lora(model, r=2, target_modules=["0"])
    lora.save_lora(model, tmp_path, format="peft")
    with pytest.raises(ValueError, match="no loralib configuration.*give the folder that holds adapter_config.json"):
        lora.load_lora(lora.unload(model), tmp_path / "adapter_model.safetensors")


def test_a_save_that_fails_leaves_the_earlier_file(file, monkeypatch):
    """Interrupted between writing and renaming, the earlier file is whole and no other remains."""
    before = file.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    model = adapted()
    nn.init.ones_(model.body[0].lora_B)
    with pytest.raises(KeyboardInterrupt):
        lora.save_lora(model, file)
    assert file.read_bytes() == before and [entry.name for entry in file.parent.iterdir()] == [file.name]


SAVE_FOR_EVER = """
import signal, sys, torch, loralib as lora
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
model = torch.nn.Sequential(torch.nn.Linear(2000, 2000))
lora.inject_lora(model, r=200, target_modules=["0"])
print("saving", flush=True)
while True:
    lora.save_lora(model, sys.argv[1])
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_while_saving(tmp_path):
    """SIGINT in a process that saves over and over leaves one whole file."""
    path = tmp_path / "a.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with process:
        assert process.stdout.readline() == b"saving\n"
        while not path.exists():
            pass
        process.send_signal(signal.SIGINT)
    assert process.returncode != 0
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert set(load_file(path)) == {"0.lora_A", "0.lora_B"}


def test_copies_are_independent_of_the_file(file):
    """Loading copies: a second load into a copy of the model gives equal, separate tensors."""
    first = base()
    lora.load_lora(first, file)
    second = copy.deepcopy(first)
    nn.init.zeros_(first.body[0].lora_A)
    assert second.body[0].lora_A.abs().sum() > 0


# What a file says of itself, and starting one task from another


def test_metadata_comes_back_and_changes_nothing_else(tmp_path, file):
    with_text = tmp_path / "b.safetensors"
    lora.save_lora(adapted(), with_text, metadata={"task": "sst2", "note": "naïve"})
    assert lora.read_metadata(with_text) == {"task": "sst2", "note": "naïve"}
    assert lora.read_metadata(file) == {}
    one, other = base(), base()
    assert lora.load_lora(one, with_text) == lora.load_lora(other, file)
    assert torch.equal(one(X), other(X))
    lora.save_lora(adapted(), tmp_path / "peft", format="peft")
    torch.save(lora.lora_state_dict(adapted()), tmp_path / "upstream.bin")
    assert lora.read_metadata(tmp_path / "peft") == lora.read_metadata(tmp_path / "upstream.bin") == {}


def test_a_file_from_before_metadata_loads(file):
    rewritten(file, lambda config: config.pop("metadata") and None)
    assert lora.read_metadata(file) == {}
    assert lora.load_lora(base(), file) == TARGETS


@pytest.mark.parametrize("metadata", [{"task": 3}, {3: "task"}, ["task"], "task"])
def test_metadata_that_are_no_texts_are_refused(tmp_path, file, metadata):
    with pytest.raises(ValueError, match="must be a dict of texts, such as {'task': 'sst2'}"):
        lora.save_lora(adapted(), tmp_path / "b.safetensors", metadata=metadata)
    assert not (tmp_path / "b.safetensors").exists()
    if metadata != {3: "task"}:  # which JSON cannot say
        rewritten(file, lambda config: config.update(metadata=metadata))
        with pytest.raises(ValueError, match="malformed loralib configuration.*must be a dict of texts"):
            lora.read_metadata(file)


def test_metadata_of_no_file_and_for_peft_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the files of peft have no place for it"):
        lora.save_lora(adapted(), tmp_path / "peft", format="peft", metadata={"task": "sst2"})
    with pytest.raises(FileNotFoundError, match="no such adapter file"):
        lora.read_metadata(tmp_path / "none.bin")
    save_file({"a": X}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="has no loralib configuration"):
        lora.read_metadata(tmp_path / "a.safetensors")


def test_an_adapter_without_its_head_starts_another_task(tmp_path):
    """The adapters are the file's, the head of another shape stays the model's and trains on."""
    path = tmp_path / "three_labels.safetensors"
    first = adapted(modules_to_save=["head"])
    lora.save_lora(first, path)

    def two_labels(**options):
        model = base()
        model.head = nn.Linear(8, 2)
        lora.inject_lora(model, r=2, lora_alpha=1, target_modules=TARGETS, **options)
        return model

    second = two_labels(modules_to_save=["head"])
    head = {name: tensor.clone() for name, tensor in second.head.state_dict().items()}
    before = snapshot(second)
    with pytest.raises(ValueError, match=r"head.weight: \(3, 8\) in the file, \(2, 8\) in the model"):
        lora.load_lora(second, path)
    assert_same(snapshot(second), before)
    assert lora.load_lora(second, path, heads=False) == TARGETS
    assert all(torch.equal(tensor, head[name]) for name, tensor in second.head.state_dict().items())
    assert all(parameter.requires_grad for parameter in second.head.parameters())
    adapters = {name: tensor for name, tensor in lora.lora_state_dict(first).items() if "lora_" in name}
    now = lora.lora_state_dict(second, modules_to_save=["head"])
    assert len(adapters) == 6 and all(torch.equal(now[name], tensor) for name, tensor in adapters.items())
    assert {m.scaling for m in second.modules() if isinstance(m, lora.LoRALayer)} == {3.0}
    lora.save_lora(second, path)  # the head is the adapter's still
    assert {"head.weight", "head.bias"} <= load_file(path).keys()


def test_an_adapter_without_its_head_in_a_model_without_adapters(tmp_path):
    path = tmp_path / "a.safetensors"
    lora.save_lora(adapted(modules_to_save=["head"]), path)
    model = base()
    head = model.head.weight
    assert lora.load_lora(model, path, heads=False) == TARGETS
    assert model.head.weight is head and not head.requires_grad


@pytest.mark.parametrize(
    ("format", "name"), [("loralib", "a.safetensors"), ("peft", "adapter"), ("diffusers", "b.safetensors")]
)
def test_folders_that_do_not_exist_are_made(format, name, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    lora.inject_lora(model, r=2, target_modules=["0"])
    lora.save_lora(model, tmp_path / "runs" / "today" / name, format=format)
    assert lora.load_lora(nn.Sequential(nn.Linear(8, 8)), tmp_path / "runs" / "today" / name) == ["0"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        lora.save_lora(model, tmp_path / "file" / name, format=format)


def test_a_number_that_is_not_one_is_told_once(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    lora.inject_lora(model, r=2, target_modules=["0"])
    nn.init.constant_(model[0].lora_B, float("nan"))
    lora.save_lora(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="0.lora_B: NaN or infinity in the file") as caught:
        lora.load_lora(model, tmp_path / "adapter")
    assert str(caught.value).count("\n") == 1

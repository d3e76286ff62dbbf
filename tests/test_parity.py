"""loralib against values computed by the original loralib 0.1.2: a faithful user's seeds and checkpoints keep working.

How: golden/upstream_0_1_2.safetensors (made by golden/make_golden.py) holds upstream's initial values, outputs,
gradients, merged weights and keys; the same measurements on our layers have to agree, the initial values bit for bit.
Run alone: `pytest tests/test_parity.py`.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import loralib as lora

GOLDEN = Path(__file__).parent / "golden"


def load_maker():
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = load_maker()


def golden() -> tuple[dict, dict]:
    with safe_open(GOLDEN / "upstream_0_1_2.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["about"])  # noqa: SIM118


VALUES, ABOUT = golden()


def our_key(key: str) -> str:
    """Upstream keeps a convolution's own tensors one level down; ours lie flat (row 11 of the defects)."""
    return key.replace("conv.weight", "weight").replace("conv.bias", "bias")


def upstream_values(name: str) -> dict[str, torch.Tensor]:
    found = {key.partition("/")[2]: value for key, value in VALUES.items() if key.partition("/")[0] == name}
    return {our_key(key): value for key, value in found.items()}


@pytest.mark.parametrize("name", maker.LAYERS)
def test_same_seed_gives_the_same_layer(name):
    """Initial values are upstream's to the last bit, in upstream's shapes and under its keys."""
    ours, shapes = maker.measure(lora, name)
    assert shapes == {our_key(key): shape for key, shape in ABOUT["state_dict"][name].items()}
    for key, value in upstream_values(name).items():
        if key.startswith("init.") and name == "embedding":
            # Normal draws go through log and cos, whose last bit depends on the processor.
            torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-6)
        elif key.startswith("init."):
            assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("name", maker.LAYERS)
def test_same_outputs_gradients_and_merged_weights(name):
    """The training output, every gradient, the weight after eval() and the evaluation output are upstream's."""
    ours, _ = maker.measure(lora, name)
    wanted = upstream_values(name)
    assert ours.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_lora_state_dict_has_upstream_keys(bias):
    """The keys saved in each bias mode are upstream's, `lora_only` adding what upstream trains but does not save."""
    wanted = {our_key(key) for key in ABOUT["lora_state_dict"][bias]}
    if bias == "lora_only":  # rows 12 and 23 of the defects
        wanted |= {f"{name}.bias" for name in maker.LAYERS if name.startswith("conv") or name == "linear_r0"}
    assert set(lora.lora_state_dict(maker.make_model(lora), bias=bias)) == wanted


@pytest.mark.parametrize("name", [name for name in maker.LAYERS if name != "linear_r0"])
def test_upstream_checkpoint_loads(name):
    """A full upstream state dict loads strictly, and the layer then gives upstream's outputs."""
    theirs = {key.partition("/")[2]: value for key, value in VALUES.items() if key.partition("/")[0] == name}
    state = {key.removeprefix("init."): value for key, value in theirs.items() if key.startswith("init.")}
    state |= {key.removeprefix("adapter."): value for key, value in theirs.items() if key.startswith("adapter.")}
    kind, args, kwargs, _ = maker.LAYERS[name]
    layer = getattr(lora, kind)(*args, **kwargs)
    layer.load_state_dict(state, strict=True)
    torch.testing.assert_close(layer(theirs["x"]), theirs["out_train"], rtol=2e-6, atol=5e-6)
    torch.testing.assert_close(layer.eval()(theirs["x"]), theirs["out_eval"], rtol=2e-6, atol=5e-6)


def test_golden_file_says_how_it_was_made():
    """The golden values carry their command, date and versions, and are those of 0.1.2."""
    assert ABOUT["versions"]["loralib"] == "0.1.2" and ABOUT["versions"].keys() == {"loralib", "torch", "python"}
    assert "make_golden.py --upstream" in ABOUT["how"] and ABOUT["seed"] == maker.SEED and ABOUT["when"]
    assert len(VALUES) == sum(len(upstream_values(name)) for name in maker.LAYERS)

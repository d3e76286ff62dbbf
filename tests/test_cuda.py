"""What differs on a CUDA device: its kernels and precisions, its dropout, its random numbers, nccl. Skipped elsewhere.

The oracles are those of the tests on a CPU: the dense formula in float64, and a training that nothing broke off.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_runs
import pytest
import run_training
import torch
from reference import CASES, EMBEDDING, KINDS, LINEAR, assert_close, assert_same_bits, expected, snapshot
from safetensors.torch import load_file

import loralib as lora

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
HERE = Path(__file__).resolve().parent
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def whole_products(monkeypatch):
    """Convolutions in float32 proper, not in tf32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_layer_computes_the_dense_formula(case, dtype):
    layer, x = case.layer(dtype).cuda(), case.inputs(dtype).cuda()
    base = snapshot(layer)
    assert_close(layer(x), expected(case, layer, x))
    layer.eval()
    with torch.no_grad():
        assert_close(layer(x), expected(case, layer, x))
    if case.base.get("max_norm") is None:
        assert_same_bits(snapshot(layer), base)
    layer.cpu().train()
    if case.base.get("max_norm") is None:
        assert_same_bits(snapshot(layer), {name: value.cpu() for name, value in base.items()})
    assert_close(layer(x.cpu()), expected(case, layer, x.cpu()))


@pytest.mark.parametrize("case", [case for case in CASES if not case.is_embedding], ids=str)
@pytest.mark.parametrize("half", HALVES)
def test_under_autocast(case, half):
    """Outputs in the half precision, gradients of float32 parameters in float32, both near the formula's."""
    layer, x = case.layer().cuda(), case.inputs().cuda()
    with torch.autocast("cuda", HALVES[half]):
        y = layer(x)
    assert y.dtype == HALVES[half]
    assert_close(y, expected(case, layer, x))
    y.float().square().sum().backward()
    exact = case.layer(torch.float64).cuda()
    exact.load_state_dict(layer.state_dict())
    exact(x.double()).square().sum().backward()
    for name in ("lora_A", "lora_B"):
        ours, wanted = getattr(layer, name).grad, getattr(exact, name).grad
        assert ours.dtype == torch.float32
        assert (ours - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("case", [*(case for case in KINDS if not case.is_embedding), EMBEDDING[0]], ids=str)
def test_gradients_are_those_of_finite_differences(case):
    layer, x = case.layer(torch.float64).cuda(), case.inputs(torch.float64).cuda()
    names = ["lora_A", "lora_B"]

    def output(*values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, [getattr(layer, name) for name in names])


def test_a_merged_layer_follows_what_an_optimizer_changes():
    """The weights there are not compared with those merged: what changes them has to leave a trace."""
    case = LINEAR[0]
    layer, x = case.layer().cuda(), case.inputs().cuda()
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1, fused=True)
    layer.eval()
    for _ in range(3):
        with torch.no_grad():
            assert_close(layer(x), expected(case, layer, x))
        layer(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("half", [None, *HALVES])
def test_dropout_keeps_the_mean_and_spares_the_base(half):
    layer = lora.Linear(64, 8, r=4, lora_dropout=0.25).cuda()
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(1, 64, device="cuda").expand(20000, 64)
    with torch.no_grad(), torch.autocast("cuda", HALVES.get(half), enabled=half is not None):
        dropped = layer(x).double()
        kept = layer.eval()(x[:1]).double()
        base = torch.nn.functional.linear(x[:1], layer.state_dict()["weight"], layer.bias).double()
    spread = (dropped - base).std(0)
    assert (spread > 0.05).all()
    assert ((dropped.mean(0) - kept).abs() < 5 * spread / 20000**0.5 + (0.02 if half else 0)).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own on the way
def test_a_whole_model_in_compiled_form():
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 16)).cuda()
    lora.inject_lora(model, r=4, target_modules="all-linear")
    for layer in (model[0], model[2]):
        torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(10, 32, device="cuda")
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_training_goes_on_with_the_random_numbers_of_the_device(gpt2, tmp_path, no_java, precision):
    """The model has dropout: with other numbers the losses would differ in the second digit."""
    knobs = {"model": gpt2, "device": "cuda", "precision": precision, "batch_size": 5, "max_steps": 6, "eval_every": 2}
    knobs |= {"max_train_samples": 40, "max_eval_samples": 4, "max_new_tokens": 12, "num_beams": 2, "lr": 1e-2}
    run_training.train_model(**knobs, output_dir=str(tmp_path / "whole"))
    distributed_runs.broken_off(run_training.train_model, {**knobs, "output_dir": str(tmp_path / "resumed")}, 3)
    run_training.train_model(**knobs, output_dir=str(tmp_path / "resumed"), resume=True)
    whole, resumed = (
        json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8")) for name in ("whole", "resumed")
    )
    assert resumed["first_step"] == 2 and whole["environment"]["device"] == torch.cuda.get_device_name()
    assert whole["peak_memory_bytes"]["cuda"] > 0
    losses = [[loss for _, loss in record["curve"]] for record in (whole, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    ours, theirs = (load_file(tmp_path / name / "adapter.safetensors") for name in ("resumed", "whole"))
    assert all((ours[name] - theirs[name]).norm() <= 1e-3 * theirs[name].norm() for name in theirs | ours)


def test_a_training_of_the_scripts_on_the_device_equals_that_on_the_cpu(gpt2, tmp_path, no_java):
    """Without dropout, whose numbers differ: perplexity before, and that of the adapter after."""
    config = Path(gpt2) / "config.json"
    folder = tmp_path / "model"
    folder.mkdir()
    for path in Path(gpt2).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    changed = json.loads(config.read_text(encoding="utf-8"))
    changed |= {name: 0.0 for name in changed if name.endswith("_pdrop")}
    (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    found = {}
    for device in ("cpu", "cuda"):
        knobs = {"model": str(folder), "device": device, "batch_size": 5, "max_steps": 4, "max_train_samples": 40}
        knobs |= {"max_eval_samples": 4, "max_new_tokens": 12, "num_beams": 2, "lr": 1e-2}
        run_training.train_model(**knobs, output_dir=str(tmp_path / device))
        record = json.loads((tmp_path / device / "results.json").read_text(encoding="utf-8"))
        found[device] = [record[when]["perplexity"] for when in ("before", "after")]
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-4)
    # AdamW divides by the gradient's size: where that is rounding only, so is the step.
    assert found["cuda"][1] == pytest.approx(found["cpu"][1], rel=2e-2)
    assert found["cuda"][1] < 0.98 * found["cuda"][0]


def test_the_library_on_models_sharded_over_nccl(tmp_path):
    """One process: two would need two devices."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    command += ["sharded_checks.py", "cuda", str(tmp_path / "outcomes.json")]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads((tmp_path / "outcomes.json").read_text(encoding="utf-8"))
    assert len(outcomes) == 9 and not any(outcomes.values()), "\n".join(filter(None, outcomes.values()))

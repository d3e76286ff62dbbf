"""Several processes on a CPU against one: losses, adapter files, predictions; frozen weights divided by fully_shard.

The oracle is the same training in one process. The models have no dropout, whose random numbers differ between
processes. Alone: `pytest tests/test_distributed.py`; with `-m "slow or not slow"` four processes, too.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import run_training
import torch
from nlg_models import save_model, tiny_gpt2
from nlu_models import roberta_tokenizer, tiny_roberta
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
COMMON = {"max_steps": 4, "eval_every": 2, "batch_size": 5, "max_train_samples": 40, "eval_batch_size": 3}
NLG = {**COMMON, "max_eval_samples": 4, "max_new_tokens": 12, "num_beams": 2, "lr": 1e-2}
NLU = {**COMMON, "task": "mrpc", "max_eval_samples": 20, "lr": 1e-2}
# The script, what differs from the above (in parts of one text some processes have none), and after how many steps
# the run is broken off and resumed.
RUNS = {
    "nlg": ("nlg", {"grad_accumulation": 5}, None),
    "nlg again": ("nlg", {"grad_accumulation": 5}, None),
    "nlg resumed": ("nlg", {"grad_accumulation": 5}, 3),
    "nlg full": ("nlg", {"adapt": "full", "lr": 1e-3}, None),
    "nlg bf16": ("nlg", {"precision": "bf16"}, None),
    "nlu": ("nlu", {"grad_accumulation": 2}, None),
    "nlu full": ("nlu", {"adapt": "full", "lr": 1e-3}, None),
}
SHARDED = {
    "nlg sharded": ("nlg", {"grad_accumulation": 5, "gradient_checkpointing": True, "fsdp": True}, None),
    "nlg sharded resumed": ("nlg", {"grad_accumulation": 5, "gradient_checkpointing": True, "fsdp": True}, 3),
    "nlg sharded bf16": ("nlg", {"precision": "bf16", "fsdp": True}, None),
    "nlu sharded": ("nlu", {"grad_accumulation": 2, "fsdp": True}, None),
}


def without_dropout(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update({name: 0.0 for name in config if name.endswith(("_pdrop", "_dropout_prob"))})
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def torchrun(processes, *command):
    """The output of a script in so many processes, or with 1 in one that torchrun has not started."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [*start, *map(str, command)], cwd=HERE, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run_all(tmp_path_factory, tokenizer, no_java):
    """A function that makes the runs in so many processes and returns the folder of their results."""
    models = tmp_path_factory.mktemp("models")
    gpt2 = tiny_gpt2(tokenizer)
    with torch.no_grad():
        gpt2.lm_head.weight[tokenizer.eos_token_id] *= 2  # some texts then end long before others
    save_model(models / "nlg", tokenizer, gpt2)
    save_model(models / "nlu", roberta_tokenizer(), tiny_roberta())
    folders = {script: without_dropout(models / script) for script in ("nlg", "nlu")}

    def made(processes, runs):
        folder = tmp_path_factory.mktemp(f"in {processes}")
        jobs = []
        for name, (script, changes, steps) in runs.items():
            knobs = {**(NLG if script == "nlg" else NLU), "model": folders[script], **changes}
            jobs.append((script, {**knobs, "output_dir": str(folder / name)}, steps))
        (folder / "runs.json").write_text(json.dumps(jobs), encoding="utf-8")
        printed = torchrun(processes, "distributed_runs.py", folder / "runs.json")
        (folder / "printed.txt").write_text(printed, encoding="utf-8")
        return folder

    return made


@pytest.fixture(scope="module")
def one(run_all):
    return run_all(1, RUNS)


@pytest.fixture(scope="module")
def two(run_all):
    return run_all(2, {**RUNS, **SHARDED})


@pytest.fixture(scope="module")
def four(run_all):
    return run_all(4, {**RUNS, **SHARDED})


@pytest.fixture(params=["two", pytest.param("four", marks=pytest.mark.slow)])
def several(request):
    return request.getfixturevalue(request.param)


def record(folder, name):
    return json.loads((folder / name / "results.json").read_text(encoding="utf-8"))


def losses(folder, name):
    """Every loss of a run: of the stretches of steps, of the validations, of the test."""
    made = record(folder, name)
    numbers = [loss for _, loss in made["curve"]]
    numbers += [entry[key] for entry in made["history"] for key in ("train_loss", "valid_loss")]
    return numbers + [made[when]["perplexity"] for when in ("before", "after") if "perplexity" in made.get(when, ())]


def predictions(folder, name):
    """The texts, or the labels, that a run predicts."""
    (path,) = (folder / name).glob("*.jsonl")
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [line["text"] if "text" in line else line["prediction"] for line in lines]


def weights(folder, name):
    (path,) = (path for path in (folder / name).rglob("*.safetensors"))
    return load_file(path)


@pytest.mark.parametrize("name", [*RUNS, *SHARDED])
def test_losses_weights_and_predictions_are_those_of_one_process(one, several, name):
    plain = name.replace(" sharded", "")
    tolerance = 1e-2 if "bf16" in name else 1e-5
    assert losses(several, name) == pytest.approx(losses(one, plain), rel=tolerance)
    ours, theirs = weights(several, name), weights(one, plain)
    assert ours.keys() == theirs.keys()
    assert record(several, name)["best_step"] == record(one, plain)["best_step"]
    if "bf16" not in name:
        for key, tensor in ours.items():
            # AdamW divides by the gradient's size: where that is rounding only, so is the difference.
            assert (tensor - theirs[key]).abs().mean() < 1e-5, key
        assert predictions(several, name) == predictions(one, plain)


@pytest.mark.parametrize("name", ["nlg again", "nlg resumed", "nlg sharded resumed"])
def test_runs_of_as_many_processes_write_the_same_bits(several, name):
    """Repeated, or broken off and resumed, each with the frozen weights whole or divided."""
    first = name.removesuffix(" again").removesuffix(" resumed")
    assert record(several, name)["checkpoint_sha256"] == record(several, first)["checkpoint_sha256"]
    assert losses(several, name) == losses(several, first)
    assert record(several, name)["first_step"] == (2 if "resumed" in name else 0)


def test_one_process_alone_prints_and_writes(one, several):
    printed = {folder: (folder / "printed.txt").read_text(encoding="utf-8") for folder in (one, several)}
    for name in RUNS:
        assert record(several, name)["processes"] > record(one, name)["processes"] == 1
        assert sorted(os.listdir(several / name)) == sorted(os.listdir(one / name))
        for folder in (one, several):
            assert len(re.findall(rf"^written +to {re.escape(str(folder / name))}:", printed[folder], re.M)) == 1


def test_one_process_evaluates_to_the_same_bits(one, several):
    """Before the training; the batches are the same, whoever computes them."""
    assert record(several, "nlg")["before"]["perplexity"] == record(one, "nlg")["before"]["perplexity"]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_library_on_sharded_models(processes, tmp_path):
    torchrun(processes, "sharded_checks.py", "cpu", tmp_path / "outcomes.json")
    outcomes = json.loads((tmp_path / "outcomes.json").read_text(encoding="utf-8"))
    assert len(outcomes) == 9
    assert not any(outcomes.values()), "\n".join(filter(None, outcomes.values()))


def test_fsdp_is_refused_where_nothing_can_be_divided(call, gpt2, tmp_path, monkeypatch):
    arguments = ["--model", gpt2, "--output_dir", tmp_path / "output", "--fsdp"]
    status, _, stderr = call(run_training, *arguments)
    assert (status, stderr.count("\n")) == (2, 1)
    assert "--fsdp divides the frozen weights between processes; start it with torchrun --nproc_per_node 2" in stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, stderr = call(run_training, *arguments, "--adapt", "full")
    assert status == 2 and "and --adapt full freezes none; leave one of them out" in stderr
    assert not (tmp_path / "output").exists()

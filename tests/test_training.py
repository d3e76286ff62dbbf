"""The training loop of the examples: batches, schedule, gradients, validation, resumption, several processes.

The oracle of a step is a literal one: the mean loss over all labels of the batch, one AdamW step, written out here.
Run alone: `pytest tests/test_training.py`.
"""

import dataclasses
import json
import math
import os
import signal

import pytest
import run_training
import run_training_nlu
import torch
from common import cli
from common.models import causal_lm
from common.training import compute, loop
from nlg_models import DATA, load, start

pytestmark = pytest.mark.usefixtures("no_java")
TASK = loop.Task(causal_lm.collate, causal_lm.loss_sum, causal_lm.count_labels)
LINES = (DATA / "train.txt").read_text(encoding="utf-8").splitlines()[:24]
LENGTHS = [(7 * i) % 60 + 1 for i in range(1003)]


def knobs(**changes):
    return loop.Knobs(**{"batch_size": 4, "num_epochs": 3, "lr": 1e-2, "warmup_steps": 2, "seed": 0, **changes})


@pytest.fixture
def samples(tokenizer):
    return [causal_lm.encode(tokenizer, *line.split("||")) for line in LINES]


@pytest.fixture
def model(gpt2):
    """Two matrices train, in a model with dropout, so that random numbers matter."""
    model, _ = load(gpt2)
    model.requires_grad_(False)
    for layer in model.transformer.h:
        layer.mlp.c_fc.weight.requires_grad_(True)
    return model


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(model, samples, tmp_path, identity=None, **changes):
    options, path, identity = knobs(**changes), tmp_path / "state.pt", identity or {}
    state = loop.read_state(path, identity) if options.resume else None
    return loop.train(model, TASK, samples, samples[:8], options, path, identity, state)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Batches and schedule


@pytest.mark.parametrize("batch_size", [1, 8, 2000])
def test_batches_hold_every_sample_once(batch_size):
    batches = loop.make_batches(LENGTHS, batch_size, seed=3)
    assert sorted(index for batch in batches for index in batch) == list(range(len(LENGTHS)))
    assert len(batches) == math.ceil(len(LENGTHS) / batch_size)
    assert max(map(len, batches)) <= batch_size


def test_batches_are_fixed_by_the_seed_and_waste_little():
    batches = loop.make_batches(LENGTHS, 8, seed="1 1")
    assert batches == loop.make_batches(LENGTHS, 8, seed="1 1")
    assert batches != loop.make_batches(LENGTHS, 8, seed="1 2")
    padded = sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in batches)
    assert padded < 1.1 * sum(LENGTHS)
    one_pool = loop.make_batches(LENGTHS[:300], 8, seed=0)
    means = [sum(LENGTHS[i] for i in batch) / len(batch) for batch in one_pool]
    assert means != sorted(means)  # no curriculum of lengths


def test_learning_rate_rises_and_falls_linearly():
    rates = [loop.learning_rate(step, 10, 1.0, 4) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert loop.learning_rate(0, 10, 1.0, 0) == 1.0


def test_choose_device():
    assert compute.choose_device("cpu") == torch.device("cpu")
    assert compute.choose_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "gpu", "meta"):
        with pytest.raises(cli.UserError, match=f"--device {name}: no such device here; use auto or one of: .*cpu"):
            compute.choose_device(name)


# Steps


def test_steps_are_those_of_adamw_on_the_mean_over_all_labels(model, samples, gpt2, tmp_path):
    """Written out for two steps, each sample alone, with a smoothed target."""
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    other, _ = load(gpt2)
    weights = [layer.mlp.c_fc.weight for layer in other.transformer.h]
    state = [[torch.zeros_like(w), torch.zeros_like(w)] for w in weights]
    options = knobs(label_smoothing=0.1, max_steps=2)
    batches = loop.make_batches([len(s["input_ids"]) for s in samples], 4, "0 1")[:2]
    for step, batch in enumerate(batches):
        loss, count = 0.0, 0
        for sample in (samples[index] for index in batch):
            logs = other.eval()(input_ids=torch.tensor([sample["input_ids"]])).logits[0].log_softmax(-1)
            for position, label in enumerate(sample["labels"]):
                if label != -100:
                    loss = loss - 0.9 * logs[position - 1, label] - 0.1 * logs[position - 1].mean()
                    count += 1
        rate = [0.5e-2, 1e-2][step]
        for weight, moments, grad in zip(weights, state, torch.autograd.grad(loss / count, weights), strict=True):
            with torch.no_grad():
                moments[0] = 0.9 * moments[0] + 0.1 * grad
                moments[1] = 0.999 * moments[1] + 0.001 * grad**2
                first, second = moments[0] / (1 - 0.9 ** (step + 1)), moments[1] / (1 - 0.999 ** (step + 1))
                weight.copy_(weight * (1 - rate * 0.01) - rate * first / (second.sqrt() + 1e-6))
    loop.train(model, TASK, samples, samples[:8], options, tmp_path / "state.pt", {})
    for layer, weight in zip(model.transformer.h, weights, strict=True):
        torch.testing.assert_close(layer.mlp.c_fc.weight, weight, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [{"grad_accumulation": 3}, {"grad_accumulation": 9}, {"gradient_checkpointing": True}],
    ids=["three parts", "more parts than texts", "checkpointing"],
)
def test_cutting_a_batch_or_computing_again_changes_nothing(gpt2, samples, tmp_path, changes):
    """A mean of the parts' means would weigh short texts more."""
    results = []
    for options in ({}, changes):
        model, _ = load(gpt2)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        outcome = train(model, samples, tmp_path, max_steps=3, lr=1e-4, **options)
        results.append((trained(model), outcome.history[-1]))
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    for name, value in results[0][0].items():
        # AdamW divides by the gradient's size: where that is rounding only, so is the difference.
        torch.testing.assert_close(results[1][0][name], value, rtol=0, atol=4e-4)
        assert (results[1][0][name] - value).abs().mean() < 2e-6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_near_and_leaves_the_weights_float32(gpt2, samples, tmp_path, precision):
    losses = []
    for name in ("fp32", precision):
        model, _ = load(gpt2)
        outcome = train(model, samples, tmp_path, max_steps=6, precision=name, lr=1e-3)
        losses.append([entry["valid_loss"] for entry in outcome.history])
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_what_requires_gradients_alone_changes_and_the_loss_falls(model, samples, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcome = train(model, samples, tmp_path)
    assert [(entry["epoch"], entry["step"]) for entry in outcome.history] == [(1, 6), (2, 12), (3, 18)]
    assert outcome.history[2]["valid_loss"] < outcome.history[0]["valid_loss"]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"transformer.h.{i}.mlp.c_fc.weight" for i in (0, 1)}
    assert [step for step, _ in outcome.curve] == list(range(1, 19))
    mean = sum(loss for _, loss in outcome.curve[:6]) / 6
    assert mean == pytest.approx(outcome.history[0]["train_loss"])
    assert outcome.optimizer_bytes == sum(2 * 4 * p.numel() + 4 for p in model.parameters() if p.requires_grad)


def test_max_steps_ends_the_training_within_an_epoch(model, samples, tmp_path):
    outcome = train(model, samples, tmp_path, max_steps=8)
    assert [(entry["epoch"], entry["step"]) for entry in outcome.history] == [(1, 6), (2, 8)]
    outcome = train(model, samples, tmp_path, max_steps=8, eval_every=3)
    assert [(entry["epoch"], entry["step"]) for entry in outcome.history] == [(1, 3), (1, 6), (2, 8)]


def test_the_curve_has_few_points(model, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CURVE_POINTS", 3)
    outcome = train(model, samples[:8], tmp_path, max_steps=7, num_epochs=9)
    assert [step for step, _ in outcome.curve] == [2, 4, 6, 7]


def test_a_loss_that_is_not_finite_stops_the_training(model, samples, tmp_path):
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    with pytest.raises(cli.UserError, match=r"the loss is nan at step 1 of 18 \(learning rate 5.00e-03\).*--lr"):
        train(model, samples, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_mean_loss_is_the_mean_over_labels_whatever_the_batches(gpt2, samples, batch_size):
    model, _ = load(gpt2)
    total = sum(causal_lm.loss_sum(model.eval(), causal_lm.collate([s]), 0.0).item() for s in samples[:7])
    mean = loop.mean_loss(model.train(), TASK, samples[:7], knobs(eval_batch_size=batch_size))
    assert mean == pytest.approx(total / causal_lm.count_labels(samples[:7]), rel=1e-6)


def test_a_loss_of_held_out_texts_that_is_not_finite_is_no_validation(model, samples, tmp_path):
    """Of whatever cause: here of a weight that the held-out texts alone meet."""
    with torch.no_grad():
        model.transformer.wte.weight[samples[0]["input_ids"][0]] = math.nan
    with pytest.raises(loop.NotFinite, match=r"the loss of 2 texts is nan; nothing was written .*--lr"):
        loop.mean_loss(model, TASK, samples[:2], knobs())


OUT_OF_RANGE = {
    "no warmup is negative": ({"warmup_steps": -1}, "--warmup_steps -1: must be at least 0"),
    "nor is it no number": ({"warmup_steps": math.nan}, "--warmup_steps nan: must be at least 0"),
    "decay": ({"weight_decay": -0.1}, "--weight_decay -0.1: must be at least 0"),
    "all smooth": ({"label_smoothing": 1.0}, "--label_smoothing 1.0: must be at least 0 and below 1"),
    "infinite rate": ({"lr": math.inf}, "--lr inf: must be above 0"),
    "no alpha": ({"lora_alpha": 0.0}, "--lora_alpha 0.0: must be above 0"),
    "all dropped": ({"lora_dropout": 1.0}, "--lora_dropout 1.0: must be at least 0 and below 1"),
    "no rank": ({"lora_dim": 0}, "--lora_dim 0: must be above 0"),
    "nothing at a time": ({"eval_batch_size": 0}, "--eval_batch_size 0: must be above 0"),
}


@pytest.mark.parametrize("script", [run_training, run_training_nlu])
@pytest.mark.parametrize("changes, message", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_a_knob_out_of_range_is_refused(script, changes, message):
    with pytest.raises(cli.UserError) as caught:
        script.check(script.Knobs(**changes))
    assert str(caught.value) == message


def test_a_run_that_ends_within_its_warmup_says_so(model, samples, tmp_path, capsys):
    train(model, samples[:8], tmp_path, warmup_steps=2, max_steps=2)
    assert "this run of 2 steps ends within its warmup, --warmup_steps 2\n" in capsys.readouterr().out
    train(model, samples[:8], tmp_path, warmup_steps=1, max_steps=2)
    assert "warmup" not in capsys.readouterr().out


def test_a_weight_without_gradient_has_none_in_several_processes(monkeypatch):
    """Or its decay would move it, which it does not in one process."""
    used, unused, elsewhere = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    used.grad = torch.full((2,), 3.0)

    def add_up(everything):  # the other process has a gradient of the third, and a loss of 1
        everything += torch.tensor([1.0, 1, 0, 1, 3, 3, 0, 0, 5, 5])

    monkeypatch.setattr(loop.distributed, "add_up", add_up)
    loss = torch.tensor(2.0)
    loop._add_up(loss, [used, unused, elsewhere])
    assert loss == 3 and unused.grad is None
    assert used.grad.tolist() == [6, 6] and elsewhere.grad.tolist() == [5, 5]


# Validation


def test_the_best_validation_is_what_is_kept_and_patience_ends_the_training(gpt2, samples, tmp_path):
    """All parameters at a learning rate that soon ruins them."""
    model, _ = load(gpt2)
    outcome = train(model, samples, tmp_path, lr=0.5, warmup_steps=0, eval_every=1, patience=3)
    losses = [entry["valid_loss"] for entry in outcome.history]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert outcome.best_step == best + 1 and len(losses) == best + 1 + 3 < 18
    kept = loop.mean_loss(model, TASK, samples[:8], knobs())
    assert kept == pytest.approx(losses[best], rel=1e-6)
    assert kept < losses[-1]


# Resumption


class Killed(Exception):
    pass


RUINOUS = {"eval_every": 1, "lr": 0.5, "warmup_steps": 0, "patience": 3}
RESUMED = {  # the knobs, and after how many steps the run is killed
    "in an epoch": ({"eval_every": 4}, 5),
    "at its end": ({"eval_every": 4}, 6),
    "later": ({"eval_every": 4}, 11),
    "bf16": ({"eval_every": 4, "precision": "bf16"}, 11),
    "an earlier best": (RUINOUS, 5),
}


@pytest.mark.parametrize("options, at", RESUMED.values(), ids=RESUMED)
def test_resumed_run_equals_an_uninterrupted_one_to_the_bit(gpt2, samples, tmp_path, monkeypatch, options, at):
    """Weights, losses and curve, with dropout, steps lost after the last validation, and a point of the curve begun."""
    monkeypatch.setattr(loop, "CURVE_POINTS", 6)  # every third step

    def run(folder, **changes):
        folder.mkdir(exist_ok=True)
        model, _ = load(gpt2)
        return train(model, samples, folder, identity={"a": 1}, **options, **changes), trained(model)

    whole, weights = run(tmp_path / "whole")
    step = loop.optimizer_step
    calls = []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == at + 1:
            raise Killed
        return step(*arguments)

    monkeypatch.setattr(loop, "optimizer_step", killed)
    with pytest.raises(Killed):
        run(tmp_path / "killed")
    monkeypatch.setattr(loop, "optimizer_step", step)
    torch.manual_seed(12345)  # another process begins with other random numbers
    resumed, again = run(tmp_path / "killed", resume=True)
    assert equal(again, weights)
    assert (resumed.history, resumed.curve, resumed.best_step) == (whole.history, whole.curve, whole.best_step)
    every = options["eval_every"]
    assert resumed.first_step == at // every * every > whole.first_step == 0
    if options is RUINOUS:
        assert whole.best_step < at < len(whole.history) < 18


def test_a_run_killed_after_its_last_step_has_none_left(model, gpt2, samples, tmp_path):
    """While its texts are scored, say; what comes back can be written as JSON."""
    whole = train(model, samples, tmp_path)
    other, _ = load(gpt2)
    other.requires_grad_(False)
    for layer in other.transformer.h:
        layer.mlp.c_fc.weight.requires_grad_(True)
    resumed = train(other, samples, tmp_path, resume=True)
    assert equal(trained(other), trained(model))
    assert (resumed.first_step, resumed.step_seconds) == (18, None)
    assert json.loads(json.dumps(resumed, allow_nan=False))[0] == whole.history


def test_dropout_makes_the_test_above_sharp(gpt2, samples, tmp_path):
    """Other random numbers, other weights."""
    weights = []
    for seed in (0, 1):
        model, _ = load(gpt2)
        batches = train(model, samples[:4], tmp_path, seed=seed, num_epochs=1)  # one batch, whatever the order
        weights.append(trained(model))
    assert batches.history and not equal(*weights)


def test_resuming_another_run_or_a_damaged_file_is_refused(model, samples, tmp_path):
    with pytest.raises(cli.UserError, match="--resume: there is no .*state.pt to go on from; it is written at each"):
        train(model, samples, tmp_path, resume=True)
    (tmp_path / "results.json").touch()
    with pytest.raises(cli.UserError, match="the run whose results.json is there came to its end; start another"):
        train(model, samples, tmp_path, resume=True)
    train(model, samples, tmp_path, identity={"lr": 1.0, "seed": 3}, max_steps=1)
    before = trained(model)
    with pytest.raises(cli.UserError, match=r"is of another run: lr 1.0, now 2.0; start anew without --resume, or"):
        train(model, samples, tmp_path, identity={"lr": 2.0, "seed": 3}, resume=True)
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(cli.UserError, match=r"state.pt cannot be read \(.*\); start anew without --resume"):
        train(model, samples, tmp_path, identity={"lr": 1.0, "seed": 3}, resume=True)
    assert equal(trained(model), before)


def test_a_state_that_is_none_is_refused(model, samples, tmp_path):
    for state in ([1], {"step": 1}):
        torch.save(state, tmp_path / "state.pt")
        with pytest.raises(cli.UserError, match=r"--resume: .*state.pt cannot be read \(.*\); start anew"):
            train(model, samples, tmp_path, resume=True)


def test_a_run_goes_on_with_its_own_base_alone():
    """Its file may have changed meanwhile."""
    record = {"data": {"train": {"sha256": "1"}}, "base": {"model.safetensors": "2"}, "processes": 1}
    before = loop.identity(knobs(), set(), record, ["train"])
    after = loop.identity(knobs(), set(), {**record, "base": {"model.safetensors": "3"}}, ["train"])
    assert {name for name in before if before[name] != after[name]} == {"base"}


def test_a_run_may_go_on_with_a_gpu():
    """The random numbers of a CPU say nothing of those of the GPU, which then begins its own."""
    loop._set_random_state(torch.device("cuda"), [torch.get_rng_state()])


def test_a_state_with_code_is_not_run(model, samples, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"identity": Code()}, tmp_path / "state.pt")
    with pytest.raises(cli.UserError, match="cannot be read"):
        train(model, samples, tmp_path, resume=True)
    assert not (tmp_path / "ran").exists()


SHORT = ["--max_steps", 12, "--eval_every", 4, "--batch_size", 4, "--max_eval_samples", 2, "--skip_base"]
SHORT += ["--lora_dropout", 0.2, "--lora_alpha", 8]


@pytest.mark.slow
def test_script_killed_for_real_goes_on_to_the_same_bits(gpt2, tmp_path):
    """SIGKILL after the first validation; the record's losses and the adapter are those of a run left alone."""
    command = ["run_training.py", "--model", gpt2, *SHORT, "--output_dir"]
    with start(*command, tmp_path / "whole") as process:
        _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    with start(*command, tmp_path / "killed") as process:
        while not (tmp_path / "killed" / "training_state.pt").exists():
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "results.json").exists()
    with start(*command, tmp_path / "killed", "--resume") as process:
        _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    whole, resumed = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed"))
    assert resumed["first_step"] >= 4 and whole["first_step"] == 0
    for key in ("history", "curve", "checkpoint_sha256", "best_step"):
        assert resumed[key] == whole[key], key
    assert sorted(os.listdir(tmp_path / "killed")) == ["adapter.safetensors", "results.json", "test_texts.jsonl"]


# Knobs


@dataclasses.dataclass
class Two(loop.Knobs):
    preset: str = cli.knob("fast", "recipe", ["fast", "paper"])


def test_options_are_given_in_full(capsys):
    """--seed is not --seeds."""

    @dataclasses.dataclass
    class One:
        seeds: int = cli.knob(3, "how many")

    with pytest.raises(SystemExit):
        cli.parse_knobs(One, "", ["--seed", "5"])
    assert "unrecognized arguments: --seed 5" in capsys.readouterr().err


def test_presets_fill_in_what_is_not_given():
    presets = {"fast": {}, "paper": {"lr": 1.0, "seed": 5}}
    assert cli.parse_knobs(Two, "", [], presets) == Two()
    assert cli.parse_knobs(Two, "", ["--preset", "paper", "--seed", "7"], presets) == Two(
        preset="paper", lr=1.0, seed=7
    )
    assert cli.fill_in(Two, {"preset": "paper"}, presets) == Two(preset="paper", lr=1.0, seed=5)
    with pytest.raises(cli.UserError, match="sed=1: no such knob; seed?"):
        cli.fill_in(Two, {"sed": 1}, presets)
    with pytest.raises(cli.UserError, match="--precision fp8: must be one of fp32, bf16, fp16"):
        cli.fill_in(Two, {"precision": "fp8"}, presets)

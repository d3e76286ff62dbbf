"""Runs that are cut off: signals, a full disk, a read-only folder, a killed writer, a loss that is not a number.

The faults are real: signals to processes, file systems of a megabyte (where mounting them is allowed), limits on the
size of files. Whatever happens, the user sees one line, and what was saved before is whole.
Run alone: `pytest tests/test_faults.py`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import run_training
import torch
from common import stopping, training
from nlg_models import NLG, ROOT
from toy_training import TASK, train

pytestmark = [
    pytest.mark.usefixtures("no_java"),
    pytest.mark.skipif(os.name == "nt", reason="POSIX signals, limits and mounts"),
]
SHORT = ["--max_steps", 12, "--eval_every", 5, "--batch_size", 4, "--max_eval_samples", 2, "--skip_base"]
SHORT += ["--lora_dropout", 0.2, "--lora_alpha", 8]
TOY = Path(__file__).with_name("toy_training.py")
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


def start(*command):
    """A Python process in examples/NLG that hears Ctrl-C: one whose parent ignores it would do so, too."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"text": True, "encoding": "utf-8", "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen([sys.executable, *map(str, command)], cwd=NLG, env=environment, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def read_until(stream, pattern):
    seen = ""
    while not re.search(pattern, seen):
        piece = stream.read(1)
        assert piece, f"ended without {pattern}: {seen}"
        seen += piece
    return seen


STEPPING = r"training: +\d+%.*[1-9]\d*/\d+ .*loss="  # the progress bar after a step


def record(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


# Signals


def after_step(monkeypatch, number, action):
    """Have `action(model)` done at the end of an optimizer step."""
    step, calls = training.optimizer_step, []

    def wrapped(model, *arguments):
        loss = step(model, *arguments)
        calls.append(loss)
        if len(calls) == number:
            action(model)
        return loss

    monkeypatch.setattr(training, "optimizer_step", wrapped)


def terminate(*_):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_script_after_its_step(gpt2, tmp_path, call, monkeypatch, name, status):
    """One line, the status that shells expect, and what --resume needs, beside an earlier adapter."""
    (tmp_path / "adapter.safetensors").write_bytes(b"earlier")
    after_step(monkeypatch, 2, lambda _: os.kill(os.getpid(), getattr(signal, name)))
    ended, _, stderr = call(run_training, "--model", gpt2, *SHORT, "--output_dir", tmp_path)
    assert (ended, stderr.splitlines()[-1]) == (
        status,
        f"stopped by {name} after step 2 of 12; the same command with --resume goes on from there",
    )
    assert sorted(os.listdir(tmp_path)) == ["adapter.safetensors", "training_state.pt"]
    assert (tmp_path / "adapter.safetensors").read_bytes() == b"earlier"
    status, _, stderr = call(run_training, "--model", gpt2, *SHORT, "--output_dir", tmp_path, "--resume")
    assert status == 0, stderr
    assert record(tmp_path)["first_step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_script_that_is_stopped_and_resumed_ends_with_the_same_bits(gpt2, tmp_path, name):
    command = ["run_training.py", "--model", gpt2, *SHORT, "--output_dir"]
    with start(*command, tmp_path / "whole") as process:
        _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    with start(*command, tmp_path / "stopped") as process:
        read_until(process.stderr, STEPPING)
        process.send_signal(getattr(signal, name))
        _, stderr = process.communicate()
    match = re.search(f"\nstopped by {name} after step (\\d+) of 12; the same command .*\n$", stderr)
    assert match and "Traceback" not in stderr, stderr
    assert process.returncode == 128 + getattr(signal, name)
    with start(*command, tmp_path / "stopped", "--resume") as process:
        _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    whole, resumed = record(tmp_path / "whole"), record(tmp_path / "stopped")
    assert resumed["first_step"] == int(match[1]) < 12
    for fact in ("history", "curve", "checkpoint_sha256", "best_step"):
        assert resumed[fact] == whole[fact], fact


@pytest.mark.parametrize("at", [2, 4, 6, 11, 18], ids=["early", "validation", "end of epoch", "later", "last"])
def test_state_of_any_step_resumes_exactly(tmp_path, monkeypatch, at):
    """Weights, losses and the history's mean losses, which began before the run was stopped."""
    weights, outcome = train(tmp_path / "whole")
    handlers = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        after_step(patch, at, terminate)
        with pytest.raises(stopping.Stopped, match=f"^stopped by SIGTERM after step {at} of 18; ") as stopped:
            train(tmp_path / "stopped")
    assert stopped.value.signum == signal.SIGTERM
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == handlers
    torch.manual_seed(12345)  # another process begins with other random numbers
    again, resumed = train(tmp_path / "stopped", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(again, weights, strict=True))
    assert (resumed.history, resumed.curve, resumed.first_step) == (outcome.history, outcome.curve, at)


def test_a_signal_during_a_validation_waits_for_its_end(tmp_path):
    def validate(*_):
        terminate()
        return 0.0, {"figure": 1.0}

    with pytest.raises(stopping.Stopped, match="after step 4 of 18"):
        train(tmp_path, TASK._replace(validate=validate))
    state = training.read_state(tmp_path / "state.pt", {})
    assert (state["step"], state["history"][0]["figure"]) == (4, 1.0)


def test_training_in_another_thread_leaves_the_signals_alone(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(tmp_path, max_steps=1)))
    thread.start()
    thread.join()
    assert len(results) == 1


WAITING = """
import sys, time
sys.path.insert(0, "..")
from common import cli, stopping
def main():
    print("ready", flush=True)
    time.sleep(60)
def patient():
    with stopping.put_off():
        main()
cli.run({})
"""


@pytest.mark.parametrize("name, status, said", [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")])
@pytest.mark.parametrize("main, signals", [("main", 1), ("patient", 2)], ids=["outside training", "twice"])
def test_a_signal_that_need_not_wait_ends_the_script_at_once(name, status, said, main, signals):
    with start("-c", WAITING.format(main)) as process:
        read_until(process.stdout, "ready")
        for _ in range(signals):
            assert process.poll() is None
            process.send_signal(getattr(signal, name))
            time.sleep(0.3)
        _, stderr = process.communicate(timeout=10)
    assert (process.returncode, stderr) == (status, f"\n{said}; no file was left half-written\n")


# Several processes


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with start(*TORCHRUN, TOY, folder) as process:
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return torch.load(folder / "end.pt")


@pytest.mark.parametrize(
    "to", ["torchrun", *(pytest.param(to, marks=pytest.mark.slow) for to in ("torchrun, Ctrl-C", "one of two"))]
)
def test_two_processes_stop_at_one_step_and_resume_exactly(tmp_path, whole_of_two, to):
    """torchrun passes a signal on; where one process alone gets it, the other hears of it from that one."""
    with start(*TORCHRUN, TOY, tmp_path) as process:
        seen = read_until(process.stderr, STEPPING)
        if to == "one of two":
            os.kill(int((tmp_path / "pid1").read_text()), signal.SIGTERM)
        else:
            process.send_signal(signal.SIGINT if "Ctrl-C" in to else signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    said = re.findall(r"^stopped by (SIG\w+) after step (\d+) of 18; the same command", seen + stderr, re.M)
    assert [name for name, _ in said] == ["SIGINT" if "Ctrl-C" in to else "SIGTERM"], stderr
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)
    with start(*TORCHRUN, TOY, tmp_path, "--resume") as process:
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    end = torch.load(tmp_path / "end.pt")
    assert end["first_step"] == int(said[0][1]) < 18
    assert end["history"] == whole_of_two["history"]
    assert all(torch.equal(a, b) for a, b in zip(end["weights"], whole_of_two["weights"], strict=True))

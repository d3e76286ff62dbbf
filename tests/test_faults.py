"""Runs that are cut off: signals, a full disk, a read-only folder, a killed writer, a loss that is not a number.

The faults are real: signals to processes, file systems of a megabyte (where mounting them is allowed), limits on the
size of files. Whatever happens, the user sees one line, and what was saved before is whole.
Run alone: `pytest tests/test_faults.py`.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import run_training
import torch
from common import cli, files, stopping
from common.models import pretrained
from common.training import loop
from nlg_models import NLG, ROOT, own_lines
from safetensors.torch import save_file
from toy_training import TASK, train

import loralib as lora

resource = pytest.importorskip("resource", reason="signals, limits and mounts are those of POSIX")

pytestmark = pytest.mark.usefixtures("no_java")
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
    step, calls = loop.optimizer_step, []

    def wrapped(model, *arguments):
        loss = step(model, *arguments)
        calls.append(loss)
        if len(calls) == number:
            action(model)
        return loss

    monkeypatch.setattr(loop, "optimizer_step", wrapped)


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
    handlers = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    weights, outcome = train(tmp_path / "whole")
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == handlers
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
    state = loop.read_state(tmp_path / "state.pt", {})
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


# A reader that leaves

EXAMPLES = NLG.parent
SCRIPTS = [path for path in sorted(EXAMPLES.rglob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]
# Those that start within a second; of the others each takes some.
LIGHT = ("COMPARISON_RESULTS", "QUALITY_COMPARISON", "LORA_vs_FULL_COMPARISON", "download_data", "make_data")
PRINTING = """
import subprocess, sys
sys.path.insert(0, "..")
from common import cli
def many():
    for number in range(100_000):
        print(number)
def last():
    print("one line, which waits for the end")
def wrong():
    print("one line")
    raise cli.UserError("said all the same")
def child():
    cli.call([sys.executable, "-c", "import sys; sys.exit(141)"])
def other():
    with subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE, bufsize=0) as process:
        process.wait()
        process.stdin.write(b"to nobody")
cli.run({})
"""


def unread(*command, lines=0, **environment):
    """(exit status, stderr) of a Python process in examples/ whose reader leaves after so many lines."""
    read, write = os.pipe()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *map(str, command)]
    process = subprocess.Popen(command, cwd=NLG, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    with open(read, encoding="utf-8") as reader:
        for _ in range(lines):
            reader.readline()
    _, stderr = process.communicate(timeout=60)
    return process.returncode, own_lines(stderr)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem in LIGHT else [pytest.mark.slow], id=path.stem) for path in SCRIPTS],
)
def test_no_script_complains_of_a_reader_that_has_left(path):
    # 0 where the text is longer than the buffer: argparse itself passes over what goes to nobody.
    status, stderr = unread(path, "--help", PYTHONUNBUFFERED="")
    assert status in (141, 0) and "Traceback" not in stderr and "BrokenPipe" not in stderr


def test_every_script_is_run_by_what_knows_of_such_readers():
    for path in SCRIPTS:
        alone = path.name not in ("run_training.py", "run_training_nlu.py")
        called = "run(main)" if alone else "run(main, under_torchrun=True)"
        assert path.read_text(encoding="utf-8").endswith(f'if __name__ == "__main__":\n    {called}\n'), path


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    "main, lines, expected",
    [
        ("many", 0, (141, "")),
        ("many", 3, (141, "")),
        ("last", 0, (141, "")),
        ("wrong", 0, (141, "error: said all the same\n")),
        ("child", 0, (141, "")),
    ],
)
def test_a_reader_that_leaves_ends_the_script_without_a_word(main, lines, expected, buffered):
    if (main, buffered) == ("wrong", "1"):
        expected = 141, ""  # the line before it went to nobody
    assert unread("-c", PRINTING.format(main), lines=lines, PYTHONUNBUFFERED=buffered) == expected


def test_a_pipe_that_breaks_elsewhere_is_a_fault():
    with start("-c", PRINTING.format("other")) as process:
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1 and stderr.endswith("BrokenPipeError: [Errno 32] Broken pipe\n")


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


# Disks


ROOM = 8192  # bytes left, so that a file begins and cannot end
MOUNT, UNMOUNT = shutil.which("mount"), shutil.which("umount")  # before `no_java` empties the path


class Disk:
    """A folder, and how to fill it or make it read-only."""

    def __init__(self, folder, mounted):
        self.folder, self.mounted, self.limits = folder, mounted, None

    def fill(self):
        if self.mounted:
            with open(self.folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(512))
            os.truncate(self.folder / "filler", (self.folder / "filler").stat().st_size - ROOM)
        else:
            self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, self.limits[1]))

    def make_room(self):
        if self.mounted:
            (self.folder / "filler").unlink(missing_ok=True)
        elif self.limits:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    def make_read_only(self, read_only=True):
        if self.mounted:
            subprocess.run([MOUNT, "-o", "remount," + ("ro" if read_only else "rw"), self.folder], check=True)
        else:
            self.folder.chmod(0o555 if read_only else 0o755)


@pytest.fixture(params=["a limit", "a small file system"])
def disk(request, tmp_path):
    folder, mounted = tmp_path / "disk", request.param == "a small file system"
    folder.mkdir()
    if mounted:
        command = [MOUNT, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
        if not MOUNT or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system needs root")
    disk = Disk(folder, mounted)
    yield disk
    disk.make_room()
    if mounted:
        subprocess.run([UNMOUNT, folder], check=True)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def adapted(value=1.0):
    model = torch.nn.Sequential(torch.nn.Linear(200, 200))  # more than a buffer holds
    lora.inject_lora(model, r=8, target_modules=["0"])
    torch.nn.init.constant_(model[0].lora_B, value)
    return model


class Folder:
    """A model and a tokenizer at once, as `pretrained.save` writes them."""

    def __init__(self, model):
        self.model = model

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        save_file(self.model.state_dict(), folder / "model.safetensors")


# What is saved, by which name in the folder, and what the error is.
SAVES = {
    "adapter": (lambda model, path: lora.save_lora(model, path), "a.safetensors", OSError),
    "adapter for PEFT": (lambda model, path: lora.save_lora(model, path, format="peft"), "peft", OSError),
    "model": (lambda model, path: pretrained.save(Folder(model), Folder(model), path), "model", cli.UserError),
    "state": (
        lambda model, path: files.write_atomically(path, lambda file: torch.save(model.state_dict(), file)),
        "training_state.pt",
        cli.UserError,
    ),
    "text": (lambda model, path: files.write_json(path, {"all": ["text"] * 2000}), "results.json", cli.UserError),
}


@pytest.mark.parametrize("save, name, error", SAVES.values(), ids=SAVES)
def test_a_full_disk_leaves_what_was_there(disk, save, name, error):
    """The error names the file and the reason; nothing else remains, and with room again the next save is whole."""
    path = disk.folder / name
    save(adapted(1.0), path)
    before = contents(disk.folder)
    assert before
    disk.fill()
    with pytest.raises(error, match="No space left on device|File too large") as raised:
        save(adapted(2.0), path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    disk.make_room()
    assert contents(disk.folder) == before
    save(adapted(2.0), path)
    assert contents(disk.folder).keys() == before.keys()
    if error is OSError:
        model = lora.unload(adapted())
        lora.load_lora(model, path)
        assert (model[0].lora_B == 2).all()


def read_only(disk):
    disk.make_read_only()
    if os.access(disk.folder, os.W_OK):
        disk.make_read_only(False)
        pytest.skip("permissions do not stop root")


@pytest.mark.parametrize("save, name, error", SAVES.values(), ids=SAVES)
def test_a_read_only_folder_leaves_what_was_there(disk, save, name, error):
    path = disk.folder / name
    if name == "peft":
        path = disk.folder
    save(adapted(1.0), path)
    before = contents(disk.folder)
    read_only(disk)
    try:
        with pytest.raises(error, match="Read-only file system|Permission denied") as raised:
            save(adapted(2.0), path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
        assert contents(disk.folder) == before
    finally:
        disk.make_read_only(False)


def test_script_tries_the_folder_before_the_work(disk, call):
    read_only(disk)
    try:
        status, stdout, stderr = call(run_training, "--output_dir", disk.folder)
    finally:
        disk.make_read_only(False)
    assert (status, stdout) == (2, "")
    assert re.fullmatch(
        rf"error: --output_dir {disk.folder}: cannot be written to \(.*\); give another folder\n", stderr
    )


def test_script_whose_disk_becomes_full_ends_with_one_line_and_goes_on_later(disk, gpt2, call, monkeypatch):
    """The state of the first validation is what --resume begins with."""
    arguments = ["--model", gpt2, *SHORT, "--output_dir", disk.folder]
    with monkeypatch.context() as patch:
        after_step(patch, 7, lambda _: disk.fill())
        status, _, stderr = call(run_training, *arguments)
    disk.make_room()
    assert status == 2 and "Traceback" not in stderr
    assert re.search(
        rf"^error: {disk.folder}/training_state.pt cannot be written \((No space left on device|File too large)\); an "
        r"earlier file is as it was\n\Z",
        stderr,
        re.M,
    )
    assert os.listdir(disk.folder) == ["training_state.pt"]
    status, _, stderr = call(run_training, *arguments, "--resume")
    assert status == 0, stderr
    assert record(disk.folder)["first_step"] == 5


# Killed writers

KILL_OVER_AND_OVER = """
import os, pathlib, signal, sys, time, torch, loralib as lora
sys.path.insert(0, "..")
from common import files
torch.set_num_threads(1)
kind, path = sys.argv[1], pathlib.Path(sys.argv[2])
model = torch.nn.Sequential(torch.nn.Linear(1000, 1000))
lora.inject_lora(model, r=200, target_modules=["0"])

def save(value):
    for tensor in (model[0].lora_A, model[0].lora_B):
        torch.nn.init.constant_(tensor, value)
    if kind == "state":
        files.write_atomically(path, lambda file: torch.save(lora.lora_state_dict(model), file))
    else:
        lora.save_lora(model, path, format=kind)

def load():
    if kind == "state":
        return torch.load(path)
    other = lora.unload(torch.nn.Sequential(torch.nn.Linear(1000, 1000)))
    lora.load_lora(other, path)
    return lora.lora_state_dict(other)

save(0)
last = 0
for attempt in range(12):
    begun, other = os.pipe()
    writer = os.fork()
    if writer == 0:
        for value in range(last + 1, last + 10**6):
            save(value)
            os.write(other, b".")
    os.read(begun, 1)
    time.sleep(0.003 * attempt)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    values = torch.cat([tensor.flatten() for tensor in load().values()]).unique()
    assert len(values) == 1 and values.item() > last, (values, last)
    last = int(values)
folder = path if kind == "peft" else path.parent
print("half-written:", sum(1 for _ in folder.glob(".*.tmp")))
save(last + 1)
assert all((tensor == last + 1).all() for tensor in load().values())
"""


@pytest.mark.parametrize("kind, name", [("loralib", "a.safetensors"), ("peft", "peft"), ("state", "state.pt")])
def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path, kind, name):
    """Twelve times; some of them in the midst of a file, which stays beside the whole one and is in nobody's way."""
    with start("-c", KILL_OVER_AND_OVER, kind, tmp_path / name) as process:
        stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert int(re.fullmatch(r"half-written: (\d+)\n", stdout)[1]) > 0


# Losses that are not numbers


def spoil(model):
    with torch.no_grad():
        model[0].weight.fill_(math.nan)


@pytest.mark.parametrize("at, saved", [(2, None), (5, 4), (10, 8)])
def test_a_loss_that_is_nan_names_the_last_good_checkpoint(tmp_path, monkeypatch, at, saved):
    after_step(monkeypatch, at, spoil)
    path = tmp_path / "state.pt"
    checkpoint = "there is none yet" if saved is None else f"{path}, of step {saved}"
    rate = loop.learning_rate(at, 18, 0.1, 2)
    with pytest.raises(cli.UserError) as raised:
        train(tmp_path)
    assert str(raised.value) == (
        f"the loss is nan at step {at + 1} of 18 (learning rate {rate:.2e}); nothing was saved of this step. The last "
        f"good checkpoint: {checkpoint}. Try a lower --lr or more --warmup_steps"
    )
    assert path.exists() == (saved is not None)
    if saved:
        assert loop.read_state(path, {})["step"] == saved


def test_a_resumed_run_knows_the_checkpoint_it_began_with(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(stopping.Stopped):
        after_step(patch, 3, terminate)
        train(tmp_path)
    after_step(monkeypatch, 1, spoil)
    with pytest.raises(cli.UserError, match="not all weights are finite at step 4 of 18 .*state.pt, of step 3. Try"):
        train(tmp_path, resume=True)
    assert loop.read_state(tmp_path / "state.pt", {})["step"] == 3


def test_script_with_a_rate_that_is_far_too_high(gpt2, tmp_path, call):
    status, _, stderr = call(run_training, "--model", gpt2, *SHORT, "--output_dir", tmp_path, "--lr", 1e38)
    assert status == 2 and "Traceback" not in stderr
    assert re.search(
        r"^error: .* at step \d of 12 \(learning rate .*\); .*checkpoint: there is none yet\. Try", stderr, re.M
    )
    assert not os.listdir(tmp_path)

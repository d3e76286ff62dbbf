"""The memory that a training is said to need, against counts worked out by hand and against what real ones take.

Run alone: `pytest tests/test_memory.py`; with the measurement, a minute or two: `pytest tests/test_memory.py -m slow`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from common.training import memory

import loralib as lora

WIDTH, WORDS, LENGTH, BATCH = 64, 500, 32, 4


def build(adapt=True, layers=2):
    config = transformers.GPT2Config(n_embd=WIDTH, n_layer=layers, n_head=2, vocab_size=WORDS, n_positions=LENGTH)
    config.bos_token_id = config.eos_token_id = 0
    model = transformers.GPT2LMHeadModel(config)
    if adapt:
        lora.inject_lora(model, r=2)
    return model


def test_what_is_held_follows_from_the_counts():
    counts = lora.count_parameters(build())
    told = memory.training_memory(build, BATCH, LENGTH)
    account = memory.account(counts.total, counts.trainable)
    assert told.weights == account["weights"]
    assert (told.gradients, told.optimizer) == (account["gradients"], account["optimizer"])
    logits = 4 * BATCH * (LENGTH - 1) * WORDS  # they, their log probabilities and the gradient are there at once
    assert told.weights + 3 * logits < told.peak < told.weights + 3 * logits + 8 * 2 * 40 * 4 * BATCH * LENGTH * WIDTH


def test_checkpointing_and_fewer_trained_weights_take_less():
    plain = memory.training_memory(build, BATCH, LENGTH)
    assert memory.training_memory(build, BATCH, LENGTH, gradient_checkpointing=True).peak < plain.peak
    assert memory.training_memory(lambda: build(adapt=False), BATCH, LENGTH).peak > plain.peak
    assert memory.training_memory(build, 2 * BATCH, LENGTH).peak > plain.peak
    assert isinstance(torch.zeros(1).untyped_storage().data_ptr(), int)  # numbers are real again


def test_the_largest_that_fits():
    builds = {"two": build, "four": lambda: build(layers=4), "eight": lambda: build(layers=8)}
    sizes = [memory.training_memory(each, BATCH, LENGTH) for each in builds.values()]
    assert memory.largest_that_fits(builds, sizes[1].peak, BATCH, LENGTH) == ("four", sizes[1])
    assert memory.largest_that_fits(builds, sizes[1].peak - 1, BATCH, LENGTH) == ("two", sizes[0])
    assert memory.largest_that_fits(builds, sizes[0].peak - 1, BATCH, LENGTH) is None


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux counts a peak anew, others do not")
def test_estimates_are_within_a_tenth_of_what_real_trainings_take():
    """The allocator gives memory back at once here; by default it keeps up to about as much again."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    script = Path(__file__).with_name("measure_memory.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert len(figures) == 9
    for case, (estimate, measured) in figures.items():
        assert estimate == pytest.approx(measured, rel=0.1), (case, figures)

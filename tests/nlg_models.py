"""Tiny causal language models for the tests of the NLG example, and scripts run in this process or another.

The models are real, made from configurations with random weights, and have a tokenizer trained on the shipped data.
conftest.py makes the fixtures known to every test.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
NLG = ROOT / "examples" / "NLG"
DATA = NLG / "data"
sys.path[:0] = [str(NLG), str(NLG.parent)]

from common import cli  # noqa: E402 (after the folder that holds it)
from common.models import causal_lm  # noqa: E402
from common.scores import text_scores  # noqa: E402

END = "<|endoftext|>"
PROMPT = "name : Quince | Type : pub | area : old town"


@pytest.fixture(scope="session")
def tokenizer():
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((DATA / "train.txt").read_text(encoding="utf-8").splitlines()[:300], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)


def save_model(folder, tokenizer, model):
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def tiny_gpt2(tokenizer, width=32):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=width, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    config.tie_word_embeddings = False  # tied and untrained, it would only repeat the last token
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():  # far from uniform, so that greedy choices have no near ties
        model.lm_head.weight.mul_(20)
    return model


def tiny_llama_config(tokenizer):
    return transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory, tokenizer):
    return save_model(tmp_path_factory.mktemp("gpt2"), tokenizer, tiny_gpt2(tokenizer))


@pytest.fixture(scope="session")
def wide_gpt2(tmp_path_factory, tokenizer):
    return save_model(tmp_path_factory.mktemp("wide"), tokenizer, tiny_gpt2(tokenizer, width=48))


@pytest.fixture(scope="session")
def llama(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny_llama_config(tokenizer))
    return save_model(tmp_path_factory.mktemp("llama"), tokenizer, model)


def load(folder):
    return causal_lm.load_causal_lm(str(folder), torch.device("cpu"))


@pytest.fixture(scope="module")
def no_java(tmp_path_factory):
    """The scores without METEOR, whose program takes seconds to start, and what needs its tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path_factory.mktemp("no java")))
        text_scores._measured.cache_clear()
        yield
    text_scores._measured.cache_clear()


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a script within this process as its command line would: (exit status, stdout, stderr)."""

    def called(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.run(module.main, under_torchrun=module.__name__.startswith("run_training"))
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return called


def start(script, *arguments, folder=NLG):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *map(str, arguments)]
    pipes = {"text": True, "encoding": "utf-8", "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def script(name, *arguments, folder=NLG):
    """(exit status, stdout, stderr) of a script run from its own folder."""
    with start(name, *arguments, folder=folder) as process:
        stdout, stderr = process.communicate()
    return process.returncode, stdout, stderr


# transformers imports torchao where it is installed, as it is for the tests, and torchao says what it lacks.
FROM_TORCHAO = re.compile(r"^(Failed to load .*torchao.*|W\d{4} .*torch/utils/_pytree\.py.*)\n", re.MULTILINE)


def own_lines(stderr):
    return FROM_TORCHAO.sub("", stderr)

"""Settings shared by all tests: no network, a fixed seed before every test, reproducible hypothesis examples.

Run everything: `pytest`; with the long tests: `pytest -m "slow or not slow"`.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Two processes with as many threads each as there are cores would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch
from nlg_models import call, gpt2, llama, no_java, tokenizer, wide_gpt2  # noqa: F401 (fixtures)
from nlu_models import bert, bert_without_pooler, deberta, decoder, distilbert, roberta  # noqa: F401

pytest.register_assert_rewrite("reference")
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, database=None, print_blob=False)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)

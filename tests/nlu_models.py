"""Tiny encoders and a decoder for the tests of the NLU example, in the form in which the hub has such models.

The models are real, made from configurations with random weights as their pretraining left them (without a classifier),
each with the tokenizer of its kind, trained on some of the shipped data. conftest.py makes the fixtures known to every
test.
"""

import functools
import importlib.util
import json
import sys

import pytest
import torch
import transformers
from nlg_models import ROOT, save_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

NLU = ROOT / "examples" / "NLU"
GLUE = NLU / "data"
sys.path.append(str(NLU))  # after NLG's, which has a script of the same name as one here

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SIZES["initializer_range"] = 0.2  # ten times the usual, so that what is read matters
WINDOW = 128  # tokens
VOCABULARY = 400
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def load_script(name):
    """The module of an NLU script that shares its name with one of NLG."""
    spec = importlib.util.spec_from_file_location(f"nlu_{name}", NLU / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def lines():
    """A few lines of each task's training file."""
    return [line for path in sorted(GLUE.glob("*/train.tsv")) for line in path.read_text("utf-8").splitlines()[1:60]]


def trained(tokenizer, trainer, special, **options):
    """What the file of a tokenizer trained on `lines` says of its model."""
    options = {"vocab_size": VOCABULARY, "show_progress": False, **options}
    tokenizer.train_from_iterator(lines(), trainer(special_tokens=special, **options))
    return json.loads(tokenizer.to_str())["model"]


def byte_level(special):
    """(A tokenizer of bytes and their pairs, its model)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return tokenizer, trained(tokenizer, trainers.BpeTrainer, special, initial_alphabet=alphabet)


@functools.cache
def roberta_tokenizer():
    _, model = byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return transformers.RobertaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


@functools.cache
def bert_tokenizer():
    tokenizer = Tokenizer(models.WordPiece())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    model = trained(tokenizer, trainers.WordPieceTrainer, SPECIAL)
    return transformers.BertTokenizer(vocab=model["vocab"])


@functools.cache
def deberta_tokenizer():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    model = trained(tokenizer, trainers.UnigramTrainer, SPECIAL, unk_token="[UNK]")
    return transformers.DebertaV2Tokenizer(vocab=[tuple(piece) for piece in model["vocab"]])


@functools.cache
def llama_tokenizer():
    """With an end of text alone: no separator, nothing to pad with."""
    tokenizer, _ = byte_level(["<|endoftext|>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def tiny_roberta():
    torch.manual_seed(0)
    # RoBERTa's positions begin after that of the padding.
    config = transformers.RobertaConfig(
        vocab_size=len(roberta_tokenizer()), max_position_embeddings=WINDOW + 2, type_vocab_size=1, **SIZES
    )
    return transformers.RobertaForMaskedLM(config)


def tiny_bert(kind):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(bert_tokenizer()), max_position_embeddings=WINDOW, **SIZES)
    return kind(config)


@pytest.fixture(scope="session")
def roberta(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("roberta"), roberta_tokenizer(), tiny_roberta())


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """With a pooler."""
    model = tiny_bert(transformers.BertForPreTraining)
    return save_model(tmp_path_factory.mktemp("bert"), bert_tokenizer(), model)


@pytest.fixture(scope="session")
def bert_without_pooler(tmp_path_factory):
    model = tiny_bert(transformers.BertForMaskedLM)
    return save_model(tmp_path_factory.mktemp("no_pooler"), bert_tokenizer(), model)


@pytest.fixture(scope="session")
def distilbert(tmp_path_factory):
    """As distilbert-base-uncased on the hub, whose tokenizer does not say of which kind it is."""
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=len(bert_tokenizer()),
        max_position_embeddings=WINDOW,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=2,
        initializer_range=SIZES["initializer_range"],
    )
    folder = tmp_path_factory.mktemp("distilbert")
    save_model(folder, bert_tokenizer(), transformers.DistilBertForMaskedLM(config))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    del settings["tokenizer_class"]
    path.write_text(json.dumps(settings), "utf-8")
    return str(folder)


@pytest.fixture(scope="session")
def deberta(tmp_path_factory):
    """As deberta-v3: relative positions only, and no types of tokens."""
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        vocab_size=len(deberta_tokenizer()),
        max_position_embeddings=WINDOW,
        type_vocab_size=0,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        **SIZES,
    )
    return save_model(tmp_path_factory.mktemp("deberta"), deberta_tokenizer(), transformers.DebertaV2Model(config))


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(llama_tokenizer()),
        num_key_value_heads=1,
        max_position_embeddings=WINDOW,
        bos_token_id=0,
        eos_token_id=0,
        **SIZES,
    )
    return save_model(tmp_path_factory.mktemp("decoder"), llama_tokenizer(), transformers.LlamaForCausalLM(config))

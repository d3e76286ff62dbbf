"""Tiny models of the architectures that `inject_lora` knows by name, built from their configurations, random weights.

Each entry says what the default injection must find, counted by hand: the adapted layers, and the number of trained
parameters at rank 2.
"""

# ruff: noqa: E501 (one row of the table, one line)

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import nn

H, HEADS, LAYERS = 16, 4, 2
R = 2
TEXT = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {"hidden_size": H, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
BERT = {**SIZES, "intermediate_size": 32, "max_position_embeddings": 32, **TEXT}
LLAMA = {**BERT, "num_key_value_heads": 2}
SHORT = {"n_embd": H, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32, **TEXT}
DISTILBERT = {"dim": H, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 32, "max_position_embeddings": 32, **TEXT}
T5 = {
    "d_model": H,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 2,
    **TEXT,
}
NEO = {"hidden_size": H, "num_layers": LAYERS, "num_heads": HEADS, "max_position_embeddings": 32, **TEXT}
OPT = {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": H, "max_position_embeddings": 32, **TEXT}
BLOOM = {"hidden_size": H, "n_layer": LAYERS, "n_head": HEADS, **TEXT}
MPT = {"d_model": H, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 32, **TEXT}
FALCON = {**SIZES, **TEXT, "alibi": False}
VIT = {**SIZES, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
SIDE = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": 32}
SIDES = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIDE.items()}
BART = {"d_model": H, "max_position_embeddings": 32, "decoder_start_token_id": 0, **SIDES, **TEXT}
LENGTHS = {"max_source_positions": 10, "max_target_positions": 10, "num_mel_bins": 8}
WHISPER = {"d_model": H, **LENGTHS, **SIDES, **TEXT, "suppress_tokens": None, "begin_suppress_tokens": None}

QV, QUERY, FUSED = ["q_proj", "v_proj"], ["query", "value"], ["query_key_value"]
VIT_QV = QUERY if transformers.__version__.startswith("4.") else QV
# Parameters of q and v of one layer where both are square; with two key heads of the four; with one.
SQUARE, GROUPED, SHARED = 2 * R * (H + H), R * (H + H) + R * (H + H // 2), R * (H + H) + R * (H + H // HEADS)


def tokens():
    return {"input_ids": 3 + torch.arange(18).reshape(2, 9) * 7 % 47}


def attention():
    return {**tokens(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}


def two_sides():
    return {**tokens(), "decoder_input_ids": tokens()["input_ids"][:, :5]}


def pictures():
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)}


def sounds():
    sound = torch.linspace(-1, 1, 2 * 8 * 20).reshape(2, 8, 20)
    return {"input_features": sound, "decoder_input_ids": tokens()["input_ids"][:, :5]}


@dataclass(frozen=True)
class Architecture:
    """A tiny model with its inputs, and what the default injection finds in it."""

    model: str  # class in transformers
    config: str  # class of its configuration
    options: dict
    targets: list[str]  # last parts of the names of the adapted layers
    adapted: int  # how many layers
    trained: int  # parameters at rank 2
    inputs: Callable = tokens

    def build(self, dtype=torch.float32) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        model = getattr(transformers, self.model)(config).to(dtype).eval()
        for parameter in model.parameters():  # biases and norms as different from their initial values as weights
            nn.init.normal_(parameter, std=0.2)
        return model

    def output(self, model: nn.Module) -> torch.Tensor:
        dtype = next(model.parameters()).dtype
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.inputs().items()}
        with torch.no_grad():
            return model(**inputs)[0]


# fmt: off
ROWS = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", SHORT, ["c_attn"], 2, 2 * SQUARE, attention),
    "GPT-Neo": ("GPTNeoForCausalLM", "GPTNeoConfig", {**NEO, "attention_types": [[["global", "local"], 1]]}, QV, 4, 2 * SQUARE),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT, FUSED, 2, 2 * SQUARE),
    "BERT": ("BertForMaskedLM", "BertConfig", BERT, QUERY, 4, 2 * SQUARE),
    "RoBERTa": ("RobertaForMaskedLM", "RobertaConfig", BERT, QUERY, 4, 2 * SQUARE),
    "DistilBERT": ("DistilBertForMaskedLM", "DistilBertConfig", DISTILBERT, ["q_lin", "v_lin"], 4, 2 * SQUARE),
    "DeBERTa-v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, ["query_proj", "value_proj"], 4, 2 * SQUARE),
    "ALBERT": ("AlbertForMaskedLM", "AlbertConfig", {**BERT, "embedding_size": 8}, QUERY, 2, SQUARE),  # one layer, used twice
    "ELECTRA": ("ElectraForMaskedLM", "ElectraConfig", {**BERT, "embedding_size": 8}, QUERY, 4, 2 * SQUARE),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5, ["q", "v"], 12, 6 * SQUARE, two_sides),
    "BART": ("BartForConditionalGeneration", "BartConfig", BART, QV, 12, 6 * SQUARE, two_sides),
    "OPT": ("OPTForCausalLM", "OPTConfig", OPT, QV, 4, 2 * SQUARE, attention),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, QV, 4, 2 * GROUPED),
    "Mistral": ("MistralForCausalLM", "MistralConfig", LLAMA, QV, 4, 2 * GROUPED),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA, QV, 4, 2 * GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 4}, QV, 4, 2 * GROUPED),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**LLAMA, "head_dim": 4}, QV, 4, 2 * GROUPED),
    "Phi": ("PhiForCausalLM", "PhiConfig", LLAMA, QV, 4, 2 * GROUPED),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", LLAMA, ["qkv_proj"], 2, 2 * GROUPED),
    "Falcon, one key head": ("FalconForCausalLM", "FalconConfig", {**FALCON, "multi_query": True}, FUSED, 2, 2 * SHARED, attention),
    "Falcon, a key head each": ("FalconForCausalLM", "FalconConfig", {**FALCON, "multi_query": False}, FUSED, 2, 2 * SQUARE, attention),
    "Falcon, two key heads": ("FalconForCausalLM", "FalconConfig", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, FUSED, 2, 2 * GROUPED, attention),
    "Bloom": ("BloomForCausalLM", "BloomConfig", BLOOM, FUSED, 2, 2 * SQUARE, attention),
    "MPT": ("MptForCausalLM", "MptConfig", MPT, ["Wqkv"], 2, 2 * SQUARE, attention),
    "BigCode, one key head": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", SHORT, ["c_attn"], 2, 2 * SHARED, attention),
    "BigCode, a key head each": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", {**SHORT, "multi_query": False}, ["c_attn"], 2, 2 * SQUARE, attention),
    "ViT": ("ViTModel", "ViTConfig", VIT, VIT_QV, 4, 2 * SQUARE, pictures),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", {**SHORT, "rotary_dim": 4}, QV, 4, 2 * SQUARE),
    "XLM-RoBERTa": ("XLMRobertaForMaskedLM", "XLMRobertaConfig", BERT, QUERY, 4, 2 * SQUARE),
    "mT5": ("MT5ForConditionalGeneration", "MT5Config", T5, ["q", "v"], 12, 6 * SQUARE, two_sides),
    "mBART": ("MBartForConditionalGeneration", "MBartConfig", BART, QV, 12, 6 * SQUARE, two_sides),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**LLAMA, "head_dim": 4}, QV, 4, 2 * GROUPED),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**LLAMA, "head_dim": 4}, QV, 4, 2 * GROUPED),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**LLAMA, "num_local_experts": 2, "experts_implementation": "eager"}, QV, 4, 2 * GROUPED),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, QV, 12, 6 * SQUARE, sounds),
}  # fmt: on
ARCHITECTURES = {name: Architecture(*row) for name, row in ROWS.items()}

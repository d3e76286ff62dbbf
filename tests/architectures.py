"""Tiny models of the architectures that `inject_lora` knows by name, built from their configurations, random weights.

Each entry says what the default injection must find, counted by hand: the adapted layers, and the number of trained
parameters at rank 2.
"""

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
# q and v of one layer when both are square; with two key heads of the four; in a fused projection.
SQUARE, GROUPED = 2 * R * (H + H), R * (H + H) + R * (H + H // 2)


@dataclass(frozen=True)
class Architecture:
    """A tiny model with its inputs, and what the default injection finds in it."""

    model: str  # class in transformers
    config: Callable
    targets: list[str]  # last parts of the names of the adapted layers
    adapted: int  # how many layers
    trained: int  # parameters at rank 2
    inputs: Callable = lambda: {"input_ids": tokens()}

    def build(self, dtype=torch.float32) -> nn.Module:
        torch.manual_seed(0)
        model = getattr(transformers, self.model)(self.config()).to(dtype).eval()
        for parameter in model.parameters():  # biases and norms as different from their initial values as weights
            nn.init.normal_(parameter, std=0.2)
        return model

    def output(self, model: nn.Module) -> torch.Tensor:
        dtype = next(model.parameters()).dtype
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.inputs().items()}
        with torch.no_grad():
            return model(**inputs)[0]


def tokens():
    return 3 + torch.arange(18).reshape(2, 9) * 7 % 47


def attention():
    return {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}


def two_sides():
    return {"input_ids": tokens(), "decoder_input_ids": tokens()[:, :5]}


def pictures():
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)}


def sounds():
    return {"input_features": torch.linspace(-1, 1, 2 * 8 * 20).reshape(2, 8, 20), "decoder_input_ids": tokens()[:, :5]}


t = transformers
QV, QUERY = ["q_proj", "v_proj"], ["query", "value"]


def falcon(**options):
    return t.FalconConfig(**SIZES, **TEXT, alibi=False, **options)


def bart():
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIDE.items()}
    return t.BartConfig(d_model=H, max_position_embeddings=32, decoder_start_token_id=0, **sides, **TEXT)


SIDE = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": 32}


def whisper():
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIDE.items()}
    lengths = {"max_source_positions": 10, "max_target_positions": 10, "num_mel_bins": 8}
    return t.WhisperConfig(d_model=H, **lengths, **sides, **TEXT, suppress_tokens=None, begin_suppress_tokens=None)


# fmt: off
ARCHITECTURES = {
    "GPT-2": Architecture("GPT2LMHeadModel", lambda: t.GPT2Config(n_embd=H, n_layer=LAYERS, n_head=HEADS, n_positions=32, **TEXT), ["c_attn"], 2, 2 * SQUARE, attention),
    "GPT-Neo": Architecture("GPTNeoForCausalLM", lambda: t.GPTNeoConfig(hidden_size=H, num_layers=2, num_heads=HEADS, attention_types=[[["global", "local"], 1]], max_position_embeddings=32, **TEXT), QV, 4, 2 * SQUARE),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", lambda: t.GPTNeoXConfig(**BERT), ["query_key_value"], 2, 2 * SQUARE),
    "BERT": Architecture("BertForMaskedLM", lambda: t.BertConfig(**BERT), QUERY, 4, 2 * SQUARE),
    "RoBERTa": Architecture("RobertaForMaskedLM", lambda: t.RobertaConfig(**BERT), QUERY, 4, 2 * SQUARE),
    "DistilBERT": Architecture("DistilBertForMaskedLM", lambda: t.DistilBertConfig(dim=H, n_layers=LAYERS, n_heads=HEADS, hidden_dim=32, max_position_embeddings=32, **TEXT), ["q_lin", "v_lin"], 4, 2 * SQUARE),
    "DeBERTa-v2": Architecture("DebertaV2ForMaskedLM", lambda: t.DebertaV2Config(**BERT, relative_attention=True, pos_att_type=["p2c", "c2p"]), ["query_proj", "value_proj"], 4, 2 * SQUARE),
    "ALBERT": Architecture("AlbertForMaskedLM", lambda: t.AlbertConfig(**BERT, embedding_size=8), QUERY, 2, SQUARE),  # one layer, used twice
    "ELECTRA": Architecture("ElectraForMaskedLM", lambda: t.ElectraConfig(**BERT, embedding_size=8), QUERY, 4, 2 * SQUARE),
    "T5": Architecture("T5ForConditionalGeneration", lambda: t.T5Config(d_model=H, d_kv=4, d_ff=32, num_layers=LAYERS, num_heads=HEADS, decoder_start_token_id=2, **TEXT), ["q", "v"], 12, 6 * SQUARE, two_sides),
    "BART": Architecture("BartForConditionalGeneration", bart, QV, 12, 6 * SQUARE, two_sides),
    "OPT": Architecture("OPTForCausalLM", lambda: t.OPTConfig(hidden_size=H, num_hidden_layers=LAYERS, num_attention_heads=HEADS, ffn_dim=32, word_embed_proj_dim=H, max_position_embeddings=32, **TEXT), QV, 4, 2 * SQUARE, attention),
    "Llama": Architecture("LlamaForCausalLM", lambda: t.LlamaConfig(**LLAMA), QV, 4, 2 * GROUPED),
    "Mistral": Architecture("MistralForCausalLM", lambda: t.MistralConfig(**LLAMA), QV, 4, 2 * GROUPED),
    "Qwen2": Architecture("Qwen2ForCausalLM", lambda: t.Qwen2Config(**LLAMA), QV, 4, 2 * GROUPED),
    "Qwen3": Architecture("Qwen3ForCausalLM", lambda: t.Qwen3Config(**LLAMA, head_dim=4), QV, 4, 2 * GROUPED),
    "Gemma": Architecture("GemmaForCausalLM", lambda: t.GemmaConfig(**LLAMA, head_dim=4), QV, 4, 2 * GROUPED),
    "Phi": Architecture("PhiForCausalLM", lambda: t.PhiConfig(**LLAMA), QV, 4, 2 * GROUPED),
    "Phi-3": Architecture("Phi3ForCausalLM", lambda: t.Phi3Config(**LLAMA), ["qkv_proj"], 2, 2 * GROUPED),
    "Falcon, one key head": Architecture("FalconForCausalLM", lambda: falcon(multi_query=True), ["query_key_value"], 2, 2 * (R * (H + H) + R * (H + 4)), attention),
    "Falcon, a key head each": Architecture("FalconForCausalLM", lambda: falcon(multi_query=False), ["query_key_value"], 2, 2 * SQUARE, attention),
    "Falcon, two key heads": Architecture("FalconForCausalLM", lambda: falcon(new_decoder_architecture=True, num_kv_heads=2), ["query_key_value"], 2, 2 * GROUPED, attention),
    "Bloom": Architecture("BloomForCausalLM", lambda: t.BloomConfig(hidden_size=H, n_layer=LAYERS, n_head=HEADS, **TEXT), ["query_key_value"], 2, 2 * SQUARE, attention),
    "MPT": Architecture("MptForCausalLM", lambda: t.MptConfig(d_model=H, n_heads=HEADS, n_layers=LAYERS, max_seq_len=32, **TEXT), ["Wqkv"], 2, 2 * SQUARE, attention),
    "BigCode, one key head": Architecture("GPTBigCodeForCausalLM", lambda: t.GPTBigCodeConfig(n_embd=H, n_layer=LAYERS, n_head=HEADS, n_positions=32, **TEXT), ["c_attn"], 2, 2 * (R * (H + H) + R * (H + 4)), attention),
    "BigCode, a key head each": Architecture("GPTBigCodeForCausalLM", lambda: t.GPTBigCodeConfig(n_embd=H, n_layer=LAYERS, n_head=HEADS, n_positions=32, multi_query=False, **TEXT), ["c_attn"], 2, 2 * SQUARE, attention),
    "ViT": Architecture("ViTModel", lambda: t.ViTConfig(**SIZES, intermediate_size=32, image_size=8, patch_size=4), QV, 4, 2 * SQUARE, pictures),
    "Whisper": Architecture("WhisperForConditionalGeneration", whisper, QV, 12, 6 * SQUARE, sounds),
}
# fmt: on

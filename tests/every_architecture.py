"""A tiny model of every architecture that the installed transformers has, from its default configuration, with inputs.

The names of the settings say what they are. What they do not say right stays as large as it is by default, which costs
nothing on the meta device; a model that is still large there, or that takes none of the inputs, is not run.
"""

import dataclasses
import inspect
import re

import numpy
import torch
import transformers
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TASKS = ["CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION"]
TASKS += ["IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION"]
WIDTH, HEADS, VOCABULARY = 64, 4, 320

# What a whole number becomes, by the first pattern that its name matches; None leaves it as it is.
NUMBERS = [
    ("chunk_size_feed_forward|num_labels|.*num_channels|in_chan.*|audio_channels|seed|sampling_rate", None),
    ("subsampling_.*", None),
    (".*kernel.*|.*stride|guided_.*|max_window_layers|num_lstm_layers|frame_stack.*", None),
    (".*vocab_size.*", VOCABULARY),
    (".*(key_value|kv)_heads|kv_n_heads", 2),
    ("mamba_n(um)?_heads|n_mamba_heads|mamba_num_heads", 8),
    ("(.*_)?n?(um)?_?(attention_|linear_.*)?heads?", HEADS),
    ("qk_rope_head_dim|rotary_dim|.*dt_rank|time_step_rank|sliding_window.*|.*attention_window|index_topk", 8),
    ("mamba_chunk_size|chunk_size|attention_chunk_size|local_attention", 8),
    ("qk_head_dim", 24),
    ("mamba_d_ssm", 128),
    (".*head_dim|.*d_head|d_kv|dim_head|kv_channels|.*d_state|.*state_size|mamba_headdim|attention_head_size", 16),
    (".*rank", 32),
    ("num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers", 0),
    ("first_k_dense_replace|num_dense_layers|moe_layer_.*_index|.*sparse_step|topk_group|.*shared_experts", 1),
    ("mamba_n_?groups|n_groups", 1),
    (".*experts_per_tok(en)?|moe_top.*|moe_k|top_k_experts|n_group|num_expert_group", 2),
    ("layer_group_size|.*_layer_period", 2),
    (".*_layer_offset|insert_layer_id", 1),
    (".*experts", 4),
    ("(.*_)?(num_)?(hidden_)?layers|n_layers?|(.*_)?depth|num_blocks|num_self_attends_per_block", 2),
    (".*(moe|expert).*(size|dim)", 48),
    (".*(intermediate|ffn|feed_forward).*|d_ff|dim_ff|dff|mlp_dim|d_inner", 96),
    (".*(hidden_size|embed_dim|_dim|d_model|n_embd|embedding_size|conv_channels|hidden)", WIDTH),
    ("dim|d_latents|lru_width|projection_size|pooler_output_size|output_channels|.*_adapter_in|latent_channels", WIDTH),
    (".*position_embeddings|n_positions|n_ctx|max_seq_len|context_length|.*target_positions", 128),
    ("max_source_positions", 32),
    (".*(query_tokens|latents|image_tokens|latent_query_num)", 16),
    ("image_size|input_size|resolution", 64),
    ("patch_size", 8),
]
NUMBERS = [(re.compile(pattern), value) for pattern, value in NUMBERS]
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types")
TOKEN = re.compile(r".*(_token_ids?|_token_index|_id|mask_index|unk_index)")
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SETTINGS = {  # by the model type of a configuration or of a part of it, where the names do not say it
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**ROPE, "mrope_section": [4, 2, 2]}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_routed_experts": 4},
    "glm5_next_text": {"qk_rope_head_dim": 0, "index_kpool": 4},
    "hy_v4_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
    | {"indexer_compress_ratio": 4},
    "squeezebert": {"intermediate_groups": 4},
    "xlnet": {"d_head": 16},
    "zaya": {"num_experts_per_tok": 1},
}
MOST = 40_000_000  # parameters of a model to run


def architectures():
    """(task, model type, class name), each class once."""
    seen = set()
    for task in TASKS:
        for kind, classes in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            for name in [classes] if isinstance(classes, str) else classes:
                if (kind, name) not in seen:
                    seen.add((kind, name))
                    yield task, kind, name


def small(config, tokens):
    """The arguments of a tiny configuration like `config`."""
    arguments, names = {}, {field.name for field in dataclasses.fields(config)}
    kinds = [set(vars(config).get(name) or ()) for name in KINDS]
    layers = max(2, *map(len, kinds))
    for field in dataclasses.fields(config):
        name = field.name
        value = vars(config).get((config.attribute_map or {}).get(name, name), vars(config).get(name))
        if isinstance(value, PretrainedConfig):
            arguments[name] = type(value)(**small(value, tokens))
        elif name in KINDS and value:
            each = list(dict.fromkeys(value))
            arguments[name] = sorted((each * layers)[:layers], key=each.index)
        elif isinstance(value, float) and "drop" in name:
            arguments[name] = 0.0
        elif isinstance(value, int) and not isinstance(value, bool) and TOKEN.fullmatch(name):
            if value >= 250:
                arguments[name] = tokens.setdefault(value, VOCABULARY - 1 - len(tokens))
        elif isinstance(value, int) and not isinstance(value, bool):
            least = next((least for pattern, least in NUMBERS if pattern.fullmatch(name)), None)
            if "kv_lora_rank" in names:  # latent attention
                rope = vars(config).get("qk_rope_head_dim")
                least = {"num_key_value_heads": HEADS, "head_dim": 8 if value == rope else 24}.get(name, least)
            if least is not None and value:
                arguments[name] = layers if least == 2 and "layer" in name and max(map(len, kinds)) else least
    return arguments | SETTINGS.get(config.model_type, {})


def build(kind, name):
    """The model on the meta device, and whether it is tiny; (None, False) where that does not work."""
    cls = getattr(transformers, name)
    for is_tiny in (True, False):  # a configuration may refuse what it has become
        try:
            default = CONFIG_MAPPING[kind]()
            return _build(cls, type(default)(**small(default, {})) if is_tiny else default, "meta"), is_tiny
        except Exception:
            continue
    return None, False


def with_weights(kind, name):
    """The model with random weights, in eval mode; None if it is not tiny."""
    model, is_tiny = build(kind, name)
    if not is_tiny or sum(parameter.numel() for parameter in model.parameters()) > MOST:
        return None
    torch.manual_seed(0)
    model = _build(getattr(transformers, name), model.config, "cpu").float().eval()
    for name, parameter in model.named_parameters():  # what starts as zero or one as different as if it were trained
        norm = parameter.dim() < 2 and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(norm), std=0.1)
    return model


def taken(model):
    """The first inputs that the model takes and the tensors that it gives for them; None if it takes none."""
    for given in inputs(model):
        try:
            outputs = run(model, given)
        except Exception:
            continue
        if outputs and all(tensor.isfinite().all() for tensor in outputs):
            return given, outputs
    return None


def _build(cls, config, device):
    wanted = getattr(cls, "config_class", None)
    if wanted is not None and not isinstance(
        config, wanted
    ):  # a part of a model, its configuration a part of the whole
        config = next((part for part in vars(config).values() if isinstance(part, wanted)), config)
    if "Classification" in cls.__name__:
        config.num_labels = 3
        config.get_text_config().pad_token_id = config.pad_token_id = 0
    with torch.device(device):
        return cls(config)


def inputs(model):
    """Inputs that the model may take, the likeliest first."""
    config, accepted = model.config, inspect.signature(model.forward).parameters
    tokens = 10 + torch.arange(32).reshape(2, 16) * 37 % 180
    text = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    text = {name: tensor for name, tensor in text.items() if name in accepted}
    decoder = {"decoder_input_ids": tokens[:, :6]} if "decoder_input_ids" in accepted else {}
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "input_ids":
        yield {**text, **decoder}
        yield {**text, "token_type_ids": torch.zeros_like(tokens)}
        yield {**text, "bbox": torch.arange(4).expand(2, 16, 4) * 3, **decoder}
        yield {"input_ids": tokens}
    for shape in ((2, 3, 64, 64), (2, 3, 224, 224)):
        yield {"pixel_values": torch.randn(*shape, generator=generator), **decoder}
        yield {**text, "pixel_values": torch.randn(*shape, generator=generator), **decoder}
    yield {"input_values": torch.randn(2, 1600, generator=generator), **decoder}
    mel = next((getattr(config, key) for key in ("num_mel_bins", "feature_size") if hasattr(config, key)), 80)
    for shape in ((2, mel, 64), (2, 64, mel), (2, 64, 160)):
        yield {"input_features": torch.randn(*shape, generator=generator), **decoder}
    if text:
        yield {**text, **decoder}


def run(model, given):
    """The tensors of numbers in what the model returns."""
    torch.manual_seed(1)
    numpy.random.seed(1)
    returned = model(**{name: tensor.clone() for name, tensor in given.items()})
    values = returned.values() if hasattr(returned, "values") else returned
    return [value for value in values if torch.is_tensor(value) and value.is_floating_point()]

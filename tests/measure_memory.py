"""Estimates of the memory of trainings and what they take, as JSON for test_memory.py: {case: [estimate, measured]}.

A process of its own, whose peak Linux counts anew for each case.
"""

import ctypes
import gc
import json
import re
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from common.training import loop, memory  # noqa: E402 (after the folder that holds it)

import loralib as lora  # noqa: E402

BATCH, LENGTH = 8, 128


def gpt2(width=256, layers=6):
    config = transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=4, vocab_size=4000, n_positions=LENGTH)
    config.bos_token_id = config.eos_token_id = 0
    return transformers.GPT2LMHeadModel(config)


def llama(dtype=torch.float32):
    config = transformers.LlamaConfig(
        **{"vocab_size": 4000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6},
        **{"num_attention_heads": 8, "max_position_embeddings": LENGTH},
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def adapted(model):
    lora.inject_lora(model, r=4)
    return model


def quantized(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


# How the model is made, and the options of the training.
CASES = {
    "GPT-2, LoRA": (lambda: adapted(gpt2()), {}),
    "GPT-2, LoRA, checkpointing": (lambda: adapted(gpt2()), {"gradient_checkpointing": True}),
    "GPT-2, all parameters": (lambda: gpt2(), {}),
    "wide GPT-2, LoRA": (lambda: adapted(gpt2(768, 4)), {}),
    "wide GPT-2, all parameters": (lambda: gpt2(768, 4), {}),
    "Llama, LoRA": (lambda: adapted(llama()), {}),
    "Llama, LoRA, base in bfloat16": (lambda: adapted(llama(torch.bfloat16)), {}),
    "Llama, LoRA, base in int8": (lambda: adapted(quantized(llama())), {}),
    "the same, checkpointing": (lambda: adapted(quantized(llama())), {"gradient_checkpointing": True}),
}


def resident(what):
    return 1024 * int(re.search(rf"^{what}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)[1])


def measured(build, gradient_checkpointing=False):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    model = build().train()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, after what making the model took
    if gradient_checkpointing:
        loop.set_checkpointing(model, True)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    for _ in range(3):
        tokens = torch.randint(0, 4000, (BATCH, LENGTH))
        output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        logits = output.logits[:, :-1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
        del output, logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return resident("VmHWM") - before


def main():
    measured(gpt2)  # what the libraries take once
    figures = {}
    for case, (build, options) in CASES.items():
        estimate = memory.training_memory(build, BATCH, LENGTH, **options)
        figures[case] = [estimate.peak, measured(build, **options)]
        print(case, *(f"{figure / 2**20:.1f}" for figure in figures[case]), file=sys.stderr, flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

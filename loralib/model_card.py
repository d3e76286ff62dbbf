"""The model card of an adapter folder: the README.md that the Hub shows and reads."""

import json


def model_card(base_model: str | None) -> str:
    """Return the text for an adapter of `base_model`; nothing in it changes if the adapter is trained further.

    >>> print(model_card("gpt2"))
    ---
    base_model: "gpt2"
    library_name: peft
    tags:
    - lora
    ---
    <BLANKLINE>
    # LoRA adapter for gpt2
    <BLANKLINE>
    The weights are those of the adapter alone; its rank and alpha are in `adapter_config.json`. Load the base model,
    then put the adapter into it: `lora.load_lora(model, folder)` with loralib, or with PEFT
    `peft.PeftModel.from_pretrained(model, folder)`.
    <BLANKLINE>
    """
    named = [f"base_model: {json.dumps(base_model)}"] if base_model else []  # a text of JSON is one of YAML
    front = ["---", *named, "library_name: peft", "tags:", "- lora", "---"]
    title = f"# LoRA adapter for {base_model}" if base_model else "# LoRA adapter"
    return "\n".join([*front, "", title, "", _BODY])


_BODY = """\
The weights are those of the adapter alone; its rank and alpha are in `adapter_config.json`. Load the base model,
then put the adapter into it: `lora.load_lora(model, folder)` with loralib, or with PEFT
`peft.PeftModel.from_pretrained(model, folder)`.
"""

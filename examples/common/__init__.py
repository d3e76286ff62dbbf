"""What the example scripts share and what is not LoRA: data, models, the training loop, metrics, result files.

The scripts call loralib themselves; nothing in this package imports it, or a script.
"""

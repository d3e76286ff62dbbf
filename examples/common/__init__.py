"""What the example scripts share and is not LoRA: the scripts call loralib themselves, nothing here imports it.

On the ground stand `cli` (options, errors, exit statuses), `stopping` (signals) and `files`. A room knows the ground
and the rooms before it in this list, and none after it:

1. `data`: reads the files of E2E and GLUE.
2. `scores`: of texts and of labels, with their intervals.
3. `training`: the loop, devices and processes, memory. It knows no model and no task.
4. `models`: causal language models and classifiers: loading, encoding, losses, generation, predictions.
5. `records`: writes the JSON file of a run, makes the runs of a comparison.
6. `reports`: reads the records: tables, comparisons, pictures. Needs no torch.
"""

ROOMS = ("data", "scores", "training", "models", "records", "reports")

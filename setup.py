"""Packaging of loralib; the library itself needs torch and safetensors only."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
# sacrebleu and pycocoevalcap (100 MB, with its Java programs) are the official scores of E2E, matplotlib draws charts.
# The lower bounds are what `.ci/versions oldest` tests.
EXAMPLES = ["transformers>=4.51", "numpy", "tqdm", "scikit-learn", "scipy>=1.14", "matplotlib>=3.8"]
EXAMPLES += ["sacrebleu>=2.4", "pycocoevalcap>=1.2"]
# peft, torchao and bitsandbytes are what the exchange with PEFT and quantised weights are tested against; accelerate's
# hooks are to survive; pytest-xdist runs the suite in two processes.
TEST = ["pytest>=8", "hypothesis>=6.100", "ruff>=0.6", "mypy>=1.18", "pytest-cov>=5", "peft>=0.21", "torchao>=0.18"]
TEST += ["accelerate>=1.10", "bitsandbytes>=0.49", "pytest-xdist>=3.5"]
# What `.ci/tools` tests the library in.
TOOLS = ["lightning>=2.6", "sentence-transformers>=6.2", "datasets>=5.2", "timm>=1.0.31", "torchvision>=0.28"]
TOOLS += ["trl>=1.0", "open_clip_torch>=3.3", "diffusers>=0.42", "onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.32"]

setup(
    name="loralib",
    version=re.search(r'__version__ = "(.+)"', (HERE / "loralib/__init__.py").read_text(encoding="utf-8"))[1],
    description="LoRA for PyTorch: small, exact and fast low-rank adaptation",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["loralib"],
    package_data={"loralib": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.5", "safetensors>=0.4.3"],
    extras_require={"examples": EXAMPLES, "test": [*EXAMPLES, *TEST], "tools": [*EXAMPLES, *TEST, *TOOLS]},
)

"""Causal language models and sequence classifiers of Hugging Face."""

"""Evaluation of text-to-image: scores of images against their prompts, and exports for GenEval and DPG-Bench."""

"""Samplers that diffusers lacks, and the table of published sampler presets."""

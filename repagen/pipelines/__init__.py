"""Pipelines of diffusers over repagen's models, and the sampling command."""

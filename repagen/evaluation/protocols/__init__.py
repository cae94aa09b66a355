"""Evaluation protocols: one YAML each, read through `repagen.evaluation.protocol.load_protocol`."""

"""Presets: one YAML per recipe, read through `repagen.training.config.load_config`."""

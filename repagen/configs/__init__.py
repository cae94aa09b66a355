"""Presets: one YAML per recipe, read through `repagen.config.load_config`."""

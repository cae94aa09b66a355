"""Networks as diffusers models: autoencoders and transformers."""

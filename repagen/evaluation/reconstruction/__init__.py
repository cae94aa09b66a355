"""How well an autoencoder gives images back."""

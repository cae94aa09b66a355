"""What features know: probes, likeness to an encoder, spatial structure, correspondence, mixes of layers and times."""

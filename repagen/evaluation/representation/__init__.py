"""What features know: read-outs of a generator's blocks and of an encoder's layers."""

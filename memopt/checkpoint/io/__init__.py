"""Files of a checkpoint: tensors, manifest, lock, and what is whole."""

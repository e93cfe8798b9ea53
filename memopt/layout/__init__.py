"""What a spec means for one parameter: which tensors hold its state, and where rows stand in them. Without torch."""

"""What the verbs print and write."""

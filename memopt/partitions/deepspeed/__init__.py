"""The parameters behind DeepSpeed's flat vectors."""

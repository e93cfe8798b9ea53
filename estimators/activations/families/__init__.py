"""Forward passes of the families of models, written with operations that only count."""

"""check_numerics: the compiled program beside the model as it was, and where they part."""

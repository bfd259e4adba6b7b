"""The compiler's transformations, one a file, each ``pass(gm, ctx) -> gm``."""

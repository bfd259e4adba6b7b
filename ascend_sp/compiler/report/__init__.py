"""What the compiler tells a person: facts of a graph, as pages, pictures, files and ranges."""

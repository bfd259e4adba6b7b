"""From a Dynamo graph to a running program: entry, options, pass pipeline, checks, lowering."""

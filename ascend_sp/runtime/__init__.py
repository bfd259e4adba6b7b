"""What runs, or speaks to other ranks: the attention op, collectives, groups, guards."""

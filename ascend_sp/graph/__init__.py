"""What passes are made with: sizes, placements, costs, and building of nodes."""

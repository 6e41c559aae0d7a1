"""The Vision Transformer: architecture, sizes, losses, weights, inference preprocessing."""

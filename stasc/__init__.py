"""Self-Taught Self-Correction: a small language model learns from its own corrections."""

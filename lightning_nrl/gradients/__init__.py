"""Steps along gradients: fits, polishes, and what linearised methods need."""

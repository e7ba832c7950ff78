"""From arrays of any shape to kernels and back."""

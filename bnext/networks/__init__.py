"""What is done to networks that exist: another class for their batch norms, what follows drawn in, and the way back."""

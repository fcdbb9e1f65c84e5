"""What the layers, the rank decisions and whole steps cost, beside what arithmetic allows."""

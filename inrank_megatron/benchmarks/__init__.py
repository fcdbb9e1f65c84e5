"""What the layers, the rank decisions and whole steps cost, against what arithmetic allows."""

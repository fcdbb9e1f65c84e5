"""What the layers, the rank decisions and full steps cost, against what arithmetic allows."""

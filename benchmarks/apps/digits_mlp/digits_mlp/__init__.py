"""Work M as an ordinary Flower app."""

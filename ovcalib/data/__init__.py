"""Images with labels, by reference."""

"""Images with labels, by reference (`sets`), and the one definition of preprocessing (`preprocessing`)."""

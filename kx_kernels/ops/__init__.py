"""One folder per operator; the file names inside are the same for all of them."""

"""Each figure that the documentation quotes about speed, measured anew: `make bench`."""

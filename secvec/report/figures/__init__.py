"""One file for each kind of figure; none of them decides what is drawn."""
